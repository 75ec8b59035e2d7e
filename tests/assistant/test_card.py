"""The model card, laid out from figures made up for it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from assistant.engine.manifest import Architecture, Manifest
from assistant.modelkit import card, scoring
from assistant.modelkit.card import Findings, Measure
from assistant.modelkit.examples import TrainConfig
from assistant.modelkit.finish import Reply
from assistant.modelkit.scoring import Judged, Pair

LOST = {
    "prompts": 80, "tokens": 16, "same_first": 0.9875, "greedy_agreement": 0.9, "bytes": 9_000_000,
    "perplexity_ratio": 1.0024,
}  # fmt: skip


def judged(kind: str, *, inside: bool = True, right: bool = True) -> Judged:
    return Judged(
        kind=kind,
        wanted="a" if inside else None,
        scope="in" if inside else "out",
        intent="a" if right else "b",
        confidence=0.9,
        inside=0.9 if inside else 0.2,
        band="answer" if inside else "out_of_scope",
    )


def reply(question: str, text: str = "Yes.\nNo.") -> Reply:
    return Reply(question, "a", "a", 0.912, 0.998, "answer", text, True)


@pytest.fixture
def findings() -> Findings:
    rows = [
        judged("written"), judged("written", right=False), judged("out", inside=False),
        judged("golden rude"),
    ]  # fmt: skip
    pairs = [Pair("surface_variant", True, 0.99, True), Pair("sibling_intent", False, 0.5, False)]
    shape = Architecture(320, 6, 5, 1, 64, 896, 6144, 1e-5, 10000.0, True, 1024)
    return Findings(
        manifest=Manifest("support-en", "0.2.0", "now", shape, "static8", 1024),
        builds={"static8": LOST, "int4": LOST | {"bytes": 5_000_000}},
        kinds=scoring.by_kind(rows),
        talks=(0.912, 129),
        measures=[Measure("built_route_accuracy", 0.9512, 1300), Measure("natural_ece", None, 0)],
        near={"cache_pairs_own": scoring.near_matches(pairs)},
        shown=[*([reply(f"question {at}?")] for at in range(11)), [reply("one?"), reply("two?")]],
        settings=asdict(TrainConfig(minutes=62)),
        report={"groups": {"written": 5000, "out": 20}, "dialogue_turns": 900, "unlabelled": 31000},
        cores=2,
    )


def written(findings: Findings, folder: Path) -> str:
    return card.write_card(folder, findings).read_text()


def test_every_figure_has_its_rows_beside_it(findings: Findings, tmp_path: Path) -> None:
    text = written(findings, tmp_path)
    for line in (
        "| written | 2 | 50.0 % | 0.400 | 50.0 % | 1.000 | 100.0 % | 0.0 % | 0.0 % | 0.0 % |",
        "| out | 1 | 100.0 % | 1.000 | 0.0 % | 0.0 % | 0.0 % |",
        "| built route accuracy | 0.9512 | 1,300 |",
        "| natural ece | - | 0 |",
        "| static8 | 80 | 98.8 % | 90.0 % | 1.0024 | 9.0 MB |",
        "| int4 | 80 | 98.8 % | 90.0 % | 1.0024 | 5.0 MB |",
        "| surface_variant | 1 | 1 | 0.990 | - | 100.0 % | 100.0 % | - | 100.0 % |",
        "| sibling_intent | 0 | 1 | 0.500 | 1.000 | 0.0 % | 0.0 % | 1.000 | 0.0 % |",
    ):
        assert line in text
    assert "Several turns: right topic 91.2 % of 129." in text


def test_the_run_is_described_as_it_was_set(findings: Findings, tmp_path: Path) -> None:
    text = written(findings, tmp_path)
    assert text.startswith("# support-en 0.2.0\n")
    assert "ONE run of 62 minutes on 2 CPU cores" in text
    assert "--minutes 62 --seed 0" in text
    assert "8 bit (constant activation scales" in text
    assert "5,000 written, 20 out; 900 dialogue turns; 31,000 unlabelled texts" in text
    assert "soft labels" in text and "all-MiniLM-L6-v2" in text


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "without a teacher": (asdict(TrainConfig().without_teacher()), "ONE run of 75 minutes"),
    "from a checkpoint": (
        asdict(TrainConfig(minutes=9).tuning().without_teacher()),
        "Fine-tuned for 9 minutes",
    ),
    "from a checkpoint, all of it": (
        asdict(TrainConfig(minutes=60).continued()),
        "Fine-tuned for 60 minutes",
    ),
    "on a GPU": (asdict(TrainConfig(device="cuda")), "on a GPU"),
    "nobody wrote down": ({}, "## Figures"),
}


@pytest.mark.parametrize("run", OTHER_RUNS)
def test_a_run_may_also_be(run: str, findings: Findings, tmp_path: Path) -> None:
    settings, words = OTHER_RUNS[run]
    text = written(replace(findings, settings=settings), tmp_path)
    assert words in text
    if run in ("without a teacher", "from a checkpoint"):
        assert "MiniLM" not in text
    if run == "from a checkpoint, all of it":
        assert "MiniLM" in text and "soft labels" in text and "the meanings of words" not in text


def test_questions_stand_with_their_answers_and_talks_stay_together(
    findings: Findings, tmp_path: Path
) -> None:
    text = written(findings, tmp_path)
    assert "## Twelve questions" in text
    one = "(`a`, confidence 0.91, in scope 1.00)\n\n> Yes.\n> No."
    assert f"**one?** {one}\n\n**two?** {one}\n\n## Data" in text


def test_pictures_are_shown_where_they_are(findings: Findings, tmp_path: Path) -> None:
    assert ".png" not in written(findings, tmp_path)
    for name in (card.CURVES, card.CALIBRATION):
        (tmp_path / name).write_bytes(b"")
    text = written(findings, tmp_path)
    assert "](curves.png)" in text and "](calibration.png)" in text


def test_what_was_not_measured_is_left_out(findings: Findings, tmp_path: Path) -> None:
    bare = replace(
        findings,
        near={},
        talks=(None, 0),
        kinds=scoring.by_kind([judged("written"), judged("out", inside=False)]),
        builds={"static8": {"bytes": 9_000_000}},
    )
    text = written(bare, tmp_path)
    assert "Near matches" not in text and "golden" not in text.lower()
    assert "| static8 | - | - | - | - | 9.0 MB |" in text
    assert "common follow-ups only." in text


def test_sources_licences_and_limits_are_named(findings: Findings, tmp_path: Path) -> None:
    text = written(findings, tmp_path)
    for words in (
        "CDLA-Sharing-1.0", "CC BY 4.0", "CC BY 3.0", "CDLA-Permissive-2.0", "Apache-2.0",
        "hard negatives", "injection attempts", "rude but legitimate", "cannot do",
        "intent accuracy",
    ):  # fmt: skip
        assert words in text
