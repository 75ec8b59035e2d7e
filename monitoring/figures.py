"""What the pages of figures share: ranges of time, the lists behind numbers, how numbers are
written. Knows no figure itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from django.urls import NoReverseMatch, reverse

from conversations.models import Message
from monitoring import rollups

# --- Which time ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Range:
    """``align``: its begin is the begin of such a period, in seconds. ``format``: how a column's
    begin is written, ``tick``: the same, shorter."""

    name: str
    length: timedelta
    step: timedelta
    align: int
    format: str
    tick: str


RANGES = {
    "1h": Range("1 hour", timedelta(hours=1), timedelta(minutes=5), 300, "%H:%M", "%H:%M"),
    "24h": Range("24 hours", timedelta(days=1), timedelta(minutes=30), 300, "%d %b %H:%M", "%H:%M"),
    "7d": Range("7 days", timedelta(days=7), timedelta(hours=3), 3_600, "%d %b %H:%M", "%d %b"),
    "30d": Range("30 days", timedelta(days=30), timedelta(days=1), 86_400, "%d %b", "%d %b"),
    "1y": Range("1 year", timedelta(days=364), timedelta(days=7), 86_400, "%d %b %Y", "%b %Y"),
}
USUAL = "24h"


@dataclass(frozen=True, slots=True)
class Window:
    """From ``begin`` until ``end``, in columns; ``before`` begins the range that it is compared
    to."""

    range: Range
    before: datetime
    begin: datetime
    end: datetime

    @classmethod
    def until(cls, end: datetime, range_: Range) -> Window:
        begin = rollups.floor(end - range_.length, range_.align)
        return cls(range_, begin - range_.length, begin, end)

    def starts(self) -> list[datetime]:
        """The begin of each column."""
        count = math.ceil((self.end - self.begin) / self.range.step)
        return [self.begin + number * self.range.step for number in range(count)]

    def ticks(self) -> list[str]:
        return [start.strftime(self.range.tick) for start in self.starts()]

    def column(self, at: datetime) -> int:
        return (at - self.begin) // self.range.step


# --- The lists behind the numbers ----------------------------------------------------------------


def answers(begin: datetime, end: datetime, /, **filters: object) -> str:
    """The admin's list of the answers of that time, with further filters."""
    return listed_of(Message, begin, end, role__exact=Message.Role.ASSISTANT, **filters)


def listed_of(model: Any, begin: datetime, end: datetime, /, **filters: object) -> str:
    return listed(
        model, created_at__gte=begin.isoformat(), created_at__lt=end.isoformat(), **filters
    )


def listed(model: Any, /, **filters: object) -> str:
    """The admin's list of such rows; nothing if there is none."""
    path = named(f"{model._meta.label_lower.replace('.', '_')}_changelist")
    return f"{path}?{urlencode(filters)}" if path and filters else path


def row(model: Any, key: object) -> str:
    return named(f"{model._meta.label_lower.replace('.', '_')}_change", key)


def named(name: str, *arguments: object) -> str:
    try:
        return reverse(f"admin:{name}", args=arguments)
    except NoReverseMatch:  # that page is not installed
        return ""


# --- How figures are written ---------------------------------------------------------------------


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"


def ms(value: float) -> str:
    return f"{value:.0f} ms" if value < 1_000 else f"{value / 1_000:.1f} s"


def percent(value: float) -> str:
    shown = 100 * value
    return f"{shown:.0f} %" if shown >= 10 or shown == int(shown) else f"{shown:.1f} %"


def score(value: float) -> str:
    return f"{value:.2f}"
