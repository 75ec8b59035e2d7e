"""The bytes of a checkpoint: safetensors files, whole or in shards, read tensor by tensor.

Everything in the folder is taken for hostile: links, lengths, types and numbers are checked before
anything is allocated. Knows files; knows nothing of networks, shapes or ONNX. No torch.
Source of the format: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
#: File names that an index may give: no folder, nothing hidden.
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.safetensors")
#: A thousand layers' header takes two megabytes; a JSON file here is smaller still.
_MOST_HEADER_BYTES = 1 << 24
_MOST_JSON_BYTES = 1 << 24
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_LFS_POINTER = b"version https://git-lfs"


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file, the fault and the cure."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: ``offset`` bytes into ``path``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of the folder by name; only headers are read. Raises: CheckpointError."""
    if (directory / WHOLE).exists() or not (directory / INDEX).exists():
        return _tensors(_weights_file(directory))
    wanted = shards(directory)
    files = {name: _tensors(_shard(directory, name)) for name in sorted(set(wanted.values()))}
    for tensor, name in wanted.items():
        if tensor not in files[name]:
            raise CheckpointError(
                f"{directory / name} lacks {tensor}, which {INDEX} places there: the shards are "
                "not of one model. Download the folder again."
            )
    return {tensor: files[name][tensor] for tensor, name in wanted.items()}


def shards(directory: Path) -> dict[str, str]:
    """The file of each tensor, as the index of ``directory`` has it. Raises: CheckpointError."""
    path = directory / INDEX
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} has no weight_map: it is not the index of a checkpoint.")
    for name in names.values():
        if not isinstance(name, str) or not SHARD_NAME.fullmatch(name):
            raise CheckpointError(
                f"{path} names the shard {str(name)[:100]!r}; a shard is a .safetensors file in "
                "the folder itself. Do not use a folder that points elsewhere."
            )
    return names


def read(name: str, stored: Stored) -> Array:
    """One tensor as float32, whatever it is stored as. Raises: CheckpointError."""
    check_type(name, stored)
    count = math.prod(stored.shape)
    raw = np.fromfile(stored.path, _DTYPES[stored.dtype], count, offset=stored.offset)
    if raw.size != count:
        raise _damaged(stored.path, f"it ends within {name}")
    value = _widened(raw, stored.dtype)
    if not (np.isfinite(value.min()) and np.isfinite(value.max())):  # a NaN passes through min
        raise CheckpointError(
            f"{stored.path}: {name} holds NaN or infinite weights, so every answer would be noise. "
            "Train or convert the model again."
        )
    return value.reshape(stored.shape)


def check_type(name: str, stored: Stored) -> None:
    """Raises: CheckpointError for numbers that are not read here."""
    if stored.dtype not in _DTYPES:
        raise CheckpointError(
            f"{stored.path}: {name} is stored as {stored.dtype[:20]!r}; F32, F16 and "
            "BF16 are read. Start from the model's full weights: they are quantised here."
        )


def _widened(raw: npt.NDArray[Any], dtype: str) -> Array:
    if dtype != "BF16":
        return raw.astype(np.float32, copy=False)
    wide = raw.astype(np.uint32)  # a bfloat16 is the upper half of a float32
    wide <<= 16
    return wide.view(np.float32)


def plain_file(path: Path) -> Path:
    """``path`` where it is a file within its folder. Raises: CheckpointError.

    The Hub's cache keeps a model's files as links into ``blobs`` beside ``snapshots``: those pass.
    """
    folder = path.parent.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. {_CONTENTS}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, until Python 3.13
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(
            f"{path} is a link to {target}, outside its folder. Copy the file itself there."
        )
    if not target.is_file():
        raise CheckpointError(f"{path} is not a plain file. {_CONTENTS}")
    return path


def read_json(path: Path, most_bytes: int = _MOST_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in ``path``. Raises: CheckpointError."""
    data = _parsed(path, read_text(path, most_bytes))
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold one JSON object.")
    return data


def read_text(path: Path, most_bytes: int = _MOST_JSON_BYTES) -> str:
    """The text of a file in a checkpoint folder. Raises: CheckpointError."""
    if plain_file(path).stat().st_size > most_bytes:
        raise CheckpointError(f"{path} is larger than {most_bytes} bytes; no such file is needed.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text: {error}.") from error


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}. Download the file again.") from error


def _weights_file(directory: Path) -> Path:
    """``model.safetensors``, or what is wrong with the folder."""
    path = directory / WHOLE
    if path.exists():
        return plain_file(path)
    pickles = sorted(one.name for pattern in _PICKLES for one in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path} is missing, and {pickles[0]} is a pickle: it could run code when read, so it "
            "never is. If you trust it, convert it with transformers: AutoModelForCausalLM."
            f'from_pretrained("{directory}").save_pretrained("{directory}").'
        )
    if (directory / "adapter_config.json").exists():
        raise CheckpointError(
            f"{directory} is an adapter (LoRA), not a model: merge it into its base first, with "
            "peft's merge_and_unload() and save_pretrained()."
        )
    return plain_file(path)


def _shard(directory: Path, name: str) -> Path:
    if not (directory / name).exists():
        raise CheckpointError(
            f"{directory / name} is missing, and {INDEX} says that weights lie there. Copy or "
            "download that shard again."
        )
    return plain_file(directory / name)


def _tensors(path: Path) -> dict[str, Stored]:
    """What the header of one file lists, each entry checked against the file's true size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in its folder."
            )
        length = int.from_bytes(start[:8], "little")
        if size < 8 or not 2 <= length <= min(size - 8, _MOST_HEADER_BYTES):
            raise _damaged(path, f"its header claims {length} bytes of {size}")
        file.seek(8)
        header = _header(path, file.read(length))
    body = size - 8 - length
    return {
        name: _entry(path, name, entry, 8 + length, body)
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _entry(path: Path, name: str, entry: Any, start: int, body: int) -> Stored:
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(begin), int(end)],
        } if len(shape) <= 8 and all(type(one) is int and 0 <= one <= body for one in shape):
            pass
        case _:
            raise _damaged(path, f"its header has no type, shape and place for {name[:100]!r}")
    if not 0 <= begin <= end <= body:
        raise _damaged(path, f"{name[:100]!r} would end at byte {end} of {body}")
    known = _DTYPES.get(dtype)
    if known is not None and end - begin != math.prod(shape) * known.itemsize:
        raise _damaged(path, f"{name[:100]!r} of shape {shape} does not take {end - begin} bytes")
    return Stored(path, dtype, tuple(shape), start + begin)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or cut short: {what}. Download the file again.")


_CONTENTS = (
    "SOURCE is a checkpoint folder: config.json, model.safetensors (or shards with their index) "
    "and tokenizer.json."
)
