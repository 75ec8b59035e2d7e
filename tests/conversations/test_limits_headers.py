"""Hostile headers, byte by byte, at both servers: a refusal or an ordinary answer, never more.

Replies carry the request's own ``X-Request-ID`` back, so one that arrives although no such header
was sent shows what got into the request by a side door.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from tests.conftest import Server, serving

pytestmark = pytest.mark.django_db(transaction=True)

SMUGGLED = b"X-Request-ID: smuggled"
#: A server that waits for more than was promised is hung up on; it must not have answered twice.
PATIENCE_S = 1.0


def asked(server: Server, request: bytes) -> tuple[list[int], bytes]:
    """The statuses of all replies to these bytes, and the bytes that came back."""
    found = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as client:
        with contextlib.suppress(OSError):  # it may close before it has read everything
            client.sendall(request)
        deadline = time.monotonic() + PATIENCE_S
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline and (part := client.recv(65_536)):
                found += part
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", found)], found


def get(*headers: bytes, target: bytes = b"/livez", host: bytes = b"Host: 127.0.0.1") -> bytes:
    lines = [b"GET " + target + b" HTTP/1.1", host, *headers, b"Connection: close"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def lives(server: Server) -> bool:
    return asked(server, get())[0] == [200]


HIDDEN = b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n" + SMUGGLED + b"\r\n\r\n"
ODD: dict[str, bytes] = {
    "a vertical tab": get(b"X-A: a\x0b" + SMUGGLED),
    "a next-line": get(b"X-A: a\x85" + SMUGGLED),
    "a file separator": get(b"X-A: a\x1c" + SMUGGLED),
    "a NUL": get(b"X-A: a\x00" + SMUGGLED),
    "a bare carriage return": get(b"X-A: a\r" + SMUGGLED),
    "a folded line": get(b"X-A: a\r\n " + SMUGGLED),
    "a space before the colon": get(b"X-Request-ID : smuggled"),
    "an underscore": get(b"X_Request_ID: smuggled"),
    "a nameless header": get(b": " + SMUGGLED),
    "two lengths": (
        b"POST /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\nContent-Length: "
        + str(len(HIDDEN)).encode()
        + b"\r\n\r\n"
        + HIDDEN
    ),
    "a length and chunks": (
        b"POST /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HIDDEN
    ),
    "chunks of a kind": (
        b"POST /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: xchunked\r\n\r\n" + HIDDEN
    ),
    "a negative length": b"POST /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
    "ten thousand equal headers": get(*[b"X-Forwarded-For: 1.2.3.4"] * 10_000),
    "a header of 33 KiB": get(b"X-Forwarded-For: " + b"1" * 33_792),
    "a header of 64 KiB": get(b"X-Forwarded-For: " + b"1" * 65_536),
    "a handshake with a header of 33 KiB": get(
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        b"Cookie: a=" + b"1" * 33_792,
        target=b"/ws/chat/7e57ed00-0000-4000-8000-000000000000/",
    ),
    "an absolute address": get(target=b"http://evil.example/livez"),
    "two hosts": get(b"Host: evil.example"),
    "another's host": get(host=b"Host: evil.example"),
    "no host": get(host=b"X-A: a"),
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500 + b"\r\n\r\n",
}
#: Legal, or harmless to everyone: the request goes through as if that header were not there.
ORDINARY = {"a next-line", "a folded line", "an underscore", "an absolute address", "no host"}


@pytest.mark.parametrize("name", ODD)
def test_a_hostile_header_is_refused_or_means_nothing(server: Server, name: str) -> None:
    began = time.monotonic()
    statuses, reply = asked(server, ODD[name])
    assert time.monotonic() - began < 3 * PATIENCE_S
    assert b"smuggled" not in reply.lower()
    ordinary = [200] if name in ORDINARY else []
    assert len(statuses) <= 1, reply
    assert all(400 <= status < 500 or status in ordinary for status in statuses), reply
    assert lives(server)


def test_a_refused_host_is_one_line_in_the_log_without_its_name(server: Server) -> None:
    before = len(server.log.read_bytes())
    assert asked(server, get(host=b"Host: a-name-nobody-serves.example"))[0] == [400]
    line = "A request was refused as malformed."
    added = server.log.read_text()[before:]
    assert line in added and "Traceback" not in added and "a-name-nobody" not in added


@pytest.fixture
def path(server: Server, ana: User, token_of: Any) -> Any:
    token = token_of(ana)

    def post(body: bytes, *headers: bytes) -> bytes:
        lines = [
            b"POST /api/v1/conversations/ HTTP/1.1",
            b"Host: 127.0.0.1",
            f"Authorization: Bearer {token}".encode(),
            f"Content-Length: {len(body)}".encode(),
            b"Connection: close",
            *headers,
        ]
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    return post


JSON = b"Content-Type: application/json"
BODY = json.dumps({"title": "hi"}).encode()
BOMB = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\x00" * 40_000


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (201, BODY, [JSON]),
        (201, BODY, [JSON, b"X-Forwarded-For: nonsense, \xff\xfe, [::1]:80"]),
        (201, BODY, [JSON, b"X-Forwarded-For: " + b"1.2.3.4, " * 1_000]),
        (201, BODY, [JSON, b"X-HTTP-Method-Override: DELETE"]),
        (415, BODY, [b"Content-Type: text/plain"]),
        (415, BODY, [b"Content-Type: \xff/\xfe"]),
        (400, BOMB, [JSON, b"Content-Encoding: gzip"]),
        (400, BODY.decode().encode("utf-16"), [JSON + b"; charset=utf-16"]),
        (401, BODY, [JSON, b"Authorization: Bearer other"]),
        (400, BODY, [JSON, b"Host: evil.example"]),
    ],
)
def test_odd_headers_get_their_own_answer_and_never_a_crash(
    server: Server, path: Any, status: int, body: bytes, headers: list[bytes]
) -> None:
    statuses, reply = asked(server, path(body, *headers))
    assert statuses == [status], reply
    assert b"Traceback" not in reply


# --- Who it comes from ---------------------------------------------------------------------------

LIMIT = 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uvicorn", "daphne"])
def test_no_server_believes_who_a_header_says_it_is(
    name: str, django_db_setup: None, database_file: Path, tmp_path: Path
) -> None:
    """Nobody is behind a proxy here: on this host anybody may say what they like."""
    with serving(name, database_file, tmp_path, ASSISTANT_LOGIN_RATE=f"{LIMIT}/m") as server:
        tries = [_signed_in(server, f"198.51.100.{n}" if n % 2 else f"x{n}") for n in range(9)]
    assert tries == [200] * LIMIT + [429] * (9 - LIMIT)


def _signed_in(server: Server, forged: str) -> int:
    """The status of a try to sign in by nobody we know."""
    token = "x" * 32
    form = {"username": "nobody", "password": "wrong", "csrfmiddlewaretoken": token}
    headers = {"Cookie": f"csrftoken={token}", "X-Forwarded-For": forged}
    body = urllib.parse.urlencode(form).encode()
    asked = urllib.request.Request(f"{server.http}/accounts/login/", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=30) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as refused:
        return refused.code
