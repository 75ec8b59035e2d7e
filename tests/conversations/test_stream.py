"""Server-sent events through the ASGI application itself: headers, events, hang-ups, slow readers.

``send`` is the test's own here, so it can block the way a full socket does.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import User
from django.test import AsyncClient

from config.asgi import application
from conversations import consumers, turn, wire
from conversations.models import Conversation, Message
from fallback.router import INTERRUPTED

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def token(ana: User, token_of: Any) -> str:
    return token_of(ana)


def path_of(conversation: Conversation) -> str:
    return f"/api/v1/conversations/{conversation.pk}/messages/"


async def ask(conversation: Conversation, token: str, text: str, accept: str = "") -> Any:
    body: dict[str, Any] = {"text": text} if accept else {"text": text, "stream": True}
    headers = {"Authorization": f"Bearer {token}", "Accept": accept or "application/json"}
    return await AsyncClient().post(
        path_of(conversation), json.dumps(body), "application/json", headers=headers
    )


async def events_of(reply: Any) -> list[dict[str, Any]]:
    raw = b"".join([part async for part in reply.streaming_content]).decode()
    events = []
    for block in raw.removesuffix("\n\n").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = json.loads(fields["data"])
        assert fields["event"] == data["type"]
        assert int(fields["id"]) == data["seq"]
        events.append(data)
    return events


@pytest.mark.parametrize("accept", ["", "text/event-stream"])
async def test_an_answer_is_streamed_with_the_headers_proxies_need(conversation, token, accept):
    reply = await ask(conversation, token, "/echo delay=0.02 one two three", accept)
    assert reply.status_code == 200
    assert reply["Content-Type"] == "text/event-stream"
    assert reply["Cache-Control"] == "no-cache"
    assert reply["X-Accel-Buffering"] == "no"
    created, *deltas, completed = await events_of(reply)
    assert created["type"] == "message.created" and created["user_message"]["seq"] == 1
    assert "".join(delta["text"] for delta in deltas) == "one two three"
    assert completed["message"]["text"] == "one two three"


async def test_text_cannot_forge_an_event(conversation, token):
    evil = "a\n\nevent:\u00a0done\ndata:\u00a0{}\n\n\u2028id:\u00a09\r\n\r\nend"
    reply = await ask(conversation, token, evil)
    types = [event["type"] for event in await events_of(reply)]
    assert set(types) == {"message.created", "message.delta", "message.completed"}


async def test_a_failure_after_the_first_delta_is_an_event(conversation, token, monkeypatch):
    monkeypatch.setattr(turn, "MAX_ANSWER_CHARS", 3)
    *_, failed = await events_of(await ask(conversation, token, "/echo delay=0.05 one two"))
    assert failed["type"] == "message.failed"
    assert failed["error"]["code"] == "generation_failed"
    assert failed["message"]["text"].startswith("one")


async def test_a_model_that_breaks_after_its_first_words_is_continued(conversation, token):
    *_, ended = await events_of(await ask(conversation, token, "/echo error=1 one two"))
    assert ended["type"] == "message.completed"
    broken, _, sure = ended["message"]["text"].partition(INTERRUPTED)
    assert broken == "one" and "support team" in sure
    assert (ended["message"]["route"], ended["message"]["degraded_reason"]) == ("human", "error")


async def test_a_refused_question_is_a_problem_before_any_byte_of_a_stream(conversation, token):
    reply = await ask(conversation, token, "  ", "text/event-stream")
    assert reply.status_code == 400
    assert reply["Content-Type"] == "application/problem+json"


async def test_a_quiet_stream_sends_a_comment(conversation, token, monkeypatch):
    monkeypatch.setattr(wire, "KEEP_ALIVE_S", 0.05)
    reply = await ask(conversation, token, "/echo first=0.3 one")
    parts = [part async for part in reply.streaming_content]
    assert parts.count(b": keep-alive\n\n") >= 3
    assert parts[-1].startswith(b"event: message.completed")


class Hangup:
    """An HTTP client at ASGI level that takes ``parts`` messages, then blocks or leaves."""

    def __init__(self, conversation: Conversation, token: str, text: str, **body: Any) -> None:
        self.body = json.dumps({"text": text, **body}).encode()
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.takes: int | None = None
        self.blocked = asyncio.Event()
        self.scope = {
            "type": "http",
            "http_version": "1.1",
            "method": "POST",
            "path": path_of(conversation),
            "raw_path": path_of(conversation).encode(),
            "query_string": b"",
            "scheme": "http",
            "server": ("testserver", 80),
            "client": ("192.0.2.7", 1),
            "headers": [
                (b"host", b"testserver"),
                (b"content-type", b"application/json"),
                (b"content-length", str(len(self.body)).encode()),
                (b"authorization", f"Bearer {token}".encode()),
            ],
        }
        self._asked = False

    async def receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if self.takes is not None and len(self.sent) > self.takes:
            self.blocked.set()
            await asyncio.Event().wait()

    def run(self) -> asyncio.Task[None]:
        return asyncio.create_task(application(self.scope, self.receive, self.send))


async def ended(conversation: Conversation) -> Message:
    for _ in range(100):
        message = await conversation.messages.filter(role="assistant").afirst()
        if message is not None and message.status != "streaming":
            return message
        await asyncio.sleep(0.02)
    raise AssertionError("the answer does not end")


LONG = "/echo delay=0.05 words=400 word"


async def test_hanging_up_while_reading_stops_the_answer(conversation, token):
    client = Hangup(conversation, token, LONG, stream=True)
    task = client.run()
    async with asyncio.timeout(3):
        while len(client.sent) < 4:  # noqa: ASYNC110 - headers, created and two deltas
            await asyncio.sleep(0.01)
    client.gone.set()
    message = await ended(conversation)
    assert message.status == "interrupted" and message.text.startswith("word")
    await asyncio.wait_for(task, 2)


async def test_hanging_up_while_the_server_is_blocked_in_send_stops_the_answer(conversation, token):
    client = Hangup(conversation, token, LONG, stream=True)
    client.takes = 3
    task = client.run()
    await asyncio.wait_for(client.blocked.wait(), 3)
    client.gone.set()
    assert (await ended(conversation)).status == "interrupted"
    await asyncio.wait_for(task, 2)


async def test_hanging_up_while_waiting_for_the_whole_answer_stops_it(conversation, token):
    client = Hangup(conversation, token, LONG)
    task = client.run()
    async with asyncio.timeout(3):
        while not await conversation.messages.aexists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)
    client.gone.set()
    assert (await ended(conversation)).status == "interrupted"
    await asyncio.wait_for(task, 2)


async def test_a_reader_that_takes_nothing_stops_its_answer_and_harms_nobody(
    conversation, ana, token, monkeypatch
):
    monkeypatch.setattr(consumers, "SEND_TIMEOUT_S", 0.3)
    headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
    elsewhere = await Conversation.objects.acreate(user=ana)

    def socket_on(at: Conversation) -> WebsocketCommunicator:
        return WebsocketCommunicator(application, f"/ws/chat/{at.pk}/", headers=headers)

    stuck, lively = socket_on(conversation), socket_on(elsewhere)
    blocked = asyncio.Event()

    async def refuse(text_data: str | None = None, **_: Any) -> None:
        blocked.set()
        await asyncio.Event().wait()

    for socket in (stuck, lively):
        assert (await socket.connect())[0]
    with monkeypatch.context() as patched:
        send = consumers.ChatConsumer.send

        async def maybe(self: Any, *args: Any, **kwargs: Any) -> None:
            here = self._conversation_id == conversation.pk
            await (refuse if here else send.__get__(self))(*args, **kwargs)

        patched.setattr(consumers.ChatConsumer, "send", maybe)
        await stuck.send_to(text_data=json.dumps({"type": "message.create", "text": LONG}))
        await asyncio.wait_for(blocked.wait(), 3)
        await lively.send_to(text_data='{"type": "message.create", "text": "hello"}')
        frames = [json.loads(await lively.receive_from(3)) for _ in range(3)]
        assert frames[-1]["message"]["text"] == "hello"
        assert (await ended(conversation)).status == "interrupted"
    for socket in (stuck, lively):
        await socket.disconnect()


async def test_a_socket_that_reads_nothing_is_closed_before_it_fills_the_memory(
    conversation, token, monkeypatch
):
    monkeypatch.setattr(consumers, "OUTBOX_BYTES", 2_000)
    monkeypatch.setattr(consumers.ChatConsumer, "send", lambda *a, **k: asyncio.Event().wait())
    headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
    socket = WebsocketCommunicator(application, f"/ws/chat/{conversation.pk}/", headers=headers)
    await socket.connect()
    for _ in range(60):
        await socket.send_to(text_data='{"type": "nonsense"}')
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)
    assert (await socket.receive_output(3)) == {"type": "websocket.close", "code": 4429}
    await socket.disconnect()


async def test_a_stream_is_stopped_through_rest(conversation, token):
    reply = await ask(conversation, token, LONG)
    content = aiter(reply.streaming_content)
    created = json.loads((await anext(content)).decode().split("data: ")[1])
    await anext(content)
    stopping = await sync_to_async(_cancel)(created["message"]["id"], token)
    rest = [part async for part in content]
    assert stopping == 202
    last = json.loads(rest[-1].decode().split("data: ")[1])
    assert (last["type"], last["message"]["status"]) == ("message.completed", "stopped")


def _cancel(identity: str, token: str) -> int:
    from django.test import Client

    headers = {"Authorization": f"Bearer {token}"}
    return Client(headers=headers).post(f"/api/v1/messages/{identity}/cancel/").status_code
