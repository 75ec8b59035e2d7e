"""New words: how many, and whether many users share one. Pure; words are numbers.

A word is known once several users have used it, so nobody alone makes a word known, and no name of
one user is kept. How many new words are usual is what windows of the reference show beside its
rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from monitoring.drift_scale import (
    SIZES,
    Bools,
    Floats,
    Numbers,
    Score,
    Turns,
    Z,
    angle_of,
    between,
    least,
)

#: Splits of the reference for each size of window.
SPLITS = 200
#: A word of one user may be a name.
KNOWN_FROM_USERS = 2

Limits = dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class _Spoken:
    """Who said which words. *Shapes*: ``words``, ``owner`` (every word spoken,); the pairs of user
    and word, each once, (pairs,)."""

    users: int
    numbers: Numbers
    words: Numbers
    owner: Numbers
    pair_user: Numbers
    pair_word: Numbers

    @classmethod
    def of(cls, turns: Turns) -> _Spoken:
        names, which = np.unique(turns.users, return_inverse=True)
        numbers, words = np.unique(_joined(turns.words), return_inverse=True)
        owner = np.repeat(which, [len(some) for some in turns.words])
        kinds = max(1, len(numbers))
        pair_user, pair_word = np.divmod(np.unique(owner * kinds + words), kinds)
        return cls(len(names), numbers, words, owner, pair_user, pair_word)

    def users_of_words(self, inside: Bools) -> Numbers:
        """How many of those users said each word. *Shapes*: ``inside`` (users,) -> (words,)."""
        said = self.pair_word[inside[self.pair_user]]
        return np.bincount(said, minlength=len(self.numbers))


def _joined(words: Sequence[Numbers]) -> Numbers:
    return np.concatenate(words) if words else np.empty(0, np.int64)


def known(turns: Turns) -> frozenset[int]:
    """The words that several users have used."""
    spoken = _Spoken.of(turns)
    said = spoken.users_of_words(np.ones(spoken.users, bool))
    return frozenset(spoken.numbers[said >= KNOWN_FROM_USERS].tolist())


def _angles(spoken: _Spoken, inside: Bools, new: Bools) -> tuple[float, float]:
    """Of what those users said: the share of new words, and the share of users who said the most
    frequent of these."""
    said = spoken.words[inside[spoken.owner]]
    most = max(spoken.users_of_words(inside)[new], default=0)
    return angle_of(int(new[said].sum()), len(said)), angle_of(int(most), int(inside.sum()))


def scores(window: Turns, words: frozenset[int], limits: Limits) -> dict[str, Score]:
    """Both features of a window; none of one without words."""
    spoken = _Spoken.of(window)
    if not len(spoken.words) or "new_words" not in limits:
        return {}
    everybody = np.ones(spoken.users, bool)
    new = ~np.isin(spoken.numbers, np.fromiter(words, np.int64))
    found = _angles(spoken, everybody, new)
    most = max(spoken.users_of_words(everybody)[new], default=0)
    now = float(new[spoken.words].mean()), float(most) / spoken.users
    return {
        name: Score(score, between(limits[name], len(window)), share)
        for name, score, share in zip(("new_words", "new_subject"), found, now, strict=True)
    }


def limits_of(reference: Turns, chance: np.random.Generator) -> Limits:
    """For each of ``SIZES``: the spread is of windows of that size, the mean of the smallest, whose
    rest is nearly the whole reference."""
    spoken = _Spoken.of(reference)
    samples = [_splits(spoken, len(reference), size, chance) for size in SIZES]
    mean = float(samples[0][:, 0].mean())
    shares = []
    for size, sample in zip(SIZES, samples, strict=True):
        chancy = least(size * len(spoken.words) / max(1, len(reference)))
        shares.append(mean + max(Z * float(sample[:, 0].std(ddof=1)), chancy))
    subjects = [float(s[:, 1].mean() + Z * s[:, 1].std(ddof=1)) for s in samples]
    return {"new_words": tuple(shares), "new_subject": tuple(subjects)}


def _splits(spoken: _Spoken, turns: int, size: int, chance: np.random.Generator) -> Floats:
    """Windows of the reference beside its rest. *Shapes*: (SPLITS, 2)."""
    draws = max(1, round(min(size, turns / 3) * spoken.users / max(1, turns)))
    all_of = spoken.users_of_words(np.ones(spoken.users, bool))
    found = []
    for _ in range(SPLITS):
        inside = np.zeros(spoken.users, bool)
        inside[chance.choice(spoken.users, draws, replace=False)] = True
        rest = all_of - spoken.users_of_words(inside)
        found.append(_angles(spoken, inside, rest < KNOWN_FROM_USERS))
    return np.array(found, float)
