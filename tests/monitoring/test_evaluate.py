"""``manage.py evaluate`` on the model that ships: its tables, its JSON, its picture."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError

from assistant.modelkit import diagrams
from monitoring import evaluation

pytestmark = pytest.mark.django_db

ROWS: list[dict[str, Any]] = [
    {"id": "a", "query": "please cancel order 48213377", "intent": "cancel_order", "scope": "in"},
    {"id": "b", "query": "who won the match?", "scope": "out", "kind": "far"},
    {
        "id": "c",
        "turns": [
            {"role": "user", "text": "where is order 48213377?"},
            {"role": "assistant", "text": "Select {{Order Number}} in My Orders."},
            {"role": "user", "text": "can I talk to a real person please"},
        ],
        "intent": "contact_human_agent",
        "scope": "in",
        "kind": "talk",
    },
]
CONTRACT = {
    "rows", "model", "intent_accuracy", "scope_auroc", "ece", "placeholder_ok", "well_ended",
    "coverage", "answer_similarity", "by", "failures",
}  # fmt: skip
FATES = {"answered", "with_caution", "handed_on", "turned_away", "out_of_scope_found"}


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A golden set of two files."""
    for name, rows in (("one", ROWS[:2]), ("two", ROWS[2:])):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(evaluation, "GOLDEN", tmp_path)
    return tmp_path


def evaluate(*args: str) -> str:
    out = StringIO()
    call_command("evaluate", *args, stdout=out, no_color=True)
    return out.getvalue()


def test_without_a_dataset_the_whole_golden_set_is_judged(golden: Path) -> None:
    found = json.loads(evaluate("--json"))
    assert found["rows"] == 3
    assert found.keys() >= CONTRACT
    assert all(one.keys() >= FATES for one in (found, *found["by"].values()))
    assert found["several_turns"] == {"rows": 1, "right_topic": 1.0}
    assert found["by"]["far"]["scope_auroc"] == found["by"]["talk"]["scope_auroc"] == 1.0


def test_the_tables_show_figures_and_fates_of_each_kind(golden: Path) -> None:
    lines = evaluate().splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("talk")] == [["talk", "1"]]
    heading = next(line for line in lines if "handed on" in line)
    assert heading.split() == [
        "kind", "rows", "answered", "with", "caution", "handed", "on", "turned", "away", "found"
    ]  # fmt: skip
    assert "several turns: right topic 100.0% of 1" in lines


def test_a_picture_that_cannot_be_drawn_is_refused_before_the_work(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = str(golden / "no-model")
    monkeypatch.setattr(diagrams, "find_spec", lambda name: "installed")
    for path, message in (
        (golden / "none" / "out.png", r"Cannot write .*none.*No such file"),
        (golden / "out.txt", r"out\.txt.*\.png, \.svg or \.pdf"),
    ):
        with pytest.raises(CommandError, match=message):
            evaluate("--model", nowhere, "--plot", str(path))
    monkeypatch.setattr(diagrams, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"needs matplotlib.*pip install matplotlib"):
        evaluate("--model", nowhere, "--plot", str(golden / "out.png"))
    assert not list(golden.glob("out.*"))


def test_rows_without_an_intent_make_no_picture(golden: Path) -> None:
    rows = golden / "rows.jsonl"
    rows.write_text('{"query": "hello"}\n')
    missing = ["--model", str(golden / "no-model"), "--plot", str(golden / "out.png")]
    with pytest.raises(CommandError, match=r"needs rows with an intent|needs matplotlib"):
        evaluate("--dataset", str(rows), *missing)


@pytest.mark.train
@pytest.mark.filterwarnings("default")
def test_the_picture_is_written(golden: Path) -> None:
    pytest.importorskip("matplotlib")
    evaluate("--plot", str(golden / "out.png"))
    assert (golden / "out.png").read_bytes().startswith(b"\x89PNG")
