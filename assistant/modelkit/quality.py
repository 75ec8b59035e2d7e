"""What quantising cost: a build against the fp32 build of the same weights.

Runs both the plain way, step by step over one batch, and compares what they write. Knows the
graph's inputs; knows nothing of files, checkpoints or of how the engine schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assistant.engine.machine import exact_products
from assistant.engine.sampling import FirstTokenRule, judge
from assistant.modelkit.checkpoint import Array, ModelShape
from assistant.modelkit.graph import TAP

Ints = npt.NDArray[np.int64]
Prompts = Sequence[Sequence[int]]

#: Tokens of each answer that are compared.
GREEDY_TOKENS = 16
#: Tokens of each answer over which activations are measured: with 16, agreement fell by 0.02.
MEASURED_TOKENS = 48
#: Prompts per run; bounds the memory of the comparison.
_BATCH = 16


@dataclass(frozen=True, slots=True)
class Floor:
    """The least a build may reach: agreement of greedy tokens, perplexity over fp32's."""

    greedy_agreement: float
    perplexity_ratio: float


@dataclass(frozen=True, slots=True)
class Quality:
    """A build against fp32, over ``prompts`` prompts of which ``tokens`` tokens were generated.

    ``greedy_agreement`` is the share of fp32's tokens written before the first difference,
    ``greedy_identical`` the share of prompts without any, ``perplexity_ratio`` is taken on fp32's
    own answers, ``same_first`` is the share of equal first tokens (the intent, where there is one).
    """

    prompts: int
    tokens: int
    greedy_agreement: float
    greedy_identical: float
    perplexity_ratio: float
    same_first: float

    def meets(self, floor: Floor) -> bool:
        return (
            self.greedy_agreement >= floor.greedy_agreement
            and self.perplexity_ratio <= floor.perplexity_ratio
        )

    def figures(self) -> dict[str, Any]:
        return {
            key: round(value, 5) if isinstance(value, float) else value
            for key, value in asdict(self).items()
        }


class Batch:
    """Rows growing together in one cache: the graph run without an engine."""

    def __init__(self, session: Any, shape: ModelShape, rows: int, capacity: int) -> None:
        from onnxruntime import OrtValue

        self._session = session
        names = [one.name for one in session.get_outputs()]
        self._wanted = [name for name in names if not name.startswith("present_")]
        self.cached: npt.NDArray[np.int32] = np.zeros(rows, np.int32)
        self._capacity = capacity
        size = (rows, shape.num_key_value_heads, capacity, shape.head_dim)
        self.cache = {
            f"{side}_{layer}": np.zeros(size, np.float32)
            for layer in range(shape.num_hidden_layers)
            for side in "kv"
        }
        self._shared = {
            name: OrtValue.ortvalue_from_numpy(value) for name, value in self.cache.items()
        }

    def step(self, rows: Prompts, *, every: bool = False) -> Array:
        """Appends new tokens to the rows (none: idle). Returns log-probabilities after the last
        token of each row that had any, or after every token with ``every``. *Shapes*: (R, vocab).
        """
        return self.run(rows, every=every)["logprobs"]

    def run(self, rows: Prompts, *, every: bool = False) -> dict[str, Array]:
        """The same; all outputs but the cache, by name."""
        counts = np.array([len(row) for row in rows], np.int32)
        binding = self._session.io_binding()
        for name, value in self._inputs(rows, counts, every).items():
            binding.bind_cpu_input(name, value)
        for name, value in self._shared.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        for name in self._wanted:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        self.cached += counts
        values = binding.get_outputs()[-len(self._wanted) :]
        return {name: one.numpy() for name, one in zip(self._wanted, values, strict=True)}

    def _inputs(
        self, rows: Prompts, counts: npt.NDArray[np.int32], every: bool
    ) -> dict[str, npt.NDArray[Any]]:
        width = max(2, int(counts.max()))  # never 1: see the note on S in ``graph``
        used = np.arange(width) < counts[:, None]
        ids = np.zeros((len(rows), width), np.int64)
        ids[used] = [token for row in rows for token in row]
        last = np.arange(len(rows)) * width + counts - 1
        return {
            "input_ids": ids,
            "sample": np.flatnonzero(used) if every else last[counts > 0],
            "seqlens_k": np.maximum(self.cached + counts - 1, 0).astype(np.int32),
            "query_seqlens": counts,
            "total_length": np.array(self._capacity, np.int32),
        }


def measure_peaks(
    session: Any,
    shape: ModelShape,
    prompts: Prompts,
    rule: FirstTokenRule | None = None,
    tokens: int = MEASURED_TOKENS,
) -> dict[str, Array]:
    """Largest size of each channel that enters a matrix, (in,), by its name, over ``prompts`` and a
    greedy answer to each. ``session`` is of a graph written by ``quantise.Tapped``."""
    peaks: dict[str, Array] = {}
    answers = generate(session, shape, prompts, tokens, rule).tolist()
    for prompt, answer in zip(prompts, answers, strict=True):
        # One row and nothing padded: what stands in padding is unspecified.
        whole = [*prompt, *answer]
        found = Batch(session, shape, 1, len(whole)).run([whole], every=True)
        for name, value in found.items():
            if name.startswith(TAP):
                matrix = name.removeprefix(TAP)
                peaks[matrix] = np.maximum(peaks.get(matrix, np.float32(0)), value)
    return peaks


def open_session(model: bytes | str) -> Any:
    """An onnxruntime session of a serialised model or of its path."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    exact_products(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def compare(
    reference: Any,
    built: Any,
    shape: ModelShape,
    prompts: Prompts,
    *,
    tokens: int = GREEDY_TOKENS,
    end: int | None = None,
    rule: FirstTokenRule | None = None,
) -> Quality:
    """How far ``built`` writes what ``reference`` writes; both are sessions of the same weights."""
    right = generate(reference, shape, prompts, tokens, rule)
    found = generate(built, shape, prompts, tokens, rule)
    lengths = _lengths(right, end)
    agreed = np.minimum(_agreed(right, found), lengths)
    used = np.arange(tokens - 1) < lengths[:, None] - 1
    loss = _losses(built, shape, prompts, right) - _losses(reference, shape, prompts, right)
    return Quality(
        prompts=len(prompts),
        tokens=tokens,
        greedy_agreement=float(agreed.sum() / lengths.sum()),
        greedy_identical=float((agreed == lengths).mean()),
        # Noise is noise: beyond this no figure tells more, and JSON has none for infinity.
        perplexity_ratio=math.exp(min(50.0, float(loss[used].mean()))) if used.any() else 1.0,
        same_first=float((right[:, 0] == found[:, 0]).mean()),
    )


def generate(
    session: Any,
    shape: ModelShape,
    prompts: Prompts,
    tokens: int,
    rule: FirstTokenRule | None = None,
) -> Ints:
    """Greedy continuations, the first token by ``rule``. *Shapes*: (prompts, tokens)."""
    parts = []
    for start in range(0, len(prompts), _BATCH):
        some = prompts[start : start + _BATCH]
        batch = _batch(session, shape, some, tokens)
        logprobs = batch.step(some)
        chosen = [[judge(row, rule).token_id if rule else int(row.argmax())] for row in logprobs]
        for _ in range(tokens - 1):
            best = batch.step([row[-1:] for row in chosen]).argmax(axis=1)
            for row, token in zip(chosen, best.tolist(), strict=True):
                row.append(token)
        parts.append(np.array(chosen, np.int64))
    return np.concatenate(parts)


def _losses(session: Any, shape: ModelShape, prompts: Prompts, answers: Ints) -> Array:
    """Nats per token of ``answers`` without the first, which may be a verdict: (P, tokens - 1)."""
    parts, tokens = [], answers.shape[1]
    for start in range(0, len(prompts), _BATCH):
        some = prompts[start : start + _BATCH]
        known = answers[start : start + _BATCH]
        batch = _batch(session, shape, some, tokens)
        batch.step(some)
        logprobs = batch.step(known[:, :-1].tolist(), every=True)
        parts.append(-np.take_along_axis(logprobs, known[:, 1:].reshape(-1, 1), axis=1))
    return np.concatenate(parts).reshape(len(prompts), tokens - 1)


def _batch(session: Any, shape: ModelShape, prompts: Prompts, tokens: int) -> Batch:
    return Batch(session, shape, len(prompts), max(map(len, prompts)) + 2 * tokens + 2)


def _lengths(answers: Ints, end: int | None) -> Ints:
    """Tokens of each answer up to its end token, that one included."""
    ends = answers == (-1 if end is None else end)
    lengths: Ints = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, answers.shape[1])
    return lengths


def _agreed(one: Ints, other: Ints) -> Ints:
    """Equal tokens before the first difference, per row."""
    differ = one != other
    agreed: Ints = np.where(differ.any(axis=1), differ.argmax(axis=1), one.shape[1])
    return agreed
