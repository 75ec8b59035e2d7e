"""Who reaches what on a socket, generated from its operations: none can be forgotten here."""

from __future__ import annotations

from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User

from conversations import wire
from conversations.models import Conversation, Message
from conversations.tokens import issue
from tests.conversations.test_owners import CANARY
from tests.conversations.test_socket import Chat
from tests.conversations.test_sockets_auth import Bare

pytestmark = pytest.mark.django_db(transaction=True)

OPERATIONS = wire.FRAME_TYPES
#: Those that name a message; the others act on the conversation of the socket alone.
NAMING = [kind for kind in OPERATIONS if kind not in {"message.create", "ping", "auth"}]


def of(user: User) -> dict[str, Any]:
    conversation = Conversation.objects.create(user=user, title=CANARY)
    asked = conversation.messages.create(seq=1, role="user", text=CANARY)
    answer = conversation.messages.create(
        seq=2, role="assistant", text=CANARY, parent=asked, status="interrupted"
    )
    return {"conversation": conversation, "question": asked.pk, "answer": answer.pk}


@pytest.fixture
def hers(ana: User) -> dict[str, Any]:
    return of(ana)


@pytest.fixture
def others(ben: User, sam: User) -> dict[str, User]:
    return {"ben": ben, "sam": sam}


def rows(user: User) -> list[Any]:
    return list(Message.objects.filter(conversation__user=user).order_by("pk").values())


def socket(user: User, by: str, conversation: Any, cookie_of: Any) -> tuple[Chat, str]:
    """A socket as that user, and the token its first frame says."""
    if by == "session":
        return Chat(conversation, cookie_of(user)), ""
    return Bare(conversation), issue(user, "x", ["read", "chat"])


def frame_of(kind: str, message: Any) -> dict[str, Any]:
    named = {"id": str(message)} if kind in NAMING else {}
    return {"type": kind, "text": "mine now", "ref": "r", **named}


def naming(ids: dict[str, Any], kind: str) -> Any:
    return ids["question"] if kind == "message.edit" else ids["answer"]


@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("who", ["ben", "sam"])
@pytest.mark.parametrize("kind", OPERATIONS)
async def test_no_operation_reaches_anothers_conversation(
    kind: str, who: str, by: str, hers: dict[str, Any], ana: User, others: Any, cookie_of: Any
) -> None:
    other = others[who]
    before = await sync_to_async(rows)(ana)
    chat, token = await sync_to_async(socket)(other, by, hers["conversation"], cookie_of)
    async with chat:
        if token:
            await chat.send(type="auth", token=token)
        await chat.send(**frame_of(kind, naming(hers, kind)))
        assert await chat.closed() == wire.CLOSE_NOT_FOUND
    assert await sync_to_async(rows)(ana) == before


@pytest.mark.parametrize("kind", OPERATIONS)
async def test_nobody_without_a_name_does_anything(
    kind: str, hers: dict[str, Any], ana: User
) -> None:
    before = await sync_to_async(rows)(ana)
    async with Bare(hers["conversation"]) as chat:
        await chat.send(**frame_of(kind, naming(hers, kind)))
        assert await chat.closed() == wire.CLOSE_UNAUTHENTICATED
    assert await sync_to_async(rows)(ana) == before


@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("kind", NAMING)
async def test_anothers_message_is_not_there_in_ones_own_conversation(
    kind: str, by: str, hers: dict[str, Any], ana: User, ben: User, cookie_of: Any
) -> None:
    own = await sync_to_async(of)(ben)
    before = await sync_to_async(rows)(ana), await sync_to_async(rows)(ben)
    chat, token = await sync_to_async(socket)(ben, by, own["conversation"], cookie_of)
    async with chat:
        if token:
            await chat.send(type="auth", token=token)
        await chat.send(**frame_of(kind, naming(hers, kind)))
        (said,) = await chat.until("error")
    assert said["error"]["code"] == "not_found" and said["ref"] == "r"
    assert CANARY not in str(said)
    assert (await sync_to_async(rows)(ana), await sync_to_async(rows)(ben)) == before


@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("kind", NAMING)
async def test_the_owner_is_never_told_that_it_is_not_there(
    kind: str, by: str, hers: dict[str, Any], ana: User, cookie_of: Any
) -> None:
    """The same frames: so what is refused above proves something."""
    chat, token = await sync_to_async(socket)(ana, by, hers["conversation"], cookie_of)
    async with chat:
        if token:
            await chat.send(type="auth", token=token)
        await chat.send(**frame_of(kind, naming(hers, kind)))
        await chat.send(type="ping")
        frames = await chat.until("pong", "message.completed", "message.failed")
    assert all(frame.get("error", {}).get("code") != "not_found" for frame in frames)


async def test_a_token_that_may_only_read_asks_nothing(hers: dict[str, Any], ana: User) -> None:
    before = await sync_to_async(rows)(ana)
    token = await sync_to_async(issue)(ana, "x", ["read"])
    async with Bare(hers["conversation"]) as chat:
        await chat.send(type="auth", token=token)
        await chat.send(type="message.create", text="hello")
        assert await chat.closed() == wire.CLOSE_UNAUTHENTICATED
    assert await sync_to_async(rows)(ana) == before
