"""Chooses the next token of every row from its log-probabilities.

Vectorised over the rows of a step; greedy rows cost one argmax. Knows NumPy arrays and slot
numbers; knows nothing of requests, texts or the model. State lives per slot: settings, random
generator, tokens seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Rows that sample choose among this many best tokens; the tail beyond them is never drawn.
CANDIDATES = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. ``temperature=0`` is greedy; ``top_k=0`` means no limit but ``CANDIDATES``."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    #: Ids that this answer never has, besides those nobody's has.
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require(0 <= self.temperature <= 100, "temperature must be between 0 and 100")
        _require(0 < self.top_p <= 1, "top_p must be above 0 and at most 1")
        _require(self.top_k >= 0, "top_k must not be negative")
        _require(0 <= self.min_p <= 1, "min_p must be between 0 and 1")
        _require(0 < self.repetition_penalty <= 10, "repetition_penalty must be in (0, 10]")
        _require(self.seed is None or self.seed >= 0, "seed must not be negative")

    @property
    def plain(self) -> bool:
        """Whether a choice depends on its row alone: neither on chance nor on earlier ones."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True, slots=True)
class FirstTokenRule:
    """How the first position is read as a verdict instead of being sampled."""

    intent_ids: tuple[int, ...]
    out_of_scope_id: int
    in_id: int
    out_id: int
    temperature: float = 1.0
    scope_temperature: float = 1.0
    scope_bias: float = 0.0
    scope_threshold: float = 0.5
    #: What is known of this very question besides (see ``wide``): added to the scores of the
    #: intents, in their order, and to the scope's; empty and 0 for nothing.
    prior: tuple[float, ...] = ()
    scope_prior: float = 0.0

    def __post_init__(self) -> None:
        _require(bool(self.intent_ids), "a first-token rule needs at least one intent")
        _require(self.temperature > 0, "the intent temperature must be above 0")
        _require(self.scope_temperature > 0, "scope_temperature must be above 0")
        _require(len(self.prior) in (0, len(self.intent_ids)), "a prior has one score an intent")

    @property
    def ids(self) -> tuple[int, ...]:
        """Every token id the rule reads or feeds."""
        return (*self.intent_ids, self.out_of_scope_id, self.in_id, self.out_id)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the model makes of the question. ``intent_id`` is the best intent, in scope or not;
    ``token_id`` is what was fed next. ``confidence`` and ``scope`` are calibrated, 0..1."""

    token_id: int
    intent_id: int
    confidence: float
    scope: float


def judge(logprobs: Floats, rule: FirstTokenRule) -> Verdict:
    """Verdict of one row. *Shapes*: logprobs (vocab,).

    Both groups only use differences within the row, so log-probabilities serve as well as logits.
    """
    scores = logprobs[list(rule.intent_ids)].astype(np.float64)
    if rule.prior:
        scores += rule.prior
    scores /= rule.temperature
    weights = np.exp(scores - scores.max())
    best = int(weights.argmax())
    gap = float(logprobs[rule.in_id]) - float(logprobs[rule.out_id]) + rule.scope_prior
    scope = _sigmoid(gap / rule.scope_temperature + rule.scope_bias)
    intent = rule.intent_ids[best]
    token = intent if scope >= rule.scope_threshold else rule.out_of_scope_id
    return Verdict(token, intent, float(weights[best] / weights.sum()), scope)


class Sampler:
    """Choices for up to ``slots`` rows; ``banned`` ids are never chosen."""

    def __init__(self, slots: int, vocab_size: int, banned: Sequence[int] = ()) -> None:
        self._banned = np.array(sorted(banned), np.int64)
        self._temperature = np.zeros(slots)
        self._top_p = np.ones(slots)
        self._top_k = np.full(slots, CANDIDATES)
        self._min_p = np.zeros(slots)
        self._penalty = np.ones(slots, np.float32)
        self._seen = np.zeros((slots, vocab_size), np.bool_)
        self._generators: list[np.random.Generator | None] = [None] * slots
        #: Slots that need more than the best token, and what single slots may not choose.
        self._special: set[int] = set()
        self._refused: dict[int, Ints] = {}

    def open(self, slot: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Prepare ``slot`` for a new request; forgets whoever had it before."""
        self._temperature[slot] = sampling.temperature
        self._top_p[slot] = sampling.top_p
        self._top_k[slot] = min(sampling.top_k or CANDIDATES, CANDIDATES)
        self._min_p[slot] = sampling.min_p
        self._penalty[slot] = sampling.repetition_penalty
        self._generators[slot] = (
            np.random.default_rng(sampling.seed) if sampling.temperature > 0 else None
        )
        self._refused.pop(slot, None)
        if sampling.banned:
            self._refused[slot] = np.array(sampling.banned, np.int64)
        (self._special.discard if sampling.plain else self._special.add)(slot)
        if sampling.repetition_penalty != 1:
            self._seen[slot] = False
            self._seen[slot, np.asarray(prompt, np.int64)] = True

    def move(self, source: int, target: int) -> None:
        """Let the request in slot ``source`` go on in ``target``."""
        for state in (self._temperature, self._top_p, self._top_k, self._min_p, self._penalty):
            state[target] = state[source]
        self._seen[target] = self._seen[source]
        self._generators[target] = self._generators[source]
        (self._special.add if source in self._special else self._special.discard)(target)
        self._refused.pop(target, None)
        if source in self._refused:
            self._refused[target] = self._refused[source]

    def choose(self, logprobs: Floats, slots: Sequence[int]) -> tuple[Ints, Floats]:
        """Chosen ids and their true log-probabilities; ``logprobs`` is masked in place.

        *Shapes*: logprobs (rows, vocab), slots (rows,) -> (rows,), (rows,).
        """
        logprobs[:, self._banned] = -np.inf
        for row, slot in enumerate(slots if self._refused else ()):
            if slot in self._refused:
                logprobs[row, self._refused[slot]] = -np.inf
        if self._special.isdisjoint(slots):
            best = logprobs.argmax(axis=1)
            return best, logprobs[np.arange(len(best)), best]
        rows = np.asarray(slots, np.int64)
        scores, penalised = self._penalise(logprobs, rows)
        sampled = np.flatnonzero(self._temperature[rows] > 0)
        if not sampled.size:
            ids = scores.argmax(axis=1)
        else:
            ids = np.empty(len(rows), np.int64)
            greedy = np.flatnonzero(self._temperature[rows] == 0)
            ids[greedy] = scores[greedy].argmax(axis=1)
            ids[sampled] = self._draw(scores[sampled], rows[sampled])
        self._seen[rows[penalised], ids[penalised]] = True
        return ids, logprobs[np.arange(len(rows)), ids]

    def _penalise(self, logprobs: Floats, rows: Ints) -> tuple[Floats, Ints]:
        """Scores after the repetition penalty, and the rows that have one.

        *Source*: Keskar et al. 2019 (CTRL), on log-probabilities: they are never above 0, so a seen
        token's score is always multiplied.
        """
        penalised = np.flatnonzero(self._penalty[rows] != 1)
        if not penalised.size:
            return logprobs, penalised
        scores = logprobs.copy()
        slots = rows[penalised]
        factors = np.where(self._seen[slots], self._penalty[slots, None], np.float32(1))
        scores[penalised] *= factors
        return scores, penalised

    def _draw(self, scores: Floats, slots: Ints) -> Ints:
        """One draw per row. *Shapes*: scores (rows, vocab), slots (rows,) -> (rows,)."""
        ids, best = top_candidates(scores, CANDIDATES)
        weights = np.exp((best - best[:, :1]) / self._temperature[slots, None])
        ranks = np.arange(weights.shape[1])
        weights[ranks >= self._top_k[slots, None]] = 0
        weights /= weights.sum(axis=1, keepdims=True)
        before = weights.cumsum(axis=1) - weights
        weights[before >= self._top_p[slots, None]] = 0
        weights[weights < self._min_p[slots, None] * weights[:, :1]] = 0
        totals = weights.cumsum(axis=1)
        points = np.array([self._random(slot) for slot in slots.tolist()]) * totals[:, -1]
        # Rounding may put a point on the total: never past the last token with any weight.
        last = np.count_nonzero(weights, axis=1) - 1
        picks = np.minimum((totals <= points[:, None]).sum(axis=1), last)
        chosen: Ints = ids[np.arange(len(picks)), picks]
        return chosen

    def _random(self, slot: int) -> float:
        generator = self._generators[slot]
        assert generator is not None, "open() gives every sampling slot a generator"
        return float(generator.random())


def top_candidates(scores: Floats, count: int) -> tuple[Ints, Doubles]:
    """Ids and scores of the ``count`` best tokens of each row, best first.

    Exact, and several times faster than partitioning whole rows: the best ``count`` tokens lie in
    the ``count`` column groups with the largest maxima. *Shapes*: (rows, vocab) -> (rows, count).
    """
    rows, vocab = scores.shape
    depth = max(1, math.isqrt(vocab // (4 * count)) * 2)
    width = vocab // depth
    if width <= count:
        return _partition(scores, np.broadcast_to(np.arange(vocab), scores.shape), count)
    # A group is a column of the row folded into (depth, width): its maximum runs along memory.
    maxima = scores[:, : depth * width].reshape(rows, depth, width).max(axis=1)
    groups = np.argpartition(maxima, width - count, axis=1)[:, width - count :]
    folded = groups[:, None, :] + (np.arange(depth) * width)[None, :, None]
    tail = np.broadcast_to(np.arange(depth * width, vocab), (rows, vocab - depth * width))
    ids = np.concatenate((folded.reshape(rows, -1), tail), axis=1)
    return _partition(np.take_along_axis(scores, ids, axis=1), ids, count)


def _partition(scores: Floats, ids: Ints, count: int) -> tuple[Ints, Doubles]:
    count = min(count, scores.shape[1])
    cut = scores.shape[1] - count
    best = np.argpartition(scores, cut, axis=1)[:, cut:] if cut else np.arange(count)[None, :]
    best = np.broadcast_to(best, (scores.shape[0], count))
    kept = np.take_along_axis(scores, best, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    found = np.take_along_axis(ids, np.take_along_axis(best, order, axis=1), axis=1)
    return found, np.take_along_axis(kept, order, axis=1).astype(np.float64)


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
