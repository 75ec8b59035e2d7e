"""What all features of drift are measured on: turns as arrays, a scale for shares, how far chance
goes. Pure; see ``drift_figures`` for the features and ``drift_words`` for those of words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    ``hours``: when, since the epoch.
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
    hours: Floats | None = None

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


#: One user counts for at most this many turns of a window: one in a hundred of the largest. Where
#: too few ask to fill a window so, for more, but never for a larger share than this of what counts.
TURNS_OF_ONE, SHARE_OF_ONE = 5, 0.05


def bound_of(asked: Iterable[int], most: int) -> int:
    """How many turns of one user count, so that ``most`` are reached if that can be.

    ``asked``: turns of each user.
    """
    each = np.array(list(asked), int)
    bound = TURNS_OF_ONE
    while _counting(each, bound) < most:
        if bound + 1 > SHARE_OF_ONE * min(most, _counting(each, bound + 1)):
            break
        bound += 1
    return bound


def _counting(each: NDArray[np.int_], bound: int) -> int:
    return int(np.minimum(each, bound).sum())


# --- Hours ---------------------------------------------------------------------------------------

#: A window that takes fewer hours may be all of one time of day; of one kind of day.
PART_OF_DAY, PART_OF_WEEK = 9.0, 96.0
#: Turns of a time below which it tells too little of itself.
LEAST_STRETCH = 60


def stretches(turns: Turns, size: int, pace: float) -> list[Bools]:
    """The turns that a window of ``size`` may be like: all, or those of one time of day or week.

    What is asked at night or on Sundays is no drift, though it is not what is asked on the whole.
    *Units*: ``pace`` in turns an hour, 0 if unknown. *Shapes*: (N,) each.
    """
    everything = np.ones(len(turns), bool)
    if turns.hours is None or pace <= 0 or size / pace >= PART_OF_WEEK:
        return [everything]
    weekday = (turns.hours // 24 + 3) % 7  # the epoch began on a Thursday
    time = (weekday >= 5).astype(int)
    if size / pace < PART_OF_DAY:
        time = time * 8 + (turns.hours % 24 // 3).astype(int)
    parts = [time == which for which in np.unique(time)]
    return [everything, *(part for part in parts if part.sum() >= LEAST_STRETCH)]
