"""Who may talk on a socket: the first frame's token, and logins that end while it is open."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.db import DatabaseError, connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from knox.models import AuthToken

from config.asgi import application
from conversations import consumers, logins
from conversations.access import VISITOR, Credential
from conversations.models import ApiToken, Conversation, Message
from conversations.tokens import issue
from tests.conftest import PASSWORD
from tests.conversations.test_socket import ENDS, Chat, ended

pytestmark = pytest.mark.django_db(transaction=True)

LONG = "/echo delay=0.05 words=400 word"


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def token(ana: User) -> str:
    return issue(ana, "x", ["chat"])


@pytest.fixture
def cookie(ana: User, cookie_of: Any) -> str:
    return str(cookie_of(ana))


class Bare(Chat):
    """A program's side of a socket: no cookie, no origin, only what it says."""

    def __init__(self, conversation: Any, *headers: tuple[bytes, bytes], query: str = "") -> None:
        path = f"/ws/chat/{getattr(conversation, 'pk', conversation)}/{query}"
        given = [(b"host", b"testserver"), *headers]
        self.socket = WebsocketCommunicator(application, path, headers=given)

    async def says(self, token: str, **more: Any) -> None:
        await self.send(type="auth", token=token, **more)


# --- The first frame -----------------------------------------------------------------------------


async def test_a_program_says_its_token_in_the_first_frame_and_then_chats(conversation, token):
    async with Bare(conversation) as chat:
        await chat.says(token)
        await chat.send(type="message.create", text="hello there")
        frames = await chat.until(*ENDS)
    assert frames[-1]["message"]["text"] == "hello there"
    assert (await Message.objects.aget(role="user")).text == "hello there"


async def test_a_page_of_this_origin_without_a_login_may_say_a_token_too(conversation, token):
    async with Bare(conversation, (b"origin", b"http://testserver")) as chat:
        await chat.says(token)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}


@pytest.mark.parametrize(
    "first",
    [
        {"type": "ping"},
        {"type": "message.create", "text": "hello"},
        {"type": "message.resume"},
        {"type": "message.cancel"},
        {"type": "auth"},
        {"type": "auth", "token": ""},
        {"type": "auth", "token": 5},
        {"type": "auth", "token": "nonsense"},
        {"type": "auth", "token": "x" * 64},
        {"type": "auth", "token": "x y"},
        {"type": "auth", "token": "\ud800"},
        {"type": "auth", "token": "x" * 16_000},
        [],
        None,
    ],
    ids=str,
)
async def test_nothing_is_served_before_a_token_was_said(first, conversation):
    async with Bare(conversation) as chat:
        await chat.socket.send_to(text_data=json.dumps(first))
        assert await chat.closed() == 4401
    assert not await Message.objects.aexists()


async def test_a_binary_first_frame_is_closed_with_4401(conversation):
    async with Bare(conversation) as chat:
        await chat.socket.send_to(bytes_data=b"\x00")
        assert await chat.closed() == 4401


async def test_who_says_nothing_is_put_out(conversation, monkeypatch):
    assert consumers.AUTH_WITHIN_S == 5
    monkeypatch.setattr(consumers, "AUTH_WITHIN_S", 0.1)
    async with Bare(conversation) as chat:
        assert await chat.closed() == 4401


async def test_a_token_in_the_address_is_refused_at_once_even_with_a_right_one_to_come(
    conversation, token
):
    async with Bare(conversation, query=f"?token={token}") as chat:
        await chat.says(token)
        assert await chat.closed() == 4401


async def test_a_token_needs_the_scope_to_chat_and_reaches_only_its_users_conversations(
    conversation, ana, ben
):
    reads = await sync_to_async(issue)(ana, "x", ["read"])
    async with Bare(conversation) as chat:
        await chat.says(reads)
        assert await chat.closed() == 4401
    foreign = await sync_to_async(issue)(ben, "x", ["chat"])
    async with Bare(conversation) as chat:
        await chat.says(foreign)
        assert await chat.closed() == 4404


async def test_who_is_signed_in_cannot_become_somebody_else(conversation, cookie, token):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="auth", token=token, ref="r")
        told = await chat.next()
        assert (told["error"]["code"], told["ref"]) == ("invalid_request", "r")
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}


@pytest.mark.parametrize("origin", [b"http://evil.example", b"null", b""])
async def test_a_foreign_page_cannot_open_a_socket_without_cookies_either(origin, conversation):
    connected, _ = await Bare(conversation, (b"origin", origin)).socket.connect()
    assert not connected


async def test_a_browser_that_hides_its_origin_is_no_program(conversation, cookie):
    header = (b"cookie", f"sessionid={cookie}".encode())
    connected, _ = await Bare(conversation, header).socket.connect()
    assert not connected


async def test_those_who_have_not_said_who_they_are_are_counted_by_address(
    conversation, settings, token
):
    settings.ASSISTANT_MAX_SOCKETS_PER_ADDRESS = 2
    settings.ASSISTANT_TRUSTED_PROXIES = 1
    header = (b"x-forwarded-for", b"192.0.2.9")
    one, two, three = (Bare(conversation, header) for _ in range(3))
    async with one, two, three:
        assert await three.closed() == 4429
    async with Bare(conversation, header) as chat:
        await chat.says(token)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}


# --- Logins that end -----------------------------------------------------------------------------


async def log_out(ana: User, cookie: str) -> None:
    client = AsyncClient()
    client.cookies["sessionid"] = cookie
    assert (await client.post("/accounts/logout/")).status_code in {200, 302}
    assert not await Session.objects.filter(pk=cookie).aexists()


async def deactivate(ana: User, cookie: str) -> None:
    await User.objects.filter(pk=ana.pk).aupdate(is_active=False)


async def change_password(ana: User, cookie: str) -> None:
    ana.set_password("another one")
    await ana.asave()


async def delete_the_account(ana: User, cookie: str) -> None:
    await User.objects.filter(pk=ana.pk).adelete()


async def let_it_expire(ana: User, cookie: str) -> None:
    await Session.objects.aupdate(expire_date="2020-01-01T00:00:00Z")


async def sign_in_as_another(ana: User, cookie: str) -> None:
    ben = await sync_to_async(User.objects.create_user)("ben", password=PASSWORD)

    def swap() -> None:
        client = Client()
        client.force_login(ben)
        other = Session.objects.get(pk=client.cookies["sessionid"].value)
        Session.objects.filter(pk=cookie).update(session_data=other.session_data)

    await sync_to_async(swap)()


ENDINGS = [
    *(log_out, deactivate, change_password, delete_the_account, let_it_expire, sign_in_as_another)
]


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
async def test_a_silent_socket_is_closed_when_its_login_ends(end, conversation, cookie, ana):
    assert logins.LOOK_EVERY_S <= 3
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        began = time.monotonic()
        await end(ana, cookie)
        assert (await chat.socket.receive_output(5))["code"] == 4401
        assert time.monotonic() - began < 5


async def revoke(token: str) -> None:
    await AuthToken.objects.all().adelete()


async def token_expires(token: str) -> None:
    await AuthToken.objects.aupdate(expiry="2020-01-01T00:00:00Z")


async def owner_leaves(token: str) -> None:
    await User.objects.aupdate(is_active=False)


@pytest.fixture
def hurry(monkeypatch: Any) -> None:
    monkeypatch.setattr(logins, "LOOK_EVERY_S", 0.1)


@pytest.mark.parametrize("end", [revoke, token_expires, owner_leaves])
@pytest.mark.parametrize("how", ["header", "first frame"])
async def test_a_programs_socket_is_closed_when_its_token_ends(
    how, end, conversation, token, hurry
):
    header = [(b"authorization", f"Bearer {token}".encode())] if how == "header" else []
    async with Bare(conversation, *header) as chat:
        if how == "first frame":
            await chat.says(token)
        await chat.send(type="ping")
        await chat.next()
        await end(token)
        assert await chat.closed() == 4401


async def test_others_stay_and_a_changed_session_of_the_same_user_too(
    conversation, cookie, ana, ben, cookie_of, hurry
):
    other = await sync_to_async(cookie_of)(ben)
    theirs = await Conversation.objects.acreate(user=ben)
    async with Chat(conversation, cookie) as mine, Chat(theirs, other) as stays:
        for chat in (mine, stays):
            await chat.send(type="ping")
            await chat.next()

        def write_something() -> None:
            session = Session.objects.get(pk=other)
            store = session.get_session_store_class()(other)
            store["cart"] = 5
            store.save()

        await sync_to_async(write_something)()
        await User.objects.filter(pk=ana.pk).aupdate(is_active=False)
        assert await mine.closed() == 4401
        await asyncio.sleep(0.3)
        await stays.send(type="ping")
        assert await stays.next() == {"type": "pong"}


async def test_what_was_written_for_a_login_that_ended_is_kept(conversation, cookie, ana, hurry):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text=LONG)
        await chat.until("message.delta")
        await User.objects.filter(pk=ana.pk).aupdate(is_active=False)
        output: dict[str, Any] = {}
        while output.get("type") != "websocket.close":
            output = await chat.socket.receive_output(3)
        assert output["code"] == 4401
        message = await ended(conversation)
    assert message.status == "interrupted" and message.text.startswith("word")


@pytest.mark.parametrize(
    "frame",
    [
        {"type": "message.create", "text": "still me?"},
        {"type": "message.resume"},
        {"type": "message.cancel"},
    ],
    ids=lambda frame: frame["type"],
)
async def test_every_message_is_checked_again(frame, conversation, cookie, ana, monkeypatch):
    monkeypatch.setattr(logins, "LOOK_EVERY_S", 60)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        await deactivate(ana, cookie)
        await chat.send(**frame)
        assert await chat.closed() == 4401


async def test_a_conversation_that_became_anothers_is_not_served_any_more(
    conversation, cookie, ben
):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        await Conversation.objects.filter(pk=conversation.pk).aupdate(user=ben)
        for kind in ("message.create", "message.resume", "message.cancel"):
            await chat.send(type=kind, text="hello")
            assert (await chat.next())["error"]["code"] == "not_found"


async def test_nobody_is_put_out_while_the_database_is_away(
    conversation, cookie, hurry, monkeypatch, caplog
):
    def away(*_: Any) -> Any:
        raise DatabaseError

    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        monkeypatch.setattr(logins, "_states", away)
        await asyncio.sleep(0.3)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
    assert "logins could not be looked at: DatabaseError" in caplog.text


async def test_a_visitors_socket_lives_as_long_as_their_session(settings, hurry):
    settings.ASSISTANT_ANONYMOUS = True
    client = AsyncClient()
    await client.get("/")
    cookie = client.cookies["sessionid"].value
    session = await Session.objects.aget(pk=cookie)
    mine = await Conversation.objects.acreate(session_key=session.get_decoded()[VISITOR])
    async with Chat(mine, cookie) as chat:
        await asyncio.sleep(0.3)
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
        await Session.objects.all().adelete()
        assert await chat.closed() == 4401


def test_looking_after_many_costs_three_queries_when_nothing_changed(ana, ben):
    def cookies(user: User) -> list[str]:
        return [Session.objects.create(
            session_key=f"{user.username}{n:029}", session_data="x", expire_date="2099-01-01T00:00Z"
        ).pk for n in range(20)]  # fmt: skip

    judged: list[str] = []
    watches = [
        logins.Watch(Credential(session_key=key), user.pk, lambda k=key: not judged.append(k), list)
        for user in (ana, ben)
        for key in cookies(user)
    ]
    assert logins.ended(watches) == [] and len(judged) == 40  # all are new
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert logins.ended(watches) == []
    assert len(queries) == 3 and len(judged) == 40
    Session.objects.filter(pk=watches[7].shown.session_key).delete()
    watches[7].stands = lambda: False
    assert logins.ended(watches) == [watches[7]]
    assert len(judged) == 40


# --- More to do on a socket ----------------------------------------------------------------------


async def test_another_answer_and_an_edit_by_socket(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="one")
        first = (await chat.until(*ENDS))[-1]["message"]
        await chat.send(type="message.regenerate", id=first["id"], ref="again")
        created, *_, second = await chat.until(*ENDS)
        assert created["ref"] == "again" and created["user_message"] is None
        assert created["message"]["siblings"] == [first["id"], second["message"]["id"]]
        await chat.send(type="message.edit", id=first["parent"], text="two", ref="edit")
        created, *_, third = await chat.until(*ENDS)
    assert created["user_message"]["text"] == third["message"]["text"] == "two"
    assert created["user_message"]["siblings"][0] == first["parent"]
    assert await conversation.messages.acount() == 5


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ({"type": "message.regenerate"}, "invalid_request"),
        ({"type": "message.edit", "text": "x"}, "invalid_request"),
        ({"type": "message.edit", "id": "../x", "text": "x"}, "invalid_request"),
        ({"type": "message.edit", "id": "{question}", "text": " "}, "invalid_request"),
        ({"type": "message.edit", "id": "{answer}", "text": "x"}, "invalid_request"),
        ({"type": "message.regenerate", "id": "{question}"}, "invalid_request"),
        ({"type": "message.regenerate", "id": "{other}"}, "not_found"),
        ({"type": "message.edit", "id": "{other}", "text": "x"}, "not_found"),
        ({"type": "message.cancel", "id": "{other}"}, "not_found"),
        ({"type": "message.cancel", "id": "{question}"}, "not_found"),
        ({"type": "message.cancel", "id": 5}, "invalid_request"),
    ],
    ids=str,
)
async def test_a_frame_about_the_wrong_message_is_a_typed_error(
    frame, code, conversation, cookie, ana
):
    asked = await conversation.messages.acreate(seq=1, role="user", text="one")
    answer = await conversation.messages.acreate(seq=2, role="assistant", text="1", parent=asked)
    elsewhere = await Conversation.objects.acreate(user=ana)
    other = await elsewhere.messages.acreate(seq=1, role="assistant", text="secret")
    names = {"{question}": str(asked.pk), "{answer}": str(answer.pk), "{other}": str(other.pk)}
    sent = {**frame, "id": names.get(frame.get("id", ""), frame.get("id"))}
    async with Chat(conversation, cookie) as chat:
        await chat.send(**sent)
        assert (await chat.next())["error"]["code"] == code
    assert await Message.objects.acount() == 3


async def test_stop_names_what_it_stops(conversation, cookie):
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="one")
        before = (await chat.until(*ENDS))[-1]["message"]["id"]
        await chat.send(type="message.create", text=LONG)
        now = (await chat.next())["message"]["id"]
        await chat.send(type="message.cancel", id=before)  # it has ended: nothing happens
        await chat.send(type="ping")
        await chat.until("pong")
        assert (await Message.objects.aget(pk=now)).status == "streaming"
        await chat.send(type="message.cancel", id=now)
        assert (await chat.until(*ENDS))[-1]["message"]["status"] == "stopped"


async def test_a_scope_that_was_taken_away_counts_from_the_next_message(
    conversation, token, monkeypatch
):
    monkeypatch.setattr(logins, "LOOK_EVERY_S", 60)
    async with Bare(conversation) as chat:
        await chat.says(token)
        await chat.send(type="ping")
        await chat.next()
        await ApiToken.objects.aupdate(scopes=["read"])
        await chat.send(type="message.create", text="hello")
        assert await chat.closed() == 4401
