"""Draws how far a model's confidence can be trusted: a reliability diagram, a coverage curve.

Pure figures come from ``scoring``. The only thing here that needs matplotlib, which a product does
not have; knows nothing of models or of who looks at the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from assistant.modelkit import scoring

_BLUE, _RED, _GREEN, _GREY, _INK = "#1f5fa8", "#c0392b", "#3d7a4e", "#9a9a9a", "#333333"
_SUFFIXES = (".png", ".svg", ".pdf")
#: The error rate whose coverage is marked.
_ERROR = 0.05
#: A curve of fewer rows is mere chance: one wrong row among the first is 100 %.
_LEAST_KEPT = 5


class DiagramError(RuntimeError):
    """The picture cannot be drawn. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Bands:
    """The confidences from which a model answers, and answers with caution."""

    answer_from: float
    caution_from: float


def check(path: Path) -> None:
    """Raises: DiagramError where matplotlib is missing, or it cannot write such a file."""
    if find_spec("matplotlib") is None:
        raise DiagramError(
            "A diagram needs matplotlib, and it is not installed: pip install matplotlib"
        )
    if path.suffix not in _SUFFIXES:
        raise DiagramError(f"{path} would be no picture; let its name end in .png, .svg or .pdf.")


def calibration(
    confidence: Sequence[float],
    correct: Sequence[bool],
    path: Path,
    *,
    title: str,
    bands: Bands | None = None,
) -> None:
    """Writes the picture to ``path``, in the format of its suffix. Raises: DiagramError."""
    check(path)
    if not len(confidence):
        raise DiagramError("A calibration diagram needs rows with an intent, and there is none.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure = pyplot.figure(figsize=(11, 5.4), facecolor="white", layout="constrained")
        grid = figure.add_gridspec(2, 2, height_ratios=(4, 1))
        reliable = figure.add_subplot(grid[0, 0])
        _reliability(reliable, confidence, correct, bands)
        _counts(figure.add_subplot(grid[1, 0], sharex=reliable), confidence, correct)
        _coverage(figure.add_subplot(grid[:, 1]), confidence, correct)
        figure.suptitle(f"{title} ({len(confidence):,} questions)", fontsize=12)
        try:
            figure.savefig(path, dpi=110)
        except OSError as error:
            raise DiagramError(f"Cannot write {path}: {error.strerror}.") from error
        finally:
            pyplot.close(figure)


def _reliability(
    axis: Any, confidence: Sequence[float], correct: Sequence[bool], bands: Bands | None
) -> None:
    """How often right against how sure, a bar a bin; red is what is missing to, or beyond, it."""
    for one in scoring.reliability(confidence, correct):
        middle, width = (one.low + one.high) / 2, (one.high - one.low) * 0.9
        axis.bar(middle, one.right, width, color=_BLUE, zorder=2)
        gap = one.confidence - one.right
        axis.bar(middle, gap, width, bottom=one.right, facecolor=_RED, alpha=0.28, zorder=3)
        axis.hlines(one.confidence, middle - width / 2, middle + width / 2, color=_RED, zorder=4)
    axis.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle="--", zorder=5)
    if bands is not None:
        _bands(axis, bands)
    ece = scoring.ece(confidence, correct)
    axis.set(xlim=(0, 1), ylim=(0, 1.08), ylabel="share that is right")
    axis.set_title(f"Reliability: calibration error (ECE) {ece:.3f}", fontsize=11)
    axis.tick_params(labelbottom=False)
    axis.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    _light_grid(axis)
    _key(axis)


def _bands(axis: Any, bands: Bands) -> None:
    marks = ((bands.caution_from, "caution from"), (bands.answer_from, "answer from"))
    for at, text in marks:
        axis.axvline(at, color=_GREEN, linewidth=1, linestyle=":", zorder=5)
        axis.annotate(
            f"{text} {at:.2f}", (at, 1.07), xytext=(-3, 0), textcoords="offset points",
            rotation=90, ha="right", va="top", fontsize=8, color=_GREEN, zorder=6,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1},
        )  # fmt: skip


def _key(axis: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    drawn = [
        Patch(color=_BLUE, label="right"),
        Patch(facecolor=_RED, alpha=0.28, label="away from the confidence"),
        Line2D([], [], color=_RED, label="mean confidence"),
    ]
    axis.legend(handles=drawn, frameon=False, fontsize=8, loc="upper left")


def _counts(axis: Any, confidence: Sequence[float], correct: Sequence[bool]) -> None:
    """How many rows stand behind each bar above."""
    found = scoring.reliability(confidence, correct)
    most = max(one.rows for one in found)
    for one in found:
        middle = (one.low + one.high) / 2
        axis.bar(middle, one.rows, (one.high - one.low) * 0.9, color=_GREY)
        axis.annotate(f"{one.rows:,}", (middle, one.rows), xytext=(0, 1),
                      textcoords="offset points", ha="center", fontsize=7, color=_INK)  # fmt: skip
    axis.set(xlabel="confidence", ylabel="questions", ylim=(0, most * 1.3))
    axis.set_yticks([])


def _coverage(axis: Any, confidence: Sequence[float], correct: Sequence[bool]) -> None:
    """Error rate of the most confident questions, as more and more of them are answered."""
    kept, error = scoring.coverage_curve(confidence, correct)
    shown = slice(min(_LEAST_KEPT, len(kept)) - 1, None)
    axis.plot(100 * kept[shown], 100 * error[shown], color=_BLUE, linewidth=1.8)
    axis.axhline(100 * _ERROR, color=_RED, linewidth=1, linestyle="--")
    covered = 100 * scoring.coverage_at_error(confidence, correct, _ERROR)
    top = max(10.0, 110 * float(error[shown].max()))
    if covered:
        axis.vlines(covered, 0, 100 * _ERROR, color=_RED, linewidth=1, linestyle=":")
        axis.plot(covered, 100 * _ERROR, "o", color=_RED)
    axis.annotate(
        f"all: {100 * float(error[-1]):.1f} %", (100, 100 * float(error[-1])),
        xytext=(-4, 6), textcoords="offset points", ha="right", va="bottom", color=_BLUE,
    )  # fmt: skip
    axis.set(xlim=(0, 102), ylim=(0, top), xlabel="% of questions answered, most confident first",
             ylabel="% of these that are wrong")  # fmt: skip
    axis.set_title(f"Coverage: {covered:.1f} % answered at {100 * _ERROR:.0f} % error", fontsize=11)
    _light_grid(axis)


def _light_grid(axis: Any) -> None:
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
