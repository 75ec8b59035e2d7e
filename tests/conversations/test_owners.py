"""Who reaches what, generated from the URL resolver: no route can be forgotten here.

A route that is new appears by itself, and fails until ``KINDS`` says whose it is.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import User
from django.test import Client
from django.urls import URLPattern, URLResolver, get_resolver, reverse

from conversations.models import Conversation, Feedback, Message
from conversations.tokens import issue

pytestmark = pytest.mark.django_db

VERBS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
CANARY = "canary-of-ana"
SAID = {"messages": [{"role": "user", "content": "hello"}]}
#: A body that is right for every route that takes one; a route refuses what it does not know.
BODIES: dict[str, dict[str, Any]] = {
    "conversation": {"title": "taken"},
    "messages": {"text": "hello"},
    "message-edit": {"text": "hello"},
    "message-feedback": {"value": "up"},
    "own-data": {"confirm": "erase my data"},
    "chat-completions": SAID,
    "responses": {"input": "hello"},
    "embeddings": {"input": "hello"},
}
#: Whose a route is: ``owned`` (it names a thing of somebody's), ``own`` (everybody finds what is
#: theirs), ``page`` (the same, by login only), ``owned page``, ``public`` (of nobody).
KINDS: dict[str, str] = {
    "chat": "page",
    "chat-conversation": "owned page",
    "conversations": "own",
    "conversation": "owned",
    "conversation-export": "owned",
    "own-export": "own",
    "own-data": "own",
    "messages": "owned",
    "own-messages": "own",
    "message-cancel": "owned",
    "message-hurry": "owned",
    "message-regenerate": "owned",
    "message-edit": "owned",
    "message-feedback": "owned",
    "message-events": "owned",
    "chat-completions": "own",
    "responses": "own",
    "embeddings": "own",
    "models": "own",
    "model": "own",
    "elsewhere": "own",
    "schema": "own",
    "docs": "page",
    "tokens": "page",
    "own-data-page": "page",
    "login": "public",
    "logout": "public",
    **dict.fromkeys(("livez", "readyz", "healthz", "health", "metrics"), "public"),
}


def routes() -> dict[str, str]:
    """All routes of the site by name, with the pattern of their path."""

    def walk(resolver: URLResolver, before: str = "", space: str = "") -> dict[str, str]:
        found: dict[str, str] = {}
        for pattern in resolver.url_patterns:
            path = before + str(pattern.pattern)
            if isinstance(pattern, URLResolver):
                found |= walk(pattern, path, space or pattern.namespace or "")
            elif isinstance(pattern, URLPattern):
                name = pattern.name or path
                found[f"{space}:{name}" if space else name] = path
        return found

    return walk(get_resolver())


ALL = routes()
ROUTES = [name for name, path in ALL.items() if path.startswith(("api/v1/", "v1/", "^v1"))]
OWNED = [name for name, kind in KINDS.items() if kind == "owned"]
STAFF = [name for name, path in ALL.items() if path.startswith("admin/")]


@pytest.fixture
def ids(ana: User) -> dict[str, Any]:
    conversation = Conversation.objects.create(user=ana, title=CANARY)
    asked = conversation.messages.create(seq=1, role="user", text=CANARY)
    answer = conversation.messages.create(seq=2, role="assistant", text=CANARY, parent=asked)
    given = Feedback.objects.create(message=answer, value="down", text=CANARY)
    found = {"conversation": conversation.pk, "question": asked.pk, "answer": answer.pk}
    return {**found, "feedback": given.pk}


def path_of(name: str, ids: dict[str, Any]) -> str:
    if name.startswith("message-") and name != "message-edit":
        return reverse(name, args=[ids["answer"]])
    if name == "message-edit":
        return reverse(name, args=[ids["question"]])
    if name == "elsewhere":
        return "/v1/nothing"
    if name == "model":
        return reverse(name, args=["local"])
    if KINDS[name].startswith("owned"):
        return reverse(name, args=[ids["conversation"]])
    return reverse(name)


def send(client: Client, verb: str, name: str, ids: dict[str, Any]) -> Any:
    body = json.dumps(BODIES.get(name, {})) if verb not in ("GET", "HEAD", "OPTIONS") else ""
    return client.generic(verb, path_of(name, ids), body, content_type="application/json")


def as_they_are() -> list[Any]:
    """All that is ana's."""
    return [
        list(Conversation.objects.filter(user__username="ana").values()),
        list(Message.objects.filter(conversation__user__username="ana").values()),
        list(Feedback.objects.filter(message__conversation__user__username="ana").values()),
    ]


def content_of(reply: Any) -> str:
    """All of it, streamed or not."""
    if not reply.streaming:
        return str(reply.content.decode())

    async def read() -> bytes:
        return b"".join([part async for part in reply.streaming_content])

    return async_to_sync(read)().decode() if reply.is_async else reply.getvalue().decode()


def client_of(user: User, by: str) -> Client:
    """A client that is signed in, or one with a token that may do everything."""
    client = Client()
    if by == "session":
        client.force_login(user)
    else:
        client.defaults["HTTP_AUTHORIZATION"] = f"Bearer {issue(user, 'x', ['read', 'chat'])}"
    return client


def test_whose_every_route_is_has_been_said() -> None:
    assert set(ALL) == set(KINDS) | set(STAFF), "say in KINDS whose the new route is"
    assert set(BODIES) <= set(ROUTES) and set(OWNED) <= set(ROUTES)
    assert len(STAFF) > 20 and all(KINDS[name] in {"own", "owned"} for name in ROUTES)


@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("who", ["ben", "sam"])
@pytest.mark.parametrize("name", OWNED)
def test_what_is_anothers_is_not_there_for_customers_and_staff(name, who, by, ids, request):
    """404 for every verb that the route has, 405 for the others; nothing seen, nothing changed."""
    client = client_of(request.getfixturevalue(who), by)
    before, seen = as_they_are(), set()
    for verb in VERBS:
        reply = send(client, verb, name, ids)
        assert reply.status_code in ({200} if verb == "OPTIONS" else {404, 405}), (verb, name)
        assert CANARY not in content_of(reply)
        seen.add(reply.status_code)
    assert 404 in seen
    assert as_they_are() == before


@pytest.mark.django_db(transaction=True)  # an export reads in a thread of its own
@pytest.mark.parametrize("by", ["session", "token"])
@pytest.mark.parametrize("who", ["ben", "sam"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "own"])
def test_everybody_finds_only_what_is_theirs(name, who, by, ids, request):
    client = client_of(request.getfixturevalue(who), by)
    before, seen = as_they_are(), set()
    for verb in VERBS:
        reply = send(client, verb, name, ids)
        assert reply.status_code in {200, 201, 404, 405}, (verb, name, reply.status_code)
        assert CANARY not in content_of(reply)
        seen.add(reply.status_code)
    assert name == "elsewhere" or seen & {200, 201}, "nothing of it was there for them"
    assert as_they_are() == before


@pytest.mark.parametrize("who", ["nobody", "ben", "sam", "token"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if "page" in kind])
def test_pages_are_for_who_is_signed_in_and_show_nothing_of_anothers(name, who, ids, request):
    """A token opens no page."""
    client = Client()
    if who == "token":
        client = client_of(request.getfixturevalue("ana"), "token")
    elif who != "nobody":
        client = client_of(request.getfixturevalue(who), "session")
    before = as_they_are()
    for verb in VERBS:
        reply = send(client, verb, name, ids)
        content = content_of(reply)
        assert CANARY not in content and str(ids["conversation"]) not in content.replace(
            f"/c/{ids['conversation']}/", ""
        )
        if who in {"nobody", "token"}:
            bare = verb == "OPTIONS" and not content  # which methods there are
            assert bare or reply.status_code in {302, 403, 405}, (verb, name, reply.status_code)
            assert reply.status_code != 302 or reply["Location"].startswith("/accounts/login/")
        elif "owned" in KINDS[name]:
            assert reply.status_code in {404, 405}, (verb, name, reply.status_code)
    assert as_they_are() == before


@pytest.mark.parametrize("who", ["nobody", "ben", "sam"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind == "public"])
def test_what_is_public_knows_nobody(name, who, ids, request):
    client = Client() if who == "nobody" else client_of(request.getfixturevalue(who), "session")
    before = as_they_are()
    for verb in VERBS:
        reply = send(client, verb, name, ids)
        content = content_of(reply)
        assert reply.status_code != 500
        assert CANARY not in content and str(ids["answer"]) not in content
    assert as_they_are() == before


@pytest.mark.parametrize("who", ["nobody", "ben", "sam", "token"])
@pytest.mark.parametrize("name", STAFF)
def test_the_admin_shows_and_changes_nothing_without_permission(name, who, ids, request):
    """Nobody but staff sees more than the way to the login, and staff only its empty index."""
    client = Client()
    if who == "token":
        client = client_of(request.getfixturevalue("sam"), "token")
    elif who != "nobody":
        client = client_of(request.getfixturevalue(who), "session")
    before = as_they_are()
    for verb in VERBS:
        reply = client.generic(verb, admin_path(name, ids), "{}", "application/json")
        assert CANARY not in content_of(reply), (verb, name)
        if who != "sam" and name not in {"admin:login", "admin:jsi18n"}:
            assert reply.status_code in {302, 405}, (verb, name, reply.status_code)
            assert (
                reply.status_code != 302
                or "/login/" in reply["Location"]
                or (name == "admin:logout")
            )
        elif who == "sam" and name.startswith("admin:conversations"):
            gone = reply.status_code == 302 and reply["Location"] == "/admin/"  # no such row
            assert gone or reply.status_code in {403, 405}, (verb, name, reply.status_code)
        assert reply.status_code < 500
    assert as_they_are() == before


def admin_path(name: str, ids: dict[str, Any]) -> str:
    """The path with the ids of what is ana's where it takes one."""
    path = "/" + ALL[name].replace("^", "").replace("$", "").replace("\\Z", "")
    of = {"conversation": "conversation", "message": "answer", "feedback": "feedback"}
    kind = next((kind for kind in of if f"conversations/{kind}/" in path), "")
    row = ids[of[kind]] if kind else "1"
    for old, new in (
        ("<path:object_id>", str(row)),
        ("<path:content_type_id>", "1"),
        ("<id>", "1"),
        ("<app_label>", "conversations"),
    ):
        path = path.replace(old, new)
    return path


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
