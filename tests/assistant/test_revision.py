"""Judging a revision and refusing one, without training anything: pure parts and paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from assistant.engine.manifest import Calibration
from assistant.modelkit import labels
from assistant.modelkit.calibrate import Scores
from assistant.modelkit.judging import Judged, Outcome
from assistant.modelkit.revision import (
    RevisionError,
    next_version,
    refuse_full_disk,
    refuse_overwriting,
    revised_card,
)
from assistant.modelkit.tune import learned


def outcome(right: float, golden_before: float, golden_after: float) -> Outcome:
    before = Judged(0.1, golden_before, 0.8, 0.6, None, ("a", "b"))
    after = Judged(right, golden_after, 0.8, 0.6, None, ())
    return Outcome(Path("run/model"), before, after, 20, 80, 1.5)


@pytest.mark.parametrize(
    ("right", "before", "after", "faults"),
    [
        (0.90, 0.800, 0.795, []),
        (1.00, 0.800, 0.900, []),
        (0.85, 0.800, 0.800, ["only 85.0% of the corrections are right"]),
        (1.00, 0.800, 0.794, ["golden set lost 0.6 points (at most 0.5)"]),
        (0.10, 0.800, 0.700, ["only 10.0% of", "lost 10.0 points"]),
    ],
)
def test_a_revision_passes_if_it_learned_and_lost_nothing(
    right: float, before: float, after: float, faults: list[str]
) -> None:
    found = outcome(right, before, after)
    assert len(found.faults()) == len(faults)
    assert all(part in said for part, said in zip(faults, found.faults(), strict=True))
    assert found.passed is found.figures()["passed"] is (not faults)
    assert ("NOT PASSED" in found.verdict()) is bool(faults)


def test_figures_that_nobody_measured_are_left_out_of_the_card() -> None:
    table = outcome(1.0, 0.8, 0.81).table()
    assert "| golden set, intent | 0.8 | 0.81 |" in table and "likeness" not in table


@pytest.mark.parametrize(
    ("base", "version"),
    [("0.1.0", "0.1.0+1"), ("0.1.0+1", "0.1.0+2"), ("2.0+9", "2.0+10"), ("1+x", "1+x+1")],
)
def test_versions_count_revisions_of_a_release(base: str, version: str) -> None:
    assert next_version(base) == version


def test_a_revised_card_has_one_section_on_corrections_and_keeps_the_rest() -> None:
    text = "# small 0.1.0\n\nAbout.\n\n## Figures\n\nfigures\n\n## Limits\n\nlimits\n"
    once = revised_card(text, "# small 0.1.0+1", "small 0.1.0", outcome(1.0, 0.8, 0.8))
    twice = revised_card(once, "# small 0.1.0+2", "small 0.1.0+1", outcome(0.5, 0.8, 0.8))
    assert once.startswith("# small 0.1.0+1\n\nAbout.\n\n## Corrections\n")
    assert once.endswith("## Figures\n\nfigures\n\n## Limits\n\nlimits\n")
    assert "Revised from small 0.1.0 with" in once and "All held: 20 corrections" in once
    assert twice.count("## ") == 3 and "NOT PASSED, do not use it" in twice
    bare = revised_card("", "# x 1+1", "x 1", outcome(1.0, 0.8, 0.8))
    assert bare.startswith("# x 1+1\n\n## Corrections\n")


@pytest.mark.parametrize(
    "out", ["active/model", "active", "active/model/run", "active/model/run/deep"]
)
def test_a_run_never_writes_into_a_folder_in_use(out: str, tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match=r"which is in use and stays as it is"):
        refuse_overwriting(tmp_path / out, [tmp_path / "active" / "model"])


def test_a_link_to_a_folder_in_use_is_seen_through(tmp_path: Path) -> None:
    active = tmp_path / "active"
    active.mkdir()
    (tmp_path / "link").symlink_to(active)
    with pytest.raises(RevisionError, match=r"which is in use"):
        refuse_overwriting(tmp_path / "link", [active])


def test_beside_a_folder_in_use_a_run_may_write(tmp_path: Path) -> None:
    refuse_overwriting(tmp_path / "runs" / "two", [tmp_path / "runs" / "one" / "model"])
    refuse_overwriting(tmp_path, [tmp_path / "runs" / "one" / "model"])


def test_a_disk_that_is_too_small_is_refused_with_both_figures(tmp_path: Path) -> None:
    with pytest.raises(RevisionError, match=r"needs about [\d,]+ MB on the disk of .* MB are free"):
        refuse_full_disk(tmp_path / "not" / "yet", 10**15)
    refuse_full_disk(tmp_path / "not" / "yet", 10)


def test_a_case_is_learned_by_intent_and_scope_and_surely_with_a_margin() -> None:
    fitted = Calibration(scope_threshold=0.3, answer_from=0.9, caution_from=0.5)
    names = ["track_order", "track_order", "track_order", "get_refund", labels.OUT_OF_SCOPE]
    at = labels.INTENTS.index("track_order")
    intents = np.zeros((5, len(labels.INTENTS) - 1))
    intents[:, at] = [9.0, 3.0, 9.0, 9.0, 9.0]  # with 36 intents, 3 is a chance of about a third
    right, sure = learned(Scores(intents, np.array([5.0, 5.0, -0.6, 5.0, -5.0])), names, fitted)
    assert right == [True, True, True, False, True]
    assert sure == [True, False, False, False, True]
