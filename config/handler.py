"""Django's ASGI handler, with every request in one worker thread.

Django changes threads twice for each middleware that is not a coroutine, which all of ours are but
one: 14 changes a request, three of its six milliseconds. Here the middleware and the view, which
are all synchronous, run behind one change, and so does what Django does around a request: its
signals and the closing of a reply. Static files need no thread and come before it. More questions
than can be worked on are refused before they cost a thread, so that those that were let in are
answered at the usual pace: no request is made of them, no line is logged for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from types import SimpleNamespace
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import RequestAborted
from django.core.handlers.asgi import ASGIHandler, get_script_prefix
from django.core.handlers.exception import convert_exception_to_response
from django.core.signals import request_started
from django.db import close_old_connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import set_script_prefix
from servestatic.middleware import ServeStaticMiddleware

from assistant.threads import crowded, room

#: Requests at a time; more wait. One that waits for its whole answer holds a thread meanwhile, so
#: this is well above what the engine's queue lets in.
MOST_REQUESTS = 256

#: Of any request: Django reads no more of a form than this, and nothing here takes a file.
MOST_BODY_BYTES = 2_621_440

#: Paths whose requests are refused in a crowd.
_SHED = ("/api/", "/v1/")

#: Threads are kept, and with them SQLite's connections.
_threads = ThreadPoolExecutor(MOST_REQUESTS, thread_name_prefix="request")


class OneThreadHandler(ASGIHandler):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Without Django's thread of its own for each request, which takes a third of a millisecond
        to start."""
        if scope["type"] != "http":
            raise ValueError(f"This handles HTTP only, not {scope['type']}.")
        bounded = _Bounded(receive)
        try:
            body = await self.read_body(bounded)
        except RequestAborted:
            if bounded.over:
                told = f"The body is larger than {MOST_BODY_BYTES:,} bytes. Send less."
                await send_problem(scope, send, "invalid_request", 413, told, CLOSED)
            return
        with closing(body):
            await self._while_listening(self._answer(scope, body, send), receive)

    async def _answer(self, scope: Any, body: Any, send: Any) -> None:
        """Cancelled when the client is gone; what a reply holds is closed all the same. Who reads
        its reply slowly is not worked on: its place is another's."""
        with ExitStack() as place:
            if scope["path"].startswith(_SHED):
                if not await room.take():
                    return await _refuse(scope, send)
                place.callback(room.leave)
            set_script_prefix(get_script_prefix(scope))
            request: Any  # one of the two
            request, refusal = self.create_request(scope, body)
            if refusal is not None:
                return await self.send_response(refusal, send)
            response = await self.run_get_response(request)
        try:
            with suppress(asyncio.CancelledError):
                await self.send_response(response, send)
        finally:
            if not response.closed:  # a stream, or from before the thread
                await sync_to_async(response.close, thread_sensitive=False)()

    async def _while_listening(self, answer: Coroutine[Any, Any, None], receive: Any) -> None:
        """Raises: whatever ``answer`` raises, but not that it was cancelled."""
        gone = asyncio.create_task(self.listen_for_disconnect(receive))
        answering = asyncio.create_task(answer)
        await asyncio.wait({gone, answering}, return_when=asyncio.FIRST_COMPLETED)
        for task in (gone, answering):
            task.cancel()
            with suppress(asyncio.CancelledError, RequestAborted):
                await task

    def load_middleware(self, is_async: bool = False) -> None:
        """``settings.MIDDLEWARE`` as one synchronous chain, behind the static files."""
        super().load_middleware(is_async=False)
        chain: Callable[[HttpRequest], HttpResponseBase] = self._middleware_chain  # type: ignore[has-type]

        def respond(request: HttpRequest) -> HttpResponseBase:
            request_started.send(sender=type(self), scope=request.scope)  # type: ignore[attr-defined]
            try:
                response = chain(request)
                if not response.streaming:
                    response.close()  # nothing of it is still to be made; sends the other signal
                return response
            finally:
                close_old_connections()

        self._middleware_chain = convert_exception_to_response(
            ServeStaticMiddleware(_in_threads(respond))
        )


def _in_threads(respond: Callable[[HttpRequest], HttpResponseBase]) -> Any:
    """That in a thread, which may lend out its request's place while it waits."""

    def placed(request: HttpRequest) -> HttpResponseBase:
        with room.worked_in():
            return respond(request)

    usual = sync_to_async(respond, thread_sensitive=False, executor=_threads)
    in_place = sync_to_async(placed, thread_sensitive=False, executor=_threads)

    async def answered(request: HttpRequest) -> HttpResponseBase:
        work = in_place if request.path.startswith(_SHED) else usual
        return await work(request)

    return answered


# -- without Django -------------------------------------------------------------------------------

#: Nobody reads on after a request that was not understood (RFC 9112, 6.3).
CLOSED = (b"connection", b"close")


class _Bounded:
    """A body on its way. Django would write it to the disk for as long as somebody sends: what is
    too large breaks off."""

    def __init__(self, receive: Any) -> None:
        self._receive, self._left = receive, MOST_BODY_BYTES

    @property
    def over(self) -> bool:
        return self._left < 0

    async def __call__(self) -> Any:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        return {"type": "http.disconnect"} if self.over else message


async def _refuse(scope: Any, send: Any) -> None:
    """For a request of the API that found no room."""
    from conversations.turn import Turn, turn_refused

    error = crowded()
    turn_refused.send_robust(sender=Turn, transport="rest", code=error.code)
    wait = (b"retry-after", f"{error.retry_after_s:.0f}".encode())
    again = (b"x-should-retry", b"true")
    await send_problem(scope, send, error.code, 503, error.message, wait, again)


async def send_problem(
    scope: Any, send: Any, code: str, status: int, detail: str, *headers: tuple[bytes, bytes]
) -> None:
    """An error as ``application/problem+json`` before any request was made of ``scope``."""
    from conversations import access, wire

    given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
    about = SimpleNamespace(path=scope["path"], request_id=access.identified(given, ""))
    body = wire.encode(wire.problem(code, status, detail, about)).encode()
    told = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", about.request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": told})
    await send({"type": "http.response.body", "body": body})
