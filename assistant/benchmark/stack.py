"""The whole product under load, against its engine alone: a server, sockets, a database.

Starts ``uvicorn`` in a process of its own with an empty database, and talks to it as browsers do:
a visitor's session, a conversation and a WebSocket for every question. Knows the public face only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

from assistant.benchmark import reading
from assistant.benchmark.drive import Room, opened, reply
from assistant.benchmark.figures import Fact, Level, Measured, percentile_ms
from assistant.benchmark.workloads import Sizes
from assistant.engine import Engine

ROOT = Path(__file__).resolve().parents[2]
#: Plain ones, which the model that ships answers itself.
QUESTIONS = (
    "how do I cancel my order?",
    "where is my parcel?",
    "I forgot my password",
    "how do I get a refund?",
    "which payment methods do you accept?",
    "how can I delete my account?",
    "I want to change my delivery address",
    "where can I download my invoice?",
)
_START_S, _ANSWER_S = 60.0, 60.0


def whole_stack(model: Path, threads: int, sizes: Sizes) -> Measured:
    """``sizes.batch`` chats through WebSocket and database; the same questions, engine alone."""
    with tempfile.TemporaryDirectory() as folder:
        environment = _room(model, threads, sizes.batch, sizes.batch * (sizes.rounds + 1))
        with Server(Path(folder), **environment) as server:
            through = asyncio.run(_through(server, sizes))
    alone = _alone(model, threads, sizes)
    share = through.tokens_per_s / alone.tokens_per_s
    return Measured(
        facts=(
            Fact("stack_tokens_per_s", round(through.tokens_per_s, 1), "/s", "tokens through it"),
            Fact("alone_tokens_per_s", round(alone.tokens_per_s, 1), "/s", "by the engine alone"),
            Fact("stack_over_alone", round(share, 3), "x", "through it over the engine alone"),
            Fact("stack_ttft_ms_p50", percentile_ms(through.ttft, 50), "ms", "first words p50"),
            Fact("stack_ttft_ms_p95", percentile_ms(through.ttft, 95), "ms", "first words p95"),
        )
    )


def stack_readers(
    model: Path, threads: int, sizes: Sizes, progress: Callable[[str], None]
) -> Measured:
    """How many can read at once what comes through WebSocket and database; ``reading.readers`` is
    the same of the engine alone."""

    def level(count: int) -> Level:
        environment = _room(model, threads, count, count + 1) | {
            "ASSISTANT_MAX_NEW_TOKENS": str(sizes.new_tokens),
            "ASSISTANT_READING_TOKENS_PER_S": f"{sizes.reading_tokens_per_s:.0f}",
        }
        with tempfile.TemporaryDirectory() as folder, Server(Path(folder), **environment) as server:
            return asyncio.run(_read_all(server, sizes, count)).level(count)

    return reading.curve("stack_readers", sizes, level, progress)


def _room(model: Path, threads: int, chats: int, sockets: int) -> dict[str, str]:
    """Settings under which so many chats of one visitor are all answered."""
    return {
        "ASSISTANT_MODEL_DIR": str(model.resolve()),
        "ASSISTANT_THREADS": str(threads),
        "ASSISTANT_MAX_BATCH": str(chats),
        "ASSISTANT_MAX_TURNS_PER_CALLER": str(chats),
        # Sockets may all open in the same moment: none is to be turned away as a crowd.
        "ASSISTANT_REQUESTS_AT_ONCE": str(chats),
        "ASSISTANT_MAX_SOCKETS_PER_CALLER": str(sockets),
        "ASSISTANT_MAX_SOCKETS_PER_ADDRESS": str(sockets),
    }


@dataclass(slots=True)
class _Seen:
    tokens: int = 0
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


# -- through the product -------------------------------------------------------------------------


class Server:
    """``uvicorn`` on a free port with its own data folder, visitors allowed, no rate limit."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = {
            **os.environ,
            "ASSISTANT_DATA_DIR": str(folder),
            "ASSISTANT_ANONYMOUS": "true",
            "ASSISTANT_RATE": "off",
            "ASSISTANT_CACHE_FRESH_S": "0",  # the same few questions are asked again and again
            "DJANGO_SETTINGS_MODULE": "config.settings",
            **environment,
        }

    def __enter__(self) -> Server:
        """Raises: RuntimeError where it does not start."""
        migrating = self._start("manage.py", "migrate", "-v0")
        if migrating.wait(_START_S):
            raise RuntimeError(f"the database was not made: {self._last_words()}")
        self._process = self._start(
            *("-m", "uvicorn", "config.asgi:application", "--port", str(self.port)),
            *("--log-level", "warning", "--lifespan", "off", "--timeout-graceful-shutdown", "5"),
        )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/livez"):  # noqa: S310
                return self
            time.sleep(0.1)
        self.__exit__()
        raise RuntimeError(f"the server did not start: {self._last_words()}")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(15)

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "server.log").open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - our own interpreter and arguments
                [sys.executable, *arguments],
                cwd=ROOT, env=self._environment, stdout=log, stderr=log,
            )  # fmt: skip

    def _last_words(self) -> str:
        lines = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Visitor:
    """A browser without a window: a session, a CSRF token, conversations."""

    def __init__(self, server: Server) -> None:
        self._server, self._jar = server, CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._jar))
        self._opener.open(f"{server.url}/").close()

    @property
    def cookies(self) -> dict[str, str]:
        return {cookie.name: cookie.value or "" for cookie in self._jar}

    def conversation(self) -> str:
        headers = {
            "Content-Type": "application/json",
            "X-CSRFToken": self.cookies.get("csrftoken", ""),
            "Origin": self._server.url,
        }
        url = f"{self._server.url}/api/v1/conversations/"
        request = urllib.request.Request(url, b"{}", headers)  # noqa: S310 - our own server
        with self._opener.open(request) as answer:
            return str(json.load(answer)["id"])

    def socket(self, conversation: str) -> Any:
        """An open WebSocket, as a context."""
        import websockets
        from websockets.typing import Origin

        cookies = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        url = f"ws://127.0.0.1:{self._server.port}/ws/chat/{conversation}/"
        origin = Origin(self._server.url)
        return websockets.connect(url, origin=origin, additional_headers={"Cookie": cookies})


async def _through(server: Server, sizes: Sizes) -> _Seen:
    """Every chat asks ``sizes.rounds`` times, each time in a conversation of its own."""
    visitor, seen = Visitor(server), _Seen()
    await _chat(visitor, [visitor.conversation()], 0, _Seen())  # loads the model
    fresh = [[visitor.conversation() for _ in range(sizes.rounds)] for _ in range(sizes.batch)]
    began = time.perf_counter()
    await asyncio.gather(*(_chat(visitor, own, at, seen) for at, own in enumerate(fresh)))
    seen.seconds = time.perf_counter() - began
    return seen


async def _chat(visitor: Visitor, conversations: Sequence[str], first: int, seen: _Seen) -> None:
    for at, conversation in enumerate(conversations):
        async with visitor.socket(conversation) as opened_socket:
            await _turn(opened_socket, QUESTIONS[(first + at) % len(QUESTIONS)], seen)


async def _turn(opened_socket: Any, question: str, seen: _Seen) -> None:
    """Raises: RuntimeError on an error frame; TimeoutError."""
    began = time.perf_counter()
    await opened_socket.send(json.dumps({"type": "message.create", "text": question}))
    waiting = True
    while True:
        frame = json.loads(await asyncio.wait_for(opened_socket.recv(), _ANSWER_S))
        if frame["type"] == "message.delta" and waiting:
            seen.ttft.append(time.perf_counter() - began)
            waiting = False
        if frame["type"] == "message.completed":
            seen.tokens += frame["message"]["usage"]["output_tokens"]
            return
        if frame["type"] in ("error", "message.failed"):
            raise RuntimeError(f"the server answered {frame}")


# -- readers --------------------------------------------------------------------------------------


async def _read_all(server: Server, sizes: Sizes, count: int) -> reading.Seen:
    """As readers of the engine alone: spread over an answer's time, their first not counted."""
    visitor, seen = Visitor(server), reading.Seen()
    await _chat(visitor, [visitor.conversation()], 0, _Seen())  # loads the model
    chats = [visitor.conversation() for _ in range(count)]
    spread_s = sizes.new_tokens / sizes.reading_tokens_per_s / count

    async def reader(at: int, conversation: str) -> None:
        await asyncio.sleep(at * spread_s)
        async with visitor.socket(conversation) as opened_socket:
            for turn in range(sizes.reader_rounds + 1):
                question = QUESTIONS[(at + turn) % len(QUESTIONS)]
                await _read(opened_socket, question, sizes, seen if turn else reading.Seen())

    await asyncio.gather(*map(reader, range(count), chats))
    return seen


async def _read(opened_socket: Any, question: str, sizes: Sizes, seen: reading.Seen) -> None:
    """One answer at reading speed; who is answered by somebody else than the model was failed.

    Pieces of text do not tell their tokens, so an answer is behind if its last piece is.
    """
    asked, told = time.perf_counter(), []
    await opened_socket.send(json.dumps({"type": "message.create", "text": question}))
    while True:
        frame = json.loads(await asyncio.wait_for(opened_socket.recv(), _ANSWER_S))
        if frame["type"] == "message.delta":
            told.append(time.perf_counter())
        if frame["type"] in ("message.completed", "message.failed", "error"):
            break
    message = frame.get("message") or {}
    if message.get("route") != "model" or not told:
        seen.failed += 1
        return
    reading_s = message["usage"]["output_tokens"] / sizes.reading_tokens_per_s
    seen.ttft.append(told[0] - asked)
    seen.stalls.append(max(0.0, told[-1] - told[0] - reading_s))
    await asyncio.sleep(max(0.0, told[0] + reading_s - time.perf_counter()))


# -- the engine alone ----------------------------------------------------------------------------


def _alone(model: Path, threads: int, sizes: Sizes) -> _Seen:
    seen = _Seen()
    with opened(model, threads, Room(sizes.batch, 512)) as engine:
        asyncio.run(_ask_all(engine, 1, 1, _Seen()))
        began = time.perf_counter()
        asyncio.run(_ask_all(engine, sizes.batch, sizes.rounds, seen))
        seen.seconds = time.perf_counter() - began
    return seen


async def _ask_all(engine: Engine, chats: int, rounds: int, seen: _Seen) -> None:
    async def chat(first: int) -> None:
        for at in range(rounds):
            answer = await reply(engine, QUESTIONS[(first + at) % len(QUESTIONS)])
            seen.tokens += len(answer.ids)

    await asyncio.gather(*map(chat, range(chats)))
