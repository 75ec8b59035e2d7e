"""What ``config.json`` says about a network, checked: its sizes, family, biases and rotary scaling.

Says which tensors such a network has. Knows nothing of files, weights or ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from assistant.modelkit.weights import CheckpointError

N = TypeVar("N", int, float)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
ELSEWHERE = "build it with --via optimum (slower)"

#: The most that each size may be. Far above any model this engine is for, far below what would
#: fill the memory of the machine that only looks at the file.
_SIZES = {
    "hidden_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 21,
    "max_position_embeddings": 1 << 31,
}
#: One ONNX file holds 2 GiB, which at four bits a weight is less than this.
_MOST_PARAMETERS = 1 << 32
_WHY_NOT_SCALED = {
    "dynamic": "changes with the length of the text, and cached keys are already turned",
    "yarn": "also rescales the attention",
    "longrope": "changes with the length of the text, and cached keys are already turned",
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was first trained for."""

    kind: str  # "linear" or "llama3"; the fields below ``factor`` are llama3's
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.factor <= 0 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise CheckpointError(
                "factor must be above 0, and high_freq_factor above low_freq_factor."
            )

    def config(self) -> dict[str, Any]:
        fields = asdict(self)
        kind = fields.pop("kind")
        return {"rope_type": kind, **(fields if kind == "llama3" else {"factor": self.factor})}


def _linear(name: str, out: int, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, width)}
    return found | {f"{name}.bias": (out,)} if bias else found


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
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            if not 1 <= getattr(self, name) <= most:
                raise CheckpointError(
                    f"{name} is {getattr(self, name)}; it must lie between 1 and {most}."
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})."
            )
        if self.head_dim % 16:
            raise CheckpointError(
                f"head_dim is {self.head_dim}; the attention kernel needs a multiple of 16: "
                f"{ELSEWHERE}."
            )
        if self.rms_norm_eps <= 0 or self.rope_theta <= 0:
            raise CheckpointError("rms_norm_eps and rope_theta must be above 0.")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise CheckpointError(f"sliding_window is {self.sliding_window}; it must be above 0.")
        if self.parameters > _MOST_PARAMETERS:
            raise CheckpointError(
                f"config.json describes {self.parameters / 1e9:.1f} billion weights; models up to "
                f"{_MOST_PARAMETERS / 1e9:.1f} billion are built here. Use a smaller one."
            )

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2" or self.attention_bias

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
    def longest_context(self) -> int:
        """Tokens up to which attending to everything is what the model was trained to do."""
        return min(
            self.max_position_embeddings, self.sliding_window or self.max_position_embeddings
        )

    @property
    def parameters(self) -> int:
        each = sum(math.prod(size) for size in self._layer("").values())
        ends = self.hidden_size * (1 + self.vocab_size * (1 if self.tie_word_embeddings else 2))
        return self.num_hidden_layers * each + ends

    def has_bias(self, projection: str) -> bool:
        """Whether ``projection``, as in ``self_attn.o_proj``, has a bias."""
        return f"{projection}.bias" in self._layer("")

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, as Hugging Face's Llama family stores them."""
        found: dict[str, tuple[int, ...]] = {EMBED: (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_hidden_layers):
            found.update(self._layer(f"model.layers.{layer}."))
        found[NORM] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            found[HEAD] = (self.vocab_size, self.hidden_size)
        return found

    def _layer(self, at: str) -> dict[str, tuple[int, ...]]:
        hidden, wide = self.hidden_size, self.intermediate_size
        found: dict[str, tuple[int, ...]] = {f"{at}input_layernorm.weight": (hidden,)}
        widths = {"q": self.query_width, "k": self.kv_width, "v": self.kv_width}
        for name, width in widths.items():
            found |= _linear(f"{at}self_attn.{name}_proj", width, hidden, self.qkv_bias)
        for name in ("q", "k") if self.qk_norm else ():
            found[f"{at}self_attn.{name}_norm.weight"] = (self.head_dim,)
        found |= _linear(f"{at}self_attn.o_proj", hidden, self.query_width, self.attention_bias)
        found[f"{at}post_attention_layernorm.weight"] = (hidden,)
        for name in ("gate", "up"):
            found |= _linear(f"{at}mlp.{name}_proj", wide, hidden, self.mlp_bias)
        return found | _linear(f"{at}mlp.down_proj", hidden, wide, self.mlp_bias)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """The shape a ``config.json`` describes. Raises: CheckpointError for what is not built."""
        family = str(config.get("model_type", "llama"))
        _refuse_unknown(config, family)
        rope = _rope(config)
        theta = rope if config.get("rope_theta") is None else config
        heads = _number(config, "num_attention_heads", int)
        hidden = _number(config, "hidden_size", int)
        head_dim = 128 if family == "qwen3" else hidden // max(heads, 1)
        return cls(
            hidden_size=hidden,
            num_hidden_layers=_number(config, "num_hidden_layers", int),
            num_attention_heads=heads,
            num_key_value_heads=_number(config, "num_key_value_heads", int, heads),
            head_dim=_number(config, "head_dim", int, head_dim),
            intermediate_size=_number(config, "intermediate_size", int),
            vocab_size=_number(config, "vocab_size", int),
            rms_norm_eps=_number(config, "rms_norm_eps", float, 1e-6),
            rope_theta=_number(theta, "rope_theta", float, 10000.0),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            max_position_embeddings=_number(config, "max_position_embeddings", int, 2048),
            family=family,
            rope_scaling=_scaling(rope),
            sliding_window=_window(config, family),
            # transformers gives Qwen2 and Mistral no choice, whatever their files say
            attention_bias=family in ("llama", "qwen3") and bool(config.get("attention_bias")),
            mlp_bias=family == "llama" and bool(config.get("mlp_bias")),
        )

    def config(self) -> dict[str, Any]:
        """The ``config.json`` of this shape; ``from_config`` reads it back."""
        fields = asdict(self)
        family = fields.pop("family")
        fields["rope_scaling"] = self.rope_scaling and self.rope_scaling.config()
        for name in ("rope_scaling", "sliding_window", "attention_bias", "mlp_bias"):
            if not fields[name] and (name, family) != ("sliding_window", "mistral"):
                del fields[name]
        if self.sliding_window and family != "mistral":
            fields["use_sliding_window"] = True
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


def _refuse_unknown(config: Mapping[str, Any], family: str) -> None:
    if family not in FAMILIES:
        raise CheckpointError(
            f"model_type {family[:60]!r} is not built here; known: {', '.join(FAMILIES)}. "
            f"For another one, {ELSEWHERE}."
        )
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(
            f"hidden_act {str(config['hidden_act'])[:60]!r} is not built; only silu is: "
            f"{ELSEWHERE}."
        )
    if config.get("quantization_config") or config.get("compression_config"):
        raise CheckpointError("The checkpoint is quantised already; start from its full weights.")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings: ``rope_scaling``, or ``rope_parameters`` as transformers 5 writes them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise CheckpointError("rope_scaling is not an object.")
    for where in (config, rope):
        if where.get("partial_rotary_factor") not in (None, 1):
            raise CheckpointError(
                f"partial_rotary_factor is set, and the kernel turns whole heads: {ELSEWHERE}."
            )
    return rope


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = str(rope.get("rope_type") or rope.get("type") or "default")[:60]
    if kind == "default":
        return None
    if kind in ("linear", "llama3"):
        try:
            return _stretched(kind, rope)
        except CheckpointError as error:
            raise CheckpointError(f"rope scaling {kind!r}: {error}") from error
    why = _WHY_NOT_SCALED.get(kind, "is unknown here")
    raise CheckpointError(
        f"rope scaling {kind!r} is not built: it {why}. If it was only added for long texts "
        f"(Qwen's yarn), remove rope_scaling from config.json; else {ELSEWHERE}."
    )


def _stretched(kind: str, rope: Mapping[str, Any]) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind, _number(rope, "factor", float))
    return RopeScaling(
        kind,
        _number(rope, "factor", float),
        _number(rope, "low_freq_factor", float),
        _number(rope, "high_freq_factor", float),
        _number(rope, "original_max_position_embeddings", int),
    )


def _window(config: Mapping[str, Any], family: str) -> int | None:
    """Tokens that attention looks back, or None where every layer sees everything."""
    kinds = config.get("layer_types") or ()
    known = {"full_attention", "sliding_attention"}
    if not isinstance(kinds, list | tuple) or not known.issuperset(map(str, kinds)):
        raise CheckpointError(f"layer_types names an attention not built here: {ELSEWHERE}.")
    # Mistral's older files may leave its default out.
    window = config.get("sliding_window", 4096 if family == "mistral" else None)
    slides = family == "mistral" or "sliding_attention" in kinds
    if window is None or not (slides or config.get("use_sliding_window")):
        return None
    return _number(config, "sliding_window", int, 4096)


def _number(
    config: Mapping[str, Any], key: str, kind: Callable[[Any], N], default: N | None = None
) -> N:
    value = config.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"{key} is missing or not a number.")
    # Python's JSON knows NaN, Infinity and 1e999.
    if not -1e30 < value < 1e30 or (kind is int and value != int(value)):
        raise CheckpointError(f"{key} is {str(value)[:30]}, which is not such a number.")
    return kind(value)
