"""Which of several heaps of sentences a question belongs to: naive Bayes over words, on the spot.

Counting is all the learning there is, so heaps may change with every save by staff. What nobody
wrote a rule for is a heap too. Pure: knows no rules and no database.

Source: multinomial naive Bayes with inverse document frequency and length normalisation as weights
(Rennie et al., "Tackling the Poor Assumptions of Naive Bayes Text Classifiers", 2003, section 4).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from assistant.modelkit import corpus
from assistant.modelkit.labels import OUT_OF_SCOPE
from fallback import words
from fallback.rules import worded

Floats = NDArray[np.float64]

_NUMBER = re.compile(r"\d+")
#: Letters at a word's beginning that stand for all its forms: cancel, cancelled, cancelling.
_STEM = 5
#: Added to every count, and how much a difference of one in the score says: chosen among 0.1..0.6
#: and 1..6, by the shipped wordings in five folds and by what is right on development rows.
_ALPHA, _SHARPNESS = 0.3, 1.5
#: A heap of few sentences counts as this many times larger, at most.
_MOST_WEIGHT = 4.0
_INSIDE = (
    *(f"natural_{part}" for part in "abcd"),
    *("hard_negatives", "rude", "plain", "smalltalk"),
)
_OUTSIDE = ("out_of_scope", "out_of_scope_b", "out_of_scope_c", "injection")


@dataclass(frozen=True, slots=True)
class Heap:
    """In how many of ``texts`` sentences each feature stands."""

    counts: Counter[str]
    texts: int

    def __add__(self, other: Heap) -> Heap:
        return Heap(self.counts + other.counts, self.texts + other.texts)


def heap(sentences: Iterable[str]) -> Heap:
    """The heap of these sentences, as people write them."""
    found = [features(worded(sentence)) for sentence in sentences]
    return Heap(Counter(feature for one in found for feature in one), len(found))


def shipped(intent: str) -> Heap:
    """The wordings this project wrote for that intent; empty for a name it does not know."""
    return _shipped().get(intent, Heap(Counter(), 0))


def intents() -> frozenset[str]:
    """The intents that ``shipped`` has sentences for."""
    return frozenset(_shipped())


@cache
def _shipped() -> dict[str, Heap]:
    texts: dict[str, list[str]] = {OUT_OF_SCOPE: []}
    for name in _INSIDE:
        for row in corpus.written(name):
            texts.setdefault(row["intent"], []).append(row["text"])
    for name in _OUTSIDE:
        texts[OUT_OF_SCOPE] += [row["text"] for row in corpus.written(name)]
    return {intent: heap(said) for intent, said in texts.items()}


def features(text: str) -> set[str]:
    """What counts of a worded text: words, their beginnings, neighbours, both ends, and ideas."""
    said = _NUMBER.sub("0", text).split()
    pairs = [f"{one} {other}" for one, other in pairwise(said)]
    ends = [f"<{' '.join(said[:1])}", f"<{' '.join(said[:2])}", f"{' '.join(said[-2:])}>"]
    meant = words.ideas(text)
    ideas = [f"={idea}" for idea in meant.words] if meant is not None else []
    return {*said, *pairs, *ends, *ideas, *(f"^{word[:_STEM]}" for word in said)}


class Learned:
    """Heaps of sentences, ready to be compared with a question."""

    def __init__(self, heaps: Sequence[Heap]) -> None:
        self._count = len(heaps)
        self._number: dict[str, int] = {}
        number = self._number
        features = [
            np.array([number.setdefault(name, len(number)) for name in one.counts], dtype=np.intp)
            for one in heaps
        ]
        counts = [np.array([*one.counts.values()], dtype=float) for one in heaps]
        totals = np.array([max(1.0, found.sum()) for found in counts])
        weights = np.clip(np.sqrt(np.median(totals) / totals), 1.0, _MOST_WEIGHT)
        # A handful of sentences must not win by what nobody wrote, so none counts as very small.
        totals = np.maximum(totals * weights, np.median(totals * weights) / 3)
        self._base = math.log(_ALPHA) - np.log(totals + _ALPHA * len(number))
        self._rarity = _rarity(features, counts, len(number), sum(one.texts for one in heaps))
        # All a feature adds to any heap lies between two of ``_starts``.
        feature = np.concatenate(features)
        order = np.argsort(feature, kind="stable")
        self._starts = np.searchsorted(feature[order], np.arange(len(number) + 1))
        self._heaps = np.repeat(np.arange(len(heaps)), [len(f) for f in features])[order]
        weighed = [found * weight for found, weight in zip(counts, weights, strict=True)]
        self._gains = np.log1p(np.concatenate(weighed)[order] / _ALPHA)

    def chances(self, text: str) -> Floats:
        """The chance that a worded text belongs to each heap: (heaps,) float64, their sum is 1."""
        known = [self._number[name] for name in features(text) if name in self._number]
        if not known:
            return np.full(self._count, 1 / self._count)
        rarity = self._rarity[known]
        rarity /= max(1e-9, float(np.linalg.norm(rarity)))
        spans = [slice(self._starts[at], self._starts[at + 1]) for at in known]
        gains = [self._gains[span] * weight for span, weight in zip(spans, rarity, strict=True)]
        at = np.concatenate([self._heaps[span] for span in spans])
        scores = np.bincount(at, np.concatenate(gains), self._count) + self._base * rarity.sum()
        raised = np.exp(_SHARPNESS * (scores - scores.max()))
        found: Floats = raised / raised.sum()
        return found


def _rarity(
    features: Sequence[NDArray[np.intp]], counts: Sequence[Floats], size: int, texts: int
) -> Floats:
    """The inverse document frequency of each feature: (size,) float64."""
    stands = np.bincount(np.concatenate(features), np.concatenate(counts), size)
    found: Floats = np.log((1 + texts) / (1 + stands))
    return found
