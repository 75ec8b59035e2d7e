"""Checkpoints: a folder with ``config.json``, safetensors and ``tokenizer.json``.

Opens and checks them without torch, and writes seeded random ones of known shapes, so that anyone
can test and benchmark offline. Knows nothing of ONNX or of quantisation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assistant.modelkit.shape import EMBED, HEAD, NORM, SHAPES, ModelShape, RopeScaling
from assistant.modelkit.weights import Array, CheckpointError, Stored, check_type, read, read_json
from assistant.modelkit.weights import stored_tensors as _stored_tensors

__all__ = [
    "CONTROL",
    "SCOPE",
    "SHAPES",
    "Array",
    "Checkpoint",
    "CheckpointError",
    "ModelShape",
    "RopeScaling",
    "write_checkpoint",
    "write_random",
]

CONTROL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SCOPE = ("<|in_scope|>", "<|out_scope|>")

#: Stored by old versions of transformers, and computed by every other.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are read one at a time: a large one never lies in memory whole."""

    directory: Path
    shape: ModelShape
    _stored: Mapping[str, Stored] = field(repr=False)
    _read: set[str] = field(default_factory=set, repr=False)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Raises: CheckpointError where a file or tensor is missing or has another shape."""
        path = directory / "config.json"
        config = read_json(path)
        stored = _stored_tensors(directory)
        # Who leaves the setting out has tied them, or else stored a head.
        config.setdefault("tie_word_embeddings", HEAD not in stored)
        try:
            shape = ModelShape.from_config(config)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        checkpoint = cls(directory, shape, stored)
        checkpoint._check()
        return checkpoint

    def tensor(self, name: str) -> Array:
        """One weight as float32, whatever it is stored as. Raises: CheckpointError."""
        self._read.add(name)
        return read(name, self._stored[name])

    @property
    def unread(self) -> list[str]:
        """Weights that nobody has asked for: a network without them is another network."""
        return sorted(self.shape.tensors().keys() - self._read)

    @property
    def embedding(self) -> Array:
        return self.tensor(EMBED)

    @property
    def head(self) -> Array:
        return self.tensor(EMBED if self.shape.tie_word_embeddings else HEAD)

    @property
    def final_norm(self) -> Array:
        return self.tensor(NORM)

    def _check(self) -> None:
        wanted = self.shape.tensors()
        for name, size in wanted.items():
            if name not in self._stored:
                raise CheckpointError(
                    f"{self.directory} lacks {name}, which config.json calls for: it is not this "
                    "model's config.json, or a part is missing. Download the folder again."
                )
            found = self._stored[name].shape
            if found != size:
                raise CheckpointError(
                    f"{self._stored[name].path}: {name} has shape {found}, and config.json calls "
                    f"for {size}. Take both from the same model."
                )
            check_type(name, self._stored[name])
        for name in self._stored:
            layer = name.startswith("model.layers.")
            if layer and name not in wanted and not _COMPUTED.fullmatch(name):
                raise CheckpointError(
                    f"{self._stored[name].path} holds {name[:100]!r}, for which a "
                    f"{self.shape.family} with this config.json has no use: without it the answers "
                    "would be another model's. Correct config.json, or build with --via optimum."
                )


def write_random(name: str, directory: Path, seed: int = 0) -> Checkpoint:
    """A new checkpoint of the shape ``name``, the same for the same seed on every machine."""
    if name not in SHAPES:
        raise CheckpointError(f"No shape is called {name!r}. Known: {', '.join(SHAPES)}.")
    return write_checkpoint(directory, SHAPES[name], seed=seed, name=name)


def write_checkpoint(
    directory: Path, shape: ModelShape, *, seed: int = 0, name: str = "random"
) -> Checkpoint:
    """A folder of seeded random weights (bf16 on disk), a working tokenizer and chat settings."""
    import ml_dtypes
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: value.astype(ml_dtypes.bfloat16) for key, value in _random(shape, seed)}
    save_file(weights, directory / "model.safetensors")
    tokenizer, control = _tokenizer(shape.vocab_size)
    (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    _write_json(directory / "config.json", shape.config())
    _write_json(directory / "inhouse.json", _inhouse(f"random-{name}", seed, control))
    return Checkpoint.open(directory)


def _random(shape: ModelShape, seed: int) -> Iterator[tuple[str, Array]]:
    rng = np.random.default_rng(seed)
    for name, size in shape.tensors().items():
        noise = rng.standard_normal(size, dtype=np.float32)
        if len(size) == 2:  # keeps every activation near unit size, so that quantising is realistic
            yield name, noise / np.float32(np.sqrt(size[1]))
        else:
            yield name, noise * np.float32(0.1) + np.float32(not name.endswith("bias"))


_INTENTS = ("cancel_order", "get_refund", "greeting", "out_of_scope")
_PLACEHOLDERS = ("Order Number", "Support Email")


def _tokenizer(vocab_size: int) -> tuple[str, dict[str, int]]:
    """A byte-level BPE of exactly ``vocab_size`` entries as JSON, and the ids of its specials."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = [*CONTROL, *SCOPE, *(f"<|intent:{name}|>" for name in _INTENTS)]
    special += [f"{{{{{name}}}}}" for name in _PLACEHOLDERS]
    pieces = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(pieces):
        raise CheckpointError(f"vocab_size must be at least {len(pieces)} for a byte-level BPE.")
    merges = list(_merges(vocab_size - len(pieces)))
    pieces += [left + right for left, right in merges]
    ids = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    return tokenizer.to_str(), {piece: ids[piece] for piece in special}


def _merges(count: int) -> Iterator[tuple[str, str]]:
    """``count`` merges over all letter runs, short ones first: no corpus, any vocabulary size."""
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    runs = list(letters)
    while count > 0:
        for run in runs[:count]:  # "Ġ" is byte-level BPE's space: a word's first piece takes it in
            yield "Ġ", run
        count -= len(runs)
        longer = [(run, letter) for run in runs for letter in letters][: max(count, 0)]
        yield from longer
        count -= len(longer)
        runs = [run + letter for run, letter in longer]


def _inhouse(name: str, seed: int, ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "name": name,
        "version": f"seed-{seed}",
        "random": True,
        "chat": {"format": "inhouse", "end": "<|end|>"},
        "intents": {intent: ids[f"<|intent:{intent}|>"] for intent in _INTENTS},
        "smalltalk": ["greeting"],
        "scope": {"in": ids[SCOPE[0]], "out": ids[SCOPE[1]]},
        "placeholders": {label: ids[f"{{{{{label}}}}}"] for label in _PLACEHOLDERS},
    }


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
