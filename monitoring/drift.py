"""Whether users ask something else than they did: windows of stored turns against a reference.

``look`` compares the newest turns and keeps a report; a breach makes ``retraining`` consider. The
statistics are ``drift_figures``', the turns ``windows``', the reference is ``references``'.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from django.utils import timezone
from django.utils.module_loading import import_string

from monitoring import drift_figures, metrics, references, windows
from monitoring.drift_figures import NAMES, Fitted, Score
from monitoring.models import DriftReference, DriftReport
from monitoring.reading import Reading
from monitoring.references import DriftError
from monitoring.windows import Window

log = logging.getLogger(__name__)

#: Turns of a window.
LEAST_WINDOW, MOST_WINDOW = 100, 500
KEPT_FOR = timedelta(days=400)
#: What does not depend on the model: all that is compared to another version's turns.
OF_USERS = frozenset({"degraded", "feedback", "new_words", "new_subject"})


# --- Looking -------------------------------------------------------------------------------------


def look() -> DriftReport | None:
    """The newest turns against the reference; the last report again if nothing was asked since.

    None while there are too few turns, or none to compare to.
    """
    references.renew()
    against = references.current()
    if against is None:
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
    if references.owed():
        scores = {name: score for name, score in scores.items() if name in OF_USERS}
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
