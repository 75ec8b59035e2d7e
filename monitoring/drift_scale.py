"""What all features of drift are measured on: turns as arrays, a scale for shares, how far chance
goes. Pure; see ``drift_figures`` for the features and ``drift_words`` for those of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Numbers = NDArray[np.int64]

#: The features, in the order they are shown.
NAMES = (
    *("intents", "confidence", "embedding", "out_of_scope", "degraded", "feedback", "language"),
    *("new_words", "new_subject"),
)
#: False alarms a month of hourly looks, all features together, if all were as the bootstrap thinks.
#: It knows one reference only, and a scale that is nearly normal: simulated, some twenty times as
#: many come, which is still well under one.
FALSE_ALARMS, LOOKS = 0.005, 720
#: Window sizes for which thresholds are fitted; between them 1/n is interpolated.
SIZES = (100, 250, 500)
#: One-sided, of one feature and one look.
Z = NormalDist().inv_cdf(1 - FALSE_ALARMS / LOOKS / len(NAMES))


@dataclass(frozen=True, slots=True)
class Turns:
    """N turns. *Shapes*: (N,) each but ``vectors`` (N, width); ``words``: N arrays of numbers.

    ``users``: whose, any numbers. ``intents``: empty where none was found; ``confidence``: nan
    likewise. ``tokens`` and ``chars``: of the question's words, nought where nobody counted.
    """

    users: Numbers
    intents: Sequence[str]
    confidence: Floats
    outside: Bools
    degraded: Bools
    down: Bools
    words: Sequence[Numbers]
    tokens: Floats
    chars: Floats
    vectors: Floats | None = None

    def __len__(self) -> int:
        return len(self.users)


@dataclass(frozen=True, slots=True)
class Score:
    """One feature of one window: how far, and from where on that is too far.

    ``now``, ``before``: shares (0..1) of the window and of the reference, where it is about such.
    """

    score: float
    threshold: float
    now: float | None = None
    before: float | None = None

    @property
    def breached(self) -> bool:
        return self.score > self.threshold

    @property
    def ratio(self) -> float:
        """1: as far as the threshold."""
        return max(0.0, self.score / self.threshold) if self.threshold > 0 else 0.0


def angle(count: Floats, of: Floats) -> Floats:
    """A share where its spread does not depend on itself. Source: Anscombe 1948."""
    found: Floats = np.arcsin(np.sqrt((count + 0.375) / (of + 0.75)))
    return found


def angle_of(count: float, of: float) -> float:
    return float(angle(np.array(count, float), np.array(of, float)))


def limit(sample: Floats, *, squares: bool = False) -> float:
    """What a sample's kind exceeds once in so many looks. ``squares``: it is a sum of such.

    Source: Wilson and Hilferty 1931: the cube root of a chi-square is nearly normal.
    """
    scaled = np.cbrt(sample) if squares else sample
    edge = float(scaled.mean() + Z * scaled.std(ddof=1))
    return edge**3 if squares else edge


def least(*sizes: float) -> float:
    """An angle that chance alone exceeds as rarely, whatever a reference has shown: one in which
    something never happened does not say that it cannot."""
    return float(Z * np.sqrt(sum(0.25 / max(1.0, size) for size in sizes)))


def between(limits: Sequence[float], size: int) -> float:
    """The limit for a window of that size; a statistic's spread is nearly linear in 1/n."""
    return float(np.interp(-1 / size, [-1 / at for at in SIZES], limits))


#: One user counts for at most this many turns of a window: one in a hundred of the largest.
TURNS_OF_ONE = 5
