"""Whether users ask something else than they did: windows of stored turns against a reference.

``reference`` fits one, ``look`` compares the newest turns to it and keeps a report; a breach makes
``retraining`` consider. The statistics are ``drift_figures``', the turns ``windows``'.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone
from django.utils.module_loading import import_string

from conversations.models import Message
from monitoring import drift_figures, metrics, windows
from monitoring.drift_figures import NAMES, Fitted, Score
from monitoring.models import DriftReference, DriftReport
from monitoring.reading import Reading
from monitoring.windows import Window

log = logging.getLogger(__name__)

#: Turns of a window, and of a reference.
LEAST_WINDOW, MOST_WINDOW = 100, 500
LEAST_REFERENCE, MOST_REFERENCE = 300, 2_000
#: A reference that nobody chose is made of no fewer.
FIRST_REFERENCE = 1_000
KEPT_FOR = timedelta(days=400)


class DriftError(ValueError):
    """There is nothing to compare. The message says why and what to do."""


# --- The reference -------------------------------------------------------------------------------


def reference(from_at: datetime | None, to_at: datetime | None) -> DriftReference:
    """The newest turns between the two as the new reference. Raises: DriftError."""
    rows = windows.newest(from_at, to_at, MOST_REFERENCE)
    if len(rows) < LEAST_REFERENCE:
        raise DriftError(
            f"A reference needs {LEAST_REFERENCE} turns and there are {len(rows)} that count (a "
            f"user counts for {drift_figures.TURNS_OF_ONE}). Choose a longer time, or wait."
        )
    window = windows.window_of(rows)
    data = drift_figures.fit(window.turns).as_json() | {"space": window.space}
    with transaction.atomic():
        DriftReference.objects.filter(active=True).update(active=False)
        return DriftReference.objects.create(
            model=_model_of(window.to_at),
            turns=len(rows),
            data=data,
            from_at=window.from_at,
            to_at=window.to_at,
        )


def just_before(at: datetime) -> datetime:
    """So that a span which begins there holds the turn of that very moment."""
    return at - timedelta(microseconds=1)


def current() -> DriftReference | None:
    return DriftReference.objects.filter(active=True).first()


def _model_of(until: datetime) -> str:
    """The model that gave the last answer of then."""
    rows = Message.objects.filter(created_at__lte=until, route=Message.Route.MODEL)
    return rows.order_by("-created_at").values_list("model", flat=True).first() or ""


def _first() -> None:
    """Without a reference, the first turns there are enough of become one."""
    if len(windows.newest(None, None, FIRST_REFERENCE)) == FIRST_REFERENCE:
        made = reference(None, None)
        log.info("drift is compared to the first %d turns from now on", made.turns)


# --- Looking -------------------------------------------------------------------------------------


def look() -> DriftReport | None:
    """The newest turns against the reference; the last report again if nothing was asked since.

    None while there are too few turns, or none to compare to.
    """
    against = current()
    if against is None:
        _first()
        return None
    rows = windows.newest(against.to_at, None, MOST_WINDOW)
    if len(rows) < LEAST_WINDOW:
        return None
    last = against.reports.first()
    if last is not None and last.to_at == rows[0]["created_at"]:
        return last
    report = _compared(against, windows.window_of(rows))
    DriftReport.objects.filter(created_at__lt=timezone.now() - KEPT_FOR).delete()
    if report.breached:
        _consider()
    return report


def _compared(against: DriftReference, window: Window) -> DriftReport:
    """The stored report. Raises: DriftError for a reference that cannot be read."""
    scores = scores_of(against, window)
    return DriftReport.objects.create(
        reference=against,
        turns=len(window.turns),
        features={name: _as_json(score) for name, score in scores.items()},
        breached=any(score.breached for score in scores.values()),
        from_at=window.from_at,
        to_at=window.to_at,
    )


def scores_of(against: DriftReference, window: Window) -> dict[str, Score]:
    """Another model's tokens and embeddings say nothing: they are left out. Raises: DriftError."""
    try:
        fitted = Fitted.from_json(against.data)
    except (KeyError, TypeError, ValueError) as error:
        raise DriftError("The reference cannot be read. Make a new one.") from error
    scores = drift_figures.compare(fitted, window.turns)
    if window.space != against.data.get("space"):
        scores = {n: s for n, s in scores.items() if n not in ("embedding", "language")}
    return scores


def _as_json(score: Score) -> dict[str, Any]:
    told = {"score": round(score.score, 6), "threshold": round(score.threshold, 6)}
    shares = {"now": score.now, "before": score.before}
    known = {name: round(value, 4) for name, value in shares.items() if value is not None}
    return {**told, **known, "breached": score.breached}


def _consider() -> None:
    """Tell the retraining; a report is kept whatever becomes of that."""
    try:
        import_string("monitoring.retraining.consider")()
    except Exception as error:
        log.warning("retraining was not considered: %s", type(error).__name__, exc_info=error)


def ratio(feature: dict[str, Any]) -> float:
    """How far a stored feature is, as a multiple of its threshold."""
    return Score(feature["score"], feature["threshold"]).ratio


def readings() -> Iterator[Reading]:
    """The newest report's features, as multiples of their thresholds."""
    report = DriftReport.objects.filter(reference__active=True).first()
    if report is None:
        return
    for name in NAMES:
        if name in report.features:
            yield Reading(metrics.DRIFT, {"feature": name}, ratio(report.features[name]))
