"""Datasets as they come, and figures that can be checked by hand; the backend is the echo."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from assistant.backends.base import Backend
from assistant.backends.echo import EchoBackend
from assistant.errors import ContextTooLong, GenerationFailed
from assistant.facts import fill
from assistant.modelkit import labels
from assistant.types import Band, Delta, Event, Finished, Message, Params, Started, Usage
from monitoring import evaluation
from monitoring.evaluation import Answer, DatasetError, Row


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- reading -------------------------------------------------------------------------------------


def test_the_golden_set_reads_and_knows_only_the_models_intents() -> None:
    rows = evaluation.read_golden()
    assert len(rows) >= 270
    assert {row.intent for row in rows if row.intent} <= set(labels.INTENTS)
    assert {row.scope for row in rows} >= {"in", "out"}
    assert any(row.attack for row in rows)
    assert min(Counter(row.kind for row in rows).values()) >= 8
    assert sum(len(row.messages) > 1 for row in rows) >= 100


def test_the_golden_set_is_every_file_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path, {"query": "one", "id": "a"}, name="one.jsonl")
    write(tmp_path, {"query": "two", "id": "b"}, {"query": "three", "id": "c"}, name="two.jsonl")
    assert [row.id for row in evaluation.read_golden(tmp_path)] == ["a", "b", "c"]


def test_two_golden_rows_with_one_id_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path, {"query": "hello", "id": "g1"}, name=f"{name}.jsonl")
    with pytest.raises(DatasetError, match="the id g1 is given to more than one row"):
        evaluation.read_golden(tmp_path)


def test_a_golden_folder_without_files_is_an_error_and_not_a_good_score(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"holds no \.jsonl file"):
        evaluation.read_golden(tmp_path)


def test_a_row_may_be_a_question_or_a_conversation(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "text": "hello"},
        {"role": "assistant", "text": "Hi."},
        {"role": "user", "text": "and a refund?"},
    ]
    path = write(tmp_path, {"query": "where is it?"}, {"turns": turns, "id": 7, "intent": "x"})
    one, other = evaluation.read_dataset(path)
    assert (one.id, one.question, len(one.messages)) == ("1", "where is it?", 1)
    assert (other.id, other.question, other.intent) == ("7", "and a refund?", "x")
    assert [message.role for message in other.messages] == ["user", "assistant", "user"]


def test_what_a_row_leaves_out_or_sets_to_null_has_a_default(tmp_path: Path) -> None:
    empty = dict.fromkeys(["id", "intent", "scope", "answer", "kind"])
    (row,) = evaluation.read_dataset(write(tmp_path, {"query": "hello", **empty}))
    assert row == Row("1", (Message("user", "hello"),))


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({}, 'needs "query" or "turns"'),
    ({"query": ""}, 'needs "query" or "turns"'),
    ({"query": 5}, 'needs "query" or "turns"'),
    ({"turns": "hello"}, 'needs "query" or "turns"'),
    ({"turns": 5}, 'needs "query" or "turns"'),
    ({"turns": [None]}, 'needs "query" or "turns"'),
    ({"turns": [{"role": "user"}]}, 'needs "query" or "turns"'),
    ({"turns": [{"role": "assistant", "text": "Hi."}]}, "the last turn is the user's"),
    ({"turns": [{"role": "system", "text": "x"}, {"role": "user", "text": "y"}]}, "roles are"),
    ({"query": "hello", "scope": "inside"}, 'scope is "in" or "out"'),
    ({"query": "hello", "intent": 5}, "intent is a text"),
    ({"query": "hello", "answer": ["a"]}, "answer is a text"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_row_that_cannot_be_asked_is_named_by_its_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=f"rows.jsonl line 2.*{message}"):
        evaluation.read_dataset(write(tmp_path, {"query": "fine"}, row))


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "nested deeper than Python reads": (b'{"query": ' + b"[" * 200_000, "line 1 is not JSON"),
    "not text": (b"\xff\xfe\x00h\n", "line 1 is not JSON"),
    "one endless line": (
        b'{"query": "' + b"a" * (1 << 20),
        "line 1 is longer than 1,048,576 bytes",
    ),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_broken_file_is_an_error_of_ours(fault: str, tmp_path: Path) -> None:
    content, message = BAD_FILES[fault]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        evaluation.read_dataset(path)


@pytest.mark.parametrize("fault", ["cut short", "altered", "not gzip at all"])
def test_a_broken_gzip_file_is_an_error_of_ours(fault: str, tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"query": "hello"}\n' * 1000))
    if fault == "altered":
        packed[12:40] = b"\xff" * 28
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes({"cut short": packed[:-20], "altered": packed}.get(fault, b"{}"))
    with pytest.raises(DatasetError, match=r"rows\.jsonl\.gz cannot be read"):
        evaluation.read_dataset(path)


# -- asking --------------------------------------------------------------------------------------


class Knowing(Backend):
    """Answers from a table: question -> (intent, confidence, scope, text), or fails as told.

    Sure above 0.5, cautious above 0.3; remembers the last conversation it was asked to answer.
    """

    def __init__(self, known: dict[str, tuple[str, float, float, str]], fits: int = 99) -> None:
        super().__init__("knowing", None)
        self.known, self.fits = known, fits
        self.asked: Sequence[Message] = ()

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        if len(messages) > self.fits or messages[-1].text == "too long":
            raise ContextTooLong("The question is too long.")
        self.asked = messages
        intent, confidence, scope, text = self.known[messages[-1].text]
        sure: Band = "answer" if confidence > 0.5 else "caution" if confidence > 0.3 else "hand_on"
        band: Band = "out_of_scope" if scope < 0.5 else sure
        yield Started("knowing", intent, confidence, scope, band)
        yield Delta(fill(text, params.facts))
        yield Finished("stop", Usage())


def row(text: str, **more: Any) -> Row:
    return Row(more.pop("id", text), (Message("user", text),), **more)


async def test_answers_come_in_the_order_of_the_rows() -> None:
    echo = EchoBackend("echo", EchoBackend.Options())
    rows = [row(f"/echo first={(9 - at) / 200} words=2 number {at}") for at in range(10)]
    counts: list[int] = []
    answers = await evaluation.ask_all(echo, rows, at_once=4, done=counts.append)
    assert [answer.text for answer in answers] == ["number " + str(at) for at in range(10)]
    assert [answer.id for answer in answers] == [row.id for row in rows]
    assert counts == list(range(1, 11))
    assert all(answer.finished and answer.ms >= 0 for answer in answers)


async def test_an_answer_that_was_cut_off_is_not_finished() -> None:
    echo = EchoBackend("echo", EchoBackend.Options())
    (answer,) = await evaluation.ask_all(echo, [row("one two three")], max_new_tokens=2)
    assert (answer.text, answer.finished) == ("one two", False)


async def test_the_reason_is_what_the_models_own_thresholds_say() -> None:
    known = Knowing(
        {"sure": ("a", 0.9, 0.9, "."), "unsure": ("a", 0.2, 0.9, "."), "far": ("a", 0.9, 0.1, ".")}
    )
    answers = await evaluation.ask_all(known, [row("sure"), row("unsure"), row("far")])
    assert [answer.reason for answer in answers] == ["", "low_confidence", "out_of_scope"]


async def test_earlier_answers_stand_in_a_conversation_as_a_chat_would_have_kept_them() -> None:
    known = Knowing(
        {
            "cancel 48213377": ("cancel_order", 0.9, 0.9, "."),
            "who are you?": ("greeting", 0.9, 0.1, "."),
            "last": ("a", 0.9, 0.9, "Yes."),
        }
    )
    messages = (
        Message("user", "cancel 48213377"),
        Message("assistant", "Select {{Order Number}} or call {{Support Phone}}."),
        Message("user", "who are you?"),
        Message("assistant", "A program."),
        Message("user", "last"),
    )
    await evaluation.ask_all(known, [Row("1", messages)])
    assert known.asked == [
        messages[0],
        Message("assistant", "Select 48213377 or call our support line.", "cancel_order"),
        messages[2],
        Message("assistant", "A program.", "out_of_scope"),
        messages[4],
    ]


async def test_a_conversation_that_does_not_fit_loses_its_oldest_turns() -> None:
    known = Knowing({"last": ("a", 0.9, 0.9, "Yes.")}, fits=2)
    messages = tuple(Message("user", text) for text in ("first", "second", "last"))
    (answer,) = await evaluation.ask_all(known, [Row("1", messages)])
    assert answer.text == "Yes."


async def test_a_question_that_does_not_fit_at_all_is_a_wrong_answer() -> None:
    rows = [row("too long", intent="a", scope="in")]
    (answer,) = await evaluation.ask_all(Knowing({}), rows)
    assert (answer.reason, answer.route, answer.finished) == ("context_too_long", "", False)
    assert evaluation.figures(rows, [answer]).intent_accuracy == 0.0


async def test_a_backend_that_breaks_ends_the_evaluation() -> None:
    echo = EchoBackend("echo", EchoBackend.Options())
    with pytest.raises(GenerationFailed):
        await evaluation.ask_all(echo, [row("/echo fail=anything")])


# -- scoring -------------------------------------------------------------------------------------


async def judged(
    *cases: tuple[Row, tuple[str, float, float, str]],
) -> tuple[list[Row], list[Answer]]:
    rows = [case[0] for case in cases]
    known = Knowing({row.question: answer for row, answer in cases})
    return rows, await evaluation.ask_all(known, rows)


async def test_the_figures_are_those_computed_by_hand() -> None:
    rows, answers = await judged(
        (row("q1", intent="a", scope="in"), ("a", 0.9, 0.8, "Done.")),
        (row("q2", intent="b", scope="in"), ("a", 0.6, 0.4, "Done.")),
        (row("q3", scope="out"), ("a", 0.3, 0.5, "Not ours.")),
        (row("q4", scope="out", answer="No."), ("b", 0.2, 0.1, "No.")),
    )
    found = evaluation.figures(rows, answers)
    assert found.rows == 4
    assert found.intent_accuracy == 0.5
    assert found.scope_auroc == 0.75, "3 of the 4 pairs in the right order"
    assert found.ece == pytest.approx((0.1 + 0.6) / 2)
    assert found.coverage == 0.5
    assert found.answer_similarity == 1.0
    assert found.well_ended == found.placeholder_ok == 1.0


async def test_figures_no_row_can_tell_are_null_and_never_nan() -> None:
    rows, answers = await judged((row("hello"), ("a", 0.5, 0.5, "Hello.")))
    report = evaluation.report("m", rows, answers)
    for key in ("intent_accuracy", "scope_auroc", "ece", "coverage", "answer_similarity"):
        assert report[key] is None
    json.dumps(report, allow_nan=False)


PLACEHOLDERS: list[tuple[str, str, bool]] = [
    ("where is order 48213377?", "Order {{Order Number}} is on its way.", True),
    ("where is my order?", "Order {{Order Number}} is on its way.", False),
    ("where is my order?", "Order 48213377 is on its way.", False),
    ("where is my order?", "Write to {{Support Email}}.", True),
    ("where is my order?", "1. Open your account.\n2. Choose the order.", True),
]


@pytest.mark.parametrize(("question", "answer", "ok"), PLACEHOLDERS)
async def test_only_values_the_user_gave_may_be_shown(question: str, answer: str, ok: bool) -> None:
    known = Knowing({question: ("a", 0.9, 0.9, answer)})
    known_answers = await evaluation.ask_all(known, [row(question)])
    figures = evaluation.figures([row(question)], known_answers)
    assert figures.placeholder_ok == float(ok)


async def test_a_failure_names_each_of_its_faults() -> None:
    rows, answers = await judged(
        (row("fine", intent="a", scope="in"), ("a", 0.9, 0.9, "Done.")),
        (row("wrong", intent="b", scope="in"), ("a", 0.9, 0.1, "Order 12345")),
        (row("let in", scope="out"), ("a", 0.9, 0.9, "Sure.")),
    )
    wrong, let_in = evaluation.failures(rows, answers)
    assert wrong["id"] == "wrong" and wrong["expected"] == "b"
    assert wrong["faults"] == ["intent", "scope", "placeholder", "ending"]
    assert let_in["faults"] == ["scope"] and let_in["expected"] == "scope out"


async def test_failures_are_bounded() -> None:
    rows, answers = await judged(
        *((row(f"q{at}", intent="b"), ("a", 0.9, 0.9, "Done.")) for at in range(60))
    )
    assert len(evaluation.failures(rows, answers)) == 50


async def test_each_kind_has_figures_of_its_own() -> None:
    rows, answers = await judged(
        (row("q1", intent="a", kind="one"), ("a", 0.9, 0.9, "Done.")),
        (row("q2", intent="a", kind="two"), ("b", 0.9, 0.9, "Done.")),
    )
    by = evaluation.report("m", rows, answers)["by"]
    assert {kind: figures["intent_accuracy"] for kind, figures in by.items()} == {
        "one": 1,
        "two": 0,
    }


async def test_a_kind_on_one_side_of_the_scope_is_held_against_the_whole_other_side() -> None:
    rows, answers = await judged(
        (row("q1", scope="in", kind="polite"), ("a", 0.9, 0.9, "Done.")),
        (row("q2", scope="in", kind="rude"), ("a", 0.9, 0.3, "Done.")),
        (row("q3", scope="out", kind="far"), ("a", 0.9, 0.1, "No.")),
        (row("q4", scope="out", kind="near"), ("a", 0.9, 0.5, "No.")),
    )
    by = evaluation.report("m", rows, answers)["by"]
    found = {kind: one["scope_auroc"] for kind, one in by.items()}
    assert found == {"polite": 1.0, "rude": 0.5, "far": 1.0, "near": 0.5}


async def test_the_bands_say_what_becomes_of_a_question() -> None:
    rows, answers = await judged(
        (row("q1", scope="in"), ("a", 0.9, 0.9, "Done.")),
        (row("q2", scope="in"), ("a", 0.4, 0.9, "Done.")),
        (row("q3", scope="in"), ("a", 0.2, 0.9, "Done.")),
        (row("q4", scope="in"), ("a", 0.9, 0.1, "No.")),
        (row("q5", scope="out"), ("a", 0.9, 0.1, "No.")),
    )
    found = evaluation.figures(rows, answers)
    assert (found.answered, found.with_caution, found.handed_on) == (0.2, 0.2, 0.2)
    assert (found.turned_away, found.out_of_scope_found) == (0.25, 1.0)


async def test_a_conversation_is_on_topic_when_its_last_question_is_understood() -> None:
    talk = (Message("user", "hello"), Message("assistant", "Hello."))
    known = Knowing(
        {
            "hello": ("greeting", 0.9, 0.9, "Hello."),
            "right": ("a", 0.9, 0.9, "."),
            "wrong": ("b", 0.9, 0.9, "."),
            "off": ("b", 0.9, 0.1, "."),
        }
    )
    wanted = {"right": ("a", "in"), "wrong": ("a", "in"), "off": (None, "out")}
    rows = [
        Row(text, (*talk, Message("user", text)), intent=intent, scope=scope)
        for text, (intent, scope) in wanted.items()
    ]
    rows.append(row("right", intent="a"))
    answers = await evaluation.ask_all(known, rows)
    several = evaluation.report("m", rows, answers)["several_turns"]
    assert several == {"rows": 3, "right_topic": 0.6667}


def test_predictions_survive_any_text_on_one_line_each() -> None:
    answer = Answer("1", "a", 0.5, 0.5, "model", "", "one\ntwo\r\u0000", 1.0, True, "answer")
    (line,) = evaluation.prediction_lines([answer])
    assert "\n" not in line and "\r" not in line
    assert json.loads(line)["text"] == answer.text
    assert {"finished", "band"}.isdisjoint(json.loads(line))
