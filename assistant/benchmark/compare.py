"""Runs all jobs on all sides, in turns: one repetition of each side, then the next repetition.

Noise that comes and goes then meets everybody alike. A side that breaks is reported and left out
from there on. Knows processes and figures; knows no engine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from assistant.benchmark.figures import Measured, Spread, spreads
from assistant.benchmark.sides import Process, Side, SideError, Trouble
from assistant.benchmark.workloads import SHARED, Job


class BenchError(RuntimeError):
    """The benchmark cannot go on. The message says what happened and what to do."""


@dataclass(slots=True)
class Status:
    """What became of a side. ``about``: versions and settings it told of itself."""

    side: Side
    about: dict[str, str] = field(default_factory=dict)
    trouble: Trouble | None = None
    why: str = ""


@dataclass(slots=True)
class Cell:
    """One job on one side."""

    job: Job
    side: Side
    repetitions: list[Measured] = field(default_factory=list)

    @property
    def spreads(self) -> dict[str, Spread]:
        return spreads(self.repetitions)

    def median(self, key: str) -> float | None:
        found = self.spreads.get(key)
        return found.median if found else None


@dataclass(frozen=True, slots=True)
class Plan:
    """``repeats`` is for jobs that every side runs; the long ones of ours run once."""

    jobs: Sequence[Job]
    sides: Sequence[Side]
    repeats: int
    threads: int
    timeout_s: float
    #: Building a peer's model: exports take minutes.
    prepare_timeout_s: float = 1800.0


@dataclass(slots=True)
class Found:
    cells: list[Cell]
    statuses: list[Status]

    @property
    def fault(self) -> str:
        """What our own engine failed at, if it did."""
        ours = [status for status in self.statuses if status.side.ours and status.trouble]
        return "; ".join(f"{one.side.name} {one.trouble} {one.why}" for one in ours)


def run(plan: Plan, progress: Callable[[str], None]) -> Found:
    """Interrupted (Ctrl-C), it returns what it has. Raises: BenchError where our own engine cannot
    do what is asked; KeyboardInterrupt where nothing was measured yet."""
    with ExitStack() as stack:
        bench = _Bench(plan, progress, stack)
        bench.start()
        try:
            for job in plan.jobs:
                bench.measure(job)
        except KeyboardInterrupt:
            if not bench.cells:
                raise
            progress("interrupted: what follows is what was measured until now")
    return Found(bench.cells, list(bench.statuses.values()))


class _Bench:
    def __init__(self, plan: Plan, progress: Callable[[str], None], stack: ExitStack) -> None:
        self._plan, self._progress, self._stack = plan, progress, stack
        self.statuses = {side.name: Status(side) for side in plan.sides}
        self._processes: dict[str, Process] = {}
        self.cells: list[Cell] = []

    def start(self) -> None:
        for side in self._plan.sides:
            try:
                if not side.ours:
                    self._prepare_apart(side)
                process = self._stack.enter_context(self._process(side))
                about = process.ask({"do": "prepare"}, self._plan.prepare_timeout_s)
            except SideError as error:
                self._broke(side, error)
                continue
            self.statuses[side.name].about = {str(key): str(about[key]) for key in about}
            self._processes[side.name] = process

    def _prepare_apart(self, side: Side) -> None:
        """Build its model in a process of its own: memory that building took is none of serving."""
        self._progress(f"preparing {side.name} ...")
        with self._process(side) as builder:
            builder.ask({"do": "prepare"}, self._plan.prepare_timeout_s)

    def measure(self, job: Job) -> None:
        shared = job.workload in SHARED
        sides = [side for side in self._plan.sides if shared or side.ours]
        cells = {side.name: Cell(job, side) for side in sides}
        try:
            for at in range(self._plan.repeats if shared else 1):
                for side in sides:
                    if side.name in self._processes:
                        turn = f" ({at + 1} of {self._plan.repeats})" if shared else ""
                        self._progress(f"measuring {job.label}: {side.name}{turn} ...")
                        self._once(job, cells[side.name])
        finally:  # an interrupted job's first repetitions count too
            self.cells += [cell for cell in cells.values() if cell.repetitions]

    def _once(self, job: Job, cell: Cell) -> None:
        side = cell.side
        try:
            request = {"do": "run", "job": job.wire()}
            cell.repetitions.append(
                _measured(self._processes[side.name].ask(request, self._plan.timeout_s))
            )
        except SideError as error:
            # Ours may well do the next job; an engine by others that fails is left out.
            if not (side.ours and error.trouble == "failed"):
                del self._processes[side.name]
            self._broke(side, error, doing=job.label)

    def _process(self, side: Side) -> Process:
        return Process(side, threads=self._plan.threads, progress=self._progress)

    def _broke(self, side: Side, error: SideError, doing: str = "") -> None:
        """Note it and go on, unless it is ours and nothing was measured that could be lost."""
        if side.ours and not self.cells:
            what = "" if error.trouble == "failed" else f"our engine {error.trouble}: "
            raise BenchError(f"{what}{error}") from error
        status = self.statuses[side.name]
        at = f"at {doing}: " if doing else ""
        status.trouble, status.why = error.trouble, f"{at}{error}"
        self._progress(f"{side.name} {error.trouble}: {status.why}")


def _measured(found: Any) -> Measured:
    """Raises: SideError."""
    try:
        return Measured.from_wire(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise SideError("garbage", f"its figures are incomplete ({error!r})") from error


def same_answers(
    sides: Sequence[Side], prompts: list[list[int]], count: int, *, threads: int, timeout_s: float
) -> dict[str, list[list[int]] | SideError]:
    """Greedy ids of each side, to prove that they run the same model."""
    found: dict[str, list[list[int]] | SideError] = {}
    for side in sides:
        with Process(side, threads=threads) as process:
            try:
                process.ask({"do": "prepare"}, timeout_s)
                request = {"do": "greedy", "prompts": prompts, "count": count}
                found[side.name] = process.ask(request, timeout_s)
            except SideError as error:
                found[side.name] = error
    return found


def to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
