"""An answer's events from any number on: while it is written, later, elsewhere."""

from __future__ import annotations

import asyncio
import json
import re
import time
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.test import AsyncClient
from django.utils import timezone

from conversations import resume, wire
from conversations import running as registry
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.running import running
from conversations.turn import Turn
from tests.conversations.conftest import Api, assert_problem
from tests.conversations.test_idempotency import events_of
from tests.conversations.test_socket import ENDS, Chat

pytestmark = pytest.mark.django_db(transaction=True)

WORDS = " ".join(["word"] * 15)
SLOW = "/echo delay=0.04 words=15 word"


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
def opened(ana: User, conversation: Conversation) -> Any:
    return sync_to_async(lambda text: Turn.open(Caller(ana.pk), conversation, text))


def path_of(message: Any) -> str:
    return f"/api/v1/messages/{message if isinstance(message, str) else message.pk}/events/"


async def get(message: Any, token: str, last: str | None = None) -> Any:
    headers = {"Authorization": f"Bearer {token}"}
    if last is not None:
        headers["Last-Event-ID"] = last
    return await AsyncClient().get(path_of(message), headers=headers)


async def finished(opened: Any, text: str = SLOW) -> tuple[Message, list[dict[str, Any]]]:
    """An answer that has ended, and all its events as they were."""
    turn = await opened(text)
    events = [wire.event_json(event) async for event in turn.read()]
    return turn.message, json.loads(json.dumps(events))


async def test_a_reader_that_lost_its_line_goes_on_where_it_was(opened, token):
    turn = await opened(SLOW)
    keeps_it_alive, seen = turn.read(), []
    async for event in keeps_it_alive:
        seen.append(event.seq)
        if len(seen) == 4:
            break
    reply = await get(turn.message, token, "4")
    assert reply["Content-Type"] == "text/event-stream" and reply["Cache-Control"] == "no-cache"
    rest = await events_of(reply)
    assert [event["seq"] for event in rest] == list(range(5, rest[-1]["seq"] + 1))
    assert rest[-1]["type"] == "message.completed" and rest[-1]["message"]["text"] == WORDS
    keeps_it_alive.close()


async def test_every_number_of_an_answer_that_has_ended_gives_just_the_rest(opened, token):
    message, events = await finished(opened)
    assert len(events) > 5
    assert await events_of(await get(message, token)) == events
    for seen in range(len(events)):
        assert await events_of(await get(message, token, str(seen))) == events[seen:]


async def test_after_the_last_event_there_is_nothing_and_a_browser_stops_asking(opened, token):
    message, events = await finished(opened)
    assert (await get(message, token, str(len(events)))).status_code == 204
    assert_problem(await get(message, token, str(len(events) + 1)), 400, "invalid_request")


async def test_what_only_the_row_knows_is_told_whole(opened, token):
    message, events = await finished(opened)
    running._ended.clear()  # as after a restart, or in another process
    whole = await events_of(await get(message, token))
    assert [event["type"] for event in whole] == [
        *("message.created", "message.delta", "message.completed")
    ]
    assert whole[1]["text"] == WORDS and whole[-1]["message"] == events[-1]["message"]
    (end,) = await events_of(await get(message, token, "4"))
    assert (end["type"], end["seq"], end["message"]["text"]) == ("message.completed", 5, WORDS)


async def test_a_browser_stops_asking_for_what_only_the_row_knows_too(opened, token):
    message, _ = await finished(opened)
    running._ended.clear()
    raw = b"".join([part async for part in (await get(message, token, "4")).streaming_content])
    (seen,) = re.findall(r"^id: (\d+)$", raw.decode(), re.MULTILINE)
    assert (await get(message, token, seen)).status_code == 204


async def test_an_answer_written_elsewhere_is_followed_by_its_row(conversation, token, monkeypatch):
    monkeypatch.setattr(resume, "ELSEWHERE_S", 0.05)
    asked = await conversation.messages.acreate(seq=1, role="user", text="hello")
    row = await conversation.messages.acreate(
        seq=2, role="assistant", parent=asked, status="streaming", alive_at=timezone.now()
    )

    async def write() -> None:
        for text in ("one ", "one two ", "one two three"):
            await asyncio.sleep(0.15)
            await Message.objects.filter(pk=row.pk).aupdate(text=text)
        await Message.objects.filter(pk=row.pk).aupdate(status="complete")

    writing = asyncio.create_task(write())
    events = await events_of(await get(row, token))
    await writing
    assert "".join(event.get("text", "") for event in events[1:-1]) == "one two three"
    assert len(events) == 5 and events[-1]["message"]["status"] == "complete"


async def test_an_answer_whose_process_died_ends_as_interrupted(conversation, token):
    asked = await conversation.messages.acreate(seq=1, role="user", text="hello")
    row = await conversation.messages.acreate(
        seq=2, role="assistant", parent=asked, status="streaming", text="so far",
        alive_at=timezone.now() - timedelta(seconds=60),
    )  # fmt: skip
    (end,) = await events_of(await get(row, token, "3"))
    assert (end["message"]["status"], end["message"]["text"]) == ("interrupted", "so far")


@pytest.mark.parametrize("last", ["-1", "1e3", "x", "", "9" * 40, "\u00b2", "1, 2", "+1", "1.0"])
async def test_what_is_no_number_is_a_400(last, opened, token):
    message, _ = await finished(opened, "hello")
    assert_problem(await get(message, token, last), 400, "invalid_request")


async def test_only_answers_of_ones_own_have_events(opened, token, ben, token_of, conversation):
    message, _ = await finished(opened, "hello")
    foreign = await sync_to_async(token_of)(ben)
    assert_problem(await get(message, str(foreign)), 404, "not_found")
    question = await conversation.messages.aget(role="user")
    assert_problem(await get(question, token), 404, "not_found")
    nobody = "00000000-0000-4000-8000-000000000000"
    assert_problem(await get(nobody, token), 404, "not_found")
    assert Api()("GET", path_of(message)).status_code == 401


async def test_resuming_twice_at_once_gives_both_the_same(opened, token):
    message, events = await finished(opened)
    both = await asyncio.gather(*(get(message, token, "3") for _ in range(2)))
    assert [await events_of(reply) for reply in both] == [events[3:]] * 2


async def test_tabs_on_every_transport_see_the_same_events(conversation, cookie, token):
    async with (
        Chat(conversation, cookie) as one,
        Chat(conversation, cookie) as two,
        Chat(conversation, cookie) as late,
    ):
        await one.send(type="message.create", text=SLOW)
        first = await one.next()
        answer = first["message"]["id"]
        await two.send(type="message.resume", after_seq=0)
        by_sse = asyncio.create_task(_events(answer, token))
        seen = [first, *(await one.until(*ENDS))]
        also = await two.until(*ENDS)
        await late.send(type="message.resume", id=answer, after_seq=2)
        rest = await late.until(*ENDS)
    for frames in (seen, also):
        frames[0].pop("ref")
    assert seen == also == await by_sse
    assert rest == seen[2:] and len(rest) > 2


async def _events(answer: str, token: str) -> list[dict[str, Any]]:
    return await events_of(await get(answer, token))


async def test_a_socket_may_resume_an_answer_by_its_id_and_only_one_of_its_own(
    conversation, cookie, opened, ana
):
    message, events = await finished(opened)
    elsewhere = await Conversation.objects.acreate(user=ana)
    other = await elsewhere.messages.acreate(seq=1, role="assistant", text="secret")
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.resume", id=str(message.pk), after_seq=3)
        assert await chat.until(*ENDS) == events[3:]
        await chat.send(type="message.resume", id=str(message.pk), after_seq=len(events))
        assert (await chat.next())["message"] == events[-1]["message"]
        await chat.send(type="message.resume", id=str(message.pk), after_seq=10**9)
        assert (await chat.next())["error"]["code"] == "invalid_request"
        for foreign in (str(other.pk), "00000000-0000-4000-8000-000000000000"):
            await chat.send(type="message.resume", id=foreign)
            assert (await chat.next())["error"]["code"] == "not_found"
        await chat.send(type="message.resume", id="../x")
        assert (await chat.next())["error"]["code"] == "invalid_request"


async def test_only_so_many_logs_are_kept_for_so_long_and_none_keeps_its_turn(opened, monkeypatch):
    monkeypatch.setattr(registry, "KEPT_LOGS", 3)
    messages = [(await finished(opened, "hello"))[0] for _ in range(5)]
    kept = [message for message in messages if running.log_of(message) is not None]
    assert kept == messages[2:]
    log = running.log_of(messages[-1])
    assert not hasattr(log.abandon, "__closure__") or not log.abandon.__closure__
    later = time.monotonic() + registry.KEPT_LOGS_S + 1
    monkeypatch.setattr(registry.time, "monotonic", lambda: later)
    assert running.log_of(messages[-1]) is None and not running._ended
