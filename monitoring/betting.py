"""Is the canary worse than the active model? Asked after every minute, answered without regret.

Conversations that began about the same time form a block: one of the canary and those of the active
model since the one before. Were both models equal, the canary's could be any of its block. A bank
that bets on "worse" block by block is the evidence; how large it may grow by chance is known by
drawing the canary's conversation of each block by lot, ``LOTS`` times over. Of the chance to be
wrong, ``FALSE``, each conversation spends a little: most of it until as many were had as a canary
needs, the rest ever after. So it may be looked at as often as one likes, and since only
conversations of the same time are compared, rush hours and new topics hurt nobody.

Source: testing by betting (Shafer, JRSS A 184, 2021) for the bank; the bet on a hit is the
conditional likelihood of a 2x2 table under an odds ratio (Breslow and Day, 1980, ch. 7), the one on
a rank is linear in it; Lan and DeMets, Biometrika 70, 1983, for spending; Fisher's randomisation
for how far chance goes. Ville's bound alone is as valid and finds less: its chance is never spent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

#: One false roll-back in twenty canaries that are no worse, and lots to know that by.
FALSE, LOTS = 0.05, 2_000
#: A bank that exceeds this with a chance of at most its inverse, at any time (Ville): a canary that
#: fails at once is found by its first few conversations, of which lots say too little.
SURE = 1_000.0
#: Conversations of a canary at which most of the rest is spent, how much, and how late; what is
#: left is for ever after.
PLANNED, MOSTLY, LATE = 150, 0.95, 2.0
#: How the bank's money lies on what may be worse. What is rare gets more, for it is found later.
STAKES = {
    "errors": 0.8, "degraded": 0.08, "thumbs_down": 0.04, "first_word": 0.04, "duration": 0.04
}  # fmt: skip
#: What happens to a conversation or not; the rest are times, compared by rank.
HITS = frozenset({"errors", "degraded", "thumbs_down"})
#: Worse by how much: odds of a hit, and strength of the bet on a late rank. A mixture of each.
ODDS = (2.0, 4.0, 8.0)
TILTS = (0.2, 0.5, 0.8)
#: A canary may take so much longer before it counts: less is nothing a reader notices.
SLACK = 1.1


@dataclass(slots=True)
class Talk:
    """What is known of one conversation since the canary began; milliseconds are means."""

    canary: bool
    errors: bool = False
    degraded: bool = False
    thumbs_down: bool = False
    first_word: list[float] = field(default_factory=list)
    duration: list[float] = field(default_factory=list)

    def value(self, name: str) -> float | None:
        found = getattr(self, name)
        if isinstance(found, list):
            return sum(found) / len(found) if found else None
        return float(found)


@dataclass(frozen=True, slots=True)
class Verdict:
    """``bank``: times its money, after so many ``blocks``; by ``STAKES``' names in ``banks``;
    ``alarm``: what chance alone does not make of it. Shares of conversations, means in
    milliseconds, of (active, canary)."""

    conversations: tuple[int, int]
    blocks: int
    worse: bool
    bank: float
    alarm: float
    banks: dict[str, float]
    means: dict[str, tuple[float | None, float | None]]

    @property
    def suspect(self) -> str:
        """Where the bank won most: what was only staked and came back says nothing."""
        return max(self.banks, key=lambda name: STAKES[name] * (self.banks[name] - 1))


def judge(talks: Iterable[Talk]) -> Verdict:
    """What conversations, in the order they began, say of the canary among them.

    An alarm is not taken back by what came later.
    """
    seen = list(talks)
    game, chance, number = _Game(), np.random.default_rng(0), 0
    for number, block in enumerate(blocks(seen), 1):
        game.bet(prices(block), chance.random(LOTS))
        if number in _LOOKS and game.look(number):
            break
    counted = sum(not talk.canary for talk in seen), sum(talk.canary for talk in seen)
    means = {name: _means(seen, name) for name in STAKES}
    return Verdict(counted, number, game.worse, game.bank, game.alarm, game.banks, means)


def spent(number: int) -> float:
    """The chance to be wrong that is spent when a canary has had so many conversations."""
    whole = FALSE - 1 / SURE
    if number <= PLANNED:
        return whole * MOSTLY * math.pow(number / PLANNED, LATE)
    return whole * (1 - (1 - MOSTLY) * PLANNED / number)


def _looks() -> Iterator[int]:
    """The numbers of conversations after which the bank is counted: never one in twenty apart."""
    number = 1
    while number < 100_000:
        yield number
        number += max(1, number // 20)


_LOOKS = frozenset(_looks())
#: Of each bet, by what may be worse and then by strength.
_MONEY = np.repeat([stake / len(ODDS) for stake in STAKES.values()], len(ODDS))


class _Game:
    """The bank, and what became of it in each lot. *Shapes*: ``_logs`` (1 + LOTS, bets), the
    real one first."""

    def __init__(self) -> None:
        self._logs = np.zeros((1 + LOTS, len(_MONEY)))
        self._out = np.zeros(1 + LOTS, bool)
        self.worse, self.alarm = False, SURE

    def bet(self, logs: Floats, chance: Floats) -> None:
        """*Shapes*: ``logs`` (members, bets) as of ``prices``; ``chance`` (LOTS,)."""
        drawn = (chance * len(logs)).astype(np.int64)
        self._logs[0] += logs[0]
        self._logs[1:] += logs[drawn]

    def look(self, number: int) -> bool:
        """Whether the bank is beyond what lots reach that have not been out before."""
        banks = np.exp(self._logs.clip(max=600)) @ _MONEY
        left = int(spent(number) * LOTS) - int(self._out[1:].sum())
        self.alarm = min(SURE, _edge(banks[1:][~self._out[1:]], left))
        self._out |= banks > self.alarm
        self.worse = bool(self._out[0])
        return self.worse

    @property
    def bank(self) -> float:
        return float(np.exp(self._logs[0].clip(max=600)) @ _MONEY)

    @property
    def banks(self) -> dict[str, float]:
        found = np.exp(self._logs[0].clip(max=600)).reshape(len(STAKES), -1).mean(axis=1)
        return dict(zip(STAKES, found.tolist(), strict=True))


def _edge(banks: Floats, left: int) -> float:
    """A value that at most so many of the lots are above."""
    if left < 1:
        return float("inf")
    return float(np.partition(banks, len(banks) - left - 1)[len(banks) - left - 1])


# --- Blocks and bets -----------------------------------------------------------------------------


def blocks(talks: Iterable[Talk]) -> Iterator[list[Talk]]:
    """A canary's conversation, then the active model's since the block before."""
    waiting: list[Talk] = []
    mine: list[Talk] = []
    for talk in talks:
        (mine if talk.canary else waiting).append(talk)
        if mine and waiting:
            yield [*mine[:1], *waiting]
            waiting, mine = [], mine[1:]


def prices(block: Sequence[Talk]) -> Floats:
    """What each bet would pay for 1, as a logarithm, were that member the canary's.

    The mean payment is 1. *Shapes*: (members, bets).
    """
    paid = np.ones((len(block), len(STAKES), len(ODDS)))
    for at, name in enumerate(STAKES):
        values = _values(block, name)
        known = np.isfinite(values)
        if known[0] and known.sum() > 1:
            bet = fair_hits if name in HITS else fair_ranks
            paid[known, at] = bet(values[known])
    return np.log(paid.reshape(len(block), -1))


def _values(block: Sequence[Talk], name: str) -> Floats:
    """nan where it was not measured. A canary's time counts without its slack."""
    values = np.array([talk.value(name) for talk in block], float)
    if name not in HITS:
        values[0] /= SLACK
    return values


def fair_hits(hit: Floats) -> Floats:
    """Of n conversations with k hits each is as likely the canary: then the mean of this is 1.

    *Shapes*: (n, odds).
    """
    n, hits, odds = len(hit), hit.sum(), np.array(ODDS)
    found: Floats = np.where(hit[:, None] > 0, odds, 1.0) * n / (odds * hits + n - hits)
    return found


def fair_ranks(took: Floats) -> Floats:
    """The same, betting that the canary is rather one of the slowest: 1 + tilt at the last.

    *Shapes*: (n, tilts).
    """
    ordered = np.sort(took)
    slower = np.searchsorted(ordered, took, "left") + np.searchsorted(ordered, took, "right") - 1
    found: Floats = 1 + np.outer(slower / (len(took) - 1) - 1, TILTS)
    return found


def _means(talks: Sequence[Talk], name: str) -> tuple[float | None, float | None]:
    sides = ([t.value(name) for t in talks if t.canary is canary] for canary in (False, True))
    known = [[value for value in side if value is not None] for side in sides]
    active, canary = (sum(side) / len(side) if side else None for side in known)
    return active, canary
