"""The canary beside the active model: what its rows say, and the roll-back if it is worse.

A conversation belongs to the canary by its id, not by who wrote: one that the canary should have
answered and could not counts against it. The test is ``betting``'s.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

from django.conf import settings

from assistant import registry
from assistant.models import ModelVersion
from assistant.registry import State
from conversations.models import Message
from monitoring import metrics
from monitoring.betting import HITS, Talk, Verdict, judge
from monitoring.gates import Gate

log = logging.getLogger(__name__)

#: While the bank is above this a canary is watched on, though it has answered enough.
DOUBT = 2.0
#: Every process has noticed the move, and has loaded the canary or failed to.
SETTLE = timedelta(seconds=30)
#: The newest answers looked at. *Units*: answers.
MOST_ROWS = 50_000
#: Reasons that say the model broke, not that it was unsure.
_BROKEN = {"error", "timeout", "breaker_open", "overload"}


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
    """The answers of models, or of whoever stood in for one, beside the same active model; oldest
    first."""
    active = registry.active()
    began = [version.changed_at, *([active.changed_at] if active is not None else [])]
    answers = Message.objects.filter(
        role=Message.Role.ASSISTANT, created_at__gte=max(began) + SETTLE
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
        "evidence": {"all": _short(verdict.bank), "alarm": _short(verdict.alarm),
                     **{name: _short(bank) for name, bank in verdict.banks.items()}},
        **{name: {"active": _short(mean[0]), "canary": _short(mean[1])}
           for name, mean in verdict.means.items()},
    }  # fmt: skip


def _told(verdict: Verdict) -> str:
    name = verdict.suspect
    active, canary = verdict.means[name]
    hit = name in HITS
    shown = [
        "unknown" if value is None else f"{value:.1%}" if hit else f"{value:.0f} ms"
        for value in (canary, active)
    ]
    of = " of conversations" if hit else ""
    return f"{name.replace('_', ' ')} {shown[0]}{of} against {shown[1]}"


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
