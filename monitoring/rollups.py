"""Figures of closed periods, kept when the conversations behind them go.

``roll_up`` counts what ended since it last looked into periods of five minutes; old periods are
added up into hours, then days, then forgotten. It may be called by anybody, at any time, any number
of times: a task does, and the page of figures does, so neither Celery nor Prometheus is needed.
A row holds one flat mapping of name to number, so adding two rows up is adding their numbers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import transaction
from django.utils import timezone

from conversations.models import Feedback, HandOver, Message
from conversations.turn import TurnRecord, turn_finished
from monitoring.models import Rollup

PERIOD_S, HOUR_S, DAY_S = 300, 3_600, 86_400
#: Each kind of row, how long it is kept, and of what it becomes a part then. Days from a month on:
#: a year is then a thousand rows, which is what a page can read.
LEVELS = (
    (PERIOD_S, timedelta(days=3), HOUR_S),
    (HOUR_S, timedelta(days=31), DAY_S),
    (DAY_S, timedelta(days=400), None),
)
#: An answer may still be written when its period ends; after this it has ended or was given up.
SETTLE = timedelta(minutes=2)
#: Bounds of one call: a gap of any length is caught up in several.
MOST_MESSAGES, MOST_STEPS, MOST_MERGED = 50_000, 400, 3_000
#: Different models in a period; more are counted as ``other``.
MOST_MODELS = 20
#: Confidence is counted in this many equal parts.
CONFIDENCE_BINS = 10
#: Latencies in buckets each a fifth wider than the one before, from 1 ms to 131 s: a percentile
#: read from them is at most that fifth off.
_PER_DOUBLING, LAST_BUCKET = 4, 68

Figures = Counter[str]

_MESSAGE = (
    *("created_at", "route", "degraded_reason", "status", "error_code", "model", "confidence"),
    *("ttft_ms", "duration_ms", "input_tokens", "output_tokens"),
)
#: Who writes anew; a kept answer's tokens were counted when it was written.
_WRITERS = frozenset({Message.Route.MODEL, Message.Route.UPSTREAM})


@dataclass(frozen=True, slots=True)
class Caught:
    """How far counting has come. ``behind``: there is more than one call may count."""

    until: datetime
    behind: bool


# --- Counting ------------------------------------------------------------------------------------


def roll_up(now: datetime | None = None, *, most_messages: int = MOST_MESSAGES) -> Caught:
    """Count what has ended since the last call, merge and forget what is old. Idempotent."""
    now = now or timezone.now()
    stop = floor(now - SETTLE, PERIOD_S)
    at = _counted_until(now)
    counted = 0
    for _ in range(MOST_STEPS):
        begin = _first_event(at, stop)
        if begin is None:
            at = stop
            break
        at = min(stop, floor(begin, HOUR_S) + timedelta(seconds=HOUR_S))
        counted += _count(begin, at)
        if counted >= most_messages:
            break
    _merge(min(at, now), now)
    oldest = now - LEVELS[-1][1]
    Rollup.objects.filter(start__lt=oldest).delete()
    return Caught(at, behind=at < stop)


def floor(at: datetime, seconds: int) -> datetime:
    """The begin of the period of that length that ``at`` lies in (UTC)."""
    return datetime.fromtimestamp(at.timestamp() // seconds * seconds, UTC)


def _counted_until(now: datetime) -> datetime:
    """The end of the newest row; without one, the longest that rows are kept."""
    newest = Rollup.objects.order_by("-start").values_list("start", "seconds").first()
    oldest = floor(now - LEVELS[-1][1], DAY_S) + timedelta(days=1)
    return oldest if newest is None else newest[0] + timedelta(seconds=newest[1])


def _sources() -> tuple[Any, ...]:
    """What is counted, each by when it was made. An answer by a person of the staff is none."""
    answers = Message.objects.filter(role=Message.Role.ASSISTANT, author="")
    ended = answers.exclude(status=Message.Status.STREAMING)
    return ended, Feedback.objects.all(), HandOver.objects.all()


def _first_event(at: datetime, stop: datetime) -> datetime | None:
    """The period's begin in which the next thing to count was made, from ``at`` on."""
    rows = (
        source.filter(created_at__gte=at, created_at__lt=stop)
        .order_by("created_at")
        .values_list("created_at", flat=True)
        .first()
        for source in _sources()
    )
    found = [moment for moment in rows if moment is not None]
    return floor(min(found), PERIOD_S) if found else None


def _count(begin: datetime, end: datetime) -> int:
    """Store the periods between the two; how many answers that were. Three statements, and one."""
    answers, feedback, hand_overs = (
        source.filter(created_at__gte=begin, created_at__lt=end) for source in _sources()
    )
    periods: defaultdict[datetime, Figures] = defaultdict(Counter)
    counted = 0
    for row in answers.values_list(*_MESSAGE).iterator():
        _add_answer(periods[floor(row[0], PERIOD_S)], *row[1:])
        counted += 1
    for made, value in feedback.values_list("created_at", "value"):
        periods[floor(made, PERIOD_S)][f"feedback/{value}"] += 1
    for (made,) in hand_overs.values_list("created_at"):
        periods[floor(made, PERIOD_S)]["hand_overs"] += 1
    rows = [
        Rollup(start=start, seconds=PERIOD_S, data=_bounded(data))
        for start, data in sorted(periods.items())
    ]
    Rollup.objects.bulk_create(rows, ignore_conflicts=True)  # somebody counted the same meanwhile
    return counted


def count_retry(*, record: TurnRecord, **_: Any) -> None:
    """A receiver of ``turn_finished``: an answer that was written once more in its row is an answer
    more of the period in which it was asked.

    Whoever counted that period has the one that broke off, which its reader saw. A period that is
    open will have the answer as it ended.
    """
    if record.attempt > 1 and record.stored:
        message = Message.objects.filter(pk=record.message_id).first()
        if message is not None and message.created_at < _counted_until(timezone.now()):
            _add_to_counted(message)


def _add_to_counted(message: Message) -> None:
    with transaction.atomic():
        rows = Rollup.objects.select_for_update().filter(start__lte=message.created_at)
        row = rows.order_by("-start").first()
        if row is None or message.created_at >= row.start + timedelta(seconds=row.seconds):
            row = Rollup(start=floor(message.created_at, PERIOD_S), seconds=PERIOD_S, data={})
        data: Figures = Counter(row.data)
        _add_answer(data, *(getattr(message, name) for name in _MESSAGE[1:]))
        row.data = _bounded(data)
        row.save()


def connect() -> None:
    turn_finished.connect(count_retry, dispatch_uid="rollups-count_retry")


def _add_answer(
    into: Figures,
    route: str,
    reason: str,
    status: str,
    error: str,
    model: str,
    confidence: float | None,
    ttft_ms: float | None,
    duration_ms: float | None,
    input_tokens: int,
    output_tokens: int,
) -> None:
    into["answers"] += 1
    into[f"route/{route or 'none'}"] += 1
    into[f"status/{status}"] += 1
    if reason:
        into[f"reason/{reason}"] += 1
    if error:
        into[f"error/{error}"] += 1
    if ttft_ms is not None:
        into[f"first/{bucket(ttft_ms)}"] += 1
    if duration_ms is not None:
        into[f"whole/{bucket(duration_ms)}"] += 1
    if model:
        into[f"model/{model}"] += 1
        if confidence is not None:
            into[f"confidence/{_bin(confidence)}/{model}"] += 1
    if route in _WRITERS:
        into["input_tokens"] += input_tokens
        into["output_tokens"] += output_tokens
        if ttft_ms is not None and duration_ms is not None and output_tokens > 1:
            into["written_tokens"] += output_tokens - 1
            into["writing_ms"] += round(max(0.0, duration_ms - ttft_ms))


def _bin(confidence: float) -> int:
    return min(CONFIDENCE_BINS - 1, max(0, int(confidence * CONFIDENCE_BINS)))


def _bounded(data: Figures) -> Figures:
    """The same with at most ``MOST_MODELS`` models, the most asked."""
    kept = {name for name, _ in part(data, "model/").most_common(MOST_MODELS)}
    found: Figures = Counter()
    for name, value in data.items():
        model = model_in(name)
        other = model is not None and model not in kept
        found[name.removesuffix(str(model)) + "other" if other else name] += value
    return found


def model_in(name: str) -> str | None:
    """The model a figure is about: of ``model/x`` and ``confidence/3/x``."""
    if name.startswith("model/"):
        return name.removeprefix("model/")
    return name.split("/", 2)[2] if name.startswith("confidence/") else None


# --- Latencies -----------------------------------------------------------------------------------


def bucket(ms: float) -> int:
    """The bucket a latency falls into: the first whose ``upper`` is not below it."""
    if ms <= 1.0:
        return 0
    # Rounded first: 2**(3/4) is not quite what its logarithm says.
    return min(LAST_BUCKET, math.ceil(round(_PER_DOUBLING * math.log2(ms), 9)))


def upper(at: int) -> float:
    """The highest latency of a bucket, in ms."""
    return float(2.0 ** (at / _PER_DOUBLING))


def percentile(buckets: Mapping[str, int], share: float) -> float | None:
    """The latency in ms below which that share lies; None of nothing. ``buckets``: number -> count.

    Inside a bucket latencies are taken as evenly spread.
    """
    total = sum(buckets.values())
    if not total:
        return None
    left = share * total
    for at in sorted(map(int, buckets)):
        count = buckets[str(at)]
        if left <= count:
            low = upper(at - 1) if at else 0.0
            return low + (upper(at) - low) * left / count
        left -= count
    return upper(LAST_BUCKET)


# --- Reading -------------------------------------------------------------------------------------


def part(data: Mapping[str, int], prefix: str) -> Counter[str]:
    """The figures whose names begin so, by the rest of their names."""
    found: Counter[str] = Counter()
    for name, value in data.items():
        if name.startswith(prefix):
            found[name[len(prefix) :]] += value
    return found


def total(rows: Iterable[Mapping[str, int]]) -> Figures:
    """All of these added up."""
    found: Figures = Counter()
    for row in rows:
        for name, value in row.items():
            found[name] += value
    return found


def read(begin: datetime, end: datetime) -> Iterator[tuple[datetime, dict[str, int]]]:
    """Start and figures of each row that begins in that time, oldest first."""
    rows = Rollup.objects.filter(start__gte=begin, start__lt=end).order_by("start")
    return rows.values_list("start", "data").iterator()


# --- Old rows ------------------------------------------------------------------------------------


def _merge(until: datetime, now: datetime) -> None:
    """Add up rows older than they are kept, as far as counting has come."""
    for seconds, kept, whole in LEVELS:
        if whole is not None:
            before = floor(min(until, now - kept), whole)
            _merge_level(seconds, whole, before)


def _merge_level(seconds: int, whole: int, before: datetime) -> None:
    old = Rollup.objects.filter(seconds=seconds, start__lt=before).order_by("start")
    with transaction.atomic():
        rows = list(old.values_list("pk", "start", "data")[:MOST_MERGED])
        groups: defaultdict[datetime, list[tuple[int, Any]]] = defaultdict(list)
        for pk, start, data in rows:
            groups[floor(start, whole)].append((pk, data))
        if len(rows) == MOST_MERGED and len(groups) > 1:
            groups.popitem()  # the last may be cut; it comes next time
        _replace(groups, whole)


def _replace(groups: Mapping[datetime, Sequence[tuple[int, Any]]], whole: int) -> None:
    """Each group's row in place of its parts. Who comes second finds the row there: it is equal."""
    merged = [
        Rollup(start=start, seconds=whole, data=total(data for _, data in rows))
        for start, rows in groups.items()
    ]
    Rollup.objects.bulk_create(merged, ignore_conflicts=True)
    gone = [pk for rows in groups.values() for pk, _ in rows]
    for at in range(0, len(gone), 500):
        Rollup.objects.filter(pk__in=gone[at : at + 500]).delete()
