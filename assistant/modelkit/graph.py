"""The ONNX graph of a Llama-family decoder, written node by node from a checkpoint.

Rows of one run lie in a rectangle ``[B, S]``: all decoding rows at S = 1, or a prompt's next chunk
at B = 1. Nothing is gathered or reshaped between layers. How a matrix is stored and multiplied is
the scheme's business (``quantise``); running the graph is the engine's. No torch, no exporter.

Inputs: ``input_ids`` (B, S), ``seqlens_k`` (B,), ``query_seqlens`` (B,), ``total_length`` (),
``sample`` (R,) into B*S, ``past_k_i`` and ``past_v_i`` (B, kv_heads, capacity, head_dim). Outputs:
``logprobs`` (R, vocab), ``pooled`` (R, hidden), ``present_k_i`` and ``present_v_i``, to be bound to
the buffers of the past.

Measured on onnxruntime 1.32's CPU GroupQueryAttention, and binding for a runner:

* A row with one new token has other last bits at S = 1 than at S >= 2, where all S agree: decode
  rows run by themselves, at S = 1, or at S >= 2 all of them where some run with guesses behind.
* Rows with two or more new tokens agree bit for bit however a prompt is cut, but a chunk of one
  token does not: never cut a prompt so that one token is left over.
* ``seqlens_k`` is never negative: an idle row with an empty cache says 0.
* Cached tokens plus the padded S fit the capacity, for every row.
* x86 without VNNI saturates in the u8 x s8 products. ``session.x64quantprecision=1`` avoids it but
  takes twice the time where VNNI exists (9 M, 64 tokens: 4.5 to 8.5 ms): it is set only without.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from assistant.modelkit.checkpoint import Array, Checkpoint, ModelShape
from assistant.modelkit.rotary import rotary_tables

if TYPE_CHECKING:
    import onnx

CONTRIB = "com.microsoft"
#: Begins the names of outputs that a scheme adds to measure with.
TAP = "peak:"
_OPSET, _IR_VERSION = 21, 10
#: protobuf refuses messages from 2 GiB.
LIMIT_BYTES = 2**31 - 2**20


class GraphError(ValueError):
    """The graph cannot be built. The message says why and what to do instead."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix as checkpoints store it: (out, in), with an optional bias (out,)."""

    name: str
    value: Array
    bias: Array | None = None


class Scheme(Protocol):
    """How weights are stored and multiplied. Activations are float32, (B, S, width) or, once only
    the sampled rows are left, (R, width)."""

    def embedding(self, ids: str, table: Weight) -> str:
        """Rows of ``table`` for ``ids``."""

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        """``x`` times each weight; what they share (quantising ``x``) is done once."""

    def head(self, x: str, table: Weight) -> str:
        """Logits of the vocabulary."""


class Writer:
    """Collects nodes and constants; names are made up here."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        #: Names of outputs besides the graph's own, one vector each.
        self.taps: list[str] = []

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def op(
        self, kind: str, *inputs: str, domain: str = "", to: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        """Appends a node and returns its first output, ``to[0]`` where names are given."""
        from onnx import helper

        name = f"{kind}_{len(self.nodes)}"
        outputs = to or (name,)
        node = helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs[0]


def build_graph(
    checkpoint: Checkpoint,
    scheme: Callable[[Writer], Scheme],
    *,
    context_tokens: int,
    progress: Callable[[str], None] = lambda line: None,
) -> onnx.ModelProto:
    """The model of ``checkpoint`` with its matrices as ``scheme`` stores them."""
    writer = Writer()
    _Decoder(checkpoint, writer, scheme(writer), context_tokens).write(progress)
    return _model(writer, checkpoint.shape)


class _Decoder:
    def __init__(
        self, checkpoint: Checkpoint, writer: Writer, scheme: Scheme, context_tokens: int
    ) -> None:
        self._from = checkpoint
        self._shape = checkpoint.shape
        self._g = writer
        self._scheme = scheme
        self._context_tokens = context_tokens

    def write(self, progress: Callable[[str], None]) -> None:
        layers = self._shape.num_hidden_layers
        self._tables()
        x = self._scheme.embedding("input_ids", Weight("embed", self._from.embedding))
        normed = self._norm(x, f"{_at(0)}input_layernorm.weight")
        for layer in range(layers):
            progress(f"layer {layer + 1} of {layers}")
            normed, x = self._layer(layer, normed, x)
        progress("head")
        tied = self._shape.tie_word_embeddings
        table = Weight("embed" if tied else "head", self._from.head)
        self._g.op("LogSoftmax", self._scheme.head(normed, table), axis=-1, to=("logprobs",))

    def _tables(self) -> None:
        """Rotary tables, and the run's length clamped to them: a cache may be longer (room for a
        padded chunk), and the kernel refuses a length beyond the table."""
        rows = self._context_tokens
        cos, sin = rotary_tables(self._shape, rows)
        self._g.constant("cos", cos)
        self._g.constant("sin", sin)
        limit = self._g.constant("rotary_rows", np.array(rows, np.int32))
        self._g.op("Min", "total_length", limit, to=("total",))

    def _layer(self, layer: int, normed: str, x: str) -> tuple[str, str]:
        """Returns the normed input of the next layer and the residual stream."""
        g, last = self._g, layer == self._shape.num_hidden_layers - 1
        (qkv,) = self._scheme.matmuls(normed, self._qkv(layer))
        if self._shape.qk_norm:
            qkv = self._head_norms(layer, qkv)
        attended = self._attention(layer, qkv)
        if last:  # after the last attention only the sampled rows matter
            attended = self._sampled(attended, self._shape.query_width)
            x = self._sampled(x, self._shape.hidden_size)
        (o,) = self._scheme.matmuls(attended, self._weight(layer, "self_attn.o_proj"))
        normed, x = self._skip_norm(x, o, f"{_at(layer)}post_attention_layernorm.weight")
        gate, up = self._scheme.matmuls(
            normed, self._weight(layer, "mlp.gate_proj"), self._weight(layer, "mlp.up_proj")
        )
        # QuickGelu with alpha 1 is SiLU in one node; a fused gate/up costs a Split, which copies.
        wide = g.op("Mul", g.op("QuickGelu", gate, domain=CONTRIB, alpha=1.0), up)
        (down,) = self._scheme.matmuls(wide, self._weight(layer, "mlp.down_proj"))
        if last:
            return self._skip_norm(x, down, "model.norm.weight", to="pooled")
        return self._skip_norm(x, down, f"{_at(layer + 1)}input_layernorm.weight")

    def _attention(self, layer: int, qkv: str) -> str:
        """Attended values, (B, S, query_width)."""
        g, shape = self._g, self._shape
        return g.op(
            "GroupQueryAttention",
            *(qkv, "", "", f"past_k_{layer}", f"past_v_{layer}"),
            *("seqlens_k", "total", "cos", "sin"),
            # positions, bias, sink, two cache scales, and two head norms the CPU kernel lacks
            *([""] * 7),
            "query_seqlens",
            domain=CONTRIB,
            to=(f"attended_{layer}", f"present_k_{layer}", f"present_v_{layer}"),
            num_heads=shape.num_attention_heads,
            kv_num_heads=shape.num_key_value_heads,
            do_rotary=1,
            rotary_interleaved=0,
            scale=shape.head_dim**-0.5,
        )

    def _sampled(self, x: str, width: int) -> str:
        """The rows whose next token is wanted: (R, width)."""
        flat = self._g.constant(f"flat_{width}", np.array([-1, width], np.int64))
        return self._g.op("Gather", self._g.op("Reshape", x, flat), "sample")

    def _head_norms(self, layer: int, qkv: str) -> str:
        """``qkv`` with every query and key head normed (Qwen3), in nodes of their own."""
        g, shape = self._g, self._shape
        groups = [shape.num_attention_heads, *[shape.num_key_value_heads] * 2]
        apart = g.constant("heads", np.array([0, 0, sum(groups), shape.head_dim], np.int64))
        flat = g.constant("joined", np.array([0, 0, sum(groups) * shape.head_dim], np.int64))
        parts = (f"q_{layer}", f"k_{layer}", f"v_{layer}")
        sizes = g.constant("head_groups", np.array(groups, np.int64))
        g.op("Split", g.op("Reshape", qkv, apart), sizes, axis=2, to=parts)
        q, k = (
            self._norm(part, f"{_at(layer)}self_attn.{name}_norm.weight")
            for part, name in zip(parts, "qk", strict=False)
        )
        return g.op("Reshape", g.op("Concat", q, k, parts[2], axis=2), flat)

    def _norm(self, x: str, gamma: str) -> str:
        return self._g.op(
            "SimplifiedLayerNormalization",
            *(x, self._gamma(gamma)),
            axis=-1,
            epsilon=self._shape.rms_norm_eps,
        )

    def _skip_norm(self, x: str, skip: str, gamma: str, to: str = "") -> tuple[str, str]:
        name = f"{len(self._g.nodes)}"
        outputs = (to or f"normed_{name}", "", "", f"residual_{name}")
        self._g.op(
            "SkipSimplifiedLayerNormalization",
            *(x, skip, self._gamma(gamma)),
            domain=CONTRIB,
            to=outputs,
            epsilon=self._shape.rms_norm_eps,
        )
        return outputs[0], outputs[3]

    def _qkv(self, layer: int) -> Weight:
        def joined(kind: str) -> Array:
            parts = [f"{_at(layer)}self_attn.{name}_proj.{kind}" for name in "qkv"]
            return np.concatenate([self._from.tensor(part) for part in parts])

        bias = joined("bias") if self._shape.qkv_bias else None
        return Weight(f"layer_{layer}.qkv", joined("weight"), bias)

    def _weight(self, layer: int, name: str) -> Weight:
        at, short = f"{_at(layer)}{name}", name.split(".")[1].removesuffix("_proj")
        bias = self._from.tensor(f"{at}.bias") if self._shape.has_bias(name) else None
        return Weight(f"layer_{layer}.{short}", self._from.tensor(f"{at}.weight"), bias)

    def _gamma(self, name: str) -> str:
        return self._g.constant(name, self._from.tensor(name))


def _at(layer: int) -> str:
    return f"model.layers.{layer}."


def _model(writer: Writer, shape: ModelShape) -> onnx.ModelProto:
    from onnx import helper

    size = sum(len(constant.raw_data) for constant in writer.constants.values())
    if size > LIMIT_BYTES:
        raise GraphError(
            f"The weights take {size / 2**30:.1f} GiB and one ONNX file holds less than 2 GiB. "
            "Build with --quant row8 or int4."
        )
    graph = helper.make_graph(
        writer.nodes,
        "decoder",
        _inputs(shape),
        [*_outputs(shape), *(_tap(name) for name in writer.taps)],
        list(writer.constants.values()),
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(
        graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="inhouse"
    )


def _inputs(shape: ModelShape) -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    whole, short = TensorProto.INT64, TensorProto.INT32
    return [
        helper.make_tensor_value_info("input_ids", whole, ["B", "S"]),
        helper.make_tensor_value_info("seqlens_k", short, ["B"]),
        helper.make_tensor_value_info("query_seqlens", short, ["B"]),
        helper.make_tensor_value_info("total_length", short, []),
        helper.make_tensor_value_info("sample", whole, ["R"]),
        *_cache(shape, "past"),
    ]


def _outputs(shape: ModelShape) -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    return [
        helper.make_tensor_value_info("logprobs", TensorProto.FLOAT, ["R", shape.vocab_size]),
        helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["R", shape.hidden_size]),
        *_cache(shape, "present"),
    ]


def _tap(name: str) -> onnx.ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}.width"])


def _cache(shape: ModelShape, prefix: str) -> list[onnx.ValueInfoProto]:
    from onnx import TensorProto, helper

    size: list[str | int | None] = ["B", shape.num_key_value_heads, "capacity", shape.head_dim]
    return [
        helper.make_tensor_value_info(f"{prefix}_{side}_{layer}", TensorProto.FLOAT, size)
        for layer in range(shape.num_hidden_layers)
        for side in "kv"
    ]
