"""What windows of turns are compared to, and that whoever answers now has a reference of its own.

Staff make one of any time; else the first turns of a version that became active become one, and
once more when a week of them is there: only then every hour and day is known. Until there are
enough, the former reference judges what does not depend on the model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from assistant import registry
from conversations.models import Message
from monitoring import drift_figures, windows
from monitoring.canary import SETTLE
from monitoring.models import DriftReference

log = logging.getLogger(__name__)

LEAST, MOST = 300, 2_000
#: A reference that nobody chose spans at least this, and is made anew when it spans a week.
LEAST_SPAN, WEEK = timedelta(days=1), timedelta(days=7)
#: Until then this is how many times as far as usual is too far.
YOUNG = 1.5
#: Without a registered version: how old turns may be.
RECENT = timedelta(days=30)


class DriftError(ValueError):
    """There is nothing to compare. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Collecting:
    """What there is of a reference to come. ``model``: empty if no version is registered."""

    model: str
    turns: int
    hours: float

    def __str__(self) -> str:
        whose = f" of {self.model}" if self.model else ""
        if self.turns < LEAST:
            return f"collecting: {self.turns} of {LEAST} turns{whose}"
        day = LEAST_SPAN / timedelta(hours=1)
        return f"collecting: {min(self.hours, day):.0f} of {day:.0f} hours{whose}"


def current() -> DriftReference | None:
    return DriftReference.objects.filter(active=True).first()


def just_before(at: datetime) -> datetime:
    """So that a span which begins there holds the turn of that very moment."""
    return at - timedelta(microseconds=1)


def reference(from_at: datetime | None, to_at: datetime | None) -> DriftReference:
    """The turns between the two, or the newest, as the new reference. Raises: DriftError."""
    rows, pace = windows.spread(from_at, to_at, MOST)
    if len(rows) < LEAST:
        raise DriftError(
            f"A reference needs {LEAST} turns and there are {len(rows)} that count (a user counts "
            f"for {drift_figures.TURNS_OF_ONE}, or for {drift_figures.SHARE_OF_ONE:.0%} of all). "
            "Choose a longer time, or wait."
        )
    return _stored(rows, pace)


def _stored(rows: Sequence[dict[str, Any]], pace: float, *, grows: bool = False) -> DriftReference:
    """``grows``: it is made anew when it spans a week."""
    window = windows.window_of(rows)
    young = window.to_at - window.from_at < WEEK
    fitted = drift_figures.fit(window.turns, pace=pace, margin=YOUNG if young else 1.0)
    data = fitted.as_json() | {"space": window.space, "grows": grows and young}
    with transaction.atomic():
        DriftReference.objects.filter(active=True).update(active=False)
        return DriftReference.objects.create(
            model=_model_of(window.to_at),
            turns=len(rows),
            data=data,
            from_at=window.from_at,
            to_at=window.to_at,
        )


def _model_of(until: datetime) -> str:
    """The model that gave the last answer of then."""
    rows = Message.objects.filter(created_at__lte=until, route=Message.Route.MODEL)
    return rows.order_by("-created_at").values_list("model", flat=True).first() or ""


# --- By itself -----------------------------------------------------------------------------------


def owed() -> bool:
    """Whether nobody made a reference since who answers now does, so that one is collected."""
    known, (_, since) = current(), _answering()
    return known is None or (since is not None and known.created_at < since)


def collecting() -> Collecting | None:
    """How far the reference to come is; None if none is owed."""
    if not owed():
        return None
    model, since = _answering()
    rows = windows.newest(since, None, LEAST)
    span = rows[0]["created_at"] - _first_of(since) if rows else timedelta(0)
    return Collecting(model, len(rows), span / timedelta(hours=1))


def renew() -> DriftReference | None:
    """The reference that became due, made; None if none did."""
    known = current()
    if owed():
        since = _answering()[1] or timezone.now() - RECENT
    elif known is not None and _grown_up(known):
        since = just_before(known.from_at)
    else:
        return None
    rows, pace = windows.spread(since, None, MOST)
    span = rows[0]["created_at"] - rows[-1]["created_at"] if rows else timedelta(0)
    if len(rows) < LEAST or span < LEAST_SPAN:
        return None
    made = _stored(rows, pace, grows=True)
    log.info("drift is compared to %d turns of %s from now on", made.turns, made.model or "rules")
    return made


def _grown_up(known: DriftReference) -> bool:
    """One that made itself of less than a week, when that week is over."""
    return bool(known.data.get("grows")) and timezone.now() - known.from_at >= WEEK


def _answering() -> tuple[str, datetime | None]:
    """The active version, and since when all processes have known that it is."""
    version = registry.active()
    return ("", None) if version is None else (version.label, version.changed_at + SETTLE)


def _first_of(since: datetime | None) -> datetime:
    first = windows.oldest(since or timezone.now() - RECENT)
    return first or timezone.now()
