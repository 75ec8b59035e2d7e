"""Event streams whose login ends while they are read."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.test import AsyncClient
from knox.models import AuthToken

from conversations import logins
from conversations.limits import Caller
from conversations.models import Conversation
from conversations.tokens import issue
from conversations.turn import Turn
from tests.conversations.test_stream import LONG, ended, events_of

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logins, "LOOK_EVERY_S", 0.1)


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def bearer(ana: User, token_of: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_of(ana)}"}


async def revoked(ana: User) -> None:
    await AuthToken.objects.all().adelete()


async def logged_out(ana: User) -> None:
    await Session.objects.all().adelete()


async def deactivated(ana: User) -> None:
    await User.objects.filter(pk=ana.pk).aupdate(is_active=False)


async def with_another_password(ana: User) -> None:
    ana.set_password("another one")
    await ana.asave()


async def ask(
    client: AsyncClient, conversation: Conversation, headers: dict[str, str], text: str = LONG
) -> Any:
    path = f"/api/v1/conversations/{conversation.pk}/messages/"
    body = json.dumps({"text": text, "stream": True})
    return await client.post(path, body, "application/json", headers=headers)


async def last_of(reply: Any, ana: User, end: Callable[[User], Awaitable[None]]) -> bytes:
    """The last part of a stream that begins before that and ends after it."""
    parts = aiter(reply.streaming_content)
    await anext(parts)
    await end(ana)
    *_, last = [part async for part in parts]
    return last


@pytest.mark.parametrize("end", [revoked, deactivated])
async def test_a_tokens_stream_ends_typed_with_its_token(end, ana, bearer, conversation):
    last = await last_of(await ask(AsyncClient(), conversation, bearer), ana, end)
    kind, data = last.decode().strip().split("\n")
    assert kind == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "unauthenticated"
    message = await ended(conversation)
    assert message.status == "interrupted" and message.text.startswith("word")


@pytest.mark.parametrize("end", [logged_out, deactivated, with_another_password])
async def test_a_pages_stream_ends_with_its_login(end, ana, conversation):
    client = AsyncClient()
    await client.aforce_login(ana)
    last = await last_of(await ask(client, conversation, {}), ana, end)
    assert last.startswith(b"event: error\n") and b'"unauthenticated"' in last


async def test_openais_clients_read_an_error_of_theirs(ana, bearer):
    said = {"messages": [{"role": "user", "content": LONG}], "stream": True}
    reply = await AsyncClient().post(
        "/v1/chat/completions", json.dumps(said), "application/json", headers=bearer
    )
    last = await last_of(reply, ana, revoked)
    error = json.loads(last.decode().removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("unauthenticated", "authentication_error")


async def test_a_login_that_stands_reads_to_the_end_whatever_a_proxy_adds(ana, conversation):
    client = AsyncClient()
    await client.aforce_login(ana)
    basic = {"Authorization": "Basic c3RhZ2luZzpzaXRl"}
    reply = await ask(client, conversation, basic, "/echo delay=0.05 words=10 word")
    assert (await events_of(reply))[-1]["type"] == "message.completed"


async def test_who_may_only_read_may_read_on(ana, conversation):
    token = await sync_to_async(issue)(ana, "x", ["read"])
    begin = sync_to_async(Turn.open)
    turn = await begin(Caller(ana.pk), conversation, "/echo delay=0.05 words=10 word")
    turn.start()
    path = f"/api/v1/messages/{turn.message.pk}/events/"
    reply = await AsyncClient().get(path, headers={"Authorization": f"Bearer {token}"})
    assert (await events_of(reply))[-1]["type"] == "message.completed"
