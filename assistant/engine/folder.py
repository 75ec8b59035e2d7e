"""A folder from anywhere: what may lie in it, and the proof that a file is the one meant.

Refuses what could run code or read elsewhere (pickles, libraries, links, tensors kept outside the
file) before anything parses it. Knows bytes and names; knows nothing of what a manifest says.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 1 << 20
_TEXT_LIMIT_BYTES = 1 << 20
#: One ONNX file is one protobuf message, which ends at 2 GiB. The largest tokenizers in use have
#: 35 MB. Sizes are compared before anything is read: a sparse file of a terabyte costs no time.
_LIMITS_BYTES = {".onnx": (1 << 31) - 1, ".json": 1 << 27, ".jinja": 1 << 18}
_LIMIT_BYTES = 1 << 24
_MOST_ENTRIES = 1000
_RUNS_CODE = re.compile(
    r".*\.(pkl|pickle|pt|pth|bin|ckpt|joblib|so(\.[0-9]+)*|dll|dylib|pyd|py|pyc|exe|sh)",
    re.IGNORECASE,
)
#: ``NodeProto.op_type`` (field 4, wire type 2) of the operators that take one activation scale for
#: the whole batch, as they lie in the file: cheap to look for while hashing.
_PER_BATCH_OPS = tuple(
    bytes([0x22, len(name)]) + name for name in (b"DynamicQuantizeMatMul", b"DynamicQuantizeLinear")
)
WHY_NOT_DYNAMIC = (
    "quantize_dynamic takes one activation scale for the whole batch, so one user's text would "
    "change another's answer; build it with row8 or int4"
)
#: Which fields of onnx.proto hold messages that may hold tensors, by message and field number.
_NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class ManifestError(Exception):
    """A model folder cannot be used. The message names the file, the fault and the cure."""


def fault(path: Path, what: str) -> ManifestError:
    folder = os.fspath(path.parent)
    return ManifestError(
        f"{path} {what}. Restore the folder with `git checkout -- {folder}` "
        f"or build it again with `manage.py build_model`."
    )


def check_entries(directory: Path) -> None:
    """Nothing in ``directory`` is a link, a device or something that runs. Raises: ManifestError.

    Nothing here would load such a file; but a folder that holds one was not made by this product.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(directory))
    except OSError:
        return  # a missing folder is reported by the first file that is looked for
    if len(names) > _MOST_ENTRIES:
        raise fault(directory / names[0], f"is one of {len(names)} files: no model folder")
    for path in (directory / name for name in names):
        if path.is_symlink():
            raise fault(path, "is a symbolic link; a model folder holds plain files only")
        if not path.is_dir() and not path.is_file():
            raise fault(path, "is not a plain file")
        if path.is_file() and _RUNS_CODE.fullmatch(path.name):
            raise fault(path, "is code or a pickle, which no model needs; delete it")


def read_text(path: Path) -> str:
    """A small text file. Raises: ManifestError."""
    _refuse_odd(path)
    try:
        with path.open("rb") as file:
            raw = file.read(_TEXT_LIMIT_BYTES + 1)
        if len(raw) > _TEXT_LIMIT_BYTES:
            raise fault(path, f"is larger than {_TEXT_LIMIT_BYTES} bytes")
        return raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise fault(path, f"cannot be read ({error})") from error


def verify(path: Path, sha256: str, size: int) -> None:
    """The file is the one that was hashed, of a sane size, and needs no other. Raises:
    ManifestError."""
    _refuse_odd(path)
    found = path.stat().st_size
    if found != size:
        raise fault(path, f"has {found} bytes instead of {size}: truncated or replaced")
    most = _LIMITS_BYTES.get(path.suffix, _LIMIT_BYTES)
    if found > most:
        raise fault(path, f"has {found} bytes; at most {most} are read of such a file")
    is_model = path.suffix == ".onnx"
    try:
        found_sha256, _ = digest(path, refuse=_PER_BATCH_OPS if is_model else ())
    except OSError as error:
        raise fault(path, f"cannot be read ({error})") from error
    if found_sha256 != sha256:
        raise fault(path, "was altered: its SHA-256 is not the one in model.json")
    if is_model:
        refuse_external_data(path)


def digest(path: Path, refuse: tuple[bytes, ...] = ()) -> tuple[str, int]:
    """SHA-256 and size. Raises: ManifestError where one of ``refuse`` occurs in the file."""
    sha256, size, overlap = hashlib.sha256(), 0, b""
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            sha256.update(block)
            size += len(block)
            window = overlap + block
            if any(mark in window for mark in refuse):
                raise fault(path, f"is quantised dynamically: {WHY_NOT_DYNAMIC}")
            overlap = block[-64:]
    return sha256.hexdigest(), size


def refuse_external_data(path: Path) -> None:
    """Raises: ManifestError unless every tensor of this ONNX file lies in the file itself.

    Reads the protobuf's outline only, never a weight. *Source*: onnx.proto, TensorProto fields 13
    (external_data) and 14 (data_location).
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
            external = any(_external(raw, *span) for span in _tensors(raw))
    except (ValueError, IndexError) as error:
        raise fault(path, f"is not an ONNX model ({error})") from error
    if external:
        raise fault(path, "keeps weights in another file, and a model is one file here")


def _tensors(raw: mmap.mmap) -> Iterator[tuple[int, int]]:
    """Where each tensor begins and ends, in graphs within graphs too."""
    left = [("model", 0, len(raw))]
    while left:
        kind, begin, end = left.pop()
        if kind == "tensor":
            yield begin, end
            continue
        for number, wire, start, stop in _fields(raw, begin, end):
            if wire == _LENGTH and number in _NESTED[kind]:
                left.append((_NESTED[kind][number], start, stop))


def _external(raw: mmap.mmap, begin: int, end: int) -> bool:
    return any(
        number == _EXTERNAL_DATA
        or (number == _DATA_LOCATION and wire == _VARINT and _varint(raw, start, stop)[0] != 0)
        for number, wire, start, stop in _fields(raw, begin, end)
    )


def _fields(raw: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, begin, end) of each field of a message. Raises: ValueError."""
    while at < end:
        tag, at = _varint(raw, at, end)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            stop = _varint(raw, at, end)[1]
        elif wire == _LENGTH:
            size, at = _varint(raw, at, end)
            stop = at + size
        elif wire in (_FIXED32, _FIXED64):
            stop = at + (4 if wire == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if stop > end or not number:
            raise ValueError(f"a field ends outside its message at byte {at}")
        yield number, wire, at, stop
        at = stop


def _varint(raw: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """A number and where it ends. Raises: ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a broken number at byte {at}")


def _refuse_odd(path: Path) -> None:
    if path.is_symlink():
        raise fault(path, "is a symbolic link; a model folder holds plain files only")
    if not path.exists():
        raise fault(path, "is missing")
    if not path.is_file():
        raise fault(path, "is not a plain file")
