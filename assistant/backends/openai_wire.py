"""What a server of OpenAI's chat completions says, read strictly: events, refusals, waits, causes.

Whatever is not as the protocol has it becomes an ``UpstreamFailed`` with a cause from ``Cause``.
The server's words are never passed on: they may quote the question. Knows no backend.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx2

from assistant.errors import UpstreamFailed
from assistant.types import Usage

#: Why there was no good answer.
Cause = Literal[
    "dns", "connect", "tls", "first_byte", "idle", "total",  # reaching it, waiting for it
    "redirect", "refused", "wrong_model", "rate_limited", "status",  # what it said
    "not_events", "bad_event", "too_large", "cut", "empty",  # how it said it
]  # fmt: skip
_TOLD: dict[Cause, str] = {
    "dns": "its host name is not known",
    "connect": "it cannot be reached",
    "tls": "its certificate was not accepted",
    "first_byte": "it did not begin in time",
    "idle": "it stopped writing",
    "total": "it took too long",
    "redirect": "it wanted to send the question to another address",
    "refused": "it refused the request",
    "wrong_model": "it does not have the model that is set",
    "rate_limited": "it is asked too often",
    "status": "it has an error of its own",
    "not_events": "it did not answer with a stream of events",
    "bad_event": "its answer is not what the protocol says",
    "too_large": "its answer is too large",
    "cut": "its answer was cut off",
    "empty": "its answer is empty",
}
#: Nothing but a change of settings helps against these.
_LASTING: frozenset[Cause] = frozenset({"dns", "tls", "redirect", "refused", "wrong_model"})
#: Some servers keep the line open after the last word, for figures that may not come.
_REST_S = 1.0
#: An error's body is read this far, for its code only.
_ERROR_BYTES = 16 << 10
#: C0 and C1 controls but tab and line ends: nothing a screen or PostgreSQL should get.
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), *range(127, 160)))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event of the server says."""

    text: str = ""
    model: str = ""
    finish: str | None = None
    usage: Usage | None = None
    done: bool = False


# -- waiting -------------------------------------------------------------------------------------


class Clock:
    """When an answer must have begun, go on and be over, on the loop's monotonic clock."""

    def __init__(self, first_byte_s: float, idle_s: float, total_s: float) -> None:
        self._now = asyncio.get_running_loop().time
        start = self._now()
        self._first, self._total = start + first_byte_s, start + total_s
        self._idle_s = idle_s

    def until_first_byte(self) -> float:
        return self._first - self._now()

    @asynccontextmanager
    async def within(
        self, cause: Literal["first_byte", "idle"], most_s: float | None = None
    ) -> AsyncIterator[None]:
        """Raises: UpstreamFailed if the body is not over in time."""
        until = self._now() + (most_s or self._idle_s)
        if cause == "first_byte":
            until = self._first
        try:
            async with asyncio.timeout_at(min(until, self._total)):
                yield
        except TimeoutError:
            raise failure("total" if self._now() >= self._total else cause) from None


# -- what the server says ------------------------------------------------------------------------


async def pieces_of(
    events: AsyncIterator[httpx2.ServerSentEvent], clock: Clock
) -> AsyncIterator[Piece]:
    """Every event as a piece, up to the end mark, each in time. Comments are no events: a server
    that only keeps the line open is late all the same."""
    begun = False
    while True:
        async with clock.within("idle" if begun else "first_byte"):
            event = await anext(events, None)
        if event is None:
            raise failure("cut")
        yield (piece := piece_of(event.data))
        if piece.done:
            return
        if piece.finish is not None:
            break
        begun = begun or bool(piece.text)
    with suppress(UpstreamFailed, httpx2.HTTPError):  # the answer is whole; these are its figures
        async with clock.within("idle", _REST_S):
            event = await anext(events, None)
        if event is not None:
            yield piece_of(event.data)


def piece_of(data: str) -> Piece:
    """Raises: UpstreamFailed if that is no chunk of a chat completion, or says that it failed."""
    if data.strip() == "[DONE]":
        return Piece(done=True)
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        raise failure("bad_event") from None
    if not isinstance(chunk, dict):
        raise failure("bad_event")
    if chunk.get("error"):
        raise failure("status", "an error within the answer")
    choices, model = chunk.get("choices"), chunk.get("model")
    if not isinstance(choices, list):
        raise failure("bad_event")
    choice = choices[0] if choices else {}
    delta = choice.get("delta") if isinstance(choice, dict) else None
    text = delta.get("content") if isinstance(delta, dict) else ""
    finish = choice.get("finish_reason") if isinstance(choice, dict) else None
    if not isinstance(text, str | None) or not isinstance(finish, str | None):
        raise failure("bad_event")
    return Piece(clean(text or ""), model if isinstance(model, str) else "", finish, _usage(chunk))


def _usage(chunk: Mapping[str, Any]) -> Usage | None:
    told = chunk.get("usage")
    if not isinstance(told, dict):
        return None
    read, written = told.get("prompt_tokens"), told.get("completion_tokens")
    if isinstance(read, int) and isinstance(written, int) and min(read, written) >= 0:
        return Usage(min(read, 10**9), min(written, 10**9))
    return None


def clean(text: str) -> str:
    """Without controls and without halves of surrogate pairs, which no database takes."""
    return text.translate(_CONTROLS).encode("utf-8", "replace").decode()


async def error_of(response: httpx2.Response, clock: Clock) -> dict[str, Any]:
    """The error object of a refusal, read within bounds; only its code and field are used."""
    body = b""
    try:
        async with clock.within("first_byte"):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > _ERROR_BYTES:
                    return {}
        error = json.loads(body)["error"]
    except (UpstreamFailed, httpx2.HTTPError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}


async def names_of(response: httpx2.Response, clock: Clock, most_bytes: int) -> tuple[str, ...]:
    """The ids of a list of models, read within bounds. Raises: UpstreamFailed if it is none."""
    body = b""
    async with clock.within("first_byte"):
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > most_bytes:
                raise failure("too_large")
    try:
        return tuple(str(entry["id"]) for entry in json.loads(body)["data"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise failure("bad_event", "no list of models") from None


def retry_after(headers: httpx2.Headers) -> float | None:
    """Seconds to wait, 0 to an hour, if the server says so in any of the usual ways."""
    value, millis = headers.get("retry-after", ""), headers.get("retry-after-ms", "")
    try:
        if millis:
            wait = float(millis) / 1000
        elif value.replace(".", "", 1).isdigit():
            wait = float(value)
        else:
            wait = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, wait), 3600.0) if wait == wait else None


# -- what goes wrong -----------------------------------------------------------------------------


def failure(cause: Cause, detail: str = "", retry_after_s: float | None = None) -> UpstreamFailed:
    more = f" ({detail})" if detail else ""
    advice = "Its settings have to be looked at." if cause in _LASTING else "Try again shortly."
    message = f"The larger model gave no answer: {_TOLD[cause]}{more}. {advice}"
    return UpstreamFailed(cause, message, retry_after_s=retry_after_s)


def cause_of(error: Exception) -> Cause:
    """What one of the library's errors means."""
    if isinstance(error, httpx2.SSEError):
        return "too_large"  # the only one left: the content type was looked at before
    if isinstance(error, httpx2.DecodingError):
        return "bad_event"
    if not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)):
        return "connect" if isinstance(error, httpx2.ProxyError) else "cut"
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, ssl.SSLError):
            return "tls"
        if isinstance(below, socket.gaierror):
            return "dns"
        below = below.__cause__ or below.__context__
    return "connect"
