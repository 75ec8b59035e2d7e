"""More requests at once than there is room for: who waits a moment, who is refused and how."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import HttpCommunicator
from django.contrib.auth.models import User

from assistant import threads
from assistant.threads import Room, waited
from config import handler
from config.asgi import application
from conversations import consumers, limits
from conversations.models import Conversation
from conversations.turn import turn_refused
from tests.conversations.test_socket import Chat
from tests.conversations.test_sockets_auth import Bare


async def test_a_place_that_is_given_back_goes_to_who_waits() -> None:
    room = Room(places=1, patience_s=5)
    assert await room.take()
    waiting = asyncio.create_task(room.take())
    await asyncio.sleep(0)
    assert not waiting.done()
    threading.Thread(target=room.leave).start()
    assert await asyncio.wait_for(waiting, 2)


async def test_who_waits_in_vain_is_refused_and_leaves_no_trace() -> None:
    room = Room(places=1, patience_s=0.01)
    assert await room.take()
    assert [await room.take() for _ in range(3)] == [False] * 3
    room.leave()
    assert await room.take()


async def test_a_burst_is_waited_for_longer_than_a_crowd_that_lasts() -> None:
    room = Room(places=1, patience_s=0, burst_s=0.05)
    assert await room.take()
    first = asyncio.create_task(room.take())
    await asyncio.sleep(0)
    assert not first.done()
    await asyncio.sleep(0.06)
    assert await first is False
    room._waiting, room._crowded_since = 1, asyncio.get_running_loop().time() - 1
    late = asyncio.create_task(room.take())
    await asyncio.sleep(0)
    assert late.done() and late.result() is False


async def test_who_comes_while_others_are_refused_is_no_burst() -> None:
    room = Room(places=1, patience_s=0, burst_s=0.05, calm_s=0.1)
    assert await room.take()
    assert await room.take() is False
    began = time.monotonic()
    assert await room.take() is False
    assert time.monotonic() - began < 0.04
    await asyncio.sleep(0.12)
    began = time.monotonic()
    assert await room.take() is False
    assert time.monotonic() - began >= 0.04


async def test_whoever_leaves_the_crowd_takes_nobodys_place() -> None:
    room = Room(places=1, patience_s=5)
    assert await room.take()
    gone, staying = (asyncio.create_task(room.take()) for _ in range(2))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    room.leave()
    assert await asyncio.wait_for(staying, 2)


async def test_a_thread_that_waits_for_an_answer_holds_no_place(monkeypatch: Any) -> None:
    room = Room(places=1, patience_s=5)
    monkeypatch.setattr(threads, "room", room)
    answer, waits = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        waits.set()
        await answer.wait()
        return "written"

    def view() -> str:
        with room.worked_in():
            return waited(work)

    assert await room.take()
    viewed = asyncio.create_task(threads.in_thread(view))
    await asyncio.wait_for(waits.wait(), 2)
    assert await asyncio.wait_for(room.take(), 2)
    answer.set()
    assert await viewed == "written"
    room.leave()
    room.leave()
    assert await asyncio.wait_for(room.take(), 2)


@pytest.mark.django_db(transaction=True)
async def test_a_crowd_is_told_when_to_come_back_and_probes_still_pass(
    monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr(handler, "room", Room(places=0, patience_s=0))
    refused: list[str] = []

    def count(code: str, **_: Any) -> None:
        refused.append(code)

    turn_refused.connect(count)
    reply = await _asked("POST", "/v1/chat/completions")
    probe = await _asked("GET", "/livez")
    headers, told = dict(reply["headers"]), json.loads(reply["body"])
    assert reply["status"] == 503 and told["error"]["code"] == "overloaded"
    assert headers[b"content-type"] == b"application/problem+json"
    assert headers[b"retry-after"] == b"2" and told["instance"] == "/v1/chat/completions"
    assert headers[b"x-should-retry"] == b"true"
    assert headers[b"x-request-id"].decode() == told["request_id"] != ""
    assert refused == ["overloaded"] and probe["status"] == 200
    assert not caplog.records  # a line for each would be most of what a crowd costs


async def _asked(method: str, path: str) -> Any:
    """Through all that serves, which Django's own test client does without."""
    host = [(b"host", b"testserver")]
    asked = HttpCommunicator(application, method, path, b"{}", host)
    reply = await asked.get_response(5)
    await asked.wait()
    return reply


# --- Sockets -------------------------------------------------------------------------------------

#: To say no in, with the rest of ten handshakes on a busy machine.
NO_WITHIN_S = 0.3 + 0.7


@pytest.mark.django_db(transaction=True)
async def test_a_crowd_of_connects_hears_no_at_once_and_why(
    ana: User, cookie_of: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(consumers, "room", Room(places=0, patience_s=0.05))
    scopes: list[str] = []

    def count(scope: str, **_: Any) -> None:
        scopes.append(scope)

    limits.refused.connect(count)
    cookie = await sync_to_async(cookie_of)(ana)
    conversation = await Conversation.objects.acreate(user=ana)
    began = time.monotonic()
    told = await asyncio.gather(*(_refused(Chat(conversation, cookie)) for _ in range(10)))
    assert time.monotonic() - began < NO_WITHIN_S
    error = {"code": "overloaded", "retry_after_s": 2.0}
    assert [(frame["type"], code) for frame, code in told] == [("error", 1013)] * 10
    assert all(error.items() <= frame["error"].items() for frame, _ in told)
    assert scopes == ["requests"] * 10


@pytest.mark.django_db(transaction=True)
async def test_an_open_socket_holds_no_place(ana: User, cookie_of: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(consumers, "room", Room(places=1, patience_s=2))
    cookie = await sync_to_async(cookie_of)(ana)
    conversation = await Conversation.objects.acreate(user=ana)
    async with Chat(conversation, cookie) as one, Chat(conversation, cookie) as two:
        for chat in (one, two):
            await chat.send(type="ping")
            assert (await chat.next())["type"] == "pong"


@pytest.mark.django_db(transaction=True)
async def test_a_socket_that_says_nobodys_token_holds_no_place_meanwhile(
    ana: User, cookie_of: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(consumers, "room", Room(places=1, patience_s=0.2))
    cookie = await sync_to_async(cookie_of)(ana)
    conversation = await Conversation.objects.acreate(user=ana)
    async with Bare(conversation), Chat(conversation, cookie) as known:
        await known.send(type="ping")
        assert (await known.next())["type"] == "pong"


async def _refused(chat: Chat) -> tuple[Any, int]:
    """What is said, and the code that follows."""
    async with chat:
        return await chat.next(), await chat.closed()
