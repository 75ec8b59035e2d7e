"""A question in a queue: its place on every transport, an answer at once for who will not wait."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.test import AsyncClient, Client

from conversations import running, turn, wire
from conversations.limits import Caller
from conversations.log import Queued
from conversations.models import Conversation, HandOver, Message
from conversations.turn import Turn
from fallback import breaker
from fallback.models import Rule
from tests.conversations.conftest import Api, assert_problem
from tests.conversations.test_socket import ENDS, Chat
from tests.conversations.test_stream import ask, events_of

pytestmark = pytest.mark.django_db(transaction=True)

LINE = "/echo queue=2 place=0.05 hello"
#: Nobody waits for its end.
LONG = "/echo queue=2 place=60 when are you open"


@pytest.fixture
def conversation(ana: User) -> Conversation:
    Rule.objects.create(name="Hours", patterns=["when are you open"], answer="From 9 to 17.")
    return Conversation.objects.create(user=ana)


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return cookie_of(ana)


@pytest.fixture
def token(ana: User, token_of: Any) -> str:
    return token_of(ana)


def hurry_path(identity: Any) -> str:
    return f"/api/v1/messages/{identity}/hurry/"


async def hurry(token: str, identity: Any) -> Any:
    return await sync_to_async(Api(token))("POST", hurry_path(identity))


# -- told ----------------------------------------------------------------------------------------


async def test_a_socket_is_told_the_place_and_the_seconds(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LINE)
        created, *rest = await chat.until(*ENDS)
    told = [frame for frame in rest if frame["type"] == "status"]
    identity = created["message"]["id"]
    assert told == [
        {
            **{"type": "status", "seq": seq, "id": identity, "state": "queued"},
            **{"position": place, "eta_ms": 50 * place},
        }
        for seq, place in ((2, 2), (3, 1))
    ]
    assert [frame["seq"] for frame in (created, *rest)] == list(range(1, len(rest) + 2))
    assert rest[-1]["message"]["text"] == "hello" and rest[-1]["message"]["route"] == "model"


async def test_an_event_stream_is_told_the_same(conversation, token):
    events = await events_of(await ask(conversation, token, LINE))
    assert [event["type"] for event in events[:4]] == [
        *("message.created", "status", "status", "message.delta")
    ]
    assert [event["position"] for event in events[1:3]] == [2, 1]


async def test_another_tab_hears_of_the_place_too(conversation, cookie):
    async with Chat(conversation, cookie) as chat, Chat(conversation, cookie) as tab:
        await chat.send(type="message.create", text=LONG)
        await chat.until("status")
        await tab.send(type="message.resume", after_seq=0)
        assert [frame["type"] for frame in await tab.until("status")] == [
            "message.created", "status"
        ]  # fmt: skip
        await chat.send(type="message.hurry")
        assert (await tab.until(*ENDS))[-1]["message"]["route"] == "rules"


async def test_json_and_the_openai_dialect_have_no_word_for_it(conversation, token):
    api = Api(token)
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    whole = await sync_to_async(api)("POST", path, {"text": LINE})
    assert whole.json()["text"] == "hello"
    body = {"model": "local", "messages": [{"role": "user", "content": LINE}]}
    said = await sync_to_async(api)("POST", "/v1/chat/completions", body)
    assert said.json()["choices"][0]["message"]["content"] == "hello"

    headers = {"Authorization": f"Bearer {token}"}
    reply = await AsyncClient().post(
        "/v1/chat/completions",
        json.dumps({**body, "stream": True}),
        "application/json",
        headers=headers,
    )
    told = b"".join([part async for part in reply.streaming_content]).decode()
    assert "queued" not in told and told.endswith("data: [DONE]\n\n")


# -- answer now ----------------------------------------------------------------------------------


async def test_a_hurry_by_socket_ends_the_waiting(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LONG)
        created, _ = await chat.until("status")
        for _ in range(3):
            await chat.send(type="message.hurry", id=created["message"]["id"])
        ended = (await chat.until(*ENDS))[-1]["message"]
        await chat.send(type="message.hurry")
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}, "it has ended: nothing happens"
    stored = await Message.objects.aget(pk=ended["id"])
    assert (stored.route, stored.degraded_reason) == ("rules", "hurry")
    assert (stored.status, stored.text) == ("complete", "From 9 to 17.")


async def test_a_hurry_by_post_ends_it_too_and_is_said_as_often_as_one_likes(
    conversation, cookie, token
):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LONG)
        identity = (await chat.until("status"))[0]["message"]["id"]
        reply = await hurry(token, identity)
        assert reply.status_code == 202 and reply.json()["id"] == identity
        ended = (await chat.until(*ENDS))[-1]["message"]
    assert (ended["route"], ended["degraded_reason"]) == ("rules", "hurry")
    again = await hurry(token, identity)
    assert again.status_code == 200 and again.json()["text"] == "From 9 to 17."


async def test_nothing_known_means_a_person(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo queue=2 place=60 blue cheese")
        await chat.until("status")
        await chat.send(type="message.hurry")
        ended = (await chat.until(*ENDS))[-1]["message"]
    assert (ended["route"], ended["degraded_reason"]) == ("human", "hurry")
    assert await HandOver.objects.filter(message=ended["id"]).aexists()


async def test_words_that_are_shown_are_written_to_their_end(conversation, cookie, token):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="/echo delay=0.05 words=8 when are you open")
        frames = await chat.until("message.delta")
        assert (await hurry(token, frames[-1]["id"])).status_code == 200
        await chat.send(type="message.hurry")
        ended = (await chat.until(*ENDS))[-1]["message"]
    assert ended["route"] == "model" and len(ended["text"].split()) == 8


async def test_a_hurry_before_anybody_reads_holds_from_the_start(conversation, ana):
    caller = Caller(ana.pk, address="192.0.2.1")
    opened = await sync_to_async(Turn.open)(caller, conversation, LONG)
    assert opened.hurry() is True
    message = await asyncio.wait_for(opened.result(), 5)
    assert (message.route, message.degraded_reason) == ("rules", "hurry")
    assert opened.hurry() is False


async def test_another_process_hears_of_it_at_its_next_sign_of_life(
    conversation, cookie, token, monkeypatch
):
    monkeypatch.setattr(turn, "ALIVE_EVERY_S", 0.05)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LONG)
        identity = (await chat.until("status"))[0]["message"]["id"]
        found = running.running.get(conversation.pk)
        monkeypatch.setattr(running.running, "get", lambda pk: None)
        assert found is not None
        assert (await hurry(token, identity)).status_code == 202
        assert (await chat.until(*ENDS))[-1]["message"]["route"] == "rules"


async def test_it_is_the_owners_to_say(conversation, cookie, ben, token_of):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LONG)
        identity = (await chat.until("status"))[0]["message"]["id"]
        others = await sync_to_async(token_of)(ben)
        assert_problem(await hurry(others, identity), 404, "not_found")
        await chat.send(type="ping")
        assert (await chat.next())["type"] == "pong", "it still waits"
        await chat.send(type="message.cancel")
        assert (await chat.until(*ENDS))[-1]["message"]["status"] == "stopped"


def test_an_answer_nobody_writes_any_more_is_not_hurried(conversation, token):
    answer = conversation.messages.create(seq=1, role="assistant", status="interrupted")
    assert Api(token)("POST", hurry_path(answer.pk)).status_code == 200


def test_a_place_is_told_as_the_other_events_are(conversation):
    answer = conversation.messages.create(seq=1, role="assistant")
    event = Queued(4, answer.pk, 3, 8.4321)
    assert wire.sse(event).startswith(b"event: status\nid: 4\ndata: {")
    assert wire.event_json(event)["eta_ms"] == 8432


# -- maintenance ---------------------------------------------------------------------------------


async def test_pages_are_told_of_maintenance_when_they_load_and_while_they_are_open(
    conversation, cookie, ana, sam
):
    def page() -> str:
        client = Client()
        client.force_login(ana)
        return str(client.get("/").content.decode())

    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
        assert "data-maintenance" not in await sync_to_async(page)()
        note = "host 7; public: Back at <noon>."
        await sync_to_async(breaker.force)("model", "open", by=sam, note=note)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong", "notice": "Back at <noon>."}
        html = await sync_to_async(page)()
        assert 'data-maintenance="Back at &lt;noon&gt;."' in html and "host 7" not in html
        await sync_to_async(breaker.force)("model", None, by=sam)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
