"""The calibration diagram is drawn from any rows, and says so where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from assistant.modelkit import diagrams
from assistant.modelkit.diagrams import Bands, DiagramError

# matplotlib warns of its own future; its warnings are not ours to mend.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("default")]

ROWS: dict[str, tuple[list[float], list[bool]]] = {
    "mixed": ([at / 40 for at in range(41)], [at % 3 > 0 for at in range(41)]),
    "one right row": ([0.7], [True]),
    "all wrong": ([0.2, 0.9, 1.0], [False] * 3),
    "all right and sure": ([1.0] * 30, [True] * 30),
}


@pytest.fixture(autouse=True)
def _needs_matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.parametrize("rows", ROWS)
def test_a_picture_is_drawn_of(rows: str, tmp_path: Path) -> None:
    confidence, correct = ROWS[rows]
    path = tmp_path / "out.png"
    diagrams.calibration(confidence, correct, path, title="model", bands=Bands(0.8, 0.5))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_the_name_chooses_the_format(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    diagrams.calibration([0.5, 0.9], [False, True], path, title="model")
    assert "<svg" in path.read_text()


def test_what_cannot_be_drawn_is_an_error_of_ours(tmp_path: Path) -> None:
    for rows, path, message in (
        ([], tmp_path / "out.png", "there is none"),
        ([0.5], tmp_path / "out.txt", r"\.png, \.svg or \.pdf"),
        ([0.5], tmp_path / "none" / "out.png", "Cannot write .*No such file"),
    ):
        with pytest.raises(DiagramError, match=message):
            diagrams.calibration(rows, [True] * len(rows), path, title="model")
