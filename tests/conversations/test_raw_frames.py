"""What no client library would send: bytes on a socket, on real servers. None may crash one."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import struct
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import websockets
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from websockets.asyncio.client import connect

from conversations.models import Conversation, Message
from tests.conftest import Server
from tests.conversations.test_servers import chat, ended, say, until

pytestmark = pytest.mark.django_db(transaction=True)

CONTINUES, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
PING_JSON = b'{"type": "ping"}'


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return str(cookie_of(ana))


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    masked: bool = True,
    claims: int | None = None,
) -> bytes:
    """One frame (RFC 6455, 5.2); ``claims``: a length that may not be the payload's."""
    length = len(payload) if claims is None else claims
    head = bytes([fin << 7 | rsv << 4 | opcode])
    if length < 126:
        head += bytes([masked << 7 | length])
    elif length < 65_536:
        head += bytes([masked << 7 | 126]) + struct.pack("!H", length)
    else:
        head += bytes([masked << 7 | 127]) + struct.pack("!Q", length)
    return head + (bytes(4) + payload if masked else payload)  # a mask of zeros changes nothing


def handshake(server: Server, conversation: Conversation, cookie: str, *more: str) -> bytes:
    lines = [
        f"GET /ws/chat/{conversation.pk}/ HTTP/1.1",
        f"Host: 127.0.0.1:{server.port}",
        f"Cookie: sessionid={cookie}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        "Sec-WebSocket-Version: 13",
        *(more or [f"Origin: {server.http}"]),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


@asynccontextmanager
async def line(server: Server, said: bytes) -> AsyncIterator[tuple[Any, Any]]:
    """A connection on which that was said; it is torn at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(said)
        yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def raw(server: Server, conversation: Conversation, cookie: str) -> AsyncIterator[Any]:
    """The same, once it is a WebSocket."""
    async with line(server, handshake(server, conversation, cookie)) as (reader, writer):
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert b" 101 " in head.split(b"\r\n")[0], head
        yield reader, writer


async def until_closed(reader: asyncio.StreamReader, within_s: float = 8) -> bytes:
    """All that comes until the server hangs up, or says that it will."""
    seen = b""
    with suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(within_s):
            while part := await reader.read(65_536):
                seen += part
    return seen


def over(reader: asyncio.StreamReader) -> bool:
    """Whether the server has hung up; some say so by a reset."""
    return reader.at_eof() or reader.exception() is not None


async def still_serves(server: Server, conversation: Conversation, cookie: str) -> None:
    async with chat(server, conversation, cookie) as client:
        await say(client, type="ping")
        await until(client, "pong")


#: Each breaks a rule of the protocol: the connection ends, at once and not as a crash.
BROKEN: dict[str, bytes] = {
    "an unmasked frame": frame(TEXT, PING_JSON, masked=False),
    "a reserved bit": frame(TEXT, PING_JSON, rsv=2),
    "an unknown opcode": frame(3, PING_JSON),
    "an unknown control opcode": frame(11),
    "a continuation of nothing": frame(CONTINUES, PING_JSON),
    "a new text inside another": frame(TEXT, b"{", fin=False) + frame(TEXT, PING_JSON),
    "a ping in fragments": frame(PING, b"x", fin=False),
    "a ping of 126 bytes": frame(PING, b"x" * 126),
    "a close of one byte": frame(CLOSE, b"\x03"),
    "a close code that is none": frame(CLOSE, struct.pack("!H", 1005)),
    "a close reason that is not UTF-8": frame(CLOSE, struct.pack("!H", 1000) + b"\xff"),
    "text that is not UTF-8": frame(TEXT, b"\xc3\x28"),
    "a length of 2^63": frame(TEXT, PING_JSON, claims=2**63),
    "a length of 1 TiB": frame(TEXT, PING_JSON, claims=2**40),
    "plain HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a close, and more after it": frame(CLOSE, struct.pack("!H", 1000)) + frame(TEXT, PING_JSON),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
async def test_a_broken_frame_ends_that_connection_and_no_other(server, conversation, cookie, data):
    async with chat(server, conversation, cookie) as other:
        async with raw(server, conversation, cookie) as (reader, writer):
            writer.write(data)
            seen = await until_closed(reader)
        assert over(reader) and b"Traceback" not in seen
        assert not seen.startswith(b"\x88") or seen[2:4] != struct.pack("!H", 1011)
        await say(other, type="ping")
        await until(other, "pong")
    await still_serves(server, conversation, cookie)


async def test_control_frames_between_fragments_and_pongs_unasked_are_fine(
    server, conversation, cookie
):
    half = len(PING_JSON) // 2
    async with raw(server, conversation, cookie) as (reader, writer):
        writer.write(frame(PONG, b"x") + frame(TEXT, PING_JSON[:half], fin=False))
        writer.write(frame(PING, b"?") + frame(CONTINUES, PING_JSON[half:]))
        await asyncio.wait_for(reader.readuntil(b'"pong"'), 5)


@pytest.mark.slow
async def test_ten_thousand_fragments_are_one_message_or_the_end(server, conversation, cookie):
    body = PING_JSON.ljust(10_000)
    parts = [frame(CONTINUES, bytes([byte]), fin=False) for byte in body[1:-1]]
    first, last = frame(TEXT, body[:1], fin=False), frame(CONTINUES, body[-1:])
    async with raw(server, conversation, cookie) as (reader, writer):
        writer.write(b"".join([first, *parts, last]))
        seen = await until_closed(reader, 3)
        assert b'"pong"' in seen or over(reader)
    await still_serves(server, conversation, cookie)


@pytest.mark.slow
async def test_ten_thousand_empty_fragments_are_no_message_and_the_end_of_nobody_else(
    server, conversation, cookie
):
    async with raw(server, conversation, cookie) as (reader, writer):
        writer.write(frame(TEXT, fin=False) + frame(CONTINUES, fin=False) * 10_000)
        writer.write(frame(CONTINUES, PING_JSON))
        seen = await until_closed(reader, 3)
        assert b'"pong"' in seen or over(reader)
    await still_serves(server, conversation, cookie)


@pytest.mark.slow
async def test_ten_thousand_frames_in_one_write_end_that_socket_only(server, conversation, cookie):
    async with raw(server, conversation, cookie) as (reader, writer):
        writer.write(frame(TEXT, b"nonsense") * 10_000)
        seen = await until_closed(reader)
        assert struct.pack("!H", 4429) in seen or over(reader)
    await still_serves(server, conversation, cookie)


async def test_a_frame_sent_before_the_handshake_was_answered_breaks_nothing(
    server, conversation, cookie
):
    """Clients must wait (RFC 6455, 4.1); servers may lose what comes before."""
    asks = json.dumps({"type": "message.create", "text": "hello"}).encode()
    said = handshake(server, conversation, cookie) + frame(TEXT, asks)
    async with line(server, said) as (reader, _):
        seen = await until_closed(reader, 1)
        assert b" 101 " in seen and b"error" not in seen
    await still_serves(server, conversation, cookie)
    assert not await conversation.messages.filter(status="streaming").aexists()


async def test_a_question_and_a_close_in_one_packet_leave_nothing_running(
    server, conversation, cookie
):
    asks = json.dumps({"type": "message.create", "text": "/echo delay=0.05 words=600 word"})
    async with raw(server, conversation, cookie) as (reader, writer):
        writer.write(frame(TEXT, asks.encode()) + frame(CLOSE, struct.pack("!H", 1000)))
        await until_closed(reader)
    await asyncio.sleep(1)  # stored or not, as the two raced; but nothing runs on
    assert not await conversation.messages.filter(status="streaming").aexists()
    await still_serves(server, conversation, cookie)


async def test_a_handshake_that_never_ends_and_a_frame_cut_off_hold_nobody_up(
    server, conversation, cookie
):
    whole = handshake(server, conversation, cookie)
    async with AsyncExitStack() as held:
        for number in range(12):
            said = whole[:-2] if number % 2 else whole + frame(TEXT, PING_JSON)[:5]
            await held.enter_async_context(line(server, said))
        began = time.monotonic()
        await still_serves(server, conversation, cookie)
        assert time.monotonic() - began < 5
    await still_serves(server, conversation, cookie)


@pytest.mark.parametrize(
    "more",
    [
        ("Origin: {own}", "Origin: {own}"),
        ("Origin: {own}", "Origin: http://evil.example"),
        ("Origin: http://evil.example", "Origin: {own}"),
        ("Origin: {own}, {own}",),
        ("Origin: {own}", "Host: evil.example"),
    ],
    ids=str,
)
async def test_doubled_headers_open_no_socket(server, conversation, cookie, more):
    said = handshake(server, conversation, cookie, *(each.format(own=server.http) for each in more))
    async with line(server, said) as (reader, _):
        status = (await until_closed(reader, 3)).split(b"\r\n")[0]
    assert status.split(b" ")[1] in {b"400", b"403"}, status


@pytest.mark.parametrize(
    ("was", "instead"),
    [
        (rb"Sec-WebSocket-Key: [^\r]+\r\n", b""),
        (rb"Sec-WebSocket-Key: [^\r]+", b"Sec-WebSocket-Key: short"),
        (rb"Version: 13", b"Version: 99"),
        (rb"Connection: Upgrade", b"Connection: close"),
    ],
    ids=["no key", "no key of 16 bytes", "version 99", "no upgrade"],
)
async def test_a_handshake_that_is_none_opens_no_socket(server, conversation, cookie, was, instead):
    said = re.sub(was, instead, handshake(server, conversation, cookie))
    async with line(server, said) as (reader, _):
        status = (await until_closed(reader, 3)).split(b"\r\n")[0]
    assert status.split(b" ")[1] in {b"400", b"404", b"426"}, status
    await still_serves(server, conversation, cookie)


@pytest.mark.parametrize("login", ["expired", "logged out", "deactivated"])
async def test_a_login_that_ended_opens_no_socket(server, conversation, cookie, login, ana):
    match login:
        case "expired":
            await Session.objects.aupdate(expire_date="2020-01-01T00:00:00Z")
        case "logged out":
            await Session.objects.all().adelete()
        case "deactivated":
            await User.objects.filter(pk=ana.pk).aupdate(is_active=False)
    async with chat(server, conversation, cookie) as client:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401


@pytest.mark.slow
async def test_a_program_with_its_token_in_the_first_frame(server, conversation, ana, token_of):
    token = await sync_to_async(token_of)(ana)
    async with connect(f"{server.ws}/ws/chat/{conversation.pk}/") as client:
        await say(client, type="auth", token=token)
        await say(client, type="message.create", text="/echo delay=0.05 words=600 word")
        await until(client, "message.delta")
        began = time.monotonic()
        await User.objects.filter(pk=ana.pk).aupdate(is_active=False)  # another process than it
        with pytest.raises(websockets.ConnectionClosed) as closed:
            async with asyncio.timeout(8):
                while True:
                    await client.recv()
        assert time.monotonic() - began < 5
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401
    assert (await ended(conversation)).text.startswith("word")


async def test_a_hundred_reconnects_leave_the_server_as_it_was(server, conversation, cookie):
    async def once() -> None:
        async with chat(server, conversation, cookie) as client:
            client.transport.abort()

    for _ in range(5):
        await asyncio.gather(*(once() for _ in range(20)), return_exceptions=True)
    await asyncio.sleep(0.5)
    await still_serves(server, conversation, cookie)
    assert not await Message.objects.aexists()


async def test_none_of_this_was_a_crash(server, conversation, cookie):
    """Runs beside the others in random order; the log is of the whole session so far."""
    await still_serves(server, conversation, cookie)
    ours = [line for line in server.log.read_text().splitlines() if "/conversations/" in line]
    assert not [line for line in ours if line.lstrip(" |").startswith("File ")]
