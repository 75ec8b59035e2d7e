"""How far one window of turns is from another, and how far is too far. Pure: arrays to figures.

Each feature is a statistic of two sums over turns, so that resampling whole users (their turns are
alike) is one product of matrices. A threshold is the value that windows of the reference itself
exceed once in so many looks, from the bootstrap's mean and spread on a scale where it is nearly
normal. Knows neither texts nor rows; what is about words is ``drift_words``'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from monitoring import drift_words
from monitoring.drift_scale import (
    NAMES,
    SHARE_OF_ONE,
    SIZES,
    TURNS_OF_ONE,
    Floats,
    Numbers,
    Score,
    Turns,
    angle,
    between,
    least,
    limit,
    stretches,
)

__all__ = ["NAMES", "SHARE_OF_ONE", "TURNS_OF_ONE", "Fitted", "Score", "Turns", "compare", "fit"]

#: Resampled windows for each size.
TIMES, LEAST_TIMES = 800, 200
#: Intents rarer than this in the reference are counted together.
RARE = 0.01
BINS = 10


# --- Sums ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Which columns a row of sums has: turns; intents, and all others; confidence's bins; flags;
    tokens and characters; the embedding."""

    intents: tuple[str, ...]
    edges: tuple[float, ...]
    width: int

    @cached_property
    def at(self) -> Mapping[str, slice]:
        sizes = {
            "turns": 1, "intents": len(self.intents) + 1, "confidence": len(self.edges) + 1,
            "outside": 1, "degraded": 1, "down": 1, "tokens": 1, "chars": 1, "vector": self.width,
        }  # fmt: skip
        ends = list(accumulate(sizes.values()))
        starts = [0, *ends[:-1]]
        return {
            name: slice(start, end) for name, start, end in zip(sizes, starts, ends, strict=True)
        }

    @property
    def columns(self) -> int:
        return int(self.at["vector"].stop)


def shape_of(reference: Turns) -> Shape:
    """Bins of equal weight, and the intents that are frequent enough to be told apart."""
    found = [intent for intent in reference.intents if intent]
    often = {intent for intent in set(found) if found.count(intent) >= RARE * len(found)}
    sure = reference.confidence[~np.isnan(reference.confidence)]
    edges = np.unique(np.quantile(sure, np.arange(1, BINS) / BINS)) if len(sure) else ()
    width = 0 if reference.vectors is None else reference.vectors.shape[1]
    return Shape(tuple(sorted(often)), tuple(float(edge) for edge in edges), width)


def rows_of(turns: Turns, shape: Shape) -> Floats:
    """One row of sums a turn. *Shapes*: (N, columns)."""
    rows, number = np.zeros((len(turns), shape.columns)), np.arange(len(turns))
    place = {intent: at for at, intent in enumerate(shape.intents)}
    rows[:, shape.at["turns"].start] = 1
    known = np.array([bool(intent) for intent in turns.intents], bool)
    which = np.array([place.get(intent, len(place)) for intent in turns.intents], int)
    rows[number[known], shape.at["intents"].start + which[known]] = 1
    sure = ~np.isnan(turns.confidence)
    bins = np.searchsorted(np.array(shape.edges), turns.confidence[sure], side="right")
    rows[number[sure], shape.at["confidence"].start + bins] = 1
    for name in ("outside", "degraded", "down", "tokens", "chars"):
        rows[:, shape.at[name].start] = getattr(turns, name)
    if turns.vectors is not None and shape.width == turns.vectors.shape[1]:
        rows[:, shape.at["vector"]] = turns.vectors
    return rows


def by_user(rows: Floats, users: Numbers) -> Floats:
    """The rows of each user added up. *Shapes*: (U, columns)."""
    names, which = np.unique(users, return_inverse=True)
    added = np.zeros((len(names), rows.shape[1]))
    np.add.at(added, which, rows)
    return added


# --- Statistics: of the sums of windows (B, columns) and of references, likewise -----------------


def psi(window: Floats, reference: Floats) -> Floats:
    """Population stability index of counts (B, K). 0: the same.

    Half a count is added to each, so that an empty bin is no infinity.
    """
    p, q = (
        (counts + 0.5) / (counts.sum(axis=-1, keepdims=True) + 0.5 * counts.shape[-1])
        for counts in (window, reference)
    )
    found: Floats = ((p - q) * np.log(p / q)).sum(axis=-1)
    return found


def _distance(window: Floats, reference: Floats, shape: Shape) -> Floats:
    """Squared distance of mean embeddings: the maximum mean discrepancy of a linear kernel."""
    means = [s[..., shape.at["vector"]] / s[..., shape.at["turns"]] for s in (window, reference)]
    found: Floats = ((means[0] - means[1]) ** 2).sum(axis=-1)
    return found


def _share(name: str) -> Callable[[Floats, Floats, Shape], Floats]:
    def more(window: Floats, reference: Floats, shape: Shape) -> Floats:
        """How much more often, as a difference of angles."""
        column, turns = shape.at[name].start, shape.at["turns"].start
        return angle(window[..., column], window[..., turns]) - angle(
            reference[..., column], reference[..., turns]
        )

    return more


def _language(window: Floats, reference: Floats, shape: Shape) -> Floats:
    """How many more tokens a character takes, as a logarithm."""
    tokens, chars = shape.at["tokens"].start, shape.at["chars"].start
    rates = [(s[..., tokens] + 1) / (s[..., chars] + 1) for s in (window, reference)]
    found: Floats = np.log(rates[0]) - np.log(rates[1])
    return found


@dataclass(frozen=True, slots=True)
class _Feature:
    """``squares``: a sum of squares, whose cube root is nearly normal; else it is so itself.
    ``share``: the column it is the share of, if it is one."""

    measure: Callable[[Floats, Floats, Shape], Floats]
    squares: bool = False
    share: str = ""


def _counts(name: str) -> Callable[[Floats, Floats, Shape], Floats]:
    return lambda window, reference, shape: psi(
        window[..., shape.at[name]], reference[..., shape.at[name]]
    )


_FEATURES: Mapping[str, _Feature] = {
    "intents": _Feature(_counts("intents"), squares=True),
    "confidence": _Feature(_counts("confidence"), squares=True),
    "embedding": _Feature(_distance, squares=True),
    "out_of_scope": _Feature(_share("outside"), share="outside"),
    "degraded": _Feature(_share("degraded"), share="degraded"),
    "feedback": _Feature(_share("down"), share="down"),
    "language": _Feature(_language),
}


# --- Fitting and comparing -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fitted:
    """A reference: its sums, the words it knows, and each feature's limit for each of ``SIZES``."""

    shape: Shape
    sums: tuple[float, ...]
    words: frozenset[int]
    limits: Mapping[str, tuple[float, ...]]

    def as_json(self) -> dict[str, Any]:
        return {
            "intents": list(self.shape.intents),
            "edges": list(self.shape.edges),
            "width": self.shape.width,
            "sums": [round(value, 6) for value in self.sums],
            "words": sorted(self.words),
            "limits": {name: list(limits) for name, limits in self.limits.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fitted:
        """Raises: KeyError, TypeError, ValueError for what ``as_json`` did not write."""
        shape = Shape(tuple(data["intents"]), tuple(data["edges"]), int(data["width"]))
        if len(data["sums"]) != shape.columns:
            raise ValueError("the sums do not fit the features")
        limits = {str(name): tuple(found) for name, found in data["limits"].items()}
        return cls(shape, tuple(data["sums"]), frozenset(data["words"]), limits)


def fit(reference: Turns, seed: int = 0, *, pace: float = 0.0, margin: float = 1.0) -> Fitted:
    """The reference with thresholds that its own windows exceed in less than one look a month.

    *Units*: ``pace`` in turns an hour, 0 if unknown; ``margin`` multiplies what hours may change.
    """
    chance = np.random.default_rng(seed)
    shape = shape_of(reference)
    rows = rows_of(reference, shape)
    limits: dict[str, tuple[float, ...]] = {}
    samples = [_samples(rows, reference, size, pace, chance) for size in SIZES]
    for name in _told(shape, rows.sum(axis=0)):
        feature = _FEATURES[name]
        limits[name] = tuple(
            margin * max(_limit(feature, pairs, shape), _least(feature, size, len(reference)))
            for size, pairs in zip(SIZES, samples, strict=True)
        )
    limits |= drift_words.limits_of(reference, chance)
    return Fitted(shape, tuple(rows.sum(axis=0).tolist()), drift_words.known(reference), limits)


def _limit(feature: _Feature, pairs: Sequence[tuple[Floats, Floats]], shape: Shape) -> float:
    """What no time of day or week exceeds by chance."""
    found = (feature.measure(window, reference, shape) for window, reference in pairs)
    return max(limit(sample, squares=feature.squares) for sample in found)


def _least(feature: _Feature, *sizes: int) -> float:
    return least(*sizes) if feature.share else 0.0


def _told(shape: Shape, sums: Floats) -> list[str]:
    """The features that these sums say anything of, but for the words."""
    needs = {"embedding": shape.width > 0, "language": sums[shape.at["chars"]].any()}
    needs["intents"] = sums[shape.at["intents"]].any()
    needs["confidence"] = sums[shape.at["confidence"]].any()
    return [name for name in _FEATURES if needs.get(name, True)]


def _samples(
    rows: Floats, turns: Turns, size: int, pace: float, chance: np.random.Generator
) -> list[tuple[Floats, Floats]]:
    """For each time that a window may be of: sums of windows, and of as many whole references.

    The reference is drawn as well: it is a sample too, and its own chance is in every look.
    """
    users, parts = by_user(rows, turns.users), stretches(turns, size, pace)
    times = max(LEAST_TIMES, TIMES // len(parts))
    some = [by_user(rows[part], turns.users[part]) for part in parts]
    return [
        (_drawn(part, size / part[:, 0].mean(), times, chance),
         _drawn(users, len(users), times, chance))
        for part in some
    ]  # fmt: skip


def _drawn(users: Floats, draws: float, times: int, chance: np.random.Generator) -> Floats:
    even = np.full(len(users), 1 / len(users))
    found: Floats = chance.multinomial(max(1, round(draws)), even, times) @ users
    return found


def compare(fitted: Fitted, window: Turns) -> dict[str, Score]:
    """Each feature that both tell something of. *Shapes*: ``window`` of at least one turn."""
    shape, size = fitted.shape, len(window)
    sums, reference = rows_of(window, shape).sum(axis=0), np.array(fitted.sums)
    told = [name for name in _told(shape, sums) if name in fitted.limits]
    if window.vectors is None or shape.width != window.vectors.shape[1]:
        told = [name for name in told if name != "embedding"]
    scores = {}
    for name in told:
        feature, limit = _FEATURES[name], between(fitted.limits[name], size)
        shares = [_plain(of, shape, feature.share) for of in (sums, reference)]
        scores[name] = Score(float(feature.measure(sums, reference, shape)), limit, *shares)
    return scores | drift_words.scores(window, fitted.words, dict(fitted.limits))


def _plain(sums: Floats, shape: Shape, share: str) -> float | None:
    return float(sums[shape.at[share].start] / sums[0]) if share else None
