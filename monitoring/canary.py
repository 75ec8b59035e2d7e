"""Is the canary worse than the active model? Asked after every minute, answered without regret.

Looking again and again at a usual test raises an alarm sooner or later whatever is true. This one
may be looked at as often as one likes. Conversations that began about the same time form a block:
one of the canary and those of the active model since the one before. Were both models equal, the
canary's could be any of its block, so a bet on what it is has a fair price: the bank that bets on
"worse" grows to ``ALARM`` times itself with a chance of at most ``1 / ALARM``, at any time. Since
only conversations of the same time are compared, rush hours and new topics hurt nobody.

A conversation belongs to the canary by its id, not by who wrote: one that the canary should have
answered and could not counts against it.

Source: e-values and testing by betting (Shafer, "Testing by betting", JRSS A 184, 2021; Ramdas et
al., "Game-theoretic statistics and safe anytime-valid inference", Statistical Science 38, 2023);
Ville's inequality for the bound; the bet on a hit is the conditional likelihood of a 2x2 table
under an odds ratio (Breslow and Day, 1980, ch. 7), the one on a rank is linear in it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from django.conf import settings

from assistant import registry
from assistant.models import ModelVersion
from assistant.registry import State
from conversations.models import Message
from monitoring import metrics
from monitoring.gates import Gate

log = logging.getLogger(__name__)

#: One false roll-back in twenty canaries that are no worse.
ALARM = 20.0
#: While the bank is above this a canary is watched on, though it has answered enough.
DOUBT = 2.0
#: How the bank's money lies on what may be worse. What is rare gets more, for it is found later.
STAKES = {"errors": 0.5, "degraded": 0.2, "thumbs_down": 0.1, "first_word": 0.1, "duration": 0.1}
#: Worse by how much: odds of a hit, and strength of the bet on a late rank. A mixture of each.
ODDS = (2.0, 4.0, 8.0)
TILTS = (0.2, 0.5, 0.8)
#: A canary may take so much longer before it counts: less is nothing a reader notices.
SLACK = 1.1
#: Every process has noticed the move, and has loaded the canary or failed to.
SETTLE = timedelta(seconds=30)
#: The newest answers looked at. *Units*: answers.
MOST_ROWS = 50_000
#: Reasons that say the model broke, not that it was unsure.
_BROKEN = {"error", "timeout", "breaker_open", "overload"}


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
    """``bank``: times its money; by ``STAKES``' names in ``banks``. Shares of conversations, means
    in milliseconds, of (active, canary)."""

    conversations: tuple[int, int]
    bank: float
    banks: dict[str, float]
    means: dict[str, tuple[float | None, float | None]]

    @property
    def worse(self) -> bool:
        return self.bank >= ALARM

    @property
    def suspect(self) -> str:
        return max(self.banks, key=lambda name: STAKES[name] * self.banks[name])


# -- the bets, pure --------------------------------------------------------------------------------


def judge(talks: Iterable[Talk]) -> Verdict:
    """What conversations, in the order they began, say of the canary among them.

    An alarm is not taken back by what came later.
    """
    seen = list(talks)
    games = {name: _Game(ODDS if name in _HITS else TILTS) for name in STAKES}
    bank = 1.0
    for block in _blocks(seen):
        for name, game in games.items():
            game.bet(_fair_hit if name in _HITS else _fair_rank, *_values(block, name))
        bank = sum(STAKES[name] * game.bank for name, game in games.items())
        if bank >= ALARM:
            break
    counted = sum(not talk.canary for talk in seen), sum(talk.canary for talk in seen)
    banks = {name: game.bank for name, game in games.items()}
    return Verdict(counted, bank, banks, {name: _means(seen, name) for name in STAKES})


_HITS = frozenset({"errors", "degraded", "thumbs_down"})


class _Game:
    """A bank that is spread over several strengths of the same bet."""

    def __init__(self, strengths: Sequence[float]) -> None:
        self._logs = dict.fromkeys(strengths, 0.0)

    def bet(self, price: Any, mine: float | None, others: Sequence[float]) -> None:
        if mine is None or not others:
            return
        for strength in self._logs:
            self._logs[strength] += math.log(price(strength, mine, others))

    @property
    def bank(self) -> float:
        logs = [min(log_, 600.0) for log_ in self._logs.values()]
        return sum(map(math.exp, logs)) / len(logs)


def _fair_hit(odds: float, mine: float, others: Sequence[float]) -> float:
    """What one gets back for 1, betting that a hit in the block is rather the canary's.

    Of n conversations with k hits each is as likely the canary: then the mean of this is 1.
    """
    n, hits = len(others) + 1, mine + sum(others)
    return (odds if mine else 1.0) * n / (odds * hits + n - hits)


def _fair_rank(tilt: float, mine: float, others: Sequence[float]) -> float:
    """The same, betting that the canary is rather one of the slowest: 1 + tilt at the last."""
    mine /= SLACK
    slower = sum((mine > other) + (mine == other) / 2 for other in others)
    return 1 + tilt * (2 * slower / len(others) - 1)


def _blocks(talks: Iterable[Talk]) -> Iterator[list[Talk]]:
    """A canary's conversation behind the active model's since the block before."""
    waiting: list[Talk] = []
    mine: list[Talk] = []
    for talk in talks:
        (mine if talk.canary else waiting).append(talk)
        if mine and waiting:
            yield [*mine[:1], *waiting]
            waiting, mine = [], mine[1:]


def _values(block: Sequence[Talk], name: str) -> tuple[float | None, list[float]]:
    mine, *others = (talk.value(name) for talk in block)
    return mine, [value for value in others if value is not None]


def _means(talks: Sequence[Talk], name: str) -> tuple[float | None, float | None]:
    sides = ([t.value(name) for t in talks if t.canary is canary] for canary in (False, True))
    known = [[value for value in side if value is not None] for side in sides]
    active, canary = (sum(side) / len(side) if side else None for side in known)
    return active, canary


# -- rows ------------------------------------------------------------------------------------------


def gate(version: ModelVersion) -> Gate:
    """What the answers since it became the canary say. Sync: two statements."""
    if version.state != State.CANARY:
        return Gate(None, f"{version.label} is not the canary, so no conversations were compared.")
    verdict = judge(talks_of(version))
    return _gate(version, verdict)


def watch() -> Gate | None:
    """Look at the canary, if there is one; take it back if it is worse. For the timetable."""
    version = registry.canary()
    if version is None:
        return None
    found = gate(version)
    registry.note_gate(version, "canary", found.kept())
    if found.passed is False:
        _take_back(version, found)
    return found


def talks_of(version: ModelVersion) -> list[Talk]:
    """Every conversation in which a model was asked since then, in the order of its first turn."""
    found: dict[Any, Talk] = {}
    for row in _rows(version):
        key = row["conversation_id"]
        if key not in found:
            mine = registry.gets_canary(str(key), version.sha256, version.canary_percent)
            found[key] = Talk(mine)
        _add(found[key], row, version.label)
    return list(found.values())


def _rows(version: ModelVersion) -> list[dict[str, Any]]:
    """The answers of models, or of whoever stood in for one; oldest first."""
    began = version.changes.filter(to_state=State.CANARY).values_list("at", flat=True).first()
    answers = Message.objects.filter(
        role=Message.Role.ASSISTANT, created_at__gte=(began or version.changed_at) + SETTLE
    )
    answers = answers.exclude(status=Message.Status.STREAMING).filter(author="")
    answers = answers.exclude(route__in=[Message.Route.REVIEWED, Message.Route.CACHE])
    columns = ("conversation_id", "status", "route", "degraded_reason", "model", "ttft_ms",
               "duration_ms", "feedback__value")  # fmt: skip
    return list(answers.order_by("-created_at").values(*columns)[:MOST_ROWS])[::-1]


def _add(talk: Talk, row: dict[str, Any], canary: str) -> None:
    by_model = row["route"] == Message.Route.MODEL
    stood_in = talk.canary and by_model and row["model"] != canary
    failed = row["status"] == Message.Status.FAILED or row["degraded_reason"] in _BROKEN
    talk.errors |= failed or stood_in
    talk.degraded |= bool(row["degraded_reason"]) and not failed
    talk.thumbs_down |= row["feedback__value"] == "down"
    if by_model and row["status"] == Message.Status.COMPLETE and not stood_in:
        for name, value in (("first_word", row["ttft_ms"]), ("duration", row["duration_ms"])):
            if value is not None:
                getattr(talk, name).append(value)


def _gate(version: ModelVersion, verdict: Verdict) -> Gate:
    needed = settings.ASSISTANT["CANARY"]["CONVERSATIONS"]
    had, figures = verdict.conversations[1], _figures(verdict)
    if verdict.worse:
        return Gate(False, f"{version.label} is worse than the active model: {_told(verdict)}.",
                    figures)  # fmt: skip
    if had < needed:
        why = f"{had} of {needed} conversations were answered; nothing is wrong so far."
        return Gate(None, why, figures)
    if verdict.bank > DOUBT or not verdict.conversations[0]:
        why = f"{had} conversations leave a doubt: {_told(verdict)}. It is watched on."
        return Gate(None, why, figures)
    return Gate(True, f"{had} conversations: no worse than the active model.", figures)


def _take_back(version: ModelVersion, found: Gate) -> None:
    try:
        registry.move(version, State.REJECTED, why=found.why)
    except registry.RegistryError as error:  # somebody was faster
        log.info("the canary was not taken back: %s", error)
        return
    metrics.ROLLED_BACK.inc()
    log.error("canary %s was taken back: %s", version.label, found.why)


def _figures(verdict: Verdict) -> dict[str, Any]:
    active, canary = verdict.conversations
    return {
        "conversations": {"active": active, "canary": canary},
        "evidence": {"all": _short(verdict.bank), "alarm": ALARM,
                     **{name: _short(bank) for name, bank in verdict.banks.items()}},
        **{name: {"active": _short(mean[0]), "canary": _short(mean[1])}
           for name, mean in verdict.means.items()},
    }  # fmt: skip


def _told(verdict: Verdict) -> str:
    name = verdict.suspect
    active, canary = verdict.means[name]
    hit = name in _HITS
    shown = [
        "unknown" if value is None else f"{value:.1%}" if hit else f"{value:.0f} ms"
        for value in (canary, active)
    ]
    of = " of conversations" if hit else ""
    return f"{name.replace('_', ' ')} {shown[0]}{of} against {shown[1]}"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
