"""More requests at once than there is room for: who waits a moment, who is refused and how."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from channels.testing import HttpCommunicator

from assistant import threads
from assistant.threads import Room, waited
from config import handler
from config.asgi import application
from conversations.turn import turn_refused


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
async def test_a_crowd_is_told_when_to_come_back_and_probes_still_pass(monkeypatch: Any) -> None:
    monkeypatch.setattr(handler, "room", Room(places=0, patience_s=0))
    refused: list[str] = []

    def count(code: str, **_: Any) -> None:
        refused.append(code)

    turn_refused.connect(count)
    reply = await _asked("POST", "/v1/chat/completions")
    probe = await _asked("GET", "/livez")
    headers, told = dict(reply["headers"]), json.loads(reply["body"])
    assert reply["status"] == 503 and told["error"]["code"] == "overloaded"
    assert headers[b"Content-Type"] == b"application/problem+json"
    assert headers[b"Retry-After"] == b"2"
    assert refused == ["overloaded"] and probe["status"] == 200


async def _asked(method: str, path: str) -> Any:
    """Through all that serves, which Django's own test client does without."""
    host = [(b"host", b"testserver")]
    asked = HttpCommunicator(application, method, path, b"{}", host)
    reply = await asked.get_response(5)
    await asked.wait()
    return reply
