"""Files of reviewed corrections: what is read, and what is refused with its file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from assistant import facts
from assistant.modelkit import corpus, labels
from assistant.modelkit.corpus import CorpusError
from assistant.modelkit.corrections import (
    MOST_CHARS,
    MOST_ROWS,
    Said,
    read_corrections,
    read_golden,
    redacted,
    written_out,
)

EXAMPLE = Path(__file__).with_name("corrections.jsonl")
GOLDEN = Path(__file__).parents[2] / "monitoring" / "golden" / "support-en.jsonl"
ROW = {"query": "where is my stuff", "intent": "track_order"}


def file_of(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "corrections.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path) -> list[Any]:
    return read_corrections(path, redacted(facts.mask))


def test_questions_turns_answers_and_ids_are_read(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "text": "cancel it"},
        {"role": "assistant", "text": "Which order?"},
        {"role": "user", "text": "48213377"},
    ]
    answer = "For {{Order Number}}: open My Orders and choose Cancel."
    path = file_of(tmp_path, ROW, "", {"turns": turns, "intent": "cancel_order", "answer": answer,
                                       "id": 7, "reviewer": "sam"})  # fmt: skip
    one, two = read(path)
    assert (one.question, one.intent, one.answer, one.id) == (*ROW.values(), None, "line 1")
    assert two.turns == tuple(Said(turn["role"], turn["text"]) for turn in turns)
    assert (two.answer, two.id, two.where) == (answer, "7", f"{path} line 3")


def test_a_compressed_file_and_one_with_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    packed = tmp_path / "corrections.jsonl.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(ROW).encode()))
    assert [case.question for case in read(packed)] == ["where is my stuff"]


def test_the_example_file_is_one_of_its_kind_and_holds_no_golden_question() -> None:
    cases = read(EXAMPLE)
    golden = corpus.HeldOut([case.question for case in read_golden(GOLDEN)])
    assert len(cases) == 20
    assert not [case.id for case in cases if case.question in golden]


TURN = {"role": "user", "text": "hello"}
ANSWERED = {**ROW, "answer": "See {{Order Nr}}."}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (['{"query": "hi"'], r"corrections\.jsonl line 1 is not JSON"),
        ([ROW, "[1, 2]"], r"line 2 is not a JSON object"),
        ([{"query": "hi"}], r'line 1 needs an "intent"'),
        ([{"intent": "greeting"}], r'line 1 needs "query" or "turns"'),
        ([{**ROW, "turns": [TURN]}], r'line 1 needs "query" or "turns" \(one of them\)'),
        ([{**ROW, "intent": "track_ordr"}], r"no intent is called 'track_ordr'; .*'track_order'"),
        ([{**ROW, "intent": 3}], r'line 1 needs an "intent"'),
        ([{**ROW, "query": "   "}], r"query is a text, and this has none"),
        ([{**ROW, "query": ["hi"]}], r"query is a text"),
        ([{**ROW, "query": "a" * (MOST_CHARS + 1)}], r"has 2,001 characters; at most 2,000"),
        ([r'{"query": "broken \ud800", "intent": "greeting"}'], r"half a character"),
        ([{"turns": [], "intent": "greeting"}], r"turns go user, assistant, user"),
        ([{"turns": [TURN, TURN], "intent": "greeting"}], r"turns go user, assistant, user"),
        ([{"turns": "hello", "intent": "greeting"}], r"turns is a list"),
        ([{"turns": [{"role": "user"}], "intent": "greeting"}], r"text is a text"),
        ([{**ROW, "id": True}], r"id is a text or a whole number"),
        ([{**ROW, "id": "a"}, {**ROW, "id": "a"}], r"line 2: the id 'a' stands in .*line 1"),
        ([{**ROW, "anwser": "x"}], r"field 'anwser'; 'answer' is meant"),
        ([ANSWERED], r"\{\{Order Nr\}\}, which is no placeholder; the nearest is \{\{Order Number"),
        ([{**ROW, "answer": "See {{Order Number"}], r"opens a placeholder that it does not close"),
        ([{**ROW, "answer": "It is 48213377."}], r"holds a value \(Order Number\)"),
        ([{**ROW, "answer": "Write to a@b.example."}], r"holds a value \(Email\)"),
        ([ROW, {"query": "Where is my stuff?", "intent": "complaint"}],
         r"line 2 says 'complaint' and .*line 1 says 'track_order' of the same question"),
    ],
)  # fmt: skip
def test_what_is_doubtful_is_refused_with_its_line(
    rows: list[Any], fault: str, tmp_path: Path
) -> None:
    with pytest.raises(CorpusError, match=fault):
        read(file_of(tmp_path, *rows))


def test_the_same_row_twice_is_no_contradiction(tmp_path: Path) -> None:
    assert len(read(file_of(tmp_path, ROW, ROW))) == 2


def test_an_empty_a_missing_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"holds no corrections"):
        read(file_of(tmp_path, "", "  "))
    with pytest.raises(CorpusError, match=r"nowhere\.jsonl is missing"):
        read(tmp_path / "nowhere.jsonl")
    rows = [{**ROW, "query": f"question {at}"} for at in range(MOST_ROWS + 1)]
    with pytest.raises(CorpusError, match=r"line 2001: over 2,000 corrections"):
        read(file_of(tmp_path, *rows))


def test_a_line_without_end_and_a_broken_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line 1 is longer than"):
        read(file_of(tmp_path, '{"query": "' + "a" * 300_000))
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(json.dumps(ROW).encode())[:-9])
    with pytest.raises(CorpusError, match=r"broken\.jsonl\.gz cannot be read"):
        read(broken)


def test_placeholders_written_out_in_a_redacted_question_are_placeholders() -> None:
    parts = redacted(facts.mask)("cancel {{order number}} and 48213377, not {{7*7}}").parts
    assert written_out(parts) == "cancel {{Order Number}} and {{Order Number}}, not {{7*7}}"
    assert sum(type(part) is not str for part in parts) == 2


def test_golden_rows_out_of_scope_are_cases_too() -> None:
    cases = read_golden(GOLDEN)
    assert {case.intent for case in cases} <= set(labels.INTENTS)
    assert any(case.intent == labels.OUT_OF_SCOPE for case in cases)
    assert any(len(case.turns) == 3 for case in cases)
