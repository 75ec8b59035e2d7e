"""How answers, confidences and embeddings are judged: pure functions over numbers and texts.

Shared by training (calibration, model card) and by evaluation in the product. No files, no models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from assistant.modelkit.labels import USER_SLOTS

Floats = NDArray[np.float64]


def accuracy(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """Share of equal labels; nan without rows."""
    if not wanted:
        return float("nan")
    return sum(p == w for p, w in zip(predicted, wanted, strict=True)) / len(wanted)


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Probability that a positive scores above a negative, ties half; nan if either is empty.

    Source: Mann-Whitney U by average ranks.
    """
    one, two = np.asarray(positive, float), np.asarray(negative, float)
    if not len(one) or not len(two):
        return float("nan")
    both = np.concatenate((one, two))
    _, inverse, counts = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[: len(one)].sum() - len(one) * (len(one) + 1) / 2) / len(one) / len(two))


@dataclass(frozen=True, slots=True)
class Bin:
    """The rows whose confidence lies between ``low`` and ``high``: how sure, how often right."""

    low: float
    high: float
    rows: int
    confidence: float
    right: float


def reliability(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> list[Bin]:
    """Equal-width bins of the confidence, those without rows left out."""
    sure, right = np.asarray(confidence, float), np.asarray(correct, float)
    which = np.minimum((sure * bins).astype(int), bins - 1)
    found = [(at, which == at) for at in range(bins) if (which == at).any()]
    return [
        Bin(
            low=at / bins,
            high=(at + 1) / bins,
            rows=int(rows.sum()),
            confidence=float(sure[rows].mean()),
            right=float(right[rows].mean()),
        )
        for at, rows in found
    ]


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins; nan without rows.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    found = reliability(confidence, correct, bins)
    if not found:
        return float("nan")
    gaps = sum(one.rows * abs(one.right - one.confidence) for one in found)
    return float(gaps / sum(one.rows for one in found))


def coverage_curve(confidence: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    """Share of rows kept and their error rate, the most confident first. *Shapes*: (N,) each."""
    sure, right = np.asarray(confidence, float), np.asarray(correct, float)
    wrong = 1 - right[np.argsort(-sure, kind="stable")]
    kept = np.arange(1, len(wrong) + 1)
    return kept / max(1, len(wrong)), np.cumsum(wrong) / kept


def coverage_at_error(confidence: ArrayLike, correct: ArrayLike, error: float = 0.05) -> float:
    """Largest share of rows, most confident first, whose error rate stays within ``error``."""
    kept, wrong = coverage_curve(confidence, correct)
    if not len(kept):
        return float("nan")
    within = np.flatnonzero(wrong <= error)
    return float(kept[within[-1]]) if len(within) else 0.0


# -- rows that were asked ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judged:
    """What was expected of one question, and what came.

    ``wanted``: its intent, None where nobody said. ``scope``: "in", "out" or None likewise.
    ``inside``: the model's probability that it is in scope. ``band``: what its own thresholds say.
    """

    kind: str
    wanted: str | None
    scope: str | None
    intent: str
    confidence: float
    inside: float
    band: str
    turns: int = 1
    placeholders_ok: bool = True
    well_ended: bool = True
    similarity: float | None = None

    @property
    def right(self) -> bool:
        return self.intent == self.wanted

    @property
    def on_topic(self) -> bool | None:
        """Whether the right thing was understood; None where nobody said what that is."""
        if self.wanted:
            return self.right
        return self.band == "out_of_scope" if self.scope == "out" else None


@dataclass(frozen=True, slots=True)
class Figures:
    """Scores over some rows; None where no row can tell. ``coverage``: at 5 % error.

    The last five say what becomes of a question: answered, answered with caution or handed on (of
    all rows), turned away though in scope (of those in scope), found to be none of our business (of
    those out of scope).
    """

    rows: int
    intent_accuracy: float | None
    scope_auroc: float | None
    ece: float | None
    placeholder_ok: float | None
    well_ended: float | None
    coverage: float | None
    answer_similarity: float | None
    answered: float | None
    with_caution: float | None
    handed_on: float | None
    turned_away: float | None
    out_of_scope_found: float | None


def figures(rows: Sequence[Judged], everyone: Sequence[Judged] = ()) -> Figures:
    """Scores of ``rows``. ``everyone``: the dataset they are from, whose rows are the other side of
    a scope that a kind of questions has only one side of."""
    labelled = [row for row in rows if row.wanted]
    right = [row.right for row in labelled]
    sure = [row.confidence for row in labelled]
    return Figures(
        rows=len(rows),
        intent_accuracy=_mean(right),
        scope_auroc=_known(_scope_auroc(rows, everyone or rows)),
        ece=_known(ece(sure, right)),
        placeholder_ok=_mean(row.placeholders_ok for row in rows),
        well_ended=_mean(row.well_ended for row in rows),
        coverage=_known(coverage_at_error(sure, right)),
        answer_similarity=_mean(row.similarity for row in rows if row.similarity is not None),
        answered=_mean(row.band == "answer" for row in rows),
        with_caution=_mean(row.band == "caution" for row in rows),
        handed_on=_mean(row.band == "hand_on" for row in rows),
        turned_away=_mean(row.band == "out_of_scope" for row in rows if row.scope == "in"),
        out_of_scope_found=_mean(row.band == "out_of_scope" for row in rows if row.scope == "out"),
    )


def _scope_auroc(rows: Sequence[Judged], everyone: Sequence[Judged]) -> float:
    """Questions in scope against questions out of scope. Whoever has some in scope is held against
    everyone's others: a handful of its own would say little."""
    inside = [row.inside for row in rows if row.scope == "in"]
    outside = [row.inside for row in rows if row.scope == "out"]
    if inside:
        outside = [row.inside for row in everyone if row.scope == "out"]
    elif outside:
        inside = [row.inside for row in everyone if row.scope == "in"]
    return auroc(inside, outside)


def by_kind(rows: Sequence[Judged]) -> dict[str, Figures]:
    """Figures of each kind of rows, in alphabetical order."""
    kinds = sorted({row.kind for row in rows})
    return {kind: figures([row for row in rows if row.kind == kind], rows) for kind in kinds}


def right_topic(rows: Sequence[Judged]) -> tuple[float | None, int]:
    """Share of the conversations of several turns that were understood, and how many there are."""
    found = [row.on_topic for row in rows if row.turns > 1 and row.on_topic is not None]
    return _mean(found), len(found)


def _mean(values: Iterable[float]) -> float | None:
    """Rounded to four places; None without values."""
    found = list(values)
    return round(sum(found) / len(found), 4) if found else None


def _known(value: float) -> float | None:
    return round(value, 4) if value == value else None


# -- near matches --------------------------------------------------------------------------------

#: Kinds of pairs that must never share an answer, whatever the words have in common.
_NEVER = re.compile(r"other_value:.*|opposite_request|sibling_intent|nlupp_slot_value_differs")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two questions. ``same``: one answer serves both. ``agree``: what else a near match asks for
    besides the cosine of their embeddings, equal values and the same intent."""

    kind: str
    same: bool
    cosine: float
    agree: bool


@dataclass(frozen=True, slots=True)
class Hits:
    """What a near match finds at the lowest threshold without a wrong hit.

    ``auroc``: the pairs that may share an answer against this kind; ``hits``: share of this kind
    that is found. ``pairs``, ``hit_rate``: all that may share an answer.
    """

    threshold: float
    pairs: int
    hit_rate: float | None
    auroc: Mapping[str, float | None]
    hits: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class NearMatches:
    """Figures by kind. ``raw``: by the cosine alone; ``agreed``: where intent and values agree."""

    pairs: Mapping[str, int]
    same: Mapping[str, bool]
    median_cosine: Mapping[str, float]
    agree: Mapping[str, float | None]
    raw: Hits
    agreed: Hits


def near_matches(pairs: Sequence[Pair]) -> NearMatches:
    """How well the cosine tells pairs that one answer serves from those it does not."""
    kinds = {kind: [pair for pair in pairs if pair.kind == kind] for kind in _kinds(pairs)}
    return NearMatches(
        pairs={kind: len(some) for kind, some in kinds.items()},
        same={kind: some[0].same for kind, some in kinds.items()},
        median_cosine={
            kind: round(float(np.median([pair.cosine for pair in some])), 4)
            for kind, some in kinds.items()
        },
        agree={kind: _mean(pair.agree for pair in some) for kind, some in kinds.items()},
        raw=_hits([(pair, pair.cosine) for pair in pairs]),
        # Where they do not agree there is no match, which is less than any cosine.
        agreed=_hits([(pair, pair.cosine if pair.agree else -2.0) for pair in pairs]),
    )


def _kinds(pairs: Sequence[Pair]) -> list[str]:
    """Those that may share an answer first."""
    return [kind for _, kind in sorted({(not pair.same, pair.kind) for pair in pairs})]


def _hits(scored: Sequence[tuple[Pair, float]]) -> Hits:
    same = [score for pair, score in scored if pair.same]
    threshold = max(
        (score for pair, score in scored if not pair.same and _NEVER.fullmatch(pair.kind)),
        default=-1.0,
    )
    auroc_by, hits = {}, {}
    for kind in _kinds([pair for pair, _ in scored]):
        scores = [score for pair, score in scored if pair.kind == kind]
        negative = not next(pair.same for pair, _ in scored if pair.kind == kind)
        auroc_by[kind] = _known(auroc(same, scores)) if negative else None
        hits[kind] = _mean(score > threshold for score in scores)
    rate = _mean(score > threshold for score in same)
    return Hits(round(max(threshold, -1.0), 5), len(same), rate, auroc_by, hits)


# -- answers -----------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")


def placeholders_ok(answer: str, values: Mapping[str, str], known: frozenset[str]) -> bool:
    """Only known placeholders, a user's value only where given, and no number from nowhere.

    ``values``: what the user gave, already filled into ``answer``; ``known``: the closed set.
    """
    names = set(_PLACEHOLDER.findall(answer))
    plain = _PLACEHOLDER.sub("", answer)
    for value in values.values():
        plain = plain.replace(value, "")
    plain = re.sub(r"(?m)^\s*\d+[.)]\s", "", plain)
    unasked = (names & USER_SLOTS) - values.keys()
    return names <= known and not unasked and "{{" not in plain and not re.search(r"\d{3,}", plain)


def well_ended(answer: str, finished: bool) -> bool:
    """The model chose to stop, at the end of a sentence, without going round in a loop."""
    text = answer.strip()
    return bool(text) and finished and text[-1] in ".!?:)" and not loops(text)


def loops(text: str, length: int = 6, times: int = 3) -> bool:
    """Whether some run of ``length`` words stands ``times`` times or more."""
    words = text.lower().split()
    seen: dict[tuple[str, ...], int] = {}
    for at in range(len(words) - length + 1):
        run = tuple(words[at : at + length])
        seen[run] = seen.get(run, 0) + 1
        if seen[run] >= times:
            return True
    return False


def similarity(one: str, other: str) -> float:
    """Character-trigram Jaccard, 0..1; 1 for equal texts."""
    grams = [
        {text[at : at + 3] for at in range(len(text) - 2)} for text in (_fold(one), _fold(other))
    ]
    return len(grams[0] & grams[1]) / max(1, len(grams[0] | grams[1]))


def _fold(text: str) -> str:
    return f"  {' '.join(text.lower().split())} "


# -- calibration -------------------------------------------------------------------------------


def softmax(logits: Floats) -> Floats:
    """Row-wise (N, K) probabilities."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    out: Floats = shifted / shifted.sum(axis=-1, keepdims=True)
    return out


def fit_temperature(logits: Floats, wanted: NDArray[np.int64]) -> float:
    """The temperature (0.3..5) with the least negative log-likelihood of ``wanted`` (N,)."""
    candidates = np.geomspace(0.3, 5, 120)
    rows = np.arange(len(wanted))

    def loss(temperature: float) -> float:
        return float(-np.log(softmax(logits / temperature)[rows, wanted] + 1e-12).mean())

    return float(min(candidates, key=loss))


def fit_scope(score_in: Floats, score_out: Floats) -> tuple[float, float]:
    """(temperature, bias) of p(in) = sigmoid(score / temperature + bias), both sides alike.

    Source: Platt 1999, by a grid: two parameters and no dependency.
    """
    best, found = float("inf"), (1.0, 0.0)
    for temperature in np.geomspace(0.3, 8, 40):
        for bias in np.linspace(-6, 6, 121):
            loss = float(
                np.logaddexp(0, -(score_in / temperature + bias)).mean()
                + np.logaddexp(0, score_out / temperature + bias).mean()
            )
            if loss < best:
                best, found = loss, (float(temperature), float(bias))
    return found


def sigmoid(x: ArrayLike) -> Floats:
    out: Floats = 1 / (1 + np.exp(-np.asarray(x, float)))
    return out


def threshold_for_error(confidence: Floats, correct: Floats, error: float) -> float:
    """The lowest confidence from which on the error rate stays within ``error`` (1.0 if none)."""
    order = np.argsort(-confidence, kind="stable")
    wrong = np.cumsum(1 - correct[order]) / np.arange(1, len(order) + 1)
    within = np.flatnonzero(wrong <= error)
    return float(confidence[order][within[-1]]) if len(within) else 1.0
