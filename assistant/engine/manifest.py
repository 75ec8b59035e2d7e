"""``model.json``: what a model folder holds, and the proof that it still holds it.

Loading checks every file's name, size and SHA-256 before anything parses it (``folder`` does that).
Knows names and JSON; knows nothing of sessions, tokenizers or threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assistant.engine.folder import (
    WHY_NOT_DYNAMIC,
    ManifestError,
    check_entries,
    digest,
    fault,
    read_text,
    verify,
)
from assistant.engine.sampling import FirstTokenRule

__all__ = [
    "MODEL",
    "NAME",
    "TEMPLATE",
    "TOKENIZER",
    "Architecture",
    "Calibration",
    "Chat",
    "FileEntry",
    "Manifest",
    "ManifestError",
    "describe_files",
]

FORMAT = 1
NAME = "model.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
OUT_OF_SCOPE = "out_of_scope"
QUANTS = frozenset({"fp32", "static8", "row8", "int4"})
CHAT_FORMATS = frozenset({"inhouse", "jinja"})
RUNNERS = frozenset({"packed", "plain"})

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_ENDS = 16


@dataclass(frozen=True, slots=True)
class Architecture:
    """The fields of the checkpoint's ``config.json`` that the graph was built from."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Chat:
    """How conversations are written: ``end``, or one of ``more_ends``, is what ends an answer.

    A template sees ``bos`` as ``bos_token`` and ``end`` as ``eos_token``.
    """

    format: str = "inhouse"
    end: str = "<|end|>"
    bos: str = ""
    more_ends: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured on held-out questions; ``answer_from`` and ``caution_from`` bound the bands."""

    temperature: float = 1.0
    scope_temperature: float = 1.0
    scope_bias: float = 0.0
    scope_threshold: float = 0.5
    answer_from: float = 0.6
    caution_from: float = 0.35


@dataclass(frozen=True, slots=True)
class FileEntry:
    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Typed view of ``model.json``."""

    name: str
    version: str
    created: str
    architecture: Architecture
    quant: str
    context_tokens: int
    chat: Chat = Chat()
    #: What runs the graph: ``packed`` is built here, ``plain`` came from an exporter and is slower.
    runner: str = "packed"
    intents: Mapping[str, int] = field(default_factory=dict)
    smalltalk: tuple[str, ...] = ()
    scope: tuple[int, int] | None = None
    placeholders: Mapping[str, int] = field(default_factory=dict)
    calibration: Calibration = Calibration()
    quality: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """The manifest of ``directory``, every listed file verified. Raises: ManifestError."""
        manifest = cls.parse(read_text(directory / NAME), directory)
        check_entries(directory)
        for name in (MODEL, TOKENIZER):
            if name not in manifest.files:
                raise fault(directory / NAME, f"does not list {name}")
        for name, entry in manifest.files.items():
            verify(directory / name, entry.sha256, entry.bytes)
        return manifest

    @classmethod
    def parse(cls, text: str, directory: Path) -> Manifest:
        """The manifest in ``text``; reads no other file. Raises: ManifestError."""
        path = directory / NAME
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise fault(path, f"is not JSON ({error})") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else None
            raise fault(path, f"has format {found!r}, and this version reads format {FORMAT}")
        try:
            return _Reader(data).manifest()
        except (KeyError, TypeError, ValueError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise fault(path, what) from error

    @property
    def digest(self) -> str:
        """SHA-256 of all that its answers depend on: every file, and what was fitted besides."""
        told = [*sorted((name, entry.sha256) for name, entry in self.files.items())]
        told.append(("calibration", json.dumps(asdict(self.calibration), sort_keys=True)))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    @property
    def topics(self) -> tuple[str, ...]:
        """The intents a question can be about, in the order of every array of them."""
        return tuple(name for name in self.intents if name != OUT_OF_SCOPE)

    def first_token_rule(self) -> FirstTokenRule | None:
        """How to read the first position; None for a model without intents."""
        if self.scope is None or OUT_OF_SCOPE not in self.intents:
            return None
        return FirstTokenRule(
            intent_ids=tuple(self.intents[name] for name in self.topics),
            out_of_scope_id=self.intents[OUT_OF_SCOPE],
            in_id=self.scope[0],
            out_id=self.scope[1],
            temperature=self.calibration.temperature,
            scope_temperature=self.calibration.scope_temperature,
            scope_bias=self.calibration.scope_bias,
            scope_threshold=self.calibration.scope_threshold,
        )

    def write(self, directory: Path) -> None:
        """Store as ``model.json``, atomically. Hash the files first: ``describe_files``."""
        data = {"format": FORMAT, **asdict(self)}
        data["scope"] = {"in": self.scope[0], "out": self.scope[1]} if self.scope else None
        text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
        self.parse(text, directory)  # what could not be read back is never written
        draft = directory / f".{NAME}.part"
        draft.write_text(text, encoding="utf-8")
        draft.replace(directory / NAME)


def describe_files(
    directory: Path, names: Iterable[str] = (MODEL, TOKENIZER)
) -> dict[str, FileEntry]:
    """Hashes and sizes for a manifest about to be written."""
    return {name: FileEntry(*digest(directory / name)) for name in names}


class _Reader:
    """Turns decoded JSON into a Manifest. Raises: KeyError, TypeError, ValueError."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def manifest(self) -> Manifest:
        data = self._data
        vocab = int(_whole(_section(data, "architecture"), "vocab_size", least=1))
        scope = data.get("scope") and _section(data, "scope")
        return Manifest(
            name=_text(data, "name"),
            version=_text(data, "version"),
            created=_text(data, "created"),
            architecture=_architecture(_section(data, "architecture")),
            quant=_quant(_text(data, "quant")),
            context_tokens=_whole(data, "context_tokens", least=8),
            chat=_chat(_section(data, "chat")),
            runner=_one_of(data.get("runner", "packed"), "runner", RUNNERS),
            intents=_ids(data, "intents", vocab),
            smalltalk=tuple(str(name) for name in data.get("smalltalk", ())),
            scope=(_id(scope, "in", vocab), _id(scope, "out", vocab)) if scope else None,
            placeholders=_ids(data, "placeholders", vocab),
            calibration=_calibration(data.get("calibration", {})),
            quality=_section(data, "quality") if "quality" in data else {},
            files=_files(_section(data, "files")),
        )


def _section(data: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = data[key]
    if not isinstance(value, dict):
        raise TypeError(f"has no object under {key!r}")
    return value


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not value:
        raise TypeError(f"has no text under {key!r}")
    return value


def _whole(data: Mapping[str, Any], key: str, *, least: int) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"has {value!r} under {key!r}, not a whole number from {least}")
    return value


def _number(data: Mapping[str, Any], key: str) -> float:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"has {value!r} under {key!r}, not a number")
    return float(value)


def _id(data: Mapping[str, Any], key: str, vocab: int) -> int:
    value = _whole(data, key, least=0)
    if value >= vocab:
        raise ValueError(f"gives {key!r} the token id {value}, outside the vocabulary of {vocab}")
    return value


def _ids(data: Mapping[str, Any], key: str, vocab: int) -> dict[str, int]:
    section = _section(data, key) if key in data else {}
    return {name: _id(section, name, vocab) for name in section}


def _architecture(data: Mapping[str, Any]) -> Architecture:
    whole = {
        key: _whole(data, key, least=1)
        for key in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        )
    }
    return Architecture(
        **whole,
        rms_norm_eps=_number(data, "rms_norm_eps"),
        rope_theta=_number(data, "rope_theta"),
        tie_word_embeddings=bool(data["tie_word_embeddings"]),
    )


def _quant(value: str) -> str:
    if value == "dynamic":
        raise ValueError(f"has quant 'dynamic': {WHY_NOT_DYNAMIC}")
    return _one_of(value, "quant", QUANTS)


def _one_of(value: Any, what: str, known: frozenset[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"has the unknown {what} {value!r}; known: {', '.join(sorted(known))}")
    return value


def _chat(data: Mapping[str, Any]) -> Chat:
    bos, more = data.get("bos", ""), data.get("more_ends", [])
    texts = [bos, *more] if isinstance(more, list) and len(more) <= _MOST_ENDS else [None]
    if not all(isinstance(text, str) for text in texts) or "" in more:
        raise TypeError(
            f"has no text under chat 'bos', or no list of them under 'more_ends': {more}"
        )
    format_ = _one_of(data["format"], "chat format", CHAT_FORMATS)
    return Chat(format_, _text(data, "end"), bos, tuple(more))


def _calibration(data: Mapping[str, Any]) -> Calibration:
    calibration = Calibration(**{key: _number(data, key) for key in data})
    if min(calibration.temperature, calibration.scope_temperature) <= 0:
        raise ValueError("has a calibration temperature that is not above 0")
    return calibration


def _files(data: Mapping[str, Any]) -> dict[str, FileEntry]:
    files = {}
    for name, entry in data.items():
        if not _SAFE_NAME.fullmatch(name):
            raise ValueError(f"lists {name!r}: a file must lie in the folder itself")
        digest = _text(entry, "sha256")
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"has no SHA-256 for {name}")
        files[name] = FileEntry(digest, _whole(entry, "bytes", least=0))
    return files
