"""Figures of one measurement and of several: percentiles, medians, spreads.

Pure arithmetic; knows neither engines nor clocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from statistics import median
from typing import Any

import numpy as np


@dataclass(slots=True)
class Times:
    """What readers saw. *Units*: seconds. A batch of several tokens is one gap and zeros."""

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0

    def saw(self, seconds: float, tokens: int, *, first: bool) -> None:
        """``tokens`` arrived ``seconds`` after the question (``first``) or after the last ones."""
        (self.ttft if first else self.gaps).append(seconds)
        self.gaps += [0.0] * (tokens - 1)
        self.tokens += tokens


@dataclass(frozen=True, slots=True)
class Usage:
    """What one measurement took. ``others_cores``: how many cores' worth of time went to whatever
    else ran on the machine meanwhile."""

    wall_s: float
    cpu_s: float
    peak_rss_mb: float
    others_cores: float = 0.0


@dataclass(frozen=True, slots=True)
class Figures:
    """One row. *Units* stand in the names; ITL is the gap between tokens."""

    ttft_ms_p50: float
    ttft_ms_p95: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    gap_ms_max: float
    output_tokens_per_s: float
    cpu_s_per_1k_tokens: float
    peak_rss_mb: float
    others_cores: float

    @classmethod
    def of(cls, times: Times, usage: Usage) -> Figures:
        """Raises: ValueError where no token came."""
        if not times.tokens:
            raise ValueError("no token came, so there is nothing to measure")
        return cls(
            ttft_ms_p50=percentile_ms(times.ttft, 50),
            ttft_ms_p95=percentile_ms(times.ttft, 95),
            ttft_ms_p99=percentile_ms(times.ttft, 99),
            itl_ms_p50=percentile_ms(times.gaps, 50),
            itl_ms_p99=percentile_ms(times.gaps, 99),
            gap_ms_max=percentile_ms(times.gaps, 100),
            output_tokens_per_s=round(times.tokens / usage.wall_s, 1),
            cpu_s_per_1k_tokens=round(usage.cpu_s / times.tokens * 1000, 3),
            peak_rss_mb=round(usage.peak_rss_mb, 1),
            others_cores=round(usage.others_cores, 2),
        )


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure of one workload that others do not have."""

    key: str
    value: float
    unit: str
    text: str


@dataclass(frozen=True, slots=True)
class Level:
    """One point of the readers' curve."""

    chats: int
    ttft_ms_p95: float
    behind: int
    answers: int
    stall_ms_p99: float

    @property
    def good(self) -> bool:
        return self.behind == 0 and self.ttft_ms_p95 <= 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """What one engine answers to one job. ``settings``: what it chose for it."""

    figures: Figures | None = None
    facts: tuple[Fact, ...] = ()
    levels: tuple[Level, ...] = ()
    settings: str = ""

    def wire(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_wire(cls, found: Mapping[str, Any]) -> Measured:
        """Raises: KeyError, TypeError for anything else."""
        return cls(
            Figures(**found["figures"]) if found["figures"] else None,
            tuple(Fact(**fact) for fact in found["facts"]),
            tuple(Level(**level) for level in found["levels"]),
            str(found["settings"]),
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


def spreads(repetitions: Sequence[Measured]) -> dict[str, Spread]:
    """Spread of every figure and fact, by key, over the repetitions that have it."""
    found: dict[str, list[float]] = {}
    for one in repetitions:
        for name in [each.name for each in fields(Figures)] if one.figures else []:
            found.setdefault(name, []).append(getattr(one.figures, name))
        for fact in one.facts:
            found.setdefault(fact.key, []).append(fact.value)
    return {key: Spread.of(values) for key, values in found.items()}


def percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(seconds, percent)) * 1000, 2) if seconds else 0.0
