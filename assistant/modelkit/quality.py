"""What quantising cost: a build against the fp32 build of the same weights.

Runs both the plain way, step by step over one batch, and compares what they write. Knows the
graph's inputs; knows nothing of files, checkpoints or of how the engine schedules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assistant.engine.sampling import FirstTokenRule, judge
from assistant.modelkit.checkpoint import Array, ModelShape

Ints = npt.NDArray[np.int64]
Prompts = Sequence[Sequence[int]]

#: Tokens of each answer that are compared.
GREEDY_TOKENS = 16
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
        counts = np.array([len(row) for row in rows], np.int32)
        inputs = self._inputs(rows, counts)
        inputs["sample"] = np.arange(counts.sum()) if every else counts.cumsum()[counts > 0] - 1
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        for name, value in self._shared.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_output("logprobs")
        self._session.run_with_iobinding(binding)
        self.cached += counts
        logprobs: Array = binding.get_outputs()[-1].numpy()
        return logprobs

    def _inputs(self, rows: Prompts, counts: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[Any]]:
        width = max(2, int(counts.max()))  # never 1: see the note on S in ``graph``
        starts = counts.cumsum() - counts
        places = np.arange(width)
        used = places < counts[:, None]
        return {
            "input_ids": np.array([token for row in rows for token in row], np.int64),
            "pack": np.where(used, starts[:, None] + places, 0).astype(np.int64),
            "unpack": np.flatnonzero(used).astype(np.int64),
            "seqlens_k": np.maximum(self.cached + counts - 1, 0).astype(np.int32),
            "query_seqlens": counts,
            "total_length": np.array(self._capacity, np.int32),
        }


def open_session(model: bytes | str) -> Any:
    """An onnxruntime session of a serialised model or of its path."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


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
        perplexity_ratio=float(np.exp(loss[used].mean())) if used.any() else 1.0,
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
