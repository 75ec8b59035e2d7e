"""The same promises on real servers: uvicorn and daphne, each a process, with a real client."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import websockets
from django.contrib.auth.models import User
from websockets.asyncio.client import ClientConnection, connect

from conversations.models import ALIVE_EVERY_S, Conversation, Message
from tests.conftest import Server, serving

pytestmark = pytest.mark.django_db(transaction=True)

LONG = "/echo delay=0.05 words=600 word"
ENDS = ("message.completed", "message.failed")


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return cookie_of(ana)


@pytest.fixture
def token(ana: User, token_of: Any) -> str:
    return token_of(ana)


def chat(server: Server, conversation: Conversation, cookie: str, **kwargs: Any) -> connect:
    headers = {"Cookie": f"sessionid={cookie}"}
    url = f"{server.ws}/ws/chat/{conversation.pk}/"
    return connect(url, additional_headers=headers, origin=server.http, **kwargs)


async def say(client: ClientConnection, **frame: Any) -> None:
    await client.send(json.dumps(frame))


async def until(client: ClientConnection, *types: str) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = []
    async with asyncio.timeout(5):
        while not frames or frames[-1]["type"] not in types:
            frames.append(json.loads(await client.recv()))
    return frames


async def ended(conversation: Conversation, within_s: float = 1.5) -> Message:
    for _ in range(int(within_s / 0.02)):
        message = await conversation.messages.filter(role="assistant").afirst()
        if message is not None and message.status != "streaming":
            return message
        await asyncio.sleep(0.02)
    raise AssertionError("the answer does not end")


def post(conversation: Conversation, token: str, text: str) -> bytes:
    body = json.dumps({"text": text, "stream": True}).encode()
    return (
        f"POST /api/v1/conversations/{conversation.pk}/messages/ HTTP/1.1\r\n"
        f"Host: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


async def test_an_answer_streams_and_stop_acts_within_a_moment(server, conversation, cookie):
    async with chat(server, conversation, cookie) as client:
        await say(client, type="message.create", text="hello there")
        frames = await until(client, *ENDS)
        assert frames[-1]["message"]["text"] == "hello there"
        await say(client, type="message.create", text=LONG)
        await until(client, "message.delta")
        began = time.monotonic()
        await say(client, type="message.cancel")
        frames = await until(client, *ENDS)
        assert time.monotonic() - began < 0.5
        assert frames[-1]["message"]["status"] == "stopped"


async def test_a_client_that_aborts_frees_its_slot_and_keeps_its_text(server, conversation, cookie):
    client = await chat(server, conversation, cookie)
    await say(client, type="message.create", text=LONG)
    await until(client, "message.delta")
    client.transport.abort()
    message = await ended(conversation)
    assert message.status == "interrupted" and 0 < len(message.text.split()) < 40


@pytest.mark.slow
async def test_a_client_comes_back_and_misses_nothing(server, conversation, cookie):
    async with chat(server, conversation, cookie) as stays:
        client = await chat(server, conversation, cookie)
        await say(client, type="message.create", text="/echo delay=0.04 words=30 word")
        seen = await until(client, "message.delta")
        await say(stays, type="message.resume", after_seq=0)
        await until(stays, "message.created")
        client.transport.abort()
        await asyncio.sleep(0.2)
        async with chat(server, conversation, cookie) as again:
            await say(again, type="message.resume", after_seq=seen[-1]["seq"])
            rest = await until(again, *ENDS)
        await until(stays, *ENDS)
    text = "".join(frame.get("text", "") for frame in [*seen, *rest])
    assert text == rest[-1]["message"]["text"] == " ".join(["word"] * 30)


async def test_events_stream_over_http_and_hanging_up_stops_the_answer(server, conversation, token):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(post(conversation, token, LONG))
    head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).decode().lower()
    assert " 200 " in head and "content-type: text/event-stream" in head
    await asyncio.wait_for(reader.readuntil(b"event: message.delta"), 5)
    assert (await Message.objects.aget(role="assistant")).status == "streaming"
    writer.transport.abort()
    assert (await ended(conversation)).status == "interrupted"


async def test_readers_that_take_nothing_slow_nobody(server, conversation, ana, token, cookie):
    """Eight sockets with the smallest buffer never read; a lively one is timed beside them."""

    def stuck(at: Conversation) -> socket.socket:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(("127.0.0.1", server.port))
        client.sendall(post(at, token, "/echo per=1 words=800 wordwordwordwordword"))
        return client

    held = []
    for _ in range(3):
        at = await Conversation.objects.acreate(user=ana)
        held.append(await asyncio.to_thread(stuck, at))
    async with chat(server, conversation, cookie) as client:
        for _ in range(5):
            began = time.monotonic()
            await say(client, type="message.create", text="hello there")
            await until(client, *ENDS)
            assert time.monotonic() - began < 1
    for each in held:
        each.close()


RAW_FRAMES: dict[str, Any] = {
    "one over the limit": "x" * 16_385,
    "invalid UTF-8": [b"\xff", b"\xfe"],
    "fragments": ['{"type":', ' "ni', 'x"}'],
    "half a character in each fragment": [b"\xe2\x82", b"\xac"],
    "256 KiB": "x" * 262_144,
    "2 MiB": "x" * 2_097_152,
    "a compressible bomb": "\x00" * 15_000_000,
}


@pytest.mark.parametrize("frame", RAW_FRAMES.values(), ids=RAW_FRAMES)
async def test_a_bad_frame_is_answered_or_closed_and_the_server_lives(
    server, conversation, cookie, frame
):
    async with chat(server, conversation, cookie) as client:
        try:
            await client.send(frame, text=True if isinstance(frame, list) else None)
            told = json.loads(await asyncio.wait_for(client.recv(), 5))
            assert told["error"]["code"] == "invalid_request"
        except websockets.ConnectionClosed as closed:
            code = closed.rcvd.code if closed.rcvd else 1006
            assert code in {1002, 1006, 1007, 1009, 4429}  # never 1011: that is a crash
    async with chat(server, conversation, cookie) as client:
        await say(client, type="ping")
        await until(client, "pong")


async def test_ten_thousand_frames_at_once_end_one_socket_only(server, conversation, cookie):
    async with chat(server, conversation, cookie) as quiet:
        async with chat(server, conversation, cookie) as flood:
            with pytest.raises(websockets.ConnectionClosed):
                async with asyncio.timeout(15):
                    for _ in range(10_000):
                        await flood.send("x" * 200)
                    while True:
                        await flood.recv()
        await say(quiet, type="ping")
        await until(quiet, "pong")


@pytest.mark.parametrize("origin", [None, "http://evil.example", "null"])
async def test_a_foreign_page_is_refused_at_the_handshake(server, conversation, cookie, origin):
    url = f"{server.ws}/ws/chat/{conversation.pk}/"
    headers = {"Cookie": f"sessionid={cookie}"}
    with pytest.raises(websockets.InvalidStatus) as refused:
        await connect(url, additional_headers=headers, origin=origin)
    assert refused.value.response.status_code == 403


async def test_a_token_in_the_address_is_no_token(server, conversation, token):
    url = f"{server.ws}/ws/chat/{conversation.pk}/?token={token}"
    async with connect(url, origin=server.http) as client:
        with pytest.raises(websockets.ConnectionClosed) as closed:
            await asyncio.wait_for(client.recv(), 5)
    assert closed.value.rcvd.code == 4401


async def test_the_server_wrote_no_traceback(server, conversation, cookie):
    """Runs beside the others in random order; the log is of the whole session so far."""
    async with chat(server, conversation, cookie) as client:
        await client.send("nonsense")
        await until(client, "error")
    log = server.log.read_text()
    # uvicorn itself logs one for bytes that are not UTF-8, and closes with 1007: not ours to catch.
    own = [trace for trace in log.split("Traceback")[1:] if "UnicodeDecodeError" not in trace]
    assert own == []
    assert "conversations/" not in log.replace("/api/v1/conversations/", "")


@pytest.mark.slow
async def test_a_server_told_to_stop_keeps_what_it_was_writing(
    conversation, cookie, database_file: Path, tmp_path: Path
):
    with serving("uvicorn", database_file, tmp_path) as server:
        client = await chat(server, conversation, cookie)
        await say(client, type="message.create", text=LONG)
        await until(client, "message.delta")
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(websockets.ConnectionClosed) as closed:
            while True:
                await asyncio.wait_for(client.recv(), 10)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012
        message = await ended(conversation, 5)
        assert await asyncio.to_thread(server.process.wait, 10) in {0, -signal.SIGTERM}
    assert message.status == "interrupted" and message.text.startswith("word")


@pytest.mark.slow
async def test_a_server_that_was_killed_left_its_questions_and_what_it_had_written(
    ana, cookie, database_file: Path, tmp_path: Path
):
    talks = [await Conversation.objects.acreate(user=ana) for _ in range(4)]
    with serving("uvicorn", database_file, tmp_path) as server:
        clients = [await chat(server, talk, cookie) for talk in talks]
        for client in clients:
            await say(client, type="message.create", text=LONG)
            await until(client, "message.created")
        await asyncio.sleep(ALIVE_EVERY_S + 1)
        server.process.kill()
        for client in clients:
            with pytest.raises(websockets.ConnectionClosed):
                while True:
                    await asyncio.wait_for(client.recv(), 2)
    with serving("uvicorn", database_file, tmp_path) as server:
        ends = await asyncio.gather(*(_told_how_it_ended(server, talk, cookie) for talk in talks))
    for talk, message in zip(talks, ends, strict=True):
        assert message["status"] == "interrupted" and message["text"].startswith("word")
        rows = [row async for row in talk.messages.order_by("seq").values_list("role", "text")]
        assert rows == [("user", LONG), ("assistant", message["text"])]


async def _told_how_it_ended(
    server: Server, conversation: Conversation, cookie: str
) -> dict[str, Any]:
    """As a page asks that comes back; a writer that gave no sign of life for long is gone."""
    async with chat(server, conversation, cookie) as client, asyncio.timeout(20):
        await say(client, type="message.resume")
        told: dict[str, Any] = {}
        while told.get("type") not in ENDS:
            told = json.loads(await client.recv())
        return dict(told["message"])
