"""How answers and confidences are judged: pure functions over numbers and texts.

Shared by training (calibration, model card) and by evaluation in the product. No files, no models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


def ece(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins; nan without rows.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks".
    """
    sure, right = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(sure):
        return float("nan")
    which = np.minimum((sure * bins).astype(int), bins - 1)
    gaps = [
        abs(right[which == at].mean() - sure[which == at].mean()) * (which == at).mean()
        for at in range(bins)
        if (which == at).any()
    ]
    return float(sum(gaps))


def coverage_at_error(confidence: ArrayLike, correct: ArrayLike, error: float = 0.05) -> float:
    """Largest share of rows, most confident first, whose error rate stays within ``error``."""
    sure, right = np.asarray(confidence, float), np.asarray(correct, float)
    if not len(sure):
        return float("nan")
    wrong = 1 - right[np.argsort(-sure, kind="stable")]
    kept = np.arange(1, len(wrong) + 1)
    within = np.flatnonzero(np.cumsum(wrong) / kept <= error)
    return float((within[-1] + 1) / len(wrong)) if len(within) else 0.0


# -- answers -----------------------------------------------------------------------------------

_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
#: Values that only the user can have given; an answer that shows one unasked has invented it.
USER_SLOTS = frozenset({"Order Number", "Invoice Number", "Amount", "Date", "Email", "Phone"})


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
