"""Requests a second through the product, without a model: a stored turn over REST, the stateless
OpenAI route, a turn over WebSocket.

    python -m tests.load.throughput [--json] [--processes 2] [--clients 16] [--seconds 10]
                                    [--reviewed] [--database postgres://user:password@host/name]

A server of its own with the echo backend (or a reviewed answer) and no rate limit; clients share
the machine with it and are plain sockets that keep their connection, so that little of its time is
theirs. Every client is a user with a token and conversations of its own; the one on a socket pauses
between turns, as a socket takes few frames a second. ``per_s`` counts what was answered, ``failed``
what was refused. ``server_ms`` is the server's own processor time a request, ``client_ms`` that of
all clients.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant.benchmark import stack

TICKS = os.sysconf("SC_CLK_TCK")
#: One question each time: what is measured is the way, not the answer.
QUESTION = "where is my parcel"
#: How many turns a conversation gets before the next: histories stay short, as people's are.
TURNS = 10
SOCKET_PAUSE_S = 0.25
PREPARE = """
import json, sys
from django.contrib.auth.models import User
from conversations.models import Conversation
from conversations.tokens import issue
from fallback.models import ReviewedAnswer
for question in {reviewed}:
    ReviewedAnswer.objects.create(question=question, answer=question)
told = []
for at in range({users}):
    user = User.objects.create(username=f"load-{{at}}")
    rows = [Conversation(user=user) for _ in range({conversations})]
    Conversation.objects.bulk_create(rows)
    told.append([issue(user, "load", ["read", "chat"]), [str(row.pk) for row in rows]])
print(json.dumps(told))
"""


@dataclass(frozen=True, slots=True)
class Report:
    """*Units* stand in the names."""

    route: str
    clients: int
    processes: int
    per_s: float
    ms_p50: float
    ms_p99: float
    server_ms: float
    client_ms: float
    failed: int


@dataclass(frozen=True, slots=True)
class User:
    token: str
    conversations: list[str]


class Server(stack.Server):
    """The benchmark's, with several processes and users."""

    def __init__(self, folder: Path, processes: int, **environment: str) -> None:
        super().__init__(folder, ASSISTANT_BACKEND="echo", **environment)
        self._processes = processes

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        if "uvicorn" in arguments and self._processes > 1:
            arguments = (*arguments, "--workers", str(self._processes))
        return super()._start(*arguments)

    def users(self, count: int, conversations: int, reviewed: Sequence[str] = ()) -> list[User]:
        """``reviewed``: questions that staff have answered."""
        code = PREPARE.format(users=count, conversations=conversations, reviewed=list(reviewed))
        made = subprocess.run(
            [sys.executable, "manage.py", "shell", "--no-imports", "-c", code],
            cwd=stack.ROOT, env=self._environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return [User(*one) for one in json.loads(made.stdout.splitlines()[-1])]

    def cpu_s(self) -> float:
        """Processor time of all its processes so far."""
        return sum(_cpu_s(pid) for pid in (self.pid, *_children(self.pid)))


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(one) for one in path.read_text().split()]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# -- one client -----------------------------------------------------------------------------------


def request(path: str, token: str, body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def _rest(user: User, at: int) -> bytes:
    return _asked_in(user.conversations[(at // TURNS) % len(user.conversations)], user)


def _rest_first(user: User, at: int) -> bytes:
    return _asked_in(user.conversations.pop(), user)


def _asked_in(conversation: str, user: User) -> bytes:
    path = f"/api/v1/conversations/{conversation}/messages/"
    return request(path, user.token, {"text": QUESTION})


def _openai(user: User, at: int) -> bytes:
    body = {"model": "local", "messages": [{"role": "user", "content": QUESTION}]}
    return request("/v1/chat/completions", user.token, body)


async def reply(reader: asyncio.StreamReader) -> tuple[int, bytes, bytes]:
    """Status, head in small letters and body of one, read to its end."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    body = b""
    if b"transfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
    else:
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = await reader.readexactly(length)
    return int(head[9:12]), head, body


async def _http(
    server: Server, user: User, asked: Callable[[User, int], bytes], until: float
) -> list[tuple[float, bool]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    found = []
    while (began := time.perf_counter()) < until:
        writer.write(asked(user, len(found)))
        status, _, _ = await reply(reader)
        found.append((time.perf_counter() - began, status in (200, 201)))
    writer.close()
    return found


async def _socket(
    server: Server, user: User, asked: Callable[[User, int], bytes], until: float
) -> list[tuple[float, bool]]:
    import websockets

    found = []
    url = f"ws://127.0.0.1:{server.port}/ws/chat/{user.conversations[0]}/"
    bearer = {"Authorization": f"Bearer {user.token}"}
    async with websockets.connect(url, additional_headers=bearer) as opened:
        while (began := time.perf_counter()) < until:
            await opened.send(json.dumps({"type": "message.create", "text": QUESTION}))
            kind = ""
            while kind not in ("message.completed", "message.failed", "error"):
                kind = json.loads(await opened.recv())["type"]
            found.append((time.perf_counter() - began, kind == "message.completed"))
            await asyncio.sleep(SOCKET_PAUSE_S)
    return found


ROUTES: dict[str, tuple[Any, Any]] = {
    "rest": (_http, _rest),
    "openai": (_http, _openai),
    "websocket": (_socket, _rest),
}


# -- all of them ----------------------------------------------------------------------------------


async def measure(server: Server, route: str, users: Sequence[User], options: Any) -> Report:
    client, asked = ROUTES[route]
    if route == "rest" and options.reviewed:
        asked = _rest_first

    async def all_of(seconds: float) -> list[tuple[float, bool]]:
        until = time.perf_counter() + seconds
        talks = await asyncio.gather(*(client(server, user, asked, until) for user in users))
        return [one for talk in talks for one in talk]

    await all_of(min(3.0, options.seconds))
    server_s, own_s, began = server.cpu_s(), _own_s(), time.perf_counter()
    found = await all_of(options.seconds)
    took = time.perf_counter() - began
    ordered = sorted(seconds for seconds, _ in found)
    return Report(
        route,
        len(users),
        options.processes,
        per_s=round(sum(good for _, good in found) / took, 1),
        ms_p50=round(ordered[len(ordered) // 2] * 1000, 2),
        ms_p99=round(ordered[int(len(ordered) * 0.99)] * 1000, 2),
        server_ms=round((server.cpu_s() - server_s) * 1000 / len(found), 2),
        client_ms=round((_own_s() - own_s) * 1000 / len(found), 2),
        failed=sum(not good for _, good in found),
    )


def _own_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def run(options: Any) -> list[Report]:
    database = {"DATABASE_URL": options.database} if options.database else {}
    reports = []
    with (
        tempfile.TemporaryDirectory(prefix="inhouse-load-") as folder,
        Server(Path(folder), options.processes, **database) as server,
    ):
        # One for each first question, or those that take turns: more than a client gets answered.
        count = round(150 * (options.seconds + 4)) if options.reviewed else 200
        users = server.users(options.clients, count, [QUESTION] * options.reviewed)
        for route in options.routes.split(","):
            few = users[:1] if route == "websocket" else users
            reports.append(await measure(server, route, few, options))
            _say(reports[-1], options)
    return reports


def _say(report: Report, options: Any) -> None:
    if not options.json:
        print(
            f"{report.route:10} {report.processes} processes, {report.clients:3} clients: "
            f"{report.per_s:7.1f}/s  p50 {report.ms_p50:6.2f} ms  p99 {report.ms_p99:7.2f} ms  "
            f"server {report.server_ms:.2f} ms, clients {report.client_ms:.2f} ms a request  "
            f"{report.failed} failed",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument(
        "--reviewed", action="store_true",
        help="staff have answered the question: first questions of a conversation, as theirs are",
    )  # fmt: skip
    parser.add_argument("--routes", default="rest,openai,websocket")
    parser.add_argument("--database", default="", help="default: SQLite in a folder of its own")
    options = parser.parse_args()
    reports = asyncio.run(run(options))
    if options.json:
        print(json.dumps([asdict(report) for report in reports], indent=2))


if __name__ == "__main__":
    main()
