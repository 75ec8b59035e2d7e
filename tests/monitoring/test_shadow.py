"""A candidate in shadow: what it is asked, when it keeps quiet, how it is compared and judged."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from assistant.backends.echo import EchoBackend
from assistant.engine.worker import EngineStats
from assistant.modelkit.build import build_random
from assistant.models import ModelVersion
from assistant.types import Message as Said
from conversations.models import Conversation, Message
from conversations.turn import TurnRecord
from monitoring import metrics, reading, shadow, shadowing
from monitoring.models import ShadowPair
from monitoring.shadowing import Shadow
from tests.monitoring.conftest import Counted, ask

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def always_sampled(settings: Any) -> Iterator[None]:
    limits = {**settings.ASSISTANT["SHADOW"], "SHARE": 1.0}
    settings.ASSISTANT = {**settings.ASSISTANT, "SHADOW": limits}
    shadowing.shadowing.forget()
    yield
    shadowing.shadowing.stop()


@pytest.fixture
def own() -> Iterator[Shadow]:
    """A shadow of the test's own."""
    made = Shadow()
    yield made
    made.stop()


class Candidate(EchoBackend):
    """Says "candidate" and the question; keeps what it was asked."""

    asked: list[tuple[Said, ...]] = []
    manner = EchoBackend.Options(intent="get_refund", confidence=0.9)

    def __init__(self, alias: str, options: Any) -> None:
        super().__init__(alias, type(self).manner)

    async def stream(self, messages: Any, params: Any) -> Any:
        self.asked.append(tuple(messages))
        async for event in super().stream(messages, params):
            yield event


@pytest.fixture
def candidate(monkeypatch: pytest.MonkeyPatch) -> type[Candidate]:
    """Whatever folder a version names, this answers for it."""
    monkeypatch.setattr("assistant.backends.onnx.OnnxBackend", Candidate)
    monkeypatch.setattr(Candidate, "asked", [])
    monkeypatch.setattr(Candidate, "manner", Candidate.manner)
    return Candidate


def version(state: str = "shadow", **more: Any) -> ModelVersion:
    values = {"name": "new", "version": "2", "sha256": uuid.uuid4().hex, "folder": "unused"}
    return ModelVersion.objects.create(state=state, **{**values, **more})


def talk(*turns: tuple[str, str], user: Any = None, **answer: Any) -> list[Message]:
    """The answers of a stored conversation, as a model gave them."""
    values = {
        "route": "model", "model": "old@1", "intent": "get_refund", "confidence": 0.9,
        "finish_reason": "stop", "duration_ms": 40.0, "ttft_ms": 10.0, "output_tokens": 7, **answer,
    }  # fmt: skip
    held, before, answers = Conversation.objects.create(user=user), None, []
    for at, (question, text) in enumerate(turns):
        asked = Message.objects.create(
            conversation=held, seq=2 * at + 1, role="user", text=question, parent=before
        )
        before = Message.objects.create(
            conversation=held, seq=2 * at + 2, role="assistant", text=text, parent=asked, **values
        )
        answers.append(before)
    return answers


def record_of(answer: Message, **more: Any) -> TurnRecord:
    values: dict[str, Any] = {
        "conversation_id": answer.conversation_id, "message_id": answer.pk, "user_id": None,
        "transport": "ws", "status": "complete", "route": answer.route, "reason": "",
        "model": answer.model, "intent": answer.intent, "confidence": 0.9, "scope": 1.0,
        "input_tokens": 5, "output_tokens": 7, "ttft_ms": 10.0, "duration_ms": 40.0,
        "finish_reason": "stop", "error_code": "", "attempt": answer.attempt,
    }  # fmt: skip
    return TurnRecord(**{**values, **more})


def until(true: Callable[[], Any], within_s: float = 10.0) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)
    return found


def heard(own: Shadow, answer: Message, **more: Any) -> ShadowPair:
    own.hear(record=record_of(answer, **more))
    return until(lambda: ShadowPair.objects.filter(message=answer).first())


# --- What is asked -------------------------------------------------------------------------------


def test_the_candidate_gets_the_chat_as_its_turn_saw_it(own: Any, candidate: Any) -> None:
    version()
    second = talk(("where is it", "On its way."), ("give me money back", "Sure."))[1]
    later = Message.objects.create(
        conversation=second.conversation, seq=5, role="user", text="later", parent=second
    )
    pair = heard(own, second, queue_ms=15.0)
    assert candidate.asked == [
        (
            Said("user", "where is it"),
            Said("assistant", "On its way.", "get_refund"),
            Said("user", "give me money back"),
        )
    ]
    assert (pair.live_ms, pair.live_model, pair.live_tokens) == (25.0, "old@1", 7)
    assert (pair.differs, pair.text, pair.intent) == ("text", "give me money back", "get_refund")
    assert pair.ms is not None and pair.ms > 0 and pair.tokens == 4
    assert later.text not in str(candidate.asked)


def test_a_turn_through_the_product_is_compared(ana: Any, token_of: Any, candidate: Any) -> None:
    candidate.manner = EchoBackend.Options()
    label = version().label
    reply = ask(ana, token_of(ana), "where is my parcel today")
    pair = until(lambda: ShadowPair.objects.first())
    assert str(pair.message_id) == reply.json()["id"] and str(pair.version) == label
    assert pair.agreed and pair.similarity == 1.0
    assert pair.text == "", "a text is kept only where they disagree"


def test_an_engine_of_its_own_answers(own: Any, tmp_path: Path) -> None:
    build_random("tiny", tmp_path / "tiny", quant="row8", seed=0)
    version(folder=str(tmp_path / "tiny"))
    pair = heard(own, *talk(("where is my parcel", "On its way.")))
    assert not pair.agreed and pair.tokens > 0 and pair.ms is not None
    engine = own._candidate._backend.engine
    assert engine.config.threads == 1 and engine.config.max_batch == 1
    own.stop()
    assert own._candidate is None and engine.stats().state == "closed"


@pytest.mark.parametrize(
    "more",
    [
        {"stored": False},
        {"route": "cache"},
        {"route": "reviewed"},
        {"status": "stopped", "finish_reason": "cancelled"},
        {"status": "failed", "finish_reason": "error"},
        {"model": "new@2"},
    ],
)
def test_what_cannot_be_compared_is_not_asked(own: Any, more: dict[str, Any]) -> None:
    version()
    own.hear(record=record_of(*talk(("a question", "An answer.")), **more))
    assert own._thread is None and not own._queue


def test_without_a_candidate_there_is_no_thread(own: Any) -> None:
    version("candidate")
    own.hear(record=record_of(*talk(("a question", "An answer."))))
    assert own._thread is None


def test_the_share_is_kept_and_the_same_everywhere(own: Any, settings: Any) -> None:
    ids = [uuid.UUID(int=number * 7919 + 13) for number in range(20_000)]
    chosen = [id_ for id_ in ids if shadowing.is_sampled(id_, 0.1)]
    assert 0.09 < len(chosen) / len(ids) < 0.11
    assert not any(shadowing.is_sampled(id_, 0.0) for id_ in ids)
    settings.ASSISTANT["SHADOW"]["SHARE"] = 0.0
    version()
    own.hear(record=record_of(*talk(("a question", "An answer."))))
    assert own._thread is None


def test_another_version_of_an_answer_is_not_compared(own: Any, candidate: Any) -> None:
    version()
    (old,) = talk(("a question", "An answer."))
    values = {"conversation": old.conversation, "parent": old.parent, "role": "assistant"}
    again = Message.objects.create(seq=3, text="Another.", route="model", model="old@1", **values)
    counted = Counted()
    own.hear(record=record_of(again))
    until(lambda: counted("assistant_shadow_turns_total", result="skipped"))
    assert not candidate.asked and not ShadowPair.objects.exists()


# --- When it keeps quiet -------------------------------------------------------------------------


class Live:
    """A backend whose engine says how much it has to do."""

    def __init__(self) -> None:
        self.now = EngineStats(state="running")
        self.looked = threading.Event()

    def engines(self) -> tuple[Live, ...]:
        return (self,)

    def stats(self) -> EngineStats:
        self.looked.set()
        return self.now

    def work(self, **counts: int) -> None:
        self.now = EngineStats(state="running", **counts)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Live:
    made = Live()
    monkeypatch.setattr("assistant.backends.built", lambda: {"model": made})
    return made


def test_nothing_is_asked_while_a_live_engine_works(own: Any, candidate: Any, live: Live) -> None:
    version()
    live.work(waiting=1)
    own.hear(record=record_of(*talk(("a question", "An answer."))))
    assert live.looked.wait(5)
    time.sleep(4 * shadowing.REST_S)
    assert not candidate.asked
    live.work()
    until(lambda: ShadowPair.objects.exists())


def test_a_live_question_breaks_it_off_and_it_is_asked_again(
    own: Any, candidate: Any, live: Live
) -> None:
    version()
    candidate.manner = EchoBackend.Options(words=10_000, delay_s=0.01)
    counted = Counted()
    own.hear(record=record_of(*talk(("a question", "An answer."))))
    until(lambda: candidate.asked)
    live.work(running=1)
    until(lambda: counted("assistant_shadow_turns_total", result="disturbed"))
    assert len(candidate.asked) == 1
    candidate.manner = EchoBackend.Options()
    own._candidate._backend.options = candidate.manner
    live.work()
    until(lambda: ShadowPair.objects.exists())
    assert len(candidate.asked) == 2


def test_the_queue_is_bounded_and_its_oldest_are_dropped(
    own: Any, candidate: Any, live: Live, settings: Any
) -> None:
    version()
    live.work(waiting=3)
    counted = Counted()
    answers = [*talk(*((f"question {n}", "An answer.") for n in range(40)))]
    for answer in answers:
        own.hear(record=record_of(answer))
    most = settings.ASSISTANT["SHADOW"]["QUEUE"]
    waiting = [waiting.record.message_id for waiting in own._queue]
    assert waiting == [answer.pk for answer in answers[-most:]]
    assert counted("assistant_shadow_turns_total", result="dropped") == len(answers) - most


# --- When it breaks ------------------------------------------------------------------------------


def test_a_shadow_that_breaks_reaches_no_user(
    ana: Any, token_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    version()
    counted = Counted()
    for place in ("monitoring.shadowing.is_sampled", "monitoring.shadowing._answer_of"):
        with monkeypatch.context() as patched:
            patched.setattr(place, broken)
            for _ in range(3):
                reply = ask(ana, token_of(ana), "where is my parcel")
                assert reply.status_code == 200 and reply.json()["text"] == "where is my parcel"
            until(lambda: counted("assistant_shadow_turns_total", result="error") >= 3)
    monkeypatch.setattr(shadowing.Shadow, "hear", broken)
    assert ask(ana, token_of(ana), "where is my parcel").json()["status"] == "complete"


def test_after_an_error_the_next_turn_is_compared(
    own: Any, candidate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version()
    one, two = talk(("a question", "An answer."), ("another", "An answer."))
    counted = Counted()
    with monkeypatch.context() as patched:
        patched.setattr(shadow, "keep", lambda *_: 1 / 0)
        own.hear(record=record_of(one))
        until(lambda: counted("assistant_shadow_turns_total", result="error"))
    assert heard(own, two).pk


def test_a_turn_that_comes_while_a_thread_ends_is_answered_by_an_engine_that_stays_open(
    own: Any, candidate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    version()
    one, two = talk(("a question", "An answer."), ("another", "An answer."))
    closing, go_on, closed = threading.Event(), threading.Event(), []

    def slow(self: Any) -> None:
        closing.set()
        assert go_on.wait(10)
        closed.append(self)

    monkeypatch.setattr(shadowing, "LINGER_S", 0.05)
    monkeypatch.setattr(shadowing._Candidate, "close", slow)
    heard(own, one)
    assert closing.wait(10)
    monkeypatch.setattr(shadowing, "LINGER_S", 60.0)
    heard(own, two)
    go_on.set()
    until(lambda: closed)
    assert own._candidate is not None and own._candidate not in closed


def test_a_candidate_that_cannot_be_loaded_has_failed(own: Any, tmp_path: Path) -> None:
    wanted = version(folder=str(tmp_path / "nothing"))
    pair = heard(own, *talk(("a question", "An answer.")))
    assert (pair.version, pair.differs, pair.agreed) == (wanted, "failed", False)


# --- Comparing and judging -----------------------------------------------------------------------


def said(**more: Any) -> shadow.Said:
    values = {"intent": "a", "confidence": 0.9, "fate": "answer", "text": "Open My Orders.",
              "tokens": 5, "ms": 30.0}  # fmt: skip
    return shadow.Said(**{**values, **more})


@pytest.mark.parametrize(
    ("candidate", "differs"),
    [
        ({}, ""),
        ({"text": "open  my orders."}, ""),
        ({"intent": "b"}, "intent"),
        ({"fate": "hand_on", "intent": "b"}, "band"),
        ({"text": "Something else entirely, really"}, "text"),
        ({"failed": True, "text": ""}, "failed"),
    ],
)
def test_answers_differ_first_in_what_matters_most(candidate: Any, differs: str) -> None:
    assert shadow.compare(said(), said(**candidate), 0.3).differs == differs


def test_what_is_turned_away_by_both_agrees_whatever_it_was_nearest_to() -> None:
    one, other = said(fate="out_of_scope"), said(fate="out_of_scope", intent="b")
    assert shadow.compare(one, other, 0.3).agreed


def test_the_sign_test_is_the_binomial_one() -> None:
    assert shadow.sign_test(0, 0) == 1.0
    assert shadow.sign_test(0, 5) == pytest.approx(1 / 32)
    assert shadow.sign_test(1, 4) == pytest.approx(6 / 32)
    assert shadow.sign_test(450, 549) == pytest.approx(shadow.sign_test(451, 550), rel=0.1)


def pairs(
    of: ModelVersion, agreed: int, *differs: str, ms: float = 30.0, **verdicts: int
) -> ModelVersion:
    """So many that agree and one of each that differs; ``verdicts`` of these, in order."""
    told = [name for name, count in verdicts.items() for _ in range(count)]
    told += [""] * (len(differs) - len(told))
    held = Conversation.objects.create()
    kinds = [("", "")] * agreed + list(zip(differs, told, strict=True))
    questions = [
        Message(conversation=held, seq=at, role="assistant", text="x")
        for at in range(3, 3 + len(kinds))
    ]
    Message.objects.bulk_create(questions)
    ShadowPair.objects.bulk_create(
        ShadowPair(version=of, message=message, agreed=not kind, differs=kind, verdict=verdict,
                   live_model="old@1", live_intent="a", intent="a", live_ms=30.0, ms=ms)
        for message, (kind, verdict) in zip(questions, kinds, strict=True)
    )  # fmt: skip
    return of


@pytest.mark.parametrize(
    ("told", "passed", "words"),
    [
        ({"agreed": 199}, None, "199 of 200 pairs"),
        ({"agreed": 200}, True, "agrees with the live model in 100%"),
        ({"agreed": 200, "ms": 44.0}, True, "agrees"),
        ({"agreed": 200, "ms": 46.0}, False, "1.5 times as long"),
        ({"agreed": 100, "differs": ["text"] * 100}, None, "judge 20 more"),
        ({"agreed": 100, "differs": ["text"] * 100, "live": 15, "candidate": 5}, False, "15 times"),
        ({"agreed": 100, "differs": ["text"] * 100, "live": 9, "candidate": 11}, True, "no worse"),
        ({"agreed": 150, "differs": ["text"] * 50, "live": 50}, True, "75%"),
        ({"agreed": 0, "differs": ["failed"] * 3}, False, "3 of its 3 answers failed"),
        ({"agreed": 298, "differs": ["failed"] * 2}, True, "agrees"),
        ({"agreed": 296, "differs": ["failed"] * 4}, False, "4 of its 300"),
    ],
)
def test_the_gate(told: dict[str, Any], passed: bool | None, words: str) -> None:
    agreed, differs = told.pop("agreed"), told.pop("differs", [])
    found = shadow.gate(pairs(version(), agreed, *differs, **told))
    assert found.passed is passed and words in found.why, found
    assert found.figures["pairs"] == agreed + len(differs)
    json.dumps(found.figures)


def test_first_questions_are_timed_where_there_are_enough() -> None:
    """A chat's later turns the live model has half read already."""
    slow = pairs(version(), 100, ms=300.0)
    for _ in range(shadow.LEAST_TIMED):
        (answer,) = talk(("a question", "An answer."))
        ShadowPair.objects.create(
            version=slow, message=answer, agreed=True, live_model="x", live_ms=20.0, ms=22.0
        )
    assert shadow.figures(slow)["slower"] == 1.1


def test_deleting_a_conversation_deletes_its_pairs(own: Any, candidate: Any) -> None:
    version()
    (answer,) = talk(("a question", "An answer."))
    heard(own, answer)
    answer.conversation.delete()
    assert not ShadowPair.objects.exists()


def test_a_conversation_that_goes_meanwhile_leaves_no_pair() -> None:
    (answer,) = talk(("a question", "An answer."))
    Conversation.objects.all().delete()
    assert shadow.keep(version(), answer, said(), said()) is None
    assert not ShadowPair.objects.exists()


# --- What is told --------------------------------------------------------------------------------


def test_the_gauge_shows_the_candidate_of_now() -> None:
    assert list(shadow.readings()) == []
    pairs(version(), 3, "text")
    (found,) = shadow.readings()
    assert found.value == 0.75 and found.gauge is metrics.SHADOW
    assert reading.SOURCES["shadow"] == shadow.readings


def test_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    one = version()
    (answer,) = talk(("refund order 48213377", "Sure, ana@example.com gets it."))
    ShadowPair.objects.create(
        version=one, message=answer, agreed=False, differs="intent", live_model="old@1",
        live_intent="get_refund", intent="track_refund", text="Order 48213377 is late.",
        live_ms=20, ms=30, created_at=timezone.now(),
    )  # fmt: skip
    call_command("shadow_report")
    told = capsys.readouterr().out
    assert "new@2" in told and "1 of 200 pairs" in told and "get_refund" in told
    assert "48213377" not in told and "ana@example.com" not in told, "values are masked"
    call_command("shadow_report", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["differs"] == {"intent": 1}
    assert found["by_intent"] == [{"intent": "get_refund", "pairs": 1, "agreed": 0}]
    assert found["examples"][0]["question"] == "refund order {{Order Number}}"


def test_the_report_of_nothing_says_what_to_do() -> None:
    from django.core.management import CommandError

    with pytest.raises(CommandError, match="promote_model"):
        call_command("shadow_report")
    with pytest.raises(CommandError, match="nobody@1"):
        call_command("shadow_report", "nobody@1")
