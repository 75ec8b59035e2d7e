"""A report as JSON's types: everything that was measured, every repetition, and its conditions.

Pure: what it is given, in the order a reader wants it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from assistant.benchmark.compare import Cell, Found
from assistant.benchmark.goals import Verdict
from assistant.benchmark.table import ratio


def report(
    found: Found,
    verdicts: Sequence[Verdict],
    *,
    conditions: Mapping[str, Any],
    same_model: Mapping[str, str],
) -> dict[str, Any]:
    """``conditions``: machine, versions and settings, as they are."""
    rivals = list(dict.fromkeys(cell.side.engine for cell in found.cells if not cell.side.ours))
    return {
        **conditions,
        "same_model": same_model,
        "engines": [
            {
                "name": status.side.name,
                "ours": status.side.ours,
                "status": status.trouble or "ran",
                "why": status.why,
                **status.about,
            }
            for status in found.statuses
        ],
        "rows": [_row(cell, found.cells, rivals) for cell in found.cells],
        "goals": [_verdict(verdict) for verdict in verdicts],
    }


def _row(cell: Cell, cells: Sequence[Cell], rivals: Sequence[str]) -> dict[str, Any]:
    last = cell.repetitions[-1]
    ours = cell.side.ours
    return {
        "workload": cell.job.workload,
        "label": cell.job.label,
        "engine": cell.side.name,
        "load": asdict(cell.job.load) if cell.job.load else None,
        "settings": last.settings,
        "figures": {key: asdict(spread) for key, spread in cell.spreads.items()},
        "ratios": {name: _rounded(ratio(cell, cells, name)) for name in rivals if ours},
        "levels": [{**asdict(level), "good": level.good} for level in last.levels],
        "repetitions": [one.wire() for one in cell.repetitions],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "goal": verdict.goal.text,
        "sign": verdict.goal.sign,
        "target": verdict.goal.target,
        "value": verdict.value,
        "reached": verdict.reached,
        "ours": verdict.ours,
        "theirs": verdict.theirs,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
