"""Export and erasure: everything of one person, nothing of another, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.db import connection
from django.test import AsyncClient, Client
from django.utils import timezone
from knox.models import AuthToken

from conversations import privacy
from conversations.limits import Caller
from conversations.models import Conversation, Feedback, Message
from conversations.running import running
from conversations.turn import Turn
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db(transaction=True)

SURE = {"confirm": "erase my data"}


@pytest.fixture
def conversation(ana: User, ben: User) -> Conversation:
    """A talk of ana's with a replaced answer and feedback; ben has a secret of his own."""
    other = Conversation.objects.create(user=ben, title="ben's")
    other.messages.create(seq=1, role="user", text="canary-of-ben")
    made = Conversation.objects.create(user=ana, title="Where\n# is it")
    asked = made.messages.create(seq=1, role="user", text='say "hi"\n</script>')
    made.messages.create(seq=2, role="assistant", text="old", parent=asked, shown=False)
    answer = made.messages.create(seq=3, role="assistant", text="**new**", parent=asked)
    Feedback.objects.create(message=answer, value="down", text="not so good")
    return made


async def download(path: str, token: str) -> tuple[Any, list[bytes]]:
    reply = await AsyncClient().get(path, headers={"Authorization": f"Bearer {token}"})
    assert reply.status_code == 200, reply.content
    return reply, [part async for part in reply.streaming_content]


@pytest.fixture
async def token(ana: User, token_of: Any) -> str:
    return await sync_to_async(token_of)(ana)


async def test_one_conversation_as_json_has_every_version(conversation, token):
    reply, parts = await download(f"{API}{conversation.pk}/export/", token)
    assert reply["Content-Type"] == "application/json"
    assert reply["Content-Disposition"] == (
        f'attachment; filename="conversation-{conversation.pk}.json"'
    )
    assert reply["Cache-Control"] == "no-store"
    body = json.loads(b"".join(parts))
    assert body["title"] == "Where\n# is it"
    assert [row["text"] for row in body["messages"]] == ['say "hi"\n</script>', "old", "**new**"]
    assert [row["shown"] for row in body["messages"]] == [True, False, True]
    assert body["messages"][2]["feedback"]["text"] == "not so good"


async def test_one_conversation_as_markdown_is_what_is_shown(conversation, token):
    reply, parts = await download(f"{API}{conversation.pk}/export/?format=md", token)
    assert reply["Content-Type"] == "text/markdown; charset=utf-8"
    text = b"".join(parts).decode()
    assert text.startswith("# Where # is it\n")
    assert "## You, " in text and "**new**" in text and "old" not in text


async def test_everything_of_one_person_and_nothing_of_another(conversation, token):
    reply, parts = await download("/api/v1/me/export/", token)
    assert "attachment" in reply["Content-Disposition"]
    raw = b"".join(parts).decode()
    body = json.loads(raw)
    assert body["user"]["username"] == "ana" and body["user"]["email"] == "ana@example.com"
    assert [row["starts_with"] for row in body["tokens"]] == [token[:15]]
    assert [row["title"] for row in body["conversations"]] == ["Where\n# is it"]
    assert len(body["conversations"][0]["messages"]) == 3
    assert "canary-of-ben" not in raw and token not in raw


async def test_a_big_export_is_made_in_pages_while_it_is_sent(ana, token, monkeypatch):
    monkeypatch.setattr(privacy, "PAGE_ROWS", 3)
    monkeypatch.setattr(privacy.Written, "BATCH_CHARS", 500)

    def rows() -> None:
        for n in range(7):
            one = Conversation.objects.create(user=ana, title=f"t{n}")
            Message.objects.bulk_create(
                Message(conversation=one, seq=seq, role="user", text=f"{n}.{seq}")
                for seq in range(1, 12)
            )

    await sync_to_async(rows)()
    _, parts = await download("/api/v1/me/export/", token)
    assert len(parts) > 10 and max(map(len, parts)) < 1_500
    body = json.loads(b"".join(parts))
    assert sorted(row["title"] for row in body["conversations"]) == [f"t{n}" for n in range(7)]
    assert all(
        [m["seq"] for m in row["messages"]] == list(range(1, 12)) for row in body["conversations"]
    )


async def test_an_export_that_is_given_up_ends(conversation, token):
    reply = await AsyncClient().get(
        "/api/v1/me/export/", headers={"Authorization": f"Bearer {token}"}
    )
    await sync_to_async(reply.close)()
    assert [part async for part in reply.streaming_content] == []


def test_a_foreign_conversation_or_format_is_refused(conversation, ben, token_of, api):
    path = f"{API}{conversation.pk}/export/"
    assert_problem(Api(token_of(ben))("GET", path), 404, "not_found")
    assert_problem(api("GET", f"{path}?format=exe"), 400, "invalid_request")
    assert_problem(Api()("GET", "/api/v1/me/export/"), 401, "unauthenticated")


@pytest.mark.parametrize(
    "body", [None, {}, {"confirm": True}, {"confirm": "yes"}, {**SURE, "x": 1}]
)
def test_nothing_is_erased_without_the_phrase(body, api, conversation):
    assert_problem(api("DELETE", "/api/v1/me/data/", body), 400, "invalid_request")
    assert Message.objects.count() == 4


def test_erasing_leaves_no_word_of_that_person_in_the_database(api, conversation, ana, ben):
    reply = api("DELETE", "/api/v1/me/data/", SURE)
    assert reply.status_code == 200
    assert reply.json() == {
        "erased": {"conversations": 1, "messages": 3, "feedback": 1, "tokens": 1}
    }
    assert Message.objects.get().text == "canary-of-ben"
    assert not AuthToken.objects.filter(user=ana).exists()
    assert User.objects.filter(pk=ana.pk).exists()
    with connection.cursor() as cursor:
        for table in connection.introspection.table_names():
            cursor.execute(f'SELECT * FROM "{table}"')
            assert "not so good" not in str(cursor.fetchall()), table
    assert_problem(api("GET", API), 401, "unauthenticated")


def test_more_than_a_page_is_erased(api, ana, ben, monkeypatch):
    monkeypatch.setattr(privacy, "PAGE_ROWS", 3)
    for owner in (ana, ben):
        Conversation.objects.bulk_create(Conversation(user=owner) for _ in range(8))
    reply = api("DELETE", "/api/v1/me/data/", SURE).json()
    assert reply["erased"]["conversations"] == 8
    assert set(Conversation.objects.values_list("user__username", flat=True)) == {"ben"}


async def test_a_running_answer_is_stopped_first_and_writes_nothing_afterwards(ana):
    caller = Caller(ana.pk)
    turn = await sync_to_async(Turn.open)(caller, None, "/echo delay=0.02 words=400 word")
    reader = turn.read()
    await anext(reader)
    await anext(reader)
    erased = await sync_to_async(privacy.erase)(caller)
    assert erased["messages"] == 2
    async with asyncio.timeout(5):
        async for _ in reader:
            pass
    assert running.of(caller) == []
    assert await Message.objects.acount() == await Conversation.objects.acount() == 0


def test_an_answer_of_another_process_finds_its_row_gone(ana):
    conversation = Conversation.objects.create(user=ana)
    conversation.messages.create(
        seq=1, role="assistant", status="streaming", alive_at=timezone.now()
    )
    assert privacy.erase(Caller(ana.pk))["messages"] == 1


def test_a_visitor_erases_their_own_with_a_csrf_token_only(settings, db):
    settings.ASSISTANT_ANONYMOUS = True
    client, other = Client(enforce_csrf_checks=True), Client()
    for one in (client, other):
        one.get("/")
        headers = {"X-CSRFToken": one.cookies["csrftoken"].value}
        assert one.post(API, "{}", "application/json", headers=headers).status_code == 201
    path, body = "/api/v1/me/data/", json.dumps(SURE)
    reply = client.delete(path, body, "application/json")
    assert_problem(reply, 403, "permission_denied")
    headers = {"X-CSRFToken": client.cookies["csrftoken"].value}
    reply = client.delete(path, body, "application/json", headers=headers)
    assert reply.json()["erased"]["conversations"] == 1
    assert Conversation.objects.count() == 1
