"""What a server's memory does when its clients misbehave, and when very many come at once.

    python -m tests.load.memory [--json] [--cases streams,sockets,flood,frames,bodies,crowd]

One server of its own for all cases, with the echo backend, started as the README says but without
limits of sockets and turns, so that one address may do everybody's worst.

streams   50 event streams, and nobody reads them
sockets   50 sockets that ask, have it told again and again, and read nothing
flood     50 sockets that send 10,000 frames each in one go
frames    20 sockets that send 60 frames of 60 KB each in one go
bodies    40 bodies of 20 MB without a token
crowd     1,000 sockets at the same moment, each trying again as the chat page does

``others_ms`` is a turn of somebody else meanwhile, ``usual_ms`` the same before the case began.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import websockets

from tests.load.throughput import Server, User, reply, request

SLOW, FLOODS, BIG, BODIES, CROWD = 50, 50, 20, 40, 1_000
#: As in the README.
FLAGS = (
    *("--no-proxy-headers", "--no-server-header", "--ws-max-size", "65536"),
    *("--ws", "config.sockets:BoundedSockets"),
)
FREE = {
    "ASSISTANT_MAX_SOCKETS_PER_ADDRESS": "100000",
    "ASSISTANT_MAX_SOCKETS_PER_CALLER": "100000",
    "ASSISTANT_MAX_TURNS_PER_CALLER": "100000",
    "ASSISTANT_MAX_NEW_TOKENS": "900",
}
#: As long as an answer may be, in as many pieces as there can be.
LONG = f"/echo per=1 words=800 {'word' * 18}"
#: A page that lost its line tries again after this, doubled each time, and half of it by chance.
AGAIN_S, AGAIN_MOST_S = 0.5, 5.0
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """*Units* stand in the names. ``done``: how many of the case's clients ended as they should."""

    case: str
    clients: int
    done: int
    seconds: float
    rss_before_mb: float
    rss_peak_mb: float
    rss_after_mb: float
    usual_ms_p99: float
    others_ms_p99: float


class AsInProduction(Server):
    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return super()._start(*arguments, *(FLAGS if "uvicorn" in arguments else ()))

    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        kib = status.partition("VmRSS:")[2].split()[0]
        return round(int(kib) / 1024, 1)

    def connections(self) -> int:
        """How many sockets it holds open, its own few among them."""
        found = 0
        for fd in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                found += str(fd.readlink()).startswith("socket:")
        return found


Case = Callable[[AsInProduction, Sequence[User]], Awaitable[int]]

# --- The cases: each returns how many clients ended as they should -------------------------------


def _stuck(port: int) -> socket.socket:
    """A connection with the smallest window there is."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    client.connect(("127.0.0.1", port))
    client.settimeout(0.5)
    return client


def _frame(text: str) -> bytes:
    """A text frame of a client (RFC 6455, 5.2), its mask all zeros."""
    data = text.encode()
    if len(data) < 126:
        return struct.pack("!BB", 0x81, 0x80 | len(data)) + bytes(4) + data
    return struct.pack("!BBH", 0x81, 0xFE, len(data)) + bytes(4) + data


def _handshake(server: Server, user: User) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    return (
        f"GET /ws/chat/{user.conversations[0]}/ HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Authorization: Bearer {user.token}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
    ).encode()


async def streams(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those whose answer is stored although nobody reads it."""

    async def ask(user: User) -> socket.socket:
        path = f"/api/v1/conversations/{user.conversations[0]}/messages/"
        client = await asyncio.to_thread(_stuck, server.port)
        asked = request(path, user.token, {"text": LONG})
        client.sendall(asked.replace(b"\r\n", b"\r\nAccept: text/event-stream\r\n", 1))
        await asyncio.sleep(0.1)  # together they would be refused
        return client

    held = [await ask(user) for user in users[:SLOW]]
    states = [await _settled(server, user) for user in users[:SLOW]]
    for client in held:
        client.close()
    return sum(state in {"complete", "interrupted"} for state in states)


async def _settled(server: Server, user: User) -> str:
    """How the last answer of that user ended."""
    until = time.monotonic() + 10
    path = f"/api/v1/conversations/{user.conversations[0]}/messages/"
    status = "none"
    while time.monotonic() < until:
        got, _, body = await _asked(server, _get(path, user.token))
        rows = json.loads(body)["results"] if got == 200 else []
        status = rows[-1]["status"] if rows else "none"
        if status not in {"streaming", "none"}:
            break
        await asyncio.sleep(0.5)
    return str(status)


def _get(path: str, token: str) -> bytes:
    head = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode()


async def _asked(server: Server, said: bytes) -> tuple[int, bytes, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**24)
    writer.write(said)
    try:
        return await asyncio.wait_for(reply(reader), PATIENCE_S)
    finally:
        writer.close()


async def sockets(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those that are hung up on within a minute."""

    def ask(user: User) -> socket.socket:
        client = _stuck(server.port)
        client.sendall(_handshake(server, user))
        client.recv(300)
        client.sendall(_frame(json.dumps({"type": "message.create", "text": LONG})))
        return client

    def again(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.sendall(_frame('{"type": "message.resume", "after_seq": 0}'))

    await asyncio.sleep(1)  # until the watcher has its own
    usual = server.connections()
    held = [await asyncio.to_thread(ask, user) for user in users[:SLOW]]
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until and server.connections() > usual:
        for client in held:
            await asyncio.to_thread(again, client)
        await asyncio.sleep(1)
    left = max(0, server.connections() - usual)  # clients do not hear of it: they read nothing
    for client in held:
        client.close()
    return SLOW - left


async def flood(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those that are closed."""
    said = _frame("nonsense") * 10_000
    return await _closed(server, users[:FLOODS], said)


async def frames(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those that are closed."""
    return await _closed(server, users[:BIG], _frame("x" * 60_000) * 60)


async def _closed(server: Server, users: Sequence[User], said: bytes) -> int:
    async def one(user: User) -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(_handshake(server, user))
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(said)
                while await reader.read(65_536):
                    pass
        over = reader.at_eof() or reader.exception() is not None
        writer.transport.abort()
        return over

    return sum(await asyncio.gather(*map(one, users)))


async def bodies(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those that are told 413, or are hung up on before they hear it."""
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        b"Content-Type: application/json\r\nContent-Length: 20000000\r\n\r\n"
    )
    part = b"x" * 1_000_000

    async def one() -> bool:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        try:
            writer.write(head)
            for _ in range(20):
                writer.write(part)
                await writer.drain()
            return (await reader.readline()).split()[1:2] == [b"413"]
        except OSError:
            return True
        finally:
            writer.transport.abort()

    return sum([await one() for _ in range(BODIES)])


async def crowd(server: AsInProduction, users: Sequence[User]) -> int:
    """Done: those that chat within half a minute."""
    until = time.monotonic() + 30
    opened: list[Any] = []

    async def one(user: User, at: int) -> None:
        url = f"ws://127.0.0.1:{server.port}/ws/chat/{user.conversations[at]}/"
        bearer, wait_s = {"Authorization": f"Bearer {user.token}"}, AGAIN_S
        while time.monotonic() < until:
            with contextlib.suppress(OSError, TimeoutError, websockets.WebSocketException):
                client = await websockets.connect(
                    url, additional_headers=bearer, ping_interval=None
                )
                await client.send('{"type": "ping"}')
                if json.loads(await client.recv())["type"] == "pong":
                    opened.append(client)
                    return
            await asyncio.sleep(wait_s * random.uniform(0.5, 1))
            wait_s = min(AGAIN_MOST_S, wait_s * 2)

    places = [(user, at) for user in users for at in range(CROWD // len(users))]
    await asyncio.gather(*(one(user, at) for user, at in places))
    for client in opened:
        client.transport.abort()
    return len(opened)


CASES: dict[str, tuple[Case, int]] = {
    "streams": (streams, SLOW),
    "sockets": (sockets, SLOW),
    "flood": (flood, FLOODS),
    "frames": (frames, BIG),
    "bodies": (bodies, BODIES),
    "crowd": (crowd, CROWD),
}

# --- Measuring -----------------------------------------------------------------------------------


class Watcher:
    """Somebody else's turns and the server's memory, for as long as a case takes."""

    def __init__(self, server: AsInProduction, user: User) -> None:
        self._server, self._user = server, user
        self.peak_mb, self.took_ms = 0.0, list[float]()

    async def run(self) -> None:
        """Until cancelled."""
        url = f"ws://127.0.0.1:{self._server.port}/ws/chat/{self._user.conversations[0]}/"
        bearer = {"Authorization": f"Bearer {self._user.token}"}
        async with websockets.connect(url, additional_headers=bearer) as client:
            while True:
                self.peak_mb = max(self.peak_mb, self._server.rss_mb())
                began, kind = time.perf_counter(), ""
                await client.send('{"type": "message.create", "text": "where is my parcel"}')
                while kind not in {"message.completed", "message.failed", "error"}:
                    kind = json.loads(await client.recv())["type"]
                self.took_ms.append((time.perf_counter() - began) * 1000)
                await asyncio.sleep(0.25)

    @property
    def p99_ms(self) -> float:
        ordered = sorted(self.took_ms)
        return round(ordered[int(len(ordered) * 0.99)], 1) if ordered else 0.0


async def _watched(watcher: Watcher, work: Awaitable[int]) -> int:
    watching = asyncio.create_task(watcher.run())
    try:
        return await work
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError, websockets.WebSocketException, OSError):
            await watching


async def measure(server: AsInProduction, case: str, users: Sequence[User]) -> Report:
    work, clients = CASES[case]
    *those, other = users
    calm, watcher = Watcher(server, other), Watcher(server, other)
    await _watched(calm, asyncio.sleep(5, 0))
    before, began = server.rss_mb(), time.monotonic()
    done = await _watched(watcher, work(server, those))
    seconds = time.monotonic() - began
    await asyncio.sleep(3)
    return Report(
        case,
        clients,
        done,
        round(seconds, 1),
        before,
        watcher.peak_mb,
        server.rss_mb(),
        calm.p99_ms,
        watcher.p99_ms,
    )


async def run(cases: Sequence[str]) -> list[Report]:
    with (
        tempfile.TemporaryDirectory(prefix="inhouse-load-") as folder,
        AsInProduction(Path(folder), 1, **FREE) as server,
    ):
        users = server.users(SLOW + 1, CROWD // SLOW)
        return [await measure(server, case, users) for case in cases]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--cases", default=",".join(CASES))
    asked = parser.parse_args()
    found = asyncio.run(run(asked.cases.split(",")))
    if asked.json:
        print(json.dumps([asdict(report) for report in found], indent=2))
        return
    for each in found:
        print(
            f"{each.case:8} {each.done:5} of {each.clients:5} in {each.seconds:5.1f} s   "
            f"memory {each.rss_before_mb:6.1f} MB, at most {each.rss_peak_mb:6.1f}, "
            f"after {each.rss_after_mb:6.1f}   others' p99 {each.others_ms_p99:7.1f} ms "
            f"(usually {each.usual_ms_p99:.1f})"
        )


if __name__ == "__main__":
    main()
