"""One request in one thread: its signals, and what a reply holds, whenever its client leaves."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from django.core.signals import request_finished, request_started
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

from assistant.threads import Room
from config import handler
from config.handler import OneThreadHandler

#: Threads of earlier tests hold connections, which are looked at around a request.
pytestmark = pytest.mark.django_db(transaction=True)

seen: list[tuple[str, str]] = []


def note(what: str) -> None:
    seen.append((what, threading.current_thread().name.partition("_")[0]))


class Pieces:
    """A body of so many pieces that knows whether it was closed."""

    def __init__(self, count: int) -> None:
        self._count = count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for _ in range(self._count):
            yield b"x"
        if self._count > 1:
            await asyncio.Event().wait()

    def close(self) -> None:
        note("closed")


def plain(request: HttpRequest) -> HttpResponse:
    note("view")
    reply = HttpResponse("plain")
    reply._resource_closers.append(lambda: note("closed"))  # type: ignore[attr-defined]
    return reply


urlpatterns = [
    path("plain", plain),
    path("stream", lambda request: StreamingHttpResponse(Pieces(1))),
    path("endless", lambda request: StreamingHttpResponse(Pieces(2))),
    path("broken", lambda request: 1 / 0),
]
urlpatterns += [path(f"api/{one.pattern}", one.callback) for one in urlpatterns]


@pytest.fixture(autouse=True)
def signals(settings: Any) -> Iterator[None]:
    settings.ROOT_URLCONF, settings.MIDDLEWARE = __name__, []
    receivers = {
        request_started: lambda **_: note("started"),
        request_finished: lambda **_: note("finished"),
    }
    seen.clear()
    for signal, receiver in receivers.items():
        signal.connect(receiver)
    yield
    for signal, receiver in receivers.items():
        signal.disconnect(receiver)


def server(where: str) -> Any:
    """To be told what a client sends, and asked what it is sent."""
    scope = {"type": "http", "method": "GET", "path": f"/{where}", "headers": []}
    return ApplicationCommunicator(OneThreadHandler(), {**scope, "query_string": b""})


async def asked(where: str, client: Any = None) -> list[dict[str, Any]]:
    with_server = server(where)
    await with_server.send_input({"type": "http.request", "body": b""})
    told = [await with_server.receive_output(5)]
    while len(told) == 1 or told[-1].get("more_body"):
        if client and len(told) > 2:
            await with_server.send_input({"type": client})
            break
        told.append(await with_server.receive_output(5))
    await with_server.wait(5)
    return told


async def test_a_plain_request_has_all_in_its_thread_and_each_once() -> None:
    head, *body = await asked("plain")
    assert head["status"] == 200 and b"".join(part["body"] for part in body) == b"plain"
    assert [what for what, _ in seen] == ["started", "view", "closed", "finished"]
    assert {thread for _, thread in seen} == {"request"}


async def test_an_error_is_a_reply_and_ends_like_one(caplog: Any) -> None:
    head, *_ = await asked("broken")
    assert head["status"] == 500
    assert [what for what, _ in seen] == ["started", "finished"]


LEAVING = [("stream", None), ("endless", "http.disconnect")]


@pytest.mark.parametrize(("where", "client"), LEAVING)
async def test_a_stream_is_closed_at_its_end_or_if_its_client_left(where: str, client: Any) -> None:
    head, *_ = await asked(where, client)
    assert head["status"] == 200
    assert [what for what, _ in seen] == ["started", "closed", "finished"]
    assert {thread for what, thread in seen if what != "started"}.isdisjoint({"MainThread"})


@pytest.mark.parametrize("where", ["plain", "stream", "endless", "broken"])
async def test_a_place_is_given_back_once_before_its_reply_is_read(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = Room(places=1, patience_s=0)
    monkeypatch.setattr(handler, "room", room)
    for _ in range(2):
        head, *_ = await asked(f"api/{where}", "http.disconnect" if where == "endless" else None)
        assert head["status"] == (500 if where == "broken" else 200)
    assert await room.take() and not await room.take()


async def test_a_reader_that_takes_its_time_holds_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(places=1, patience_s=0)
    monkeypatch.setattr(handler, "room", room)
    asking = server("api/endless")
    await asking.send_input({"type": "http.request", "body": b""})
    assert (await asking.receive_output(5))["status"] == 200
    assert await room.take()
    await asking.send_input({"type": "http.disconnect"})
    await asking.wait(5)
    assert not await room.take()  # it was not given back a second time


async def test_a_client_that_left_before_its_answer_gets_none_and_breaks_nothing() -> None:
    asking = server("plain")
    await asking.send_input({"type": "http.disconnect"})
    await asking.wait(5)
    assert await asking.receive_nothing() and seen == []


async def test_who_leaves_the_crowd_is_not_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    room = Room(places=0, patience_s=60)
    monkeypatch.setattr(handler, "room", room)
    asking = server("api/plain")
    await asking.send_input({"type": "http.request", "body": b""})
    assert await asking.receive_nothing()
    await asking.send_input({"type": "http.disconnect"})
    await asking.wait(5)
    room.leave()
    assert await asking.receive_nothing() and seen == []
    assert await room.take()
