"""How a model's matrices are stored and multiplied: fp32, row8 or int4.

``row8`` gives every token its own activation scale, so no answer depends on what else is in the
batch. Writes nodes through ``graph.Writer``; knows nothing of layers, checkpoints or files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from assistant.modelkit.checkpoint import Array
from assistant.modelkit.graph import CONTRIB, Scheme, Weight, Writer

_BLOCK = 32


class QuantError(ValueError):
    """The scheme is unknown or refused."""


def scheme(name: str) -> Callable[[Writer], Scheme]:
    """The scheme called ``name``. Raises: QuantError."""
    if name == "dynamic":
        raise QuantError(
            "dynamic is refused: it takes one activation scale for the whole batch, so another "
            "user's text would change this user's answer. Use row8, which is as small."
        )
    if name not in SCHEMES:
        raise QuantError(f"No scheme is called {name!r}. Known: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


class Fp32:
    """Full precision: the reference."""

    def __init__(self, writer: Writer) -> None:
        self._g = writer

    def embedding(self, ids: str, table: Weight, *, tied: bool) -> str:
        return self._g.op("Gather", self._g.constant(table.name, table.value), ids)

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        return [self._gemm(x, weight) for weight in weights]

    def head(self, x: str, table: Weight) -> str:
        return self._gemm(x, table)

    def _gemm(self, x: str, weight: Weight) -> str:
        inputs = [x, self._g.constant(weight.name, weight.value)]
        if weight.bias is not None:
            inputs.append(self._g.constant(f"{weight.name}.bias", weight.bias))
        return self._g.op("Gemm", *inputs, transB=1)


class Row8:
    """8-bit weights (one scale per output column), 8-bit activations (one scale per token).

    Integer products are exact whatever their order, and a token's scale is its own: the result of
    a row cannot depend on its neighbours. Activations are stored as uint8 around 128 because
    onnxruntime's u8 x s8 kernels are the fast ones: s8 x s8 took 17 times as long.
    """

    def __init__(self, writer: Writer) -> None:
        self._g = writer
        self._step = writer.constant("row8.step", np.array(1 / 127, np.float32))
        self._middle = writer.constant("row8.middle", np.array(128, np.uint8))

    def embedding(self, ids: str, table: Weight, *, tied: bool) -> str:
        # Tied: the head's (hidden, vocab) matrix serves both, so columns are gathered and turned.
        g, axis = self._g, 1 if tied else 0
        matrix, scales = self._store(table) if tied else self._store_rows(table)
        rows = g.op("Gather", matrix, ids, axis=axis)
        x = g.op("DequantizeLinear", rows, g.op("Gather", scales, ids), axis=axis)
        return g.op("Transpose", x, perm=[1, 0]) if tied else x

    def matmuls(self, x: str, *weights: Weight) -> list[str]:
        g = self._g
        # A row of zeros divides 0 by 0; whatever that becomes as uint8 is multiplied by 0 again.
        peak = g.op("ReduceMax", g.op("Abs", x), self._last_axis(), keepdims=1)
        small = g.op("QuantizeLinear", g.op("Div", x, peak), self._step, self._middle)
        return [self._product(small, peak, weight) for weight in weights]

    def head(self, x: str, table: Weight) -> str:
        return self.matmuls(x, table)[0]

    def _product(self, small: str, peak: str, weight: Weight) -> str:
        g = self._g
        matrix, scales = self._store(weight)
        inputs = (small, matrix, self._step, scales, self._middle)
        y = g.op("Mul", g.op("MatMulIntegerToFloat", *inputs, domain=CONTRIB), peak)
        if weight.bias is None:
            return y
        return g.op("Add", y, g.constant(f"{weight.name}.bias", weight.bias))

    def _store(self, weight: Weight) -> tuple[str, str]:
        """Names of the (in, out) int8 matrix and of its scale per column."""
        values, scales = quantise_rows(weight.value)
        matrix = self._g.constant(f"{weight.name}.int8", values.T)
        return matrix, self._g.constant(f"{weight.name}.scale", scales)

    def _store_rows(self, weight: Weight) -> tuple[str, str]:
        values, scales = quantise_rows(weight.value)
        matrix = self._g.constant(f"{weight.name}.int8", values)
        return matrix, self._g.constant(f"{weight.name}.scale", scales)

    def _last_axis(self) -> str:
        return self._g.constant("last_axis", np.array([-1], np.int64))


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


SCHEMES: dict[str, Callable[[Writer], Scheme]] = {"row8": Row8, "int4": Int4, "fp32": Fp32}


def quantise_rows(matrix: Array) -> tuple[npt.NDArray[np.int8], Array]:
    """Symmetric int8 with one scale per row. Shapes: (out, in) -> (out, in), (out,)."""
    scales = np.abs(matrix).max(axis=1) / np.float32(127)
    scales = np.where(scales > 0, scales, np.float32(1)).astype(np.float32)
    return np.rint(matrix / scales[:, None]).astype(np.int8), scales


def quantise_blocks(matrix: Array) -> tuple[npt.NDArray[np.uint8], Array]:
    """Symmetric 4-bit in blocks of 32 inputs, two to a byte, low half first, 8 meaning zero.

    The scale maps the value of largest size to -8, which uses all sixteen levels.
    Shapes: (out, in) -> (out, blocks, 16), (out, blocks).
    Source: onnxruntime ContribOperators.md, MatMulNBits.
    """
    out, width = matrix.shape
    blocks = -(-width // _BLOCK)
    padded = np.zeros((out, blocks * _BLOCK), np.float32)
    padded[:, :width] = matrix
    cells = padded.reshape(out, blocks, _BLOCK)
    at = np.abs(cells).argmax(axis=2)[..., None]
    scales = np.take_along_axis(cells, at, axis=2) / np.float32(-8)
    scales = np.where(scales != 0, scales, np.float32(1))
    codes = np.clip(np.rint(cells / scales) + 8, 0, 15).astype(np.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales[..., 0].astype(np.float32)
