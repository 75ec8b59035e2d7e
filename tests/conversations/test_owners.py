"""Who reaches what, generated from the URL resolver: no route of the API can be forgotten here.

A route that is new appears by itself, and fails until ``path_of`` knows whose id it takes.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from conversations.models import Conversation, Feedback, Message
from conversations.tokens import issue

pytestmark = pytest.mark.django_db

VERBS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
CANARY = "canary-of-ana"
#: A body that is right for every route that takes one; a route refuses what it does not know.
BODIES: dict[str, dict[str, Any]] = {
    "conversation": {"title": "taken"},
    "messages": {"text": "hello"},
    "message-edit": {"text": "hello"},
    "message-feedback": {"value": "up"},
}


def api_routes() -> list[str]:
    """The names of all routes below ``/api/v1/``."""

    def walk(resolver: URLResolver, before: str = "") -> list[str]:
        names: list[str] = []
        for pattern in resolver.url_patterns:
            path = before + str(pattern.pattern)
            if isinstance(pattern, URLResolver):
                names += walk(pattern, path)
            elif isinstance(pattern, URLPattern) and path.startswith("api/v1/"):
                assert pattern.name, f"{path} has no name"
                names.append(pattern.name)
        return names

    return walk(get_resolver())


ROUTES = api_routes()
OWNED = [name for name in ROUTES if name.startswith(("conversation", "message"))]
OWNED.remove("conversations")


@pytest.fixture
def ids(ana: User) -> dict[str, Any]:
    conversation = Conversation.objects.create(user=ana, title=CANARY)
    asked = conversation.messages.create(seq=1, role="user", text=CANARY)
    answer = conversation.messages.create(seq=2, role="assistant", text=CANARY, parent=asked)
    Feedback.objects.create(message=answer, value="down", text=CANARY)
    return {"conversation": conversation.pk, "question": asked.pk, "answer": answer.pk}


def path_of(name: str, ids: dict[str, Any]) -> str:
    if name in {"message-cancel", "message-regenerate", "message-feedback"}:
        return reverse(name, args=[ids["answer"]])
    if name == "message-edit":
        return reverse(name, args=[ids["question"]])
    return reverse(name, args=[ids["conversation"]]) if name in OWNED else reverse(name)


def send(client: Client, verb: str, name: str, ids: dict[str, Any]) -> Any:
    body = json.dumps(BODIES.get(name, {})) if verb not in ("GET", "HEAD", "OPTIONS") else ""
    return client.generic(verb, path_of(name, ids), body, content_type="application/json")


def as_they_are() -> list[Any]:
    return [list(model.objects.values()) for model in (Conversation, Message, Feedback)]


def content_of(reply: Any) -> str:
    return "" if reply.streaming else reply.content.decode()


def test_the_list_of_routes_is_not_empty() -> None:
    assert len(ROUTES) >= 11 and len(OWNED) >= 7
    assert set(BODIES) <= set(ROUTES)


@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("who", ["ben", "sam"])
@pytest.mark.parametrize("name", OWNED)
def test_what_is_anothers_is_not_there_for_customers_and_staff(name, who, by, ids, request):
    """404 for every verb that the route has, 405 for the others; nothing seen, nothing changed."""
    user = request.getfixturevalue(who)
    client = Client()
    if by == "session":
        client.force_login(user)
    else:
        client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {issue(user, 'x', ['read', 'chat'])}"
    before, seen = as_they_are(), set()
    for verb in VERBS:
        reply = send(client, verb, name, ids)
        assert reply.status_code in ({200} if verb == "OPTIONS" else {404, 405}), (verb, name)
        assert CANARY not in content_of(reply)
        seen.add(reply.status_code)
    assert 404 in seen
    assert as_they_are() == before


@pytest.mark.parametrize("name", ROUTES)
def test_nobody_without_a_name_gets_anything(name, ids):
    before = as_they_are()
    for verb in VERBS:
        reply = send(Client(), verb, name, ids)
        assert reply.status_code == 401, (verb, name)
        assert reply["WWW-Authenticate"] == "Bearer"
        if verb != "HEAD":
            assert reply.json()["error"]["code"] == "unauthenticated"
    assert as_they_are() == before


@pytest.mark.parametrize("name", ROUTES)
def test_a_session_writes_nothing_without_a_csrf_token(name, ids, ana):
    client = Client(enforce_csrf_checks=True)
    client.force_login(ana)
    before = as_they_are()
    for verb in ("POST", "PUT", "PATCH", "DELETE"):
        assert send(client, verb, name, ids).status_code == 403, (verb, name)
    assert as_they_are() == before


@pytest.mark.parametrize("name", ROUTES)
def test_a_token_that_may_only_read_changes_nothing(name, ids, ana):
    client = Client(headers={"Authorization": f"Bearer {issue(ana, 'x', ['read'])}"})
    before = as_they_are()
    for verb in ("POST", "PUT", "PATCH", "DELETE"):
        assert send(client, verb, name, ids).status_code == 403, (verb, name)
    assert as_they_are() == before


@pytest.mark.parametrize("name", OWNED)
def test_the_owner_is_never_told_that_it_is_not_there(name, ids, ana):
    """The same requests that are 404 for others: so the matrix above proves something."""
    client = Client()
    client.force_login(ana)
    for verb in ("GET", "HEAD", "PATCH"):
        reply = send(client, verb, name, ids)
        assert reply.status_code in {200, 400, 405}, (verb, name)
