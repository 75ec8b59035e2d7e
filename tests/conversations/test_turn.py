"""The turn itself: its log, its readers, how it ends, and what is stored whatever happens."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import OperationalError
from django.utils import timezone

from assistant.errors import Conflict, InvalidRequest, NotFound, RateLimited
from assistant.types import Delta as Shown
from conversations import opening
from conversations import turn as turns
from conversations.limits import Caller
from conversations.log import Completed, Created, Delta, Failed
from conversations.models import Conversation, Message
from conversations.running import running
from conversations.tasks import reap_stale_turns
from conversations.turn import Turn, TurnRecord
from fallback.models import ReviewedAnswer, Rule
from fallback.router import INTERRUPTED, Ask, route

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def caller(ana: User) -> Caller:
    return Caller(ana.pk, address="192.0.2.1")


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def opened(caller: Caller, conversation: Conversation) -> Any:
    return sync_to_async(lambda text: Turn.open(caller, conversation, text))


@pytest.fixture
def records() -> Any:
    seen: list[TurnRecord] = []

    def note(record: TurnRecord, **_: Any) -> None:
        seen.append(record)

    turns.turn_finished.connect(note)
    yield seen
    turns.turn_finished.disconnect(note)


async def stored(turn: Turn) -> Message:
    return await Message.objects.aget(pk=turn.message.pk)


async def until_done(turn: Turn, within_s: float = 2) -> Message:
    for _ in range(int(within_s / 0.01)):
        if turn.done:
            return await stored(turn)
        await asyncio.sleep(0.01)
    raise AssertionError("the turn does not end")


async def test_every_reader_sees_the_same_numbered_log(opened):
    turn = await opened("/echo delay=0.02 words=10 word")

    async def read(after: int) -> list[Any]:
        return [event async for event in turn.read(after)]

    first, second, late = await asyncio.gather(read(0), read(0), read(3))
    assert first == second
    assert late == first[3:]
    assert isinstance(first[0], Created) and isinstance(first[-1], Completed)
    assert [event.seq for event in first] == list(range(1, len(first) + 1))
    again = await read(0)
    assert again == first


async def test_the_first_delta_comes_at_once_and_later_ones_are_joined(opened):
    turn = await opened("/echo delay=0.002 words=60 word")
    deltas = [event.text async for event in turn if isinstance(event, Delta)]
    assert deltas[0] == "word"
    assert 2 < len(deltas) < 20
    assert "".join(deltas) == (await stored(turn)).text


async def test_the_record_of_a_turn_holds_figures_and_no_text(opened, records):
    turn = await opened("/echo intent=cancel_order confidence=0.9 scope=0.8 secret words here")
    await turn.result()
    await asyncio.sleep(0.05)
    (record,) = records
    assert (record.status, record.route, record.intent) == ("complete", "model", "cancel_order")
    assert (record.confidence, record.scope, record.output_tokens) == (0.9, 0.8, 3)
    assert record.duration_ms >= record.ttft_ms >= 0
    assert "secret" not in repr(record)


async def test_an_observer_that_breaks_breaks_nothing(opened):
    def broken(**_: Any) -> None:
        raise RuntimeError("observer")

    turns.turn_finished.connect(broken)
    try:
        assert (await (await opened("hello")).result()).status == "complete"
    finally:
        turns.turn_finished.disconnect(broken)


async def test_closing_from_another_thread_stops_within_a_moment(opened):
    turn = await opened("/echo delay=0.05 words=500 word")
    reader = turn.read()
    await anext(reader)
    await anext(reader)
    threading.Thread(target=turn.close).start()
    began = asyncio.get_running_loop().time()
    events = [event async for event in reader]
    assert asyncio.get_running_loop().time() - began < 0.3
    assert events[-1].message.status == "stopped"
    assert (await stored(turn)).status == "stopped"


async def test_closing_before_the_task_has_begun_still_stores_an_end(opened):
    turn = await opened("/echo words=500 word")
    turn.start()
    turn.close("interrupted")
    assert (await until_done(turn)).status == "interrupted"


def test_closing_a_turn_nobody_ever_read_stores_an_end(caller, conversation):
    turn = Turn.open(caller, conversation, "hello")
    turn.read().close()
    turn.message.refresh_from_db()
    assert (turn.message.status, turn.message.text) == ("interrupted", "")
    assert running.get(conversation.pk) is None


async def test_closing_after_the_end_changes_nothing(opened):
    turn = await opened("hello")
    await turn.result()
    turn.close()
    await asyncio.sleep(0.05)
    assert (await stored(turn)).status == "complete"


async def test_the_last_reader_to_leave_stops_the_turn_after_the_grace(opened):
    turn = await opened("/echo delay=0.05 words=500 word")
    one, two = turn.read(), turn.read()
    await anext(one)
    await anext(two)
    one.close()
    await asyncio.sleep(0.15)
    assert not turn.done
    two.close()
    await asyncio.sleep(0.02)
    three = turn.read()
    await anext(three)  # back within the grace: a reload
    await asyncio.sleep(0.15)
    assert not turn.done
    three.close()
    assert (await until_done(turn, 0.5)).status == "interrupted"


async def test_a_cancelled_task_of_a_stopping_server_still_stores_what_there_is(opened):
    turn = await opened("/echo delay=0.05 words=500 word")
    reader = turn.read()
    await anext(reader)
    await anext(reader)
    turn._task.cancel()
    message = await until_done(turn)
    assert message.status == "interrupted" and message.text


async def test_an_answer_is_stored_even_if_the_ending_loop_cancels_its_saving(opened):
    turn = await opened("/echo delay=0.05 words=500 word")
    reader = turn.read()
    await anext(reader)
    await anext(reader)
    turn._task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    assert turns._finishing
    for saving in list(turns._finishing):
        saving.cancel()
    message = await stored_as_ended(turn)
    assert message.status == "interrupted" and message.text


async def stored_as_ended(turn: Turn) -> Message:
    for _ in range(200):
        message = await stored(turn)
        if message.status != "streaming":
            return message
        await asyncio.sleep(0.01)
    raise AssertionError("never stored")


async def test_an_answer_that_takes_too_long_is_ended_by_what_is_known(opened, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "REQUEST_TIMEOUT_S": 0.2}
    turn = await opened("/echo hang=2 one two three")
    events = [event async for event in turn]
    assert isinstance(events[-1], Completed)
    message = await stored(turn)
    written, _, known = message.text.partition(INTERRUPTED)
    assert (message.status, message.degraded_reason, written) == ("complete", "timeout", "one two")
    assert message.route in {"rules", "human"} and known


async def test_a_way_that_never_ends_is_cut_off_and_kept(opened, settings, monkeypatch):
    async def endless(ask: Ask) -> Any:
        async for event in route(replace(ask, steps=("echo",))):
            yield event
            if isinstance(event, Shown):
                await asyncio.Event().wait()

    settings.ASSISTANT = {**settings.ASSISTANT, "REQUEST_TIMEOUT_S": 0.1}
    monkeypatch.setattr(turns, "LAST_WORDS_S", 0.1)
    monkeypatch.setattr(turns, "route", endless)
    turn = await opened("one two three")
    events = [event async for event in turn]
    assert isinstance(events[-1], Failed)
    message = await stored(turn)
    assert (message.status, message.text) == ("failed", "one")
    assert message.error_code == "generation_failed"


async def test_a_save_that_fails_is_tried_again(opened, monkeypatch):
    monkeypatch.setattr(turns, "SAVE_PAUSES_S", (0.01, 0.01))
    turn = await opened("hello")
    save, calls = turn._save, []

    def shaky(*args: Any) -> Message:
        calls.append(args)
        if len(calls) < 3:
            raise OperationalError("away")
        return save(*args)

    with mock.patch.object(turn, "_save", shaky):
        message = await turn.result()
    assert message.status == (await stored(turn)).status == "complete"


async def test_a_reader_hears_the_end_even_if_it_cannot_be_saved(opened, monkeypatch, caplog):
    monkeypatch.setattr(turns, "SAVE_PAUSES_S", (0.01,))
    turn = await opened("hello")
    with mock.patch.object(turn, "_save", side_effect=OperationalError("away")):
        assert (await turn.result()).text == "hello"
    assert "not saved" in caplog.text and "hello" not in caplog.text
    assert running.get(turn.conversation_id) is None


async def test_text_so_far_is_saved_while_the_answer_is_written(opened, monkeypatch):
    monkeypatch.setattr(turns, "ALIVE_EVERY_S", 0.05)
    turn = await opened("/echo delay=0.02 words=40 word")
    reader = turn.read()
    await anext(reader)
    await asyncio.sleep(0.3)
    row = await stored(turn)
    assert row.status == "streaming" and row.text.startswith("word")
    reader.close()
    await until_done(turn)


async def test_an_answer_ended_in_another_process_stops_here(opened, monkeypatch):
    monkeypatch.setattr(turns, "ALIVE_EVERY_S", 0.05)
    turn = await opened("/echo delay=0.05 words=500 word")
    reader = turn.read()
    await anext(reader)
    await Message.objects.filter(pk=turn.message.pk).aupdate(status="stopped")
    message = await until_done(turn)
    reader.close()
    assert message.status == "stopped" and message.text


async def test_a_deleted_conversation_ends_its_turn_and_stays_deleted(opened, conversation):
    turn = await opened("/echo delay=0.05 words=500 word")
    reader = turn.read()
    await anext(reader)
    await conversation.adelete()
    turn.close()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if turn.done:
            break
    assert turn.done
    assert await Message.objects.acount() == 0


async def test_the_database_is_only_touched_after_the_last_token(opened, monkeypatch):
    work: list[str] = []
    in_thread = turns.in_thread

    async def noted(function: Any, *args: Any) -> Any:
        work.append(function.__name__)
        return await in_thread(function, *args)

    turn = await opened("/echo delay=0.005 words=50 word")
    monkeypatch.setattr(turns, "in_thread", noted)
    await turn.result()
    await asyncio.sleep(0.05)
    assert work == ["_settle"]


# --- Opening -------------------------------------------------------------------------------------


def test_one_answer_at_a_time_in_a_conversation(caller, conversation):
    turn = Turn.open(caller, conversation, "hello")
    with pytest.raises(Conflict):
        Turn.open(caller, conversation, "again")
    assert conversation.messages.count() == 2
    turn.close()
    Turn.open(caller, conversation, "again").close()


def test_the_database_itself_refuses_a_second_running_answer(conversation):
    from django.db import IntegrityError

    values = {"conversation": conversation, "role": "assistant", "status": "streaming"}
    Message.objects.create(seq=1, **values)
    with pytest.raises(IntegrityError):
        Message.objects.create(seq=2, **values)


def test_parallel_sends_into_one_conversation_give_one_order_and_one_answer(caller, conversation):
    from django.db import connection

    outcomes: list[str] = []

    def send() -> None:
        try:
            Turn.open(caller, conversation, "hello")
            outcomes.append("opened")
        except (Conflict, RateLimited) as error:
            outcomes.append(error.code)
        finally:
            connection.close()

    threads = [threading.Thread(target=send) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert outcomes.count("opened") == 1 and len(outcomes) == 12
    assert list(conversation.messages.values_list("seq", flat=True)) == [1, 2]
    running.get(conversation.pk).close()


@pytest.mark.parametrize("newest_shown", [True, False])
def test_what_was_added_since_the_history_was_read_comes_before_the_question(
    caller, conversation, monkeypatch, newest_shown
):
    conversation.messages.create(seq=1, role="user", text="one")
    read = opening._recent

    def and_then_another_tab(*given: Any) -> list[Message]:
        rows = read(*given)
        conversation.messages.create(seq=2, role="assistant", text="two", shown=newest_shown)
        return rows

    monkeypatch.setattr(opening, "_recent", and_then_another_tab)
    turn = Turn.open(caller, conversation, "three")
    turn.close()
    seqs = list(conversation.messages.values_list("seq", "text"))
    assert seqs == [(1, "one"), (2, "two"), (3, "three"), (4, "")]
    asked = conversation.messages.get(seq=3)
    assert asked.parent.seq == (2 if newest_shown else 1)


def test_a_title_that_was_given_meanwhile_stays(caller, conversation):
    Conversation.objects.filter(pk=conversation.pk).update(title="mine")
    Turn.open(caller, conversation, "hello").close()
    conversation.refresh_from_db()
    assert conversation.title == "mine"


def test_a_caller_has_at_most_four_answers_written_at_once(caller, ana, ben):
    opened = [Turn.open(caller, None, f"question {n}") for n in range(4)]
    with pytest.raises(RateLimited) as refused:
        Turn.open(caller, None, "a fifth")
    assert refused.value.retry_after_s
    other = Turn.open(Caller(ben.pk), None, "mine")
    opened[0].close()
    Turn.open(caller, None, "a fifth").close()
    for turn in [*opened, other]:
        turn.close()
    assert Conversation.objects.filter(user=ana).count() == 5


def test_nothing_is_stored_when_a_question_is_refused(caller, conversation):
    with pytest.raises(InvalidRequest):
        Turn.open(caller, conversation, "a\x00b")
    with pytest.raises(InvalidRequest):
        Turn.open(caller, None, "   ")
    assert (Message.objects.count(), Conversation.objects.count()) == (0, 1)


def test_a_conversation_deleted_meanwhile_is_not_found(caller, conversation):
    gone = Conversation.objects.get(pk=conversation.pk)
    conversation.delete()
    with pytest.raises(NotFound):
        Turn.open(caller, gone, "hello")


def test_somebody_elses_answer_cannot_be_tried_again(conversation, ben):
    answer = conversation.messages.create(seq=1, role="assistant", status="failed")
    with pytest.raises(NotFound):
        Turn.retry(Caller(ben.pk), answer.pk)


async def test_a_run_that_was_given_up_cannot_write_over_its_retry(opened, caller):
    first = await opened("/echo delay=0.05 words=500 word")
    reader = first.read()
    await anext(reader)
    await Message.objects.filter(pk=first.message.pk).aupdate(status="interrupted")  # reaped
    running.remove(first)
    await Message.objects.filter(role="user").aupdate(text="short and good")
    second = await sync_to_async(Turn.retry)(caller, first.message.pk)
    assert (await second.result()).text == "short and good"
    first.close()
    await until_done(first)
    reader.close()
    row = await stored(second)
    assert (row.status, row.text, row.attempt) == ("complete", "short and good", 2)


async def test_the_model_reads_earlier_pairs_but_not_what_broke_off(opened, conversation):
    def rows() -> None:
        said = [
            ("user", "q1", "complete"),
            ("assistant", "a1", "complete"),
            ("user", "q2", "complete"),
            ("assistant", "half", "failed"),
            ("user", "q3", "complete"),
            ("assistant", "a3", "stopped"),
        ]
        for seq, (role, text, status) in enumerate(said, 1):
            conversation.messages.create(seq=seq, role=role, text=text, status=status)

    await sync_to_async(rows)()
    turn = await opened("q4")
    assert [message.text for message in turn._ask.messages] == ["q1", "a1", "q3", "a3", "q4"]
    turn.close()
    await until_done(turn)


# --- After a crash -------------------------------------------------------------------------------


def _left_behind(conversation: Conversation, seconds: float) -> Message:
    return conversation.messages.create(
        seq=2,
        role="assistant",
        status="streaming",
        text="half an ans",
        alive_at=timezone.now() - timedelta(seconds=seconds),
    )


def test_an_answer_of_a_dead_process_is_marked_and_keeps_its_text(conversation):
    dead = _left_behind(conversation, 9)
    assert reap_stale_turns() == 1
    dead.refresh_from_db()
    assert (dead.status, dead.text) == ("interrupted", "half an ans")
    assert reap_stale_turns() == 0


def test_an_answer_that_showed_life_is_left_alone(conversation):
    _left_behind(conversation, 3)
    assert reap_stale_turns() == 0


def test_a_dead_answer_blocks_no_new_question_and_can_be_tried_again(caller, conversation):
    conversation.messages.create(seq=1, role="user", text="hello")
    dead = _left_behind(conversation, 9)
    Turn.open(caller, conversation, "next").close()
    Turn.retry(caller, dead.pk).close()


# --- Who answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "route", "reason", "answer"),
    [
        ("where is my refund", "reviewed", "", "Within 5 days."),
        ("/echo confidence=0.1 cancel my order", "rules", "low_confidence", "Go to orders."),
        ("/echo confidence=0.1 scope=0.1 the weather", "model", "out_of_scope", "the weather"),
        ("/echo fail=overloaded cancel my order", "rules", "overload", "Go to orders."),
        ("/echo fail=unavailable cancel my order", "rules", "error", "Go to orders."),
        ("/echo first=2 cancel my order", "rules", "timeout", "Go to orders."),
        ("/echo error=0 cancel my order", "rules", "error", "Go to orders."),
    ],
)
async def test_the_route_and_its_reason_are_stored(opened, settings, text, route, reason, answer):
    settings.ASSISTANT = {**settings.ASSISTANT, "FIRST_TOKEN_TIMEOUT_S": 0.3}
    await ReviewedAnswer.objects.acreate(question="Where is my refund?", answer="Within 5 days.")
    await Rule.objects.acreate(name="cancel", patterns=["cancel my order"], answer="Go to orders.")
    message = await (await opened(text)).result()
    assert (message.route, message.degraded_reason, message.text) == (route, reason, answer)
    assert message.status == "complete"


async def test_when_nothing_can_answer_a_person_is_offered(opened, settings):
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "FACTS": {"Support Phone": "+1 555 0100", "Support Hours": "Mon-Fri 9-17"},
    }
    message = await (await opened("/echo fail=unavailable blue cheese")).result()
    assert (message.route, message.degraded_reason) == ("human", "error")
    assert "+1 555 0100" in message.text and "Mon-Fri 9-17" in message.text


def test_a_polite_refusal_is_remembered_as_one_and_not_as_its_best_guess(
    caller: Caller, conversation: Conversation
) -> None:
    refused = {"intent": "get_refund", "degraded_reason": "out_of_scope", "route": "model"}
    Message.objects.create(conversation=conversation, seq=1, role="user", text="the weather?")
    Message.objects.create(
        conversation=conversation, seq=2, role="assistant", text="Not mine.", **refused
    )
    messages = opening.first_run(caller, conversation, "and a refund?", None).ask.messages
    assert [message.intent for message in messages] == [None, "out_of_scope", None]


def test_a_turn_nobody_read_ends_once_however_often_it_is_closed(
    caller: Caller, conversation: Conversation, records: list[TurnRecord]
) -> None:
    turn = Turn.open(caller, conversation, "never read")
    turn.close("stopped")
    turn.read().close()
    turn.close("interrupted")
    assert [record.status for record in records] == ["stopped"]
    assert Message.objects.get(pk=turn.message.pk).status == "stopped"
