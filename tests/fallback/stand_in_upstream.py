"""A server that speaks OpenAI's chat completions, and fails in each of the ways real ones do.

A real uvicorn on a free port, in a thread. The first part of the path says how it behaves:
``http://127.0.0.1:PORT/good/v1`` answers, ``/hang/v1`` never does. What it was sent is kept in
``calls``.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import random
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from tests.conftest import free_port

Send = Callable[[dict[str, Any]], Awaitable[None]]
WORDS = ("Of ", "course", ", ", "gladly", ".")
ABLE = ("order", "refund", "invoice", "account", "delivery", "address", "payment", "review")
#: What is asked in this call.
_asked: ContextVar[dict[str, Any]] = ContextVar("asked")
#: How each mode ends for a client; the eleven of reliability's F26 but DNS, which has no server.
CAUSES = {
    "error_500": "status",
    "limited": "rate_limited",
    "hang": "first_byte",
    "trickle": "idle",
    "html": "not_events",
    "cut": "cut",
    "bad_event": "bad_event",
    "wrong_model": "wrong_model",
    "huge": "too_large",
}


@dataclass
class StandIn:
    """``pause_s``: between words (``trickle``, ``able``). ``say``: the words it answers with."""

    port: int
    scheme: str = "http"
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    pause_s: float = 0.0
    models: tuple[str, ...] = ("big", "small")
    say: tuple[str, ...] = WORDS
    gone: int = 0  # clients who left in the middle
    release: threading.Event = field(default_factory=threading.Event)

    def url(self, mode: str = "good") -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/{mode}/v1"

    def forget(self) -> None:
        self.calls.clear()
        self.headers.clear()
        self.pause_s, self.say, self.gone = 0.0, WORDS, 0

    # -- the application

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            return
        mode, rest = scope["path"].strip("/").split("/", 1)
        self.headers.append({k.decode(): v.decode() for k, v in scope["headers"]})
        if scope["method"] == "GET":
            assert rest == "v1/models", rest
            return await getattr(self, f"_models_{mode}")(send)
        _asked.set(json.loads(await _body(receive)))
        self.calls.append(_asked.get())
        assert rest == "v1/chat/completions", rest
        answer = asyncio.create_task(getattr(self, f"_{mode}")(send))
        left = asyncio.create_task(_until_left(receive))
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        self.gone += not answer.done()
        for task in (answer, left):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await answer

    async def _events(self, send: Send, words: tuple[str, ...], *, end: bool = True) -> None:
        await _head(send, 200, "text/event-stream")
        await _event(send, {"role": "assistant", "content": ""})
        for word in words:
            await _event(send, {"content": word})
            await asyncio.sleep(self.pause_s)
        if end:
            await _event(send, {}, finish="stop")
            await _data(send, {"choices": [], "usage": _usage(len(words))})
            await _chunk(send, b"data: [DONE]\n\n", more=False)

    async def _good(self, send: Send) -> None:
        await self._events(send, self.say)

    async def _able(self, send: Send) -> None:
        """As a real model: the same words to the same question, up to the limit that was set."""
        body = _asked.get()
        words = random.Random(body["messages"][-1]["content"])
        await _head(send, 200, "text/event-stream")
        for _ in range(body["max_tokens"]):
            await _event(send, {"content": f"{words.choice(ABLE)} "})
            await asyncio.sleep(self.pause_s or 0.0005)
        await _event(send, {}, finish="length")
        read = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": read, "completion_tokens": body["max_tokens"]}
        await _data(send, {"choices": [], "usage": usage})
        await _chunk(send, b"data: [DONE]\n\n", more=False)

    # -- its list of models

    async def _models_good(self, send: Send) -> None:
        await _head(send, 200, "application/json")
        told = {"object": "list", "data": [{"id": name} for name in self.models]}
        await _chunk(send, json.dumps(told).encode(), more=False)

    async def _models_none(self, send: Send) -> None:
        await _error(send, 404, "not_found")

    async def _models_refused(self, send: Send) -> None:
        await _error(send, 401, "invalid_api_key")

    async def _models_html(self, send: Send) -> None:
        await self._html(send)

    async def _models_elsewhere(self, send: Send) -> None:
        await self._elsewhere(send)

    async def _models_hang(self, send: Send) -> None:
        await asyncio.sleep(2)

    async def _models_huge(self, send: Send) -> None:
        await _head(send, 200, "application/json")
        await _chunk(send, b"[" * (2 << 20), more=False)

    async def _error_500(self, send: Send) -> None:
        await _error(send, 500, "server_error")

    async def _limited(self, send: Send) -> None:
        await _error(send, 429, "rate_limit_exceeded", [(b"retry-after", b"30")])

    async def _limited_once(self, send: Send) -> None:
        if len(self.calls) > 1:
            return await self._good(send)
        return await _error(send, 429, "rate_limit_exceeded", [(b"retry-after-ms", b"50")])

    async def _once_500(self, send: Send) -> None:
        await (self._good(send) if len(self.calls) > 1 else self._error_500(send))

    async def _bad_request(self, send: Send) -> None:
        await _error(send, 400, "invalid_value")

    async def _no_temperature(self, send: Send) -> None:
        if "temperature" in self.calls[-1]:
            await _error(send, 400, "unsupported_value", param="temperature")
        elif "max_tokens" in self.calls[-1]:
            await _error(send, 400, "unsupported_parameter", param="max_tokens")
        else:
            await self._good(send)

    async def _hang(self, send: Send) -> None:
        await asyncio.Event().wait()

    async def _hang_after_headers(self, send: Send) -> None:
        await _head(send, 200, "text/event-stream")
        while True:
            await _chunk(send, b": keep-alive\n\n")
            await asyncio.sleep(0.02)

    async def _trickle(self, send: Send) -> None:
        await self._events(send, WORDS * 1_000)

    async def _html(self, send: Send) -> None:
        await _head(send, 200, "text/html")
        await _chunk(send, b"<html><h1>Please sign in</h1></html>", more=False)

    async def _cut(self, send: Send) -> None:
        await self._events(send, WORDS[:2], end=False)
        raise ConnectionAbortedError("told to cut the answer")

    async def _cut_at_once(self, send: Send) -> None:
        await _head(send, 200, "text/event-stream")
        await _chunk(send, b"", more=False)

    async def _bad_event(self, send: Send) -> None:
        await _head(send, 200, "text/event-stream")
        await _chunk(send, b'data: {"choices": [{"delta": {"cont\n\n', more=False)

    async def _error_within(self, send: Send) -> None:
        await self._events(send, WORDS[:2], end=False)
        await _data(send, {"error": {"message": "overloaded", "code": "overloaded"}})

    async def _wrong_model(self, send: Send) -> None:
        await _error(send, 404, "model_not_found")

    async def _huge(self, send: Send) -> None:
        await self._events(send, ("x" * (1 << 20),))

    async def _endless(self, send: Send) -> None:
        await self._events(send, ("word after word " * 4,) * 100_000)

    async def _empty(self, send: Send) -> None:
        await self._events(send, ())

    async def _no_end_mark(self, send: Send) -> None:
        await self._events(send, self.say, end=False)
        await _event(send, {}, finish="length")
        await _chunk(send, b"", more=False)

    async def _packed(self, send: Send) -> None:
        await _head(send, 200, "text/event-stream", [(b"content-encoding", b"gzip")])
        await _chunk(send, b"\x1f\x8b", more=False)

    async def _elsewhere(self, send: Send) -> None:
        """To a host that records who comes: itself, under another name."""
        there = f"{self.scheme}://localhost:{self.port}/good/v1/chat/completions".encode()
        await _head(send, 307, "text/plain", [(b"location", there)])
        await _chunk(send, b"", more=False)


# -- the wire ------------------------------------------------------------------------------------


async def _body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


async def _until_left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _head(
    send: Send, status: int, kind: str, more: list[tuple[bytes, bytes]] | None = None
) -> None:
    headers = [(b"content-type", kind.encode()), *(more or [])]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _chunk(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _data(send: Send, data: dict[str, Any]) -> None:
    await _chunk(send, f"data: {json.dumps(data)}\n\n".encode())


async def _event(send: Send, delta: dict[str, str], finish: str | None = None) -> None:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    await _data(
        send,
        {
            "id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1,
            "model": "big-2026-01-01", "choices": [choice],
        },
    )  # fmt: skip


async def _error(
    send: Send,
    status: int,
    code: str,
    headers: list[tuple[bytes, bytes]] | None = None,
    param: str | None = None,
) -> None:
    await _head(send, status, "application/json", headers)
    error = {"message": "something secret", "type": "error", "code": code, "param": param}
    await _chunk(send, json.dumps({"error": error}).encode(), more=False)


def _usage(words: int) -> dict[str, int]:
    return {"prompt_tokens": 11, "completion_tokens": words, "total_tokens": 11 + words}


# -- running it ----------------------------------------------------------------------------------


@contextlib.contextmanager
def standing_in(folder: Path | None = None) -> Iterator[StandIn]:
    """The server, started. With a folder it speaks TLS, under a certificate nobody trusts."""
    stand_in = StandIn(free_port(), "https" if folder else "http")
    tls = _certificate(folder) if folder else {}
    config = uvicorn.Config(
        stand_in, port=stand_in.port, log_config=None, lifespan="off", ws="none",
        timeout_graceful_shutdown=1, **tls,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the stand-in did not start"
        time.sleep(0.01)
    try:
        yield stand_in
    finally:
        server.should_exit = True
        thread.join(10)


def _certificate(folder: Path) -> dict[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(key.private_bytes(*form))
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return {"ssl_keyfile": str(folder / "key.pem"), "ssl_certfile": str(folder / "cert.pem")}
