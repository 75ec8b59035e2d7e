"""The WebSocket, spoken to through channels' own communicator: frames, refusals, stop, resume."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import User

from config.asgi import application
from conversations import turn
from conversations.consumers import ChatConsumer
from conversations.models import Conversation, Message
from conversations.running import running
from fallback.models import Rule

pytestmark = pytest.mark.django_db(transaction=True)


class Chat:
    """A browser's side of one socket."""

    def __init__(self, conversation: Any, cookie: str, origin: str = "http://testserver") -> None:
        headers = [(b"host", b"testserver"), (b"cookie", f"sessionid={cookie}".encode())]
        if origin:
            headers.append((b"origin", origin.encode()))
        path = f"/ws/chat/{getattr(conversation, 'pk', conversation)}/"
        self.socket = WebsocketCommunicator(application, path, headers=headers)

    async def __aenter__(self) -> Chat:
        connected, _ = await self.socket.connect()
        assert connected
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.socket.disconnect()

    async def send(self, **frame: Any) -> None:
        await self.socket.send_to(text_data=json.dumps(frame))

    async def next(self, within_s: float = 3) -> dict[str, Any]:
        return json.loads(await self.socket.receive_from(within_s))

    async def until(self, *types: str) -> list[dict[str, Any]]:
        frames = [await self.next()]
        while frames[-1]["type"] not in types:
            frames.append(await self.next())
        return frames

    async def closed(self) -> int:
        return (await self.socket.receive_output(3))["code"]


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return cookie_of(ana)


ENDS = ("message.completed", "message.failed", "error")


async def test_an_answer_arrives_as_created_deltas_completed(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.02 one two three four", ref="r1")
        frames = await chat.until(*ENDS)
    created, *deltas, completed = frames
    assert created["type"] == "message.created" and created["ref"] == "r1"
    assert created["user_message"]["text"].endswith("one two three four")
    assert created["message"]["status"] == "streaming" and created["message"]["text"] == ""
    assert created["conversation"]["id"] == str(conversation.pk)
    assert [frame["type"] for frame in deltas] == ["message.delta"] * len(deltas)
    assert len(deltas) >= 2
    assert "".join(frame["text"] for frame in deltas) == "one two three four"
    assert completed["message"]["text"] == "one two three four"
    assert completed["message"]["status"] == "complete"
    assert completed["message"]["html"] == "<p>one two three four</p>\n"
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))


async def test_stop_acts_at_once_and_keeps_what_was_written(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.05 words=200 word")
        await chat.next()
        await chat.next()
        began = asyncio.get_running_loop().time()
        await chat.send(type="message.cancel")
        frames = await chat.until(*ENDS)
        assert asyncio.get_running_loop().time() - began < 0.5
    message = frames[-1]["message"]
    assert frames[-1]["type"] == "message.completed"
    assert (message["status"], message["finish_reason"]) == ("stopped", "cancelled")
    assert message["text"].startswith("word")
    stored = await Message.objects.aget(pk=message["id"])
    assert (stored.status, stored.text) == ("stopped", message["text"])


async def test_stop_with_nothing_running_is_no_error(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.cancel")
        await chat.send(type="message.cancel")
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}


async def test_pings_are_answered_while_an_answer_streams(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.5 words=20 word")
        await chat.until("message.delta")
        await chat.send(type="ping")
        assert (await chat.next(0.4))["type"] == "pong"


async def test_a_second_question_while_one_is_answered_is_refused_and_not_stored(
    conversation, cookie
):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.1 words=50 word")
        await chat.until("message.delta")
        await chat.send(type="message.create", text="another", ref="second")
        frames = await chat.until("error")
        assert frames[-1]["error"]["code"] == "conflict"
        assert frames[-1]["ref"] == "second"
        assert await conversation.messages.acount() == 2
        await chat.send(type="message.cancel")
        await chat.until(*ENDS)


async def test_two_tabs_see_the_same_stream(conversation, cookie):
    async with Chat(conversation, cookie) as first, Chat(conversation, cookie) as second:
        await first.send(type="message.create", text="/echo delay=0.04 words=20 word")
        seen = await first.until("message.delta")
        await second.send(type="message.resume", after_seq=0)
        also_seen = await second.until(*ENDS)
        seen += await first.until(*ENDS)
    for frame in (seen[0], also_seen[0]):
        assert frame.pop("ref") is None
    assert also_seen == seen


async def test_resuming_after_a_number_sends_only_what_came_later(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.04 words=20 word")
        seen = [await chat.next() for _ in range(4)]
        async with Chat(conversation, cookie) as again:
            await again.send(type="message.resume", after_seq=4)
            rest = await again.until(*ENDS)
    assert rest[0]["seq"] == 5
    text = "".join(frame.get("text", "") for frame in [*seen, *rest])
    assert text == rest[-1]["message"]["text"] == " ".join(["word"] * 20)


async def test_resuming_after_the_end_tells_how_it_ended(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="hello there")
        ended = (await chat.until(*ENDS))[-1]
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.resume", after_seq=2)
        told = await chat.next()
    assert told["type"] == "message.completed"
    assert told["message"] == ended["message"]


async def test_resuming_where_nothing_was_asked_is_a_typed_error(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.resume", after_seq=0, ref="x")
        told = await chat.next()
    assert (told["type"], told["error"]["code"], told["ref"]) == ("error", "not_found", "x")


async def test_an_answer_that_breaks_off_says_so_and_can_be_tried_again(
    conversation, cookie, monkeypatch
):
    async with Chat(conversation, cookie) as chat:
        monkeypatch.setattr(turn, "MAX_ANSWER_CHARS", 6)
        await chat.send(type="message.create", text="/echo delay=0.05 one two three")
        failed = (await chat.until(*ENDS))[-1]
        assert failed["type"] == "message.failed"
        assert failed["error"]["code"] == failed["message"]["error"]["code"] == "generation_failed"
        assert (failed["message"]["status"], failed["message"]["text"]) == ("failed", "one two")
        monkeypatch.undo()
        await Message.objects.filter(role="user").aupdate(text="one two three")
        await chat.send(type="message.retry", id=failed["message"]["id"], ref="again")
        created, *_, completed = await chat.until(*ENDS)
    assert created["user_message"] is None and created["ref"] == "again"
    assert created["message"]["id"] == completed["message"]["id"] == failed["message"]["id"]
    assert completed["message"]["text"] == "one two three"
    assert completed["message"]["error"] is None
    assert await conversation.messages.acount() == 2


async def test_a_complete_answer_or_another_conversations_cannot_be_tried_again(
    conversation, cookie, ana
):
    elsewhere = await Conversation.objects.acreate(user=ana)
    other = await elsewhere.messages.acreate(seq=1, role="assistant", status="failed")
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="hello")
        done = (await chat.until(*ENDS))[-1]["message"]["id"]
        await chat.send(type="message.retry", id=done)
        assert (await chat.next())["error"]["code"] == "invalid_request"
        await chat.send(type="message.retry", id=str(other.pk))
        assert (await chat.next())["error"]["code"] == "not_found"


BAD_FRAMES = {
    "not JSON": "hello",
    "empty": "",
    "a list": "[]",
    "a number": "5",
    "null": "null",
    "no type": "{}",
    "unknown type": '{"type": "message.destroy"}',
    "number as type": '{"type": 5}',
    "list as type": '{"type": ["ping"]}',
    "number as text": '{"type": "message.create", "text": 5}',
    "no text": '{"type": "message.create"}',
    "only spaces": '{"type": "message.create", "text": "  \\n "}',
    "NUL": '{"type": "message.create", "text": "a\\u0000b"}',
    "lone surrogate": '{"type": "message.create", "text": "\\ud800"}',
    "escape sequence": '{"type": "message.create", "text": "\\u001b[31m"}',
    "too long": json.dumps({"type": "message.create", "text": "x" * 4001}),
    "frame too large": json.dumps({"type": "message.create", "text": "x" * 16_400}),
    "deeply nested": "[" * 16_000,
    "NaN": '{"type": "message.resume", "after_seq": NaN}',
    "huge number": '{"type": "message.resume", "after_seq": ' + "9" * 5000 + "}",
    "negative": '{"type": "message.resume", "after_seq": -1}',
    "true as number": '{"type": "message.resume", "after_seq": true}',
    "retry without id": '{"type": "message.retry"}',
    "retry of no id": '{"type": "message.retry", "id": "../../x"}',
    "object as ref": '{"type": "ping", "ref": {}}',
}


@pytest.mark.parametrize("data", BAD_FRAMES.values(), ids=BAD_FRAMES)
async def test_a_bad_frame_gets_a_typed_error_and_the_socket_lives(
    data, conversation, cookie, caplog
):
    async with Chat(conversation, cookie) as chat:
        await chat.socket.send_input({"type": "websocket.receive", "text": data})
        told = await chat.next()
        assert told["type"] == "error"
        assert told["error"]["code"] in {"invalid_request", "context_too_long"}
        assert told["error"]["message"]
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
    assert await Message.objects.acount() == 0
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_binary_frame_gets_a_typed_error(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.socket.send_to(bytes_data=b"\xff\x00")
        assert (await chat.next())["error"]["code"] == "invalid_request"


async def test_a_flood_of_frames_closes_only_that_socket(conversation, cookie):
    async with Chat(conversation, cookie) as quiet:
        flood = Chat(conversation, cookie)
        await flood.socket.connect()
        for _ in range(200):
            flood.socket.input_queue.put_nowait({"type": "websocket.receive", "text": "x" * 900})
        codes = []
        while not codes:
            output = await flood.socket.receive_output(3)
            if output["type"] == "websocket.close":
                codes.append(output["code"])
        await flood.socket.disconnect()
        await quiet.send(type="ping")
        assert await quiet.next() == {"type": "pong"}
    assert codes == [4429]


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "https://testserver",
        "http://testserver:8080",
        "http://testserver.evil.com",
        "http://eviltestserver",
        "http://evil@testserver",
        "http://TESTSERVER",
        "http://testserver.",
        "http://[::1]",
        "http://xn--tstserver-xya",
    ],
)
async def test_a_page_of_another_origin_cannot_open_a_socket(origin, conversation, cookie):
    connected, _ = await Chat(conversation, cookie, origin).socket.connect()
    assert not connected


async def test_an_unknown_session_is_closed_with_4401(conversation):
    async with Chat(conversation, "nonsense") as chat:
        assert await chat.closed() == 4401


async def test_a_foreign_or_unknown_conversation_is_closed_with_4404(conversation, ben, cookie_of):
    cookie = await sync_to_async(cookie_of)(ben)
    for identity in (conversation, "00000000-0000-4000-8000-000000000000"):
        async with Chat(identity, cookie) as chat:
            assert await chat.closed() == 4404


@pytest.mark.parametrize("event", ["logged out", "deactivated"])
async def test_a_login_that_ended_cannot_send_on_an_open_socket(event, conversation, cookie, ana):
    from django.contrib.sessions.models import Session

    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        if event == "logged out":
            await Session.objects.all().adelete()
        else:
            await User.objects.filter(pk=ana.pk).aupdate(is_active=False)
        await chat.send(type="message.create", text="still me?")
        assert await chat.closed() == 4401
    assert await Message.objects.acount() == 0


async def test_an_api_client_opens_a_socket_with_its_token(conversation, ana, token_of):
    token = await sync_to_async(token_of)(ana)
    headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
    socket = WebsocketCommunicator(application, f"/ws/chat/{conversation.pk}/", headers=headers)
    assert (await socket.connect())[0]
    await socket.send_to(text_data='{"type": "ping"}')
    assert json.loads(await socket.receive_from()) == {"type": "pong"}
    await socket.disconnect()


async def test_a_rule_speaks_the_language_of_the_browser(conversation, ana, cookie_of):
    for at, language in enumerate(("de", "en")):
        await Rule.objects.acreate(
            name=language,
            language=language,
            patterns=["merci"],
            answer=f"In {language}.",
            priority=at,
        )
    cookie = await sync_to_async(cookie_of)(ana)
    for read, answer in ((b"de-AT,de;q=0.9,en;q=0.5", "In de."), (b"en", "In en.")):
        chat = Chat(conversation, cookie)
        chat.socket.scope["headers"].append((b"accept-language", read))
        async with chat:
            await chat.send(type="message.create", text="/echo fail=unavailable merci")
            told = await chat.until("message.completed", "message.failed")
        assert told[-1]["message"]["text"] == answer


@pytest.mark.parametrize("given", [b"req-7", b"no\tid", b""])
async def test_an_answer_is_told_with_the_id_of_its_handshake(given, conversation, ana, token_of):
    ids = []

    def hear(*, record: turn.TurnRecord, **_: Any) -> None:
        ids.append(record.request_id)

    turn.turn_finished.connect(hear)
    token = await sync_to_async(token_of)(ana)
    headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
    path = f"/ws/chat/{conversation.pk}/"
    socket = WebsocketCommunicator(application, path, headers=[*headers, (b"x-request-id", given)])
    assert (await socket.connect())[0]
    await socket.send_to(text_data='{"type": "message.create", "text": "hello"}')
    while json.loads(await socket.receive_from(3))["type"] not in ENDS:
        pass
    await socket.disconnect()
    turn.turn_finished.disconnect(hear)
    (name,) = ids
    assert name == "req-7" if given == b"req-7" else len(name) == 32


@pytest.mark.parametrize("header", ["Bearer nonsense", "Bearer", "Basic YTpi", "Bearer \xff\xfe"])
async def test_a_bad_token_is_closed_with_4401(header, conversation):
    headers = [(b"host", b"testserver"), (b"authorization", header.encode("latin-1"))]
    socket = WebsocketCommunicator(application, f"/ws/chat/{conversation.pk}/", headers=headers)
    await socket.connect()
    assert (await socket.receive_output(3))["code"] == 4401
    await socket.disconnect()


async def test_a_caller_may_not_open_sockets_without_end(conversation, cookie, settings):
    settings.ASSISTANT_MAX_SOCKETS_PER_CALLER = 2
    async with Chat(conversation, cookie) as one, Chat(conversation, cookie) as two:
        for chat in (one, two):
            await chat.send(type="ping")
            await chat.next()
        async with Chat(conversation, cookie) as third:
            assert await third.closed() == 4429
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}


async def test_a_client_that_vanishes_stops_its_answer_which_is_kept(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.05 words=200 word")
        await chat.until("message.delta")
    message = await ended(conversation)
    assert message.status == "interrupted"
    assert message.text.startswith("word") and len(message.text.split()) < 30


async def test_leaving_waits_for_the_answer_to_be_stored_even_if_a_send_failed_first(
    conversation, cookie, monkeypatch, settings
):
    """A server that stops closes its sockets, and ends as soon as their handlers have returned."""
    settings.ASSISTANT = {**settings.ASSISTANT, "ABANDON_GRACE_S": 0.3}
    failed = asyncio.Event()

    async def fail(*_: Any, **__: Any) -> None:
        failed.set()
        raise OSError

    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.05 words=200 word")
        await chat.until("message.delta")
        monkeypatch.setattr(ChatConsumer, "send", fail)
        await asyncio.wait_for(failed.wait(), 3)
    message = await conversation.messages.aget(role="assistant")
    assert message.status == "interrupted" and message.text.startswith("word")


async def test_an_answer_another_tab_still_reads_goes_on(conversation, cookie):
    async with Chat(conversation, cookie) as stays:
        async with Chat(conversation, cookie) as goes:
            await goes.send(type="message.create", text="/echo delay=0.02 words=20 word")
            await goes.until("message.delta")
            await stays.send(type="message.resume", after_seq=0)
            await stays.next()
        assert (await stays.until(*ENDS))[-1]["message"]["status"] == "complete"


async def test_a_client_that_leaves_with_its_question_leaves_no_running_answer(
    conversation, cookie
):
    chat = Chat(conversation, cookie)
    await chat.socket.connect()
    await chat.send(type="message.create", text="/echo delay=1 words=100 word")
    await chat.socket.disconnect()
    await asyncio.sleep(0.3)  # never acknowledged: stored or not, but nothing runs on
    assert not await conversation.messages.filter(status="streaming").aexists()
    assert running.get(conversation.pk) is None


async def ended(conversation: Conversation, within_s: float = 2) -> Message:
    """The last answer, once it has ended."""
    message = None
    for _ in range(int(within_s / 0.02)):
        message = await conversation.messages.filter(role="assistant").order_by("-seq").afirst()
        if message is not None and message.status != "streaming":
            return message
        await asyncio.sleep(0.02)
    raise AssertionError(f"still not ended: {message and message.status}")
