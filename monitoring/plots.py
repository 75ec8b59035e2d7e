"""Figures as pictures: columns and lines laid out for SVG, and the same figures as a table. Pure.

Colours and dark mode are the style sheet's; nothing here is HTML, so nothing here must be escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: The picture's own units; it is scaled to the page. Left and bottom hold the scale's words.
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 520, 190, 46, 22, 8
#: Colours of the style sheet; further series begin again.
COLOURS = 8
#: Words below the columns, at most.
_MOST_TICKS = 6
_HALF_WORD = 24

Values = Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Series:
    """One colour. ``values``: one a column, None where there is nothing to show."""

    name: str
    values: Values
    href: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """A word of a scale and where it stands."""

    at: float
    word: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A series as a path: ``area`` is filled, a line is not; ``dots`` are its single points."""

    name: str
    colour: int
    path: str
    area: bool
    dots: tuple[tuple[str, str], ...] = ()
    href: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A column of the picture as a row of its table; ``href``: what is behind it."""

    name: str
    cells: tuple[str, ...]
    href: str = ""


@dataclass(frozen=True, slots=True)
class Plot:
    """A picture, its words for who cannot see it, and its table.

    ``drawn`` is empty where there is nothing to show; ``empty`` says what to do about it.
    """

    key: str
    title: str
    about: str
    empty: str
    drawn: tuple[Drawn, ...] = ()
    x: tuple[Mark, ...] = ()
    y: tuple[Mark, ...] = ()
    limit: float | None = None
    head: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    note: str = ""
    href: str = ""
    width: int = field(default=WIDTH, init=False)
    height: int = field(default=HEIGHT, init=False)
    left: int = field(default=LEFT, init=False)


@dataclass(frozen=True, slots=True)
class Sheet:
    """What every plot needs: columns by name, and how a value is written."""

    key: str
    title: str
    about: str
    empty: str
    columns: Sequence[str]
    write: Callable[[float], str]
    #: Shorter names for below the picture.
    ticks: Sequence[str] = ()
    note: str = ""
    #: What is behind the whole, and behind each column.
    href: str = ""
    hrefs: Sequence[str] = ()
    #: The scale reaches at least this far; 1 for shares.
    least: float = 0.0
    limit: float | None = None


def lines(sheet: Sheet, series: Sequence[Series]) -> Plot:
    """A line for each series; a value alone is a dot."""
    top = _top([v for s in series for v in s.values] + [sheet.limit], sheet.least)
    drawn = [_line(sheet, s, at, top) for at, s in enumerate(series)]
    return _plot(sheet, series, tuple(drawn), top)


def columns(sheet: Sheet, series: Sequence[Series]) -> Plot:
    """The series upon each other in every column."""
    sums = [sum(s.values[at] or 0.0 for s in series) for at in range(len(sheet.columns))]
    top = _top(sums, sheet.least)
    base, drawn = [0.0] * len(sums), []
    for number, one in enumerate(series):
        drawn.append(_stack(one, number, base, top))
        base = [low + (value or 0.0) for low, value in zip(base, one.values, strict=True)]
    return _plot(sheet, series, tuple(drawn), top)


def _plot(sheet: Sheet, series: Sequence[Series], drawn: tuple[Drawn, ...], top: float) -> Plot:
    if not any(value for one in series for value in one.values):
        return Plot(sheet.key, sheet.title, sheet.about, sheet.empty, note=sheet.note)
    rows = tuple(
        Row(
            name,
            tuple(_cell(sheet, one.values[at]) for one in series),
            sheet.hrefs[at] if sheet.hrefs else "",
        )
        for at, name in enumerate(sheet.columns)
        if any(one.values[at] is not None for one in series)
    )
    return Plot(
        sheet.key,
        sheet.title,
        sheet.about,
        sheet.empty,
        drawn=drawn,
        x=tuple(_ticks(sheet.ticks or sheet.columns)),
        y=tuple(Mark(_y(top * part / 2, top), sheet.write(top * part / 2)) for part in range(3)),
        limit=_y(sheet.limit, top) if sheet.limit is not None else None,
        head=tuple(one.name for one in series),
        rows=rows,
        note=sheet.note,
        href=sheet.href,
    )


def _cell(sheet: Sheet, value: float | None) -> str:
    return "" if value is None else sheet.write(value)


# --- Where things stand --------------------------------------------------------------------------


def _top(values: Sequence[float | None], least: float) -> float:
    """The scale's end: 1, 2 or 5 and zeros, not below any value."""
    most = max((value for value in values if value is not None), default=0.0)
    if most <= least or most <= 0:
        return least or 1.0
    ten = float(10.0 ** math.floor(math.log10(most)))
    return next(step * ten for step in (1.0, 2.0, 5.0, 10.0) if most <= step * ten * 1.000001)


def _y(value: float, top: float) -> float:
    room = HEIGHT - BOTTOM - TOP
    return round(HEIGHT - BOTTOM - room * min(value, top) / top, 1)


def _x(at: float, count: int) -> float:
    """The middle of a column."""
    return round(LEFT + (WIDTH - LEFT) * (at + 0.5) / count, 1)


def _ticks(names: Sequence[str]) -> list[Mark]:
    """Some of the columns' names, none so near an edge that it would be cut."""
    every = max(1, math.ceil(len(names) / _MOST_TICKS))
    marks = [Mark(_x(at, len(names)), names[at]) for at in range(every // 2, len(names), every)]
    return [mark for mark in marks if mark.at < WIDTH - _HALF_WORD]


def _line(sheet: Sheet, one: Series, number: int, top: float) -> Drawn:
    count, path, dots, before = len(one.values), [], [], False
    for at, value in enumerate(one.values):
        if value is None:
            before = False
            continue
        x, y = _x(at, count), _y(value, top)
        path.append(f"{'L' if before else 'M'}{x:g} {y:g}")
        after = at + 1 < count and one.values[at + 1] is not None
        if not before and not after:
            dots.append((f"{x:g}", f"{y:g}"))
        before = True
    return Drawn(one.name, number % COLOURS, "".join(path), False, tuple(dots), one.href)


def _stack(one: Series, number: int, base: Sequence[float], top: float) -> Drawn:
    count = len(one.values)
    width = (WIDTH - LEFT) / max(1, count)
    gap = min(2.0, width * 0.2)
    path = []
    for at, value in enumerate(one.values):
        if value:
            low, high = _y(base[at], top), _y(base[at] + value, top)
            left = LEFT + width * at + gap / 2
            path.append(f"M{left:.1f} {low:g}h{width - gap:.1f}V{high:g}h-{width - gap:.1f}z")
    return Drawn(one.name, number % COLOURS, "".join(path), True, href=one.href)
