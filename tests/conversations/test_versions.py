"""Another answer, a question put differently: versions are kept, the newest is shown."""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.test import AsyncClient
from django.utils import timezone

from assistant.errors import Conflict
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.turn import Turn
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture
def talk(api: Any, conversation: Conversation) -> Any:
    """Ask; the answer as JSON."""
    path = f"{API}{conversation.pk}/messages/"
    return lambda text: api("POST", path, {"text": text}).json()


def at(message: dict[str, Any] | Message, what: str) -> str:
    identity = message["id"] if isinstance(message, dict) else message.pk
    return f"/api/v1/messages/{identity}/{what}/"


def listed(api: Any, conversation: Conversation, query: str = "") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = api("GET", f"{API}{conversation.pk}/messages/{query}").json()[
        "results"
    ]
    return rows


def test_another_answer_stands_beside_the_first_and_hides_what_followed(api, conversation, talk):
    first, later = talk("one"), talk("two")
    reply = api("POST", at(first, "regenerate"), {})
    assert reply.status_code == 200 and reply["X-Assistant-Route"] == "model"
    second = reply.json()
    assert (second["parent"], second["text"]) == (first["parent"], "one")
    assert second["siblings"] == [first["id"], second["id"]]
    shown = listed(api, conversation)
    assert [row["id"] for row in shown] == [first["parent"], second["id"]]
    assert shown[1]["siblings"] == second["siblings"] and shown[0]["siblings"] == []
    every = listed(api, conversation, "?siblings=1")
    assert [row["text"] for row in every] == ["one", "one", "two", "two", "one"]
    assert [row["shown"] for row in every] == [True, False, False, False, True]
    assert later["id"] in [row["id"] for row in every]


def test_an_edited_question_gets_an_answer_and_the_model_forgets_the_old_branch(
    api, conversation, talk
):
    talk("one")
    second = talk("two")
    talk("three")
    edited = api("POST", at({"id": second["parent"]}, "edit"), {"text": "TWO"}).json()
    shown = listed(api, conversation)
    assert [row["text"] for row in shown] == ["one", "one", "TWO", "TWO"]
    assert shown[3]["id"] == edited["id"]
    assert shown[2]["siblings"] == [second["parent"], shown[2]["id"]]
    assert shown[2]["parent"] == shown[1]["id"]
    turn = Turn.open(Caller(conversation.user_id), conversation, "four")
    assert [message.text for message in turn._ask.messages] == ["one", "one", "TWO", "TWO", "four"]
    turn.close()


def test_the_first_question_can_be_edited_many_times(api, conversation, talk):
    ids = [talk("v0")["parent"]]
    for n in range(1, 4):
        answer = api("POST", at({"id": ids[-1]}, "edit"), {"text": f"v{n}"}).json()
        ids.append(answer["parent"])
    (question, _answer) = listed(api, conversation)
    assert question["siblings"] == ids and question["parent"] is None


def test_rows_without_parents_are_linked_before_they_have_versions(api, conversation):
    for seq, (role, text) in enumerate(
        [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")], 1
    ):
        conversation.messages.create(seq=seq, role=role, text=text)
    assert all(row["siblings"] == [] for row in listed(api, conversation))
    _q1, a1, q2, _a2 = conversation.messages.order_by("seq")
    api("POST", at(q2, "edit"), {"text": "Q2"})
    shown = listed(api, conversation)
    assert [row["text"] for row in shown] == ["q1", "a1", "Q2", "Q2"]
    assert [len(row["siblings"]) for row in shown] == [0, 0, 2, 0]
    again = api("POST", at(a1, "regenerate"), {}).json()
    assert again["siblings"] == [str(a1.pk), again["id"]]
    assert [row["text"] for row in listed(api, conversation)] == ["q1", "q1"]


def test_the_kind_of_message_must_fit_and_it_must_be_shown(api, conversation, talk):
    answer = talk("one")
    question = {"id": answer["parent"]}
    for message, what, body in [
        (question, "regenerate", {}),
        (answer, "edit", {"text": "x"}),
        (question, "edit", {"text": "  "}),
        (question, "edit", {"text": "x" * 4001}),
        (question, "edit", {"text": "a\x00b"}),
        (question, "edit", {}),
        (question, "edit", {"text": "a", "role": "system"}),
        (answer, "regenerate", {"text": "a"}),
    ]:
        assert_problem(api("POST", at(message, what), body), 400, "invalid_request")
    assert Message.objects.count() == 2
    api("POST", at(answer, "regenerate"), {})
    assert_problem(api("POST", at(answer, "regenerate"), {}), 400, "invalid_request")
    assert Message.objects.count() == 3


def test_nothing_is_replaced_while_an_answer_is_written(api, conversation, talk):
    answer = talk("one")
    running = conversation.messages.create(
        seq=9, role="assistant", status="streaming", alive_at=timezone.now()
    )
    for message, what, body in [
        (answer, "regenerate", {}),
        (running, "regenerate", {}),
        ({"id": answer["parent"]}, "edit", {"text": "x"}),
    ]:
        assert_problem(api("POST", at(message, what), body), 409, "conflict")
    assert Message.objects.filter(shown=False).count() == 0


def test_another_users_message_is_not_there_to_be_replaced(api, talk, ben, token_of):
    answer = talk("one")
    theirs = Api(token_of(ben))
    assert_problem(theirs("POST", at(answer, "regenerate"), {}), 404, "not_found")
    asked = {"id": answer["parent"]}
    assert_problem(theirs("POST", at(asked, "edit"), {"text": "x"}), 404, "not_found")
    assert Message.objects.count() == 2


def test_versions_count_against_the_rate(api, talk, settings):
    answer = talk("one")
    settings.ASSISTANT_RATE = "1/h"
    assert api("POST", at(answer, "regenerate"), {}).status_code == 200
    asked = {"id": answer["parent"]}
    assert_problem(api("POST", at(asked, "edit"), {"text": "x"}), 429, "rate_limited")


def test_the_same_question_again_is_answered_with_some_chance(conversation, talk):
    answer = talk("one")
    turn = Turn.regenerate(Caller(conversation.user_id), answer["id"])
    assert turn._ask.params.temperature > 0
    turn.close()
    with pytest.raises(Conflict):
        _two_at_once(conversation)


def _two_at_once(conversation: Conversation) -> None:
    caller = Caller(conversation.user_id)
    shown = conversation.messages.get(shown=True, role="assistant")
    opened = Turn.regenerate(caller, shown.pk)
    try:
        Turn.regenerate(caller, opened.message.pk)
    finally:
        opened.close()


def test_a_conversation_with_versions_is_deleted_whole(api, conversation, talk):
    answer = talk("one")
    api("POST", at(answer, "regenerate"), {})
    api("POST", at(answer, "feedback"), {"value": "up"})
    assert api("DELETE", f"{API}{conversation.pk}/").status_code == 204
    assert Message.objects.count() == 0


@pytest.mark.parametrize(("what", "body"), [("regenerate", {}), ("edit", {"text": "other"})])
async def test_a_new_version_streams_like_a_new_question(what, body, ana, conversation, token_of):
    caller = Caller(ana.pk)
    turn = await sync_to_async(Turn.open)(caller, conversation, "hello there")
    answer = await turn.result()
    identity = answer.pk if what == "regenerate" else answer.parent_id
    headers = {"Authorization": f"Bearer {await sync_to_async(token_of)(ana)}"}
    reply = await AsyncClient().post(
        f"/api/v1/messages/{identity}/{what}/",
        json.dumps({**body, "stream": True}),
        "application/json",
        headers=headers,
    )
    assert reply["Content-Type"] == "text/event-stream"
    raw = b"".join([part async for part in reply.streaming_content]).decode()
    events = [json.loads(line[6:]) for line in raw.splitlines() if line.startswith("data: ")]
    assert [events[0]["type"], events[-1]["type"]] == ["message.created", "message.completed"]
    new = events[0]["user_message"] or events[0]["message"]
    assert len(new["siblings"]) == 2
    assert events[-1]["message"]["text"] == body.get("text", "hello there")
