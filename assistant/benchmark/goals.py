"""The goals of the design, judged on what was measured: reached, short by how much, or not known.

Pure. A ratio is always ours over theirs, medians of the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from assistant.benchmark.compare import Cell


@dataclass(frozen=True, slots=True)
class Goal:
    """``key``: a figure or fact. ``against``: an engine whose best row is the measure, or "" for a
    figure that stands for itself. ``label``: the job's, "" for any."""

    text: str
    workload: str
    key: str
    sign: Literal[">=", "<=", "<"]
    target: float
    label: str = ""
    against: str = ""
    unit: str = ""
    #: Only this row of the engine, where "its best" would be another thing.
    variant: str = ""


GOALS = (
    Goal("1 chat against llama.cpp", "single", "output_tokens_per_s", ">=", 1.0, "", "llama.cpp"),
    Goal(
        "8 chats against llama.cpp",
        "chats", "output_tokens_per_s", ">=", 1.4, "8 chats", "llama.cpp",
    ),
    Goal(
        "32 chats against llama.cpp",
        "chats", "output_tokens_per_s", ">=", 1.9, "32 chats", "llama.cpp",
    ),
    Goal(
        "first token of a 64-token prompt against llama.cpp",
        "ttft", "ttft_ms_p50", "<=", 0.5, "prompt 64", "llama.cpp",
    ),
    Goal(
        "first token of a 512-token prompt against llama.cpp",
        "ttft", "ttft_ms_p50", "<=", 0.5, "prompt 512", "llama.cpp",
    ),
    Goal(
        "8 chats against onnxruntime-genai's Engine",
        "chats", "output_tokens_per_s", ">=", 3.0, "8 chats", "genai", variant="Engine",
    ),
    Goal(
        "8 chats against optimum's generate",
        "chats", "output_tokens_per_s", ">=", 5.0, "8 chats", "optimum",
    ),
    Goal(
        "longest gap of streaming chats beside a 2,000-token prompt (15 M size)",
        "intruder", "intruder_gap_ms", "<=", 150.0, unit=" ms",
    ),
    Goal("a chat's eighth turn, warm over cold", "turns", "turn_warm_over_cold", "<=", 0.25),
    Goal("refusal when full", "overload", "refusal_ms_p99", "<", 5.0, unit=" ms"),
    Goal(
        "through WebSocket and database against the engine alone",
        "stack", "stack_over_alone", ">=", 0.85, unit="x",
    ),
    Goal("idle processor time", "idle", "idle_cpu_percent", "<", 1.0, unit=" %"),
    Goal("growth over many requests", "growth", "growth_mb", "<=", 16.0, unit=" MiB"),
    Goal(
        "chats served at reading speed (15 M size)",
        "readers", "readers", ">=", 600.0, unit=" chats",
    ),
    Goal(
        "chats served at reading speed through WebSocket and database",
        "stack-readers", "stack_readers", ">=", 300.0, unit=" chats",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Verdict:
    """``ours``: the row that was judged. ``reached`` is None where nothing was measured."""

    goal: Goal
    value: float
    ours: str
    theirs: str
    reached: bool

    def __str__(self) -> str:
        unit = "x" if self.goal.against or not self.goal.unit else self.goal.unit
        word = "reached" if self.reached else "short:"
        return f"goal {self.goal.sign} {self.goal.target:g}{unit}: {word} {self.value:.3g}{unit}"


def judge(goal: Goal, cells: Sequence[Cell], counted: Sequence[str] = ()) -> Verdict | None:
    """``goal`` on the best of our rows; None where it was not measured. ``counted``: names of our
    rows that count, all if empty."""
    fitting = [
        cell
        for cell in cells
        if cell.job.workload == goal.workload and goal.label in ("", cell.job.label)
    ]
    ours = _best(goal, [cell for cell in fitting if cell.side.ours and _counts(cell, counted)])
    if ours is None:
        return None
    value, theirs = ours[0], ""
    if goal.against:
        rivals = [cell for cell in fitting if cell.side.engine == goal.against]
        best = _best(goal, [cell for cell in rivals if goal.variant in cell.side.name])
        if best is None or not best[0]:
            return None
        value, theirs = ours[0] / best[0], best[1]
    return Verdict(goal, round(value, 3), ours[1], theirs, _reached(goal, value))


def verdicts(cells: Sequence[Cell], counted: Sequence[str] = ()) -> list[Verdict]:
    """Of all goals that were measured."""
    found = (judge(goal, cells, counted) for goal in GOALS)
    return [verdict for verdict in found if verdict is not None]


def _counts(cell: Cell, counted: Sequence[str]) -> bool:
    return not counted or cell.side.name in counted


def _reached(goal: Goal, value: float) -> bool:
    if goal.sign == ">=":
        return value >= goal.target
    return value <= goal.target if goal.sign == "<=" else value < goal.target


def _best(goal: Goal, cells: Sequence[Cell]) -> tuple[float, str] | None:
    """Best median and whose it is."""
    found = [
        (value, cell.side.name) for cell in cells if (value := cell.median(goal.key)) is not None
    ]
    if not found:
        return None
    return max(found) if goal.sign == ">=" else min(found)
