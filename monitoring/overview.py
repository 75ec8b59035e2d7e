"""What the staff's page of figures shows: tiles, plots and what is so right now.

Read from ``rollups`` and from the results in the database, so it needs neither Prometheus nor a
worker. Every number names the list behind it. Knows no request and no HTML: ``admin_overview``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import DatabaseError
from django.utils import timezone

from conversations.models import Feedback, HandOver, Message
from monitoring import plots, rollups, standing
from monitoring.figures import (
    RANGES,
    USUAL,
    Window,
    answers,
    listed,
    listed_of,
    ms,
    number,
    percent,
)
from monitoring.models import Rollup
from monitoring.plots import Plot, Series, Sheet
from monitoring.rollups import Figures, part, percentile

log = logging.getLogger(__name__)

#: What a look at the page may count by itself; the rest waits for the task or the next look.
MOST_COUNTED = 5_000
#: Different routes, reasons and models in one picture.
MOST_SERIES = 7


# --- The page ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure with its change against the range before; ``mood``: better, worse or nothing."""

    key: str
    name: str
    value: str
    href: str
    change: str = ""
    mood: str = ""


@dataclass(frozen=True, slots=True)
class Overview:
    """``behind``: counting has not caught up. ``any``: something was ever counted."""

    window: Window
    tiles: tuple[Tile, ...]
    plots: tuple[Plot, ...]
    listings: tuple[standing.Listing, ...]
    behind: bool
    any: bool


def overview(key: str = USUAL, now: datetime | None = None) -> Overview:
    """The page for that range; an unknown one is the usual. Counts what is missing first."""
    now = now or timezone.now()
    caught = _caught_up(now)
    window = Window.until(caught.until, RANGES.get(key, RANGES[USUAL]))
    told = _Told.of(window, now)
    drawn = (*_plots_of_answers(told), *standing.results(window))
    return Overview(
        window,
        tuple(_tiles(told)),
        drawn,
        tuple(standing.listings()),
        caught.behind,
        Rollup.objects.exists(),
    )


def _caught_up(now: datetime) -> rollups.Caught:
    try:
        return rollups.roll_up(now, most_messages=MOST_COUNTED)
    except DatabaseError as error:  # read-only, or locked for long: what was counted is shown
        log.warning("figures could not be counted: %s", type(error).__name__)
        return rollups.Caught(rollups.floor(now, rollups.PERIOD_S), behind=True)


@dataclass(frozen=True, slots=True)
class _Told:
    """The figures of a window: of each column, of all, and of the range before (None: unknown)."""

    window: Window
    columns: tuple[Figures, ...]
    now: Figures
    before: Figures | None

    @classmethod
    def of(cls, window: Window, now: datetime) -> _Told:
        columns: list[Figures] = [Counter() for _ in window.starts()]
        before: Figures = Counter()
        for start, data in rollups.read(window.before, window.end):
            (before if start < window.begin else columns[window.column(start)]).update(data)
        first = Rollup.objects.order_by("start").values_list("start", flat=True).first()
        known = first is not None and first <= window.before and before["answers"]
        return cls(window, tuple(columns), rollups.total(columns), before if known else None)

    def each(self, figure: Callable[[Figures], float | None]) -> list[float | None]:
        return [figure(column) for column in self.columns]

    def sheet(
        self, key: str, title: str, about: str, write: Callable[[float], str], **more: Any
    ) -> Sheet:
        starts = self.window.starts()
        ends = [*starts[1:], self.window.end]
        return Sheet(
            key,
            title,
            about,
            "No answers in this range. Choose a longer one, or ask something in the chat.",
            [start.strftime(self.window.range.format) for start in starts],
            write,
            self.window.ticks(),
            href=answers(self.window.begin, self.window.end),
            hrefs=[answers(*ends_of) for ends_of in zip(starts, ends, strict=True)],
            **more,
        )


# --- Figures of some answers ---------------------------------------------------------------------


def _latency(kind: str, share: float) -> Callable[[Figures], float | None]:
    return lambda data: percentile(part(data, kind), share)


def _ratio(over: Callable[[Figures], int], under: Callable[[Figures], int]) -> Any:
    def figure(data: Figures) -> float | None:
        whole = under(data)
        return over(data) / whole if whole > 0 else None

    return figure


def _of(name: str) -> Callable[[Figures], int]:
    return lambda data: data[name]


def _degraded(data: Figures) -> int:
    return part(data, "reason/").total()


_first = {share: _latency("first/", share) for share in (0.5, 0.95, 0.99)}
_whole = {share: _latency("whole/", share) for share in (0.5, 0.95)}
_errors = _ratio(_of("status/failed"), _of("answers"))
_degraded_share = _ratio(_degraded, _of("answers"))
_hits = _ratio(_of("route/cache"), lambda data: data["answers"] - data["route/reviewed"])
_liked = _ratio(_of("feedback/up"), lambda data: data["feedback/up"] + data["feedback/down"])
_speed = _ratio(lambda data: 1_000 * data["written_tokens"], _of("writing_ms"))


# --- Tiles ---------------------------------------------------------------------------------------


def _tiles(told: _Told) -> Iterable[Tile]:
    begin, end = told.window.begin, told.window.end
    every = answers(begin, end)
    yield _asked(told, every)
    for share in (0.5, 0.95, 0.99):
        name = f"First word, p{100 * share:.0f}"
        yield _tile(
            told, f"first_{share}", name, _first[share], ms, -1, _slow(told, "ttft_ms", share)
        )
    slow = _slow(told, "duration_ms", 0.95)
    yield _tile(told, "whole", "Whole answer, p95", _whole[0.95], ms, -1, slow)
    yield _tile(
        told,
        "speed",
        "Tokens a second",
        _speed,
        number,
        1,
        answers(begin, end, route__exact="model"),
    )
    failed = answers(begin, end, status__exact=Message.Status.FAILED)
    yield _tile(told, "errors", "Errors", _errors, percent, -1, failed)
    degraded = answers(begin, end, degraded_reason="any")
    yield _tile(told, "degraded", "Degraded", _degraded_share, percent, -1, degraded)
    kept = answers(begin, end, route__exact=Message.Route.CACHE)
    yield _tile(told, "cache", "From the cache", _hits, percent, 0, kept)
    judged = _feedback(begin, end)
    yield _tile(told, "liked", "Thumbs up", _liked, percent, 1, judged)
    waiting = HandOver.objects.filter(status=HandOver.Status.WAITING).count()
    href = listed(HandOver, status__exact=HandOver.Status.WAITING)
    yield Tile("waiting", "Waiting for a person, now", number(waiting), href)


def _asked(told: _Told, href: str) -> Tile:
    """Compared by the hour: the range that runs is a little longer than the one before."""
    hours = (told.window.end - told.window.begin) / timedelta(hours=1)
    hours_before = (told.window.begin - told.window.before) / timedelta(hours=1)
    before = told.before["answers"] / hours_before * hours if told.before else None
    value = told.now["answers"]
    return Tile("asked", "Questions", number(value), href, _change(value, before), "")


def _tile(
    told: _Told,
    key: str,
    name: str,
    figure: Callable[[Figures], float | None],
    write: Callable[[float], str],
    better: int,
    href: str,
) -> Tile:
    """``better``: 1 if more is, -1 if less is, 0 if neither."""
    value = figure(told.now)
    before = figure(told.before) if told.before is not None else None
    if value is None:
        return Tile(key, name, "–", href)  # noqa: RUF001
    change = _points(value, before) if write is percent else _change(value, before)
    return Tile(key, name, write(value), href, change, _mood(value, before, better, write))


def _mood(value: float, before: float | None, better: int, write: Callable[[float], str]) -> str:
    """Whether it got better or worse by as much as matters: a point, or a twentieth."""
    if not before or not better:
        return ""
    moved = 100 * (value - before) if write is percent else 20 * (value / before - 1)
    if abs(moved) < 1:
        return ""
    return "better" if moved * better > 0 else "worse"


def _change(value: float, before: float | None) -> str:
    if not before:
        return ""
    by = round(100 * (value / before - 1))
    return f"{by:+d} %" if by else "as before"


def _points(value: float, before: float | None) -> str:
    if before is None:
        return ""
    by = round(100 * (value - before), 1)
    return f"{by:+.1f} points" if by else "as before"


def _slow(told: _Told, column: str, share: float) -> str:
    """Answers not faster than that percentile."""
    kind = "first/" if column == "ttft_ms" else "whole/"
    value = percentile(part(told.now, kind), share)
    least = {f"{column}__gte": f"{value:.1f}"} if value is not None else {}
    return answers(told.window.begin, told.window.end, **least)


def _feedback(begin: datetime, end: datetime, /, **filters: object) -> str:
    return listed_of(Feedback, begin, end, **filters)


# --- Plots of answers ----------------------------------------------------------------------------


def _plots_of_answers(told: _Told) -> Iterable[Plot]:
    begin, end = told.window.begin, told.window.end
    sheet = told.sheet("routes", "Questions by route", "Who answered, upon each other.", number)
    yield plots.columns(sheet, _shares_of(told, "route/", "route__exact", count=True))
    about = "From the question to the first words: half, 95 % and 99 % of answers were faster."
    yield plots.lines(
        told.sheet("first", "First word", about, ms),
        [
            Series(f"p{100 * share:.0f}", told.each(figure), _slow(told, "ttft_ms", share))
            for share, figure in _first.items()
        ],
    )
    about = "From the question to the stored answer."
    yield plots.lines(
        told.sheet("whole", "Whole answer", about, ms),
        [
            Series(f"p{100 * share:.0f}", told.each(figure), _slow(told, "duration_ms", share))
            for share, figure in _whole.items()
        ],
    )
    about = "Share of answers that are not the model's best, by reason."
    yield plots.columns(
        told.sheet("degraded", "Degraded answers", about, percent, least=0.05),
        _shares_of(told, "reason/", "degraded_reason"),
    )
    yield plots.columns(
        told.sheet(
            "errors", "Errors", "Share of answers that failed, by error.", percent, least=0.05
        ),
        _shares_of(told, "error/", "error_code__exact"),
    )
    yield _confidence(told)
    judged = told.sheet("feedback", "Feedback", "Thumbs given in that time.", number)
    yield plots.columns(
        judged,
        [
            Series(
                f"thumbs {value}",
                told.each(lambda data, value=value: data[f"feedback/{value}"]),  # type: ignore[misc]
                _feedback(begin, end, value__exact=value),
            )
            for value in ("up", "down")
        ],
    )


def _shares_of(told: _Told, prefix: str, parameter: str, *, count: bool = False) -> list[Series]:
    """A series for each of the commonest names below ``prefix``: how many, or which share."""
    whole = part(told.now, prefix)
    names = sorted(name for name, _ in whole.most_common(MOST_SERIES))

    def series(name: str) -> Series:
        figure = _of(prefix + name) if count else _ratio(_of(prefix + name), _of("answers"))
        wanted = "" if name == "none" else name
        href = answers(told.window.begin, told.window.end, **{parameter: wanted})
        shown = "nobody" if name == "none" else name.replace("_", " ")
        return Series(shown, told.each(figure), href)

    return [series(name) for name in names]


def _confidence(told: _Told) -> Plot:
    """For each model the share of its answers in each tenth of confidence."""
    found = part(told.now, "confidence/")
    by_model: dict[str, Counter[str]] = {}
    for name, count in found.items():
        tenth, _, model = name.partition("/")
        by_model.setdefault(model, Counter())[tenth] += count
    known = sorted(by_model, key=lambda model: -by_model[model].total())[:MOST_SERIES]
    begin, end = told.window.begin, told.window.end
    bins = range(rollups.CONFIDENCE_BINS)
    edges = [number_ / rollups.CONFIDENCE_BINS for number_ in range(rollups.CONFIDENCE_BINS + 1)]
    sheet = Sheet(
        "confidence",
        "Confidence by model",
        "How sure each model was of what is asked: share of its answers in each tenth.",
        "No answer of a model with a confidence in this range.",
        [f"{edges[at]:.1f} to {edges[at + 1]:.1f}" for at in bins],
        percent,
        [f"{edges[at]:.1f}" for at in bins],
        href=answers(begin, end),
        hrefs=[
            answers(begin, end, confidence__gte=edges[at], confidence__lt=edges[at + 1] + (at == 9))
            for at in bins
        ],
    )
    return plots.lines(
        sheet,
        [
            Series(
                model,
                [by_model[model][str(at)] / by_model[model].total() for at in bins],
                answers(begin, end, model=model),
            )
            for model in known
        ],
    )
