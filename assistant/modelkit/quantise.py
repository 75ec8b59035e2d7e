"""How a model's matrices are stored and multiplied: fp32, static8, row8 or int4.

No scheme lets an answer depend on what else is in the batch: activation scales are constants
(``static8``) or belong to one token (``row8``, ``int4``). Writes nodes through ``graph.Writer``;
knows nothing of layers, checkpoints or files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from assistant.modelkit.balance import LEAST_PEAK
from assistant.modelkit.checkpoint import Array
from assistant.modelkit.graph import CONTRIB, TAP, Scheme, Weight, Writer

_BLOCK = 32
#: Scales of a 4-bit block to choose from, in parts of the one that cuts nothing off.
_REACHES = np.linspace(0.75, 1.1, 15, dtype=np.float32)
SCHEMES = ("static8", "row8", "int4", "fp32")


class QuantError(ValueError):
    """The scheme is unknown or refused."""


def scheme(name: str, peaks: Mapping[str, float] | None = None) -> Callable[[Writer], Scheme]:
    """The scheme called ``name``; static8 needs ``peaks``. Raises: QuantError."""
    known(name)
    if name == "static8":
        if peaks is None:
            raise QuantError("static8 needs measured peaks of the activations.")
        return lambda writer: Static8(writer, peaks)
    schemes: dict[str, Callable[[Writer], Scheme]] = {"row8": Row8, "int4": Int4, "fp32": Fp32}
    return schemes[name]


def known(name: str) -> None:
    """Raises: QuantError where ``name`` is no scheme."""
    if name == "dynamic":
        raise QuantError(
            "dynamic is refused: it takes one activation scale for the whole batch, so another "
            "user's text would change this user's answer. Use static8, which is as small and fast."
        )
    if name not in SCHEMES:
        raise QuantError(f"No scheme is called {name!r}. Known: {', '.join(SCHEMES)}.")


class Fp32:
    """Full precision: the reference."""

    def __init__(self, writer: Writer) -> None:
        self._g = writer

    def embedding(self, ids: str, table: Weight) -> str:
        return self._g.op("Gather", self._g.constant(table.name, table.value), ids)

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        return [self._product(x, weight) for weight in weights]

    def head(self, x: str, table: Weight) -> str:
        # Turned by the operator: the embedding reads the same matrix.
        return self._g.op("Gemm", x, self._g.constant(table.name, table.value), transB=1)

    def _product(self, x: str, weight: Weight) -> str:
        y = self._g.op("MatMul", x, self._g.constant(weight.name, weight.value.T))
        if weight.bias is None:
            return y
        return self._g.op("Add", y, self._g.constant(f"{weight.name}.bias", weight.bias))


class Tapped(Fp32):
    """Full precision that also tells the largest size of each channel that enters a matrix.

    The graph gets one more output for it, ``peak:NAME``, (in,).
    """

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        self._tap(x, weights[0])
        return super().matmuls(x, *weights)

    def head(self, x: str, table: Weight) -> str:
        self._tap(x, table)
        return super().head(x, table)

    def _tap(self, x: str, weight: Weight) -> None:
        g, width = self._g, weight.value.shape[1]
        flat = g.constant(f"rows_of_{width}", np.array([-1, width], np.int64))
        rows = g.op("Reshape", g.op("Abs", x), flat)
        first = g.constant("first_axis", np.array([0], np.int64))
        g.taps.append(g.op("ReduceMax", rows, first, keepdims=0, to=(f"{TAP}{weight.name}",)))


class Row8:
    """8-bit weights (one scale per output column), 8-bit activations (one scale per token).

    Integer products are exact whatever their order, and a token's scale is its own: the result of
    a row cannot depend on its neighbours. Activations are stored as uint8 around 128 because
    onnxruntime's u8 x s8 kernels are the fast ones: s8 x s8 took 17 times as long.
    """

    def __init__(self, writer: Writer) -> None:
        self._g = writer
        self._middle = writer.constant("middle", np.array(128, np.uint8))

    def embedding(self, ids: str, table: Weight) -> str:
        # A matrix of its own even where the head has the same one: the head's lies column by
        # column, and gathering columns took 9 % of a step of 32 chats (1 % by rows).
        g = self._g
        values, scales = quantise_rows(table.value)
        rows = g.op("Gather", g.constant(f"{table.name}.rows", values), ids)
        sizes = g.op("Gather", g.constant(f"{table.name}.row_scale", scales[:, None]), ids)
        return g.op(
            "Mul", g.op("DequantizeLinear", rows, g.constant("one", np.array(1, np.float32))), sizes
        )

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        g = self._g
        # A row of zeros divides 0 by 0; whatever that becomes as uint8 is multiplied by 0 again.
        peak = g.op("ReduceMax", g.op("Abs", x), self._last_axis(), keepdims=1)
        small = g.op("QuantizeLinear", g.op("Div", x, peak), self._unit(), self._middle)
        return [self._product(small, peak, weight) for weight in weights]

    def head(self, x: str, table: Weight) -> str:
        return self.matmuls(x, table)[0]

    def _product(self, small: str, peak: str, weight: Weight) -> str:
        g = self._g
        matrix, scales = self._store(weight)
        inputs = (small, matrix, self._unit(), scales, self._middle)
        y = g.op("Mul", g.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB), peak)
        if weight.bias is None:
            return y
        return g.op("Add", y, g.constant(f"{weight.name}.bias", weight.bias))

    def _store(self, weight: Weight) -> tuple[str, str]:
        """Names of the (in, out) int8 matrix and of its scale per column."""
        values, scales = quantise_rows(weight.value)
        matrix = self._g.constant(f"{weight.name}.int8", values.T)
        return matrix, self._g.constant(f"{weight.name}.scale", scales)

    def _unit(self) -> str:
        """The scale of activations that were divided by their row's peak."""
        return self._g.constant("row8.step", np.array(1 / 127, np.float32))

    def _last_axis(self) -> str:
        return self._g.constant("last_axis", np.array([-1], np.int64))


class Static8(Row8):
    """8-bit weights, 8-bit activations with one constant scale a matrix.

    ``peaks``: the largest size that still has its own step, by the name of the first matrix that
    reads it; what is larger is cut off. ``balance`` makes weights that suit it: greedy agreement
    with fp32 is then little below row8's, at little more than half of row8's nodes.
    """

    def __init__(self, writer: Writer, peaks: Mapping[str, float]) -> None:
        super().__init__(writer)
        self._peaks = peaks

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        name = weights[0].name
        size = np.array(max(self._peaks[name], LEAST_PEAK) / 127, np.float32)
        step = self._g.constant(f"{name}.step", size)
        small = self._g.op("QuantizeLinear", x, step, self._middle)
        return [self._constant_product(small, step, one) for one in weights]

    def _constant_product(self, small: str, step: str, weight: Weight) -> str:
        matrix, scales = self._store(weight)
        inputs = [small, matrix, step, scales, self._middle]
        if weight.bias is not None:
            inputs += ["", self._g.constant(f"{weight.name}.bias", weight.bias)]
        return self._g.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB)


class Int4(Row8):
    """4-bit weights in blocks of 32, int8 embedding and head: for one chat, or little memory."""

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        return [self._blocks(x, weight) for weight in weights]

    def head(self, x: str, table: Weight) -> str:
        return super().matmuls(x, table)[0]

    def _blocks(self, x: str, weight: Weight) -> str:
        g, (out, width) = self._g, weight.value.shape
        packed, scales = quantise_blocks(weight.value)
        inputs = [
            x,
            g.constant(f"{weight.name}.int4", packed),
            g.constant(f"{weight.name}.scale", scales),
        ]
        if weight.bias is not None:
            inputs += ["", "", g.constant(f"{weight.name}.bias", weight.bias)]
        return g.op(
            "MatMulNBits",
            *inputs,
            domain=CONTRIB,
            K=width,
            N=out,
            bits=4,
            block_size=_BLOCK,
            accuracy_level=4,  # 8-bit activations, one scale per token and block
        )


def quantise_rows(matrix: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Symmetric int8 with one scale per row. Shapes: (out, in) -> (out, in), (out,)."""
    scales = np.abs(matrix).max(axis=1) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales


def quantise_blocks(matrix: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Symmetric 4-bit in blocks of 32 inputs, two to a byte, low half first, 8 meaning zero.

    A scale maps the value of largest size to -8, which uses all sixteen levels, or to somewhat
    beside it: of ``_REACHES`` each block takes what leaves the least squared error.
    Shapes: (out, in) -> (out, blocks, 16), (out, blocks).
    Source: onnxruntime ContribOperators.md, MatMulNBits.
    """
    out, width = matrix.shape
    blocks = -(-width // _BLOCK)
    padded = np.zeros((out, blocks * _BLOCK), np.float32)
    padded[:, :width] = matrix
    cells = padded.reshape(out, blocks, _BLOCK)
    at = np.abs(cells).argmax(axis=2)[..., None]
    full = np.take_along_axis(cells, at, axis=2) / np.float32(-8)
    full = np.where(full != 0, full, np.float32(1)).astype(np.float32)
    best = np.argmin([_error(cells, full * reach) for reach in _REACHES], axis=0)
    scales = full * _REACHES[best][..., None]
    codes = (_levels(cells, scales) + 8).astype(np.uint8)
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.astype(np.uint8), scales[..., 0]


def _error(cells: Array, scales: Array) -> Array:
    """Squared error of each block."""
    error: Array = ((_levels(cells, scales) * scales - cells) ** 2).sum(axis=2)
    return error


def _levels(cells: Array, scales: Array) -> Array:
    """The nearest of the sixteen levels, -8 to 7."""
    levels: Array = np.clip(np.rint(cells / scales), -8, 7)
    return levels
