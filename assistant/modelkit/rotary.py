"""Rotary tables: the cosines and sines by which attention knows where a token stands.

Plain, linear and Llama 3's scaling, as Hugging Face computes them, in float64 until the last step.
Knows a model's shape; knows nothing of graphs or files.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from assistant.modelkit.checkpoint import Array, ModelShape, RopeScaling

Doubles = npt.NDArray[np.float64]


def rotary_tables(shape: ModelShape, rows: int) -> tuple[Array, Array]:
    """Cosines and sines, (rows, head_dim / 2) each.

    Source: Su et al. 2021, RoFormer, in the half-split layout of Hugging Face's Llama.
    """
    angles = np.arange(rows)[:, None] * frequencies(shape)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def frequencies(shape: ModelShape) -> Doubles:
    """Radians per position of each pair of dimensions, (head_dim / 2,)."""
    steps = np.arange(0, shape.head_dim, 2, dtype=np.float64) / shape.head_dim
    plain = shape.rope_theta**-steps
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    return plain / scaling.factor if scaling.kind == "linear" else _llama3(plain, scaling)


def _llama3(plain: Doubles, scaling: RopeScaling) -> Doubles:
    """Short waves stay, long ones are stretched by ``factor``, between the two it is blended.

    Source: apply_scaling in Meta's llama-models, ``models/llama3/model.py``.
    """
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)  # share of the unscaled frequency
    return plain * (kept + (1 - kept) / scaling.factor)
