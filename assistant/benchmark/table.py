"""A report as text: one aligned table, then what each workload says besides, then the goals.

Pure: cells in, lines out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from assistant.benchmark.compare import Cell, Status
from assistant.benchmark.goals import Verdict
from assistant.benchmark.peers import EXTRA

#: Figure, title, digits.
_COLUMNS = (
    ("ttft_ms_p50", "TTFT p50", 1),
    ("ttft_ms_p95", "p95", 1),
    ("ttft_ms_p99", "p99 ms", 1),
    ("itl_ms_p50", "gap p50", 2),
    ("itl_ms_p99", "p99", 1),
    ("gap_ms_max", "max ms", 1),
    ("output_tokens_per_s", "tok/s", 0),
    ("cpu_s_per_1k_tokens", "CPU s/1k", 2),
    ("peak_rss_mb", "RSS MB", 0),
    ("others_cores", "others", 2),
    ("of_bound", "of bound", 2),
)
#: Facts that are columns already, or belong in the JSON only.
_QUIET = {
    "of_bound", "bound_ttft_ms", "bound_tokens_per_s",
    "cached_bandwidth", "bandwidth", "operations",
}  # fmt: skip


def table(cells: Sequence[Cell]) -> list[str]:
    """Rows by workload; ratio columns for each engine by others, beside our rows only."""
    with_figures = [cell for cell in cells if cell.median("output_tokens_per_s") is not None]
    if not with_figures:
        return []
    rivals = list(dict.fromkeys(cell.side.engine for cell in with_figures if not cell.side.ours))
    head = ["", "engine", *(title for _, title, _ in _COLUMNS), "tok/s min-max"]
    rows = [[*head, *(f"x {name}" for name in rivals)]]
    last = ""
    for cell in with_figures:
        label = cell.job.label if cell.job.label != last else ""
        last = cell.job.label
        ratios = [_ratio(cell, with_figures, name) for name in rivals]
        values = [_text(cell, key, digits) for key, _, digits in _COLUMNS]
        rows.append([label, cell.side.name, *values, _range(cell), *ratios])
    return aligned(rows, left=2)


def _text(cell: Cell, key: str, digits: int) -> str:
    value = cell.median(key)
    return "" if value is None else f"{value:,.{digits}f}"


def _range(cell: Cell) -> str:
    spread = cell.spreads["output_tokens_per_s"]
    return f"{spread.low:,.0f}-{spread.high:,.0f}" if len(cell.repetitions) > 1 else ""


def _ratio(cell: Cell, cells: Sequence[Cell], rival: str) -> str:
    """Ours over the rival's best: of tokens a second, or of the time to a first token."""
    value = ratio(cell, cells, rival) if cell.side.ours else None
    return "" if value is None else f"{value:.2f}"


def ratio(cell: Cell, cells: Sequence[Cell], rival: str) -> float | None:
    ttft = cell.job.workload == "ttft"
    key = "ttft_ms_p50" if ttft else "output_tokens_per_s"
    theirs = [
        value
        for other in cells
        if other.job == cell.job and other.side.engine == rival
        if (value := other.median(key)) is not None
    ]
    ours = cell.median(key)
    if not theirs or ours is None:
        return None
    best = min(theirs) if ttft else max(theirs)
    return ours / best if best else None


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """The first ``left`` columns to the left, the others to the right."""
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = []
    for row in rows:
        parts = [
            text.ljust(width) if at < left else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def facts(cells: Iterable[Cell]) -> list[str]:
    """What single workloads say besides: one line per row of ours."""
    lines = []
    for cell in cells:
        last = cell.repetitions[-1]
        said = [
            f"{fact.text} {cell.median(fact.key):g} {fact.unit}".strip()
            for fact in last.facts
            if fact.key not in _QUIET
        ]
        if said:
            lines.append(f"{cell.job.label}, {cell.side.name}: {'; '.join(said)}")
        for level in last.levels:
            lines.append(
                f"  {level.chats:5} readers: first token p95 {level.ttft_ms_p95:,.0f} ms, "
                f"{level.behind} of {level.answers} answers behind, "
                f"stall p99 {level.stall_ms_p99:,.0f} ms"
            )
    return lines


def statuses(found: Iterable[Status]) -> list[str]:
    """Versions and settings of who ran, and what became of who did not."""
    lines = []
    for status in found:
        if status.trouble == "not installed":
            lines.append(f"{status.side.name}: not installed: {EXTRA} ({status.why})")
        elif status.trouble:
            lines.append(f"{status.side.name}: {status.trouble}: {status.why}")
        about = "; ".join(f"{key} {value}" for key, value in status.about.items())
        if about:
            lines.append(f"{status.side.name}: {about}")
    return lines


def settings(cells: Iterable[Cell]) -> list[str]:
    """What each peer chose for each load."""
    chosen: dict[str, list[str]] = {}
    for cell in cells:
        if text := cell.repetitions[-1].settings:
            chosen.setdefault(f"{cell.side.name}: {text}", []).append(cell.job.label)
    return [f"{text} ({', '.join(labels)})" for text, labels in chosen.items()]


#: Cores' worth of others' work that spoils a measurement.
_DISTURBING = 0.1


def warnings(cells: Iterable[Cell]) -> list[str]:
    """What makes the figures doubtful."""
    disturbed = [
        spread.high
        for cell in cells
        if (spread := cell.spreads.get("others_cores")) and spread.high > _DISTURBING
    ]
    if not disturbed:
        return []
    return [
        f"warning: in {len(disturbed)} rows others used up to {max(disturbed):.1f} cores meanwhile "
        "(column others). Such figures are too low, and their ratios too: engines whose threads "
        "wait for each other spinning (llama.cpp, torch) lose most. Measure on a quiet machine."
    ]


def goals(found: Sequence[Verdict]) -> list[str]:
    """One line each: what, who, against whom, the goal and how it went."""
    rows = []
    for verdict in found:
        who = verdict.ours + (f" / {verdict.theirs}" if verdict.theirs else "")
        rows.append([verdict.goal.text, who, str(verdict)])
    return aligned(rows, left=3) if rows else []
