"""A request sent twice is carried out once, on every transport; and messages keep one order."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import IntegrityError, connection, transaction
from django.test import AsyncClient
from django.utils import timezone

from assistant.errors import Conflict
from conversations import opening
from conversations.idempotency import IdempotencyConflict, Once, run_once
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.running import running
from conversations.turn import Turn
from tests.conversations.conftest import API, Api, assert_problem
from tests.conversations.test_socket import ENDS, Chat

pytestmark = pytest.mark.django_db(transaction=True)

KEY = "6f1f2a1e-first"
SLOW = "/echo delay=0.05 words=12 word"


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def token(ana: User, token_of: Any) -> str:
    return str(token_of(ana))


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return str(cookie_of(ana))


@pytest.fixture
def ask(token: str, conversation: Conversation) -> Any:
    """Ask under a name."""
    path = f"{API}{conversation.pk}/messages/"

    def post(text: str, key: str = KEY, **more: Any) -> Any:
        return Api(token, **{"Idempotency-Key": key})("POST", path, {"text": text, **more})

    return post


def post(conversation: Conversation, token: str, text: str, **headers: str) -> Any:
    """The same, from async code: one that does not wait for the answer to be read."""
    path = f"{API}{conversation.pk}/messages/"
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": KEY, **headers}
    return AsyncClient().post(path, json.dumps({"text": text}), "application/json", headers=headers)


async def events_of(reply: Any) -> list[dict[str, Any]]:
    raw = b"".join([part async for part in reply.streaming_content]).decode()
    blocks = [block.split("\n") for block in raw.strip().split("\n\n")]
    return [json.loads(lines[2].removeprefix("data: ")) for lines in blocks if len(lines) == 3]


# --- REST ----------------------------------------------------------------------------------------


def test_the_same_request_again_gets_the_same_answer_and_is_not_carried_out(ask, conversation):
    first, again = ask("hello"), ask("hello")
    assert first.status_code == again.status_code == 200
    assert again.json() == first.json()
    assert "Idempotent-Replayed" not in first and again["Idempotent-Replayed"] == "true"
    assert again["X-Assistant-Route"] == first["X-Assistant-Route"]
    assert conversation.messages.count() == 2


def test_a_replay_costs_the_caller_nothing(ask, settings):
    settings.ASSISTANT_RATE = "1/h"
    first = ask("hello")
    assert [ask("hello").json()["id"] for _ in range(3)] == [first.json()["id"]] * 3
    assert_problem(ask("hello", "another name"), 429, "rate_limited")


def test_another_body_under_the_same_name_is_a_mismatch(ask, conversation):
    ask("hello")
    reply = ask("goodbye")
    assert_problem(reply, 422, "idempotency_mismatch")
    assert conversation.messages.count() == 2


def test_the_same_name_is_another_in_another_conversation_and_of_another_user(
    ask, conversation, ana, ben, token, token_of
):
    ask("hello")
    for user, key in ((ana, token), (ben, str(token_of(ben)))):
        elsewhere = Conversation.objects.create(user=user)
        reply = Api(key, **{"Idempotency-Key": KEY})(
            "POST", f"{API}{elsewhere.pk}/messages/", {"text": "other words"}
        )
        assert reply.status_code == 200 and "Idempotent-Replayed" not in reply
    foreign = Api(str(token_of(ben)), **{"Idempotency-Key": KEY})
    reply = foreign("POST", f"{API}{conversation.pk}/messages/", {"text": "hello"})
    assert_problem(reply, 404, "not_found")


def test_a_name_is_free_again_after_a_day(ask, conversation):
    first = ask("hello").json()
    nearly = timezone.now() - timedelta(hours=23, minutes=59)
    conversation.messages.update(created_at=nearly)
    assert ask("hello").json()["id"] == first["id"]
    conversation.messages.update(created_at=nearly - timedelta(minutes=2))
    second = ask("other words")
    assert second.status_code == 200 and second.json()["id"] != first["id"]
    assert ask("other words").json()["id"] == second.json()["id"]


@pytest.mark.parametrize(
    "key", ["", "   ", "x" * 256, "x" * 10_240, "caf\u00e9", "a\tb", "a\x7fb"], ids=ascii
)
def test_what_is_no_name_is_a_400_and_nothing_is_stored(key, ask, conversation):
    assert_problem(ask("hello", key), 400, "invalid_request")
    assert not conversation.messages.exists()


@pytest.mark.parametrize("key", ["x", "x" * 255, '"8e03978e-40d5"', "../../x", "a b"])
def test_any_printable_name_of_up_to_255_characters_will_do(key, ask):
    assert ask("hello", key).json()["id"] == ask("hello", key).json()["id"]


def test_a_refused_request_takes_no_name(ask, conversation):
    assert_problem(ask("  "), 400, "invalid_request")
    assert ask("hello").status_code == 200
    assert conversation.messages.count() == 2


def test_an_answer_written_elsewhere_cannot_be_read_along(ask, conversation):
    ask("hello")
    answer = conversation.messages.filter(role="assistant")
    answer.update(status="streaming", alive_at=timezone.now())
    running._ended.clear()  # as in a process that never wrote it
    reply = ask("hello")
    assert_problem(reply, 409, "idempotency_conflict")
    assert (reply["Retry-After"], reply["X-Should-Retry"]) == ("1", "true")
    answer.update(alive_at=timezone.now() - timedelta(seconds=30))
    gone = ask("hello")  # that process has died
    assert gone.status_code == 200 and gone.json()["status"] == "interrupted"


async def test_a_repeated_request_joins_the_answer_being_written(conversation, token):
    first = asyncio.create_task(post(conversation, token, SLOW))
    async with asyncio.timeout(5):
        while running.get(conversation.pk) is None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    second, streamed = await asyncio.gather(
        post(conversation, token, SLOW),
        post(conversation, token, SLOW, Accept="text/event-stream"),
    )
    assert second["Idempotent-Replayed"] == streamed["Idempotent-Replayed"] == "true"
    assert second.json() == (await first).json()
    assert second.json()["text"] == " ".join(["word"] * 12)
    assert (await events_of(streamed))[-1]["message"] == second.json()
    assert await conversation.messages.acount() == 2


@pytest.mark.parametrize("kept", [True, False], ids=["log kept", "log gone"])
async def test_a_finished_stream_is_replayed_whole(kept, conversation, token):
    sse = {"Accept": "text/event-stream"}
    first = await events_of(await post(conversation, token, SLOW, **sse))
    if not kept:
        running._ended.clear()
    reply = await post(conversation, token, SLOW, **sse)
    again = await events_of(reply)
    assert reply["Idempotent-Replayed"] == "true"
    first[0]["conversation"] = again[0]["conversation"]  # it was updated when the answer ended
    assert again[0] == first[0] and again[-1]["message"] == first[-1]["message"]
    for events in (first, again):
        text = "".join(event.get("text", "") for event in events)
        assert text == events[-1]["message"]["text"] == " ".join(["word"] * 12)
        assert [event["seq"] for event in events] == list(range(1, len(events) + 1))


async def test_a_failed_answer_is_replayed_as_it_failed(conversation, token):
    await events_of(await post(conversation, token, "hello", Accept="text/event-stream"))
    broken = {"status": "failed", "error_code": "generation_failed", "error_message": "It broke."}
    await conversation.messages.filter(role="assistant").aupdate(**broken)
    running._ended.clear()
    again = await events_of(await post(conversation, token, "hello", Accept="text/event-stream"))
    assert [event["type"] for event in again] == [
        *("message.created", "message.delta", "message.failed")
    ]
    told = {"code": "generation_failed", "message": "It broke.", "retry_after_s": None}
    assert again[-1]["error"] == told and again[-1]["message"]["status"] == "failed"


async def test_fifty_at_once_are_carried_out_once(conversation, token):
    replies = await asyncio.gather(*(post(conversation, token, "hello") for _ in range(50)))
    codes = {reply.status_code for reply in replies}
    assert codes <= {200, 409}
    answers = {reply.json()["id"] for reply in replies if reply.status_code == 200}
    refusals = {reply.json()["error"]["code"] for reply in replies if reply.status_code == 409}
    assert len(answers) == 1 and refusals <= {"idempotency_conflict"}
    assert await conversation.messages.acount() == 2


def test_another_answer_and_an_edit_are_made_once(api, ask, conversation, token):
    answer = ask("hello").json()
    named = Api(token, **{"Idempotency-Key": "again"})
    once = named("POST", f"/api/v1/messages/{answer['id']}/regenerate/", {})
    twice = named("POST", f"/api/v1/messages/{answer['id']}/regenerate/", {})
    assert once.json()["id"] == twice.json()["id"] != answer["id"]
    assert twice["Idempotent-Replayed"] == "true"
    assert twice.json() == once.json()
    path = f"/api/v1/messages/{answer['parent']}/edit/"
    assert_problem(named("POST", path, {"text": "HELLO"}), 422, "idempotency_mismatch")
    edit = Api(token, **{"Idempotency-Key": "edit"})
    edits = [edit("POST", path, {"text": "HELLO"}).json() for _ in range(2)]
    assert edits[0] == edits[1] and edits[0]["text"] == "HELLO"
    assert_problem(edit("POST", path, {"text": "other"}), 422, "idempotency_mismatch")
    assert conversation.messages.count() == 5
    nowhere = "00000000-0000-4000-8000-000000000000"
    reply = named("POST", f"/api/v1/messages/{nowhere}/regenerate/", {})
    assert_problem(reply, 404, "not_found")


def test_the_database_itself_holds_a_name_once(conversation):
    rows = {"conversation": conversation, "role": "user", "idempotency_key": KEY}
    Message.objects.create(seq=1, **rows)
    with pytest.raises(IntegrityError), transaction.atomic():
        Message.objects.create(seq=2, **rows)
    for seq in (3, 4):  # without a name there is no bound
        Message.objects.create(seq=seq, **{**rows, "idempotency_key": ""})


# --- WebSocket -----------------------------------------------------------------------------------


async def test_a_frame_sent_twice_is_carried_out_once(conversation, cookie):
    frame = {"type": "message.create", "text": "hello there", "idempotency_key": KEY}
    async with Chat(conversation, cookie) as chat:
        await chat.send(**frame, ref="1")
        first = await chat.until(*ENDS)
    async with Chat(conversation, cookie) as chat:
        await chat.send(**frame, ref="2")
        again = await chat.until(*ENDS)
        await chat.send(**{**frame, "text": "other words"}, ref="3")
        mismatch = await chat.next()
    assert again[0].pop("replayed") is True and "replayed" not in first[0]
    assert (first[0].pop("ref"), again[0].pop("ref")) == ("1", "2")
    assert again == first
    assert (mismatch["error"]["code"], mismatch["ref"]) == ("idempotency_mismatch", "3")
    assert await conversation.messages.acount() == 2


async def test_a_frame_lost_on_the_way_back_joins_its_running_answer(conversation, cookie, token):
    frame = {"type": "message.create", "text": SLOW, "idempotency_key": KEY}
    async with Chat(conversation, cookie) as one, Chat(conversation, cookie) as two:
        await one.send(**frame)
        await one.until("message.delta")
        await two.send(**frame)
        joined = await two.until(*ENDS)
        reply = await post(conversation, token, SLOW)  # the same name on another transport
        own = (await one.until(*ENDS))[-1]
    assert joined[0]["type"] == "message.created" and joined[0]["replayed"] is True
    assert joined[-1] == own
    assert reply["Idempotent-Replayed"] == "true" and reply.json()["id"] == own["message"]["id"]


BAD_KEYS = {
    "a number": {"type": "message.create", "text": "a", "idempotency_key": 5},
    "empty": {"type": "message.create", "text": "a", "idempotency_key": ""},
    "too long": {"type": "message.create", "text": "a", "idempotency_key": "x" * 256},
    "a line break": {"type": "message.create", "text": "a", "idempotency_key": "a\nb"},
    "on a frame without": {"type": "message.cancel", "idempotency_key": "a"},
}


@pytest.mark.parametrize("frame", BAD_KEYS.values(), ids=BAD_KEYS)
async def test_a_bad_name_in_a_frame_is_a_typed_error(frame, conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(**frame)
        told = await chat.next()
    assert (told["type"], told["error"]["code"]) == ("error", "invalid_request")
    assert not await Message.objects.aexists()


# --- One order -----------------------------------------------------------------------------------


def in_threads(work: Callable[[int], Any], times: int, threads: int) -> list[Any]:
    """What ``work`` gave, or raised, from threads that all begin together."""
    barrier = threading.Barrier(threads)

    def one(number: int) -> Any:
        if number < threads:
            barrier.wait(30)
        try:
            return work(number)
        except Exception as error:
            return error
        finally:
            connection.close()

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(times)))


def test_two_hundred_parallel_sends_are_numbered_without_gap_or_double(
    ana, conversation, monkeypatch
):
    """The storing itself: here an answer is complete at once, so nobody is refused as busy."""
    blank = opening._empty_answer

    def complete(*args: Any) -> Message:
        answer = blank(*args)
        answer.status = Message.Status.COMPLETE
        return answer

    monkeypatch.setattr(opening, "_empty_answer", complete)
    caller = Caller(ana.pk)
    opened = in_threads(
        lambda n: opening.first_run(caller, conversation, f"question {n}", None), 200, 20
    )
    assert [each for each in opened if isinstance(each, Exception)] == []
    rows = list(conversation.messages.order_by("seq").values_list("seq", "role"))
    assert [seq for seq, _ in rows] == list(range(1, 401))
    assert [role for _, role in rows] == ["user", "assistant"] * 200


def test_of_parallel_sends_one_is_answered_and_the_others_hear_why(ana, conversation, settings):
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 100
    caller = Caller(ana.pk)
    told = in_threads(lambda n: Turn.open(caller, conversation, f"question {n}"), 40, 20)
    turns = [each for each in told if isinstance(each, Turn)]
    refused = [each for each in told if not isinstance(each, Turn)]
    assert len(turns) == 1 and {type(error) for error in refused} == {Conflict}
    assert list(conversation.messages.order_by("seq").values_list("seq", flat=True)) == [1, 2]
    turns[0].close()


def test_of_parallel_sends_with_one_name_none_is_told_that_another_question_is_in_the_way(
    ana, conversation, settings
):
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 100
    caller, once = Caller(ana.pk), Once.of(KEY, "hello")

    def send(_: int) -> Any:
        begin = partial(Turn.open, caller, conversation, "hello", once=once)
        return run_once(conversation.pk, once, begin)

    told = in_threads(send, 60, 20)
    (turn,) = [each for each in told if isinstance(each, Turn)]
    joined = [each for each in told if isinstance(each, Message)]
    refused = [each for each in told if each is not turn and not isinstance(each, Message)]
    assert joined and {message.pk for message in joined} == {turn.message.pk}
    assert {type(error) for error in refused} <= {IdempotencyConflict}
    assert conversation.messages.count() == 2
    turn.close()
