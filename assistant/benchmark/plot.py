"""A report as a picture: bars of speed and of first tokens, and the readers' curve if measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from assistant.benchmark.compare import Cell

#: Ours in blues, others in warm and grey tones: told apart at a glance, in print too.
_OURS = ("#1f5fa8", "#5b9bd5", "#9dc3e6", "#123a66")
_OTHERS = ("#e08e45", "#f2c18d", "#8c8c8c", "#b5b5b5", "#6b8e5a", "#a9c29b")


def plot(cells: Sequence[Cell], path: Path, title: str) -> None:
    """Writes a PNG (or what the suffix says). Raises: ValueError when there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawings = _drawings(cells)
    if not drawings:
        raise ValueError("nothing was measured that could be drawn; add single, chats or readers")
    pyplot.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = pyplot.subplots(
        1, len(drawings), figsize=(5.8 * len(drawings), 4.8), squeeze=False, facecolor="white"
    )
    for axis, (draw, chosen) in zip(axes[0], drawings, strict=True):
        draw(axis, chosen)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _drawings(cells: Sequence[Cell]) -> list[tuple[Any, list[Cell]]]:
    speed = [cell for cell in cells if cell.job.workload in ("single", "chats")]
    first = [cell for cell in cells if cell.job.workload == "ttft"]
    curve = [cell for cell in cells if cell.repetitions[-1].levels]
    found = [(_speed, speed), (_first_tokens, first), (_curve, curve)]
    return [(draw, chosen) for draw, chosen in found if chosen]


def _speed(axis: Any, cells: list[Cell]) -> None:
    _bars(axis, cells, "output_tokens_per_s")
    axis.set_title("Output tokens a second (more is better)")


def _first_tokens(axis: Any, cells: list[Cell]) -> None:
    _bars(axis, cells, "ttft_ms_p50")
    axis.set_title("First token, ms (less is better)")


def _bars(axis: Any, cells: list[Cell], key: str) -> None:
    """Groups by job, a bar per engine, whiskers from least to most."""
    labels = list(dict.fromkeys(cell.job.label for cell in cells))
    colours = _colours(cells)
    width = 0.8 / len(colours)
    for at, (name, colour) in enumerate(colours.items()):
        mine = [cell for cell in cells if cell.side.name == name]
        places = [labels.index(cell.job.label) + (at + 0.5) * width - 0.4 for cell in mine]
        spreads = [cell.spreads[key] for cell in mine]
        tops = [spread.median for spread in spreads]
        down = [spread.median - spread.low for spread in spreads]
        up = [spread.high - spread.median for spread in spreads]
        axis.bar(places, tops, width * 0.92, color=colour, label=name)
        axis.errorbar(places, tops, [down, up], fmt="none", ecolor="#444444", elinewidth=0.8)
    axis.set_xticks(range(len(labels)), labels)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    _legend(axis, -0.08)


def _colours(cells: list[Cell]) -> dict[str, str]:
    ours = dict.fromkeys(cell.side.name for cell in cells if cell.side.ours)
    others = dict.fromkeys(cell.side.name for cell in cells if not cell.side.ours)
    found = {name: _OURS[at % len(_OURS)] for at, name in enumerate(ours)}
    return found | {name: _OTHERS[at % len(_OTHERS)] for at, name in enumerate(others)}


def _curve(axis: Any, cells: list[Cell]) -> None:
    """First token p95 against readers; hollow where someone fell behind."""
    for cell, colour in zip(cells, _OURS * len(cells), strict=False):
        levels = cell.repetitions[-1].levels
        chats = [level.chats for level in levels]
        axis.plot(chats, [level.ttft_ms_p95 for level in levels], color=colour,
                  label=f"{cell.job.label}, {cell.side.name}")  # fmt: skip
        for level in levels:
            face = "white" if level.behind else colour
            axis.plot(level.chats, level.ttft_ms_p95, "o", color=colour, markerfacecolor=face)
    axis.axhline(1000, color="#c0392b", linewidth=1, linestyle="--", label="1 s")
    axis.set_yscale("log")
    axis.set_xlabel("chats read at once (hollow: an answer fell behind its reader)")
    axis.set_title("First token p95, ms, at reading speed")
    axis.grid(color="#e6e6e6", linewidth=0.8)
    _legend(axis, -0.16)


def _legend(axis: Any, below: float) -> None:
    """Under the drawing, where no bar is."""
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, below))
