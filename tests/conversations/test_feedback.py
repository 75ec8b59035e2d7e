"""What a reader thinks of an answer: said, said again, taken back, and seen by staff."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.utils import timezone

from conversations.models import Conversation, Feedback, Message
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana, title="Refund")


@pytest.fixture
def answer(conversation: Conversation) -> Message:
    conversation.messages.create(seq=1, role="user", text="where is my refund")
    return conversation.messages.create(seq=2, role="assistant", text="soon", route="model")


def path_of(message: Message) -> str:
    return f"/api/v1/messages/{message.pk}/feedback/"


def test_feedback_is_given_replaced_shown_and_taken_back(api, answer):
    body = {"value": "down", "reason": "wrong", "text": " not mine \n"}
    given = api("POST", path_of(answer), body).json()["feedback"]
    assert given.pop("created_at").endswith("Z")
    assert given == {"value": "down", "reason": "wrong", "text": "not mine"}
    again = api("POST", path_of(answer), {"value": "up"}).json()["feedback"]
    assert (again["value"], again["reason"], again["text"]) == ("up", None, "")
    assert Feedback.objects.count() == 1
    listed = api("GET", f"{API}{answer.conversation_id}/messages/").json()["results"]
    assert [row["feedback"] and row["feedback"]["value"] for row in listed] == [None, "up"]
    for _ in range(2):
        assert api("DELETE", path_of(answer)).status_code == 204
    assert Feedback.objects.count() == 0


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"value": "sideways"},
        {"value": True},
        {"value": ["up"]},
        {"value": "up", "reason": "because"},
        {"value": "up", "text": "x" * 1001},
        {"value": "up", "text": "a\x00b"},
        {"value": "up", "text": 5},
        {"value": "up", "user": 1},
    ],
)
def test_bad_feedback_is_refused_and_leaves_nothing(body, api, answer):
    assert_problem(api("POST", path_of(answer), body), 400, "invalid_request")
    assert Feedback.objects.count() == 0


def test_a_thousand_characters_are_read(api, answer):
    body = {"value": "up", "text": "é" * 1000}
    assert len(api("POST", path_of(answer), body).json()["feedback"]["text"]) == 1000


def test_only_finished_answers_are_judged(api, conversation, answer):
    question = conversation.messages.get(role="user")
    assert_problem(api("POST", path_of(question), {"value": "up"}), 400, "invalid_request")
    running = conversation.messages.create(
        seq=3, role="assistant", status="streaming", alive_at=timezone.now()
    )
    assert_problem(api("POST", path_of(running), {"value": "up"}), 409, "conflict")


def test_another_users_answer_cannot_be_judged(ben, token_of, answer):
    theirs = Api(token_of(ben))
    assert_problem(theirs("POST", path_of(answer), {"value": "up"}), 404, "not_found")
    assert_problem(theirs("DELETE", path_of(answer)), 404, "not_found")


def test_an_answer_written_again_has_a_clean_slate(api, ana, answer):
    from conversations.limits import Caller
    from conversations.turn import Turn

    api("POST", path_of(answer), {"value": "down"})
    Message.objects.filter(pk=answer.pk).update(status="failed")
    Turn.retry(Caller(ana.pk), answer.pk).close()
    assert Feedback.objects.count() == 0


def test_a_list_with_feedback_costs_the_same_number_of_statements(
    api, conversation, answer, django_assert_max_num_queries
):
    for seq in range(3, 23):
        message = conversation.messages.create(seq=seq, role="assistant", text=str(seq))
        Feedback.objects.create(message=message, value="up")
    api("GET", API)  # the token's first use is noted
    with django_assert_max_num_queries(8):
        api("GET", f"{API}{conversation.pk}/messages/")


def test_staff_find_the_conversation_from_the_feedback(sam: User, answer: Message) -> None:
    Feedback.objects.create(message=answer, value="down", text="<script>alert(1)</script>")
    client = Client()
    client.force_login(sam)
    path = "/admin/conversations/feedback/"
    assert client.get(path).status_code == 403
    names: Any = ["view_feedback", "view_conversation", "view_message"]
    sam.user_permissions.set(Permission.objects.filter(codename__in=names))
    page = client.get(path).content.decode()
    link = f"/admin/conversations/conversation/{answer.conversation_id}/change/"
    assert f'href="{link}"' in page and "<script>alert" not in page
    assert client.get(f"{path}{answer.pk}/change/").status_code == 200
    assert client.get(link).status_code == 200
