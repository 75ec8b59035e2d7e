"""Checkpoints: a folder with ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

Reads and checks them without torch, and writes seeded random ones of known shapes, so that anyone
can test and benchmark offline. Knows nothing of ONNX or of quantisation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
N = TypeVar("N", int, float)

CONTROL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
SCOPE = ("<|in_scope|>", "<|out_scope|>")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

_EMBED, _HEAD, _NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The message names the file, the fault and the cure."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What ``config.json`` says about the network; field names as there."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 1024
    family: str = "llama"

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 16:
            raise CheckpointError(
                f"head_dim is {self.head_dim}; the attention kernel needs a multiple of 16."
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise CheckpointError("rms_norm_eps and rope_theta must be above 0.")

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    @property
    def query_width(self) -> int:
        """Width of all query heads together; not always ``hidden_size`` (Qwen3)."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(size)) for size in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, as Hugging Face's Llama family stores them."""
        found: dict[str, tuple[int, ...]] = {_EMBED: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            found.update(self._layer(f"model.layers.{layer}."))
        found[_NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            found[_HEAD] = (self.vocab_size, self.hidden_size)
        return found

    def _layer(self, at: str) -> dict[str, tuple[int, ...]]:
        hidden, wide = self.hidden_size, self.intermediate_size
        widths = {"q": self.query_width, "k": self.kv_width, "v": self.kv_width}
        found: dict[str, tuple[int, ...]] = {f"{at}input_layernorm.weight": (hidden,)}
        for name, width in widths.items():
            found[f"{at}self_attn.{name}_proj.weight"] = (width, hidden)
            if self.qkv_bias:
                found[f"{at}self_attn.{name}_proj.bias"] = (width,)
        for name in ("q", "k") if self.qk_norm else ():
            found[f"{at}self_attn.{name}_norm.weight"] = (self.head_dim,)
        found[f"{at}self_attn.o_proj.weight"] = (hidden, self.query_width)
        found[f"{at}post_attention_layernorm.weight"] = (hidden,)
        found[f"{at}mlp.gate_proj.weight"] = (wide, hidden)
        found[f"{at}mlp.up_proj.weight"] = (wide, hidden)
        found[f"{at}mlp.down_proj.weight"] = (hidden, wide)
        return found

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape a ``config.json`` describes. Raises: CheckpointError for what is not built."""
        family = str(config.get("model_type", "llama"))
        _refuse_unknown(config, family)
        heads = _number(config, "num_attention_heads", int)
        hidden = _number(config, "hidden_size", int)
        rope = config.get("rope_parameters") or {}
        return cls(
            hidden_size=hidden,
            num_hidden_layers=_number(config, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=_number(config, "num_key_value_heads", int, heads),
            head_dim=_number(config, "head_dim", int, hidden // max(heads, 1)),
            intermediate_size=_number(config, "intermediate_size", int),
            vocab_size=_number(config, "vocab_size", int),
            rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
            rope_theta=_number({**rope, **config}, "rope_theta", float, 10000.0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=_number(config, "max_position_embeddings", int, 2048),
            family=family,
        )

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of this shape; ``from_config`` reads it back."""
        fields = asdict(self)
        family = fields.pop("family")
        return {"model_type": family, "hidden_act": "silu", **fields}


#: Known shapes with random weights: for tests, benchmarks and comparisons with other engines.
SHAPES: dict[str, ModelShape] = {
    "tiny": ModelShape(48, 2, 4, 2, 16, 96, 512),
    "9m": ModelShape(320, 6, 5, 1, 64, 896, 6000),
    "15m": ModelShape(384, 8, 6, 2, 64, 1024, 8192, max_position_embeddings=4096),
    "smollm2-135m": ModelShape(
        576, 30, 9, 3, 64, 1536, 49152, rope_theta=100_000.0, max_position_embeddings=8192
    ),
    "qwen2.5-0.5b": ModelShape(
        896,
        24,
        14,
        2,
        64,
        4864,
        151_936,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        max_position_embeddings=32768,
        family="qwen2",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose tensors are read one at a time: a large one never lies in memory whole."""

    directory: Path
    shape: ModelShape

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Raises: CheckpointError where a file or tensor is missing or has another shape."""
        path = directory / "config.json"
        text = _text(path)
        try:
            shape = ModelShape.from_config(json.loads(text))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except ValueError as error:
            raise CheckpointError(f"{path} is not JSON: {error}.") from error
        checkpoint = cls(directory, shape)
        checkpoint._check()
        return checkpoint

    def tensor(self, name: str) -> Array:
        """One weight as float32, whatever it is stored as (fp32, fp16 or bf16)."""
        import ml_dtypes

        value = self._file.get_tensor(name)
        if value.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise CheckpointError(
                f"{self._path}: {name} is stored as {value.dtype}; fp32, fp16 and bf16 are read."
            )
        return np.asarray(value, dtype=np.float32)

    @property
    def embedding(self) -> Array:
        return self.tensor(_EMBED)

    @property
    def head(self) -> Array:
        return self.tensor(_EMBED if self.shape.tie_word_embeddings else _HEAD)

    @property
    def final_norm(self) -> Array:
        return self.tensor(_NORM)

    @property
    def _path(self) -> Path:
        return self.directory / "model.safetensors"

    @cached_property
    def _file(self) -> Any:
        from safetensors import SafetensorError, safe_open

        if not self._path.is_file():
            raise CheckpointError(
                f"{self._path} is missing. A checkpoint folder holds config.json, "
                "model.safetensors (one file, not shards) and tokenizer.json."
            )
        try:
            return safe_open(self._path, framework="numpy")
        except SafetensorError as error:
            raise CheckpointError(f"{self._path} is damaged: {error}.") from error

    def _check(self) -> None:
        stored = set(self._file.keys())
        for name, wanted in self.shape.tensors().items():
            if name not in stored:
                raise CheckpointError(f"{self._path} lacks {name}, which config.json calls for.")
            found = tuple(self._file.get_slice(name).get_shape())
            if found != wanted:
                raise CheckpointError(
                    f"{self._path}: {name} has shape {found}, and config.json calls for {wanted}."
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


def _refuse_unknown(config: Mapping[str, Any], family: str) -> None:
    if family not in FAMILIES:
        raise CheckpointError(
            f"model_type {family!r} is not built here; known: {', '.join(FAMILIES)}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {config['hidden_act']!r} is not built; only silu is.")
    for key in ("mlp_bias",) if family == "qwen2" else ("mlp_bias", "attention_bias"):
        if config.get(key):
            raise CheckpointError(f"{key} is set, and the graph has no such bias.")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"rope scaling {kind!r} is not built; only plain rotary is.")
    if config.get("quantization_config"):
        raise CheckpointError("The checkpoint is quantised already; start from its full weights.")


def _number(
    config: Mapping[str, Any], key: str, kind: Callable[[Any], N], default: N | None = None
) -> N:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{key} is missing or not a number.")
    return kind(value)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; SOURCE must be a checkpoint folder.") from None


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
