"""Every kind of error over HTTP, made to happen: each is a problem, and each is in the papers."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from config.asgi import application
from conversations import errors, views
from conversations.models import Conversation, Message
from conversations.running import running
from conversations.tokens import issue
from tests.conftest import ROOT
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db(transaction=True)

CHAT, NOBODY = "/v1/chat/completions", "00000000-0000-4000-8000-000000000000"
JSON = {"Accept": "application/json"}


@dataclass
class Stage:
    """Who can ask, and what can be set."""

    api: Api
    ana: User
    settings: Any
    monkeypatch: pytest.MonkeyPatch

    def ask(self, text: str, **more: Any) -> Any:
        """The model alone, so that its failure is an error."""
        said = [{"role": "user", "content": text}]
        return self.api("POST", CHAT, {"model": "model", "messages": said, **more})

    def page(self, method: str, path: str, **more: Any) -> Any:
        client = Client(raise_request_exception=False, **more)
        return client.generic(method, path, headers=JSON)

    def talk(self) -> str:
        return f"{API}{Conversation.objects.create(user=self.ana).pk}/messages/"


@pytest.fixture
def stage(stage: None, api: Api, ana: User, settings: Any, monkeypatch: Any) -> Stage:
    return Stage(api, ana, settings, monkeypatch)


def a_busy_conversation(stage: Stage) -> Any:
    path = stage.talk()
    held = Conversation.objects.get()
    held.messages.create(seq=1, role="user", text="a")
    running = Message.Status.STREAMING
    held.messages.create(seq=2, role="assistant", status=running, alive_at=timezone.now())
    return stage.api("POST", path, {"text": "hello"})


def a_name_of_another_request(stage: Stage) -> Any:
    path = stage.talk()
    stage.api.headers["Idempotency-Key"] = "x"
    stage.api("POST", path, {"text": "one"})
    return stage.api("POST", path, {"text": "two"})


def an_answer_written_elsewhere(stage: Stage) -> Any:
    path = stage.talk()
    stage.api.headers["Idempotency-Key"] = "x"
    stage.api("POST", path, {"text": "one"})
    running._ended.clear()  # as in another process
    Message.objects.filter(role="assistant").update(status="streaming", alive_at=timezone.now())
    return stage.api("POST", path, {"text": "one"})


def a_name_used_twice(stage: Stage) -> Any:
    path, named = stage.talk(), {**stage.api.headers, "Idempotency-Key": "one"}
    stage.api.headers = named
    stage.api("POST", path, {"text": "hello"})
    return stage.api("POST", path, {"text": "something else"})


def a_request_that_runs_elsewhere(stage: Stage) -> Any:
    path, named = stage.talk(), {**stage.api.headers, "Idempotency-Key": "one"}
    stage.api.headers = named
    stage.api("POST", path, {"text": "hello"})
    answers = Message.objects.filter(role="assistant")
    answers.update(status=Message.Status.STREAMING, alive_at=timezone.now())
    running._ended.clear()  # as in a process that never wrote it
    return stage.api("POST", path, {"text": "hello"})


def one_question_too_many(stage: Stage) -> Any:
    stage.settings.ASSISTANT_RATE = "1/m"
    stage.ask("one")
    return stage.ask("two")


def a_try_to_sign_in_too_many(stage: Stage) -> Any:
    stage.settings.ASSISTANT_LOGIN_RATE = "1/5m"
    for _ in range(2):
        reply = Client().post("/accounts/login/", {"username": "x", "password": "y"}, headers=JSON)
    return reply


def a_session_without_csrf(stage: Stage) -> Any:
    client = Client(enforce_csrf_checks=True)
    client.force_login(stage.ana)
    return client.post(API, "{}", content_type="application/json")


def a_page_without_csrf(stage: Stage) -> Any:
    return stage.page("POST", "/accounts/login/", enforce_csrf_checks=True)


def a_token_that_may_only_read(stage: Stage) -> Any:
    return Api(issue(stage.ana, "x", ["read"]))("POST", API, {})


def a_view_that_breaks(stage: Stage) -> Any:
    stage.monkeypatch.setattr(views, "own_conversation", lambda *_: 1 / 0)
    return stage.api("GET", f"{API}{Conversation.objects.create(user=stage.ana).pk}/")


def a_page_that_breaks(stage: Stage) -> Any:
    stage.monkeypatch.setattr(views, "caller_of_page", lambda *_: 1 / 0)
    return stage.page("GET", "/")


def another_host(stage: Stage) -> Any:
    return Client().get(API, headers={"Host": "evil.example"})


def no_model(stage: Stage) -> Any:
    stage.settings.ASSISTANT = {
        **stage.settings.ASSISTANT,
        "BACKENDS": {"gone": {"BACKEND": "nowhere.Backend"}},
        "ROUTE": ["gone"],
    }
    return stage.ask("hello")


def other_media(stage: Stage) -> Any:
    return stage.api.client.post(API, {"a": "b"}, headers=stage.api.headers)


#: what happens -> status, code and the request that it happens to
ERRORS: dict[str, tuple[int, str, Callable[[Stage], Any]]] = {
    "a bad field": (400, "invalid_request", lambda s: s.api("POST", API, {"title": 5})),
    "no JSON": (400, "invalid_request", lambda s: s.api("POST", API, raw=b"{")),
    "a bad query": (400, "invalid_request", lambda s: s.api("GET", f"{API}?ordering=x")),
    "a bad cursor": (404, "not_found", lambda s: s.api("GET", f"{API}?cursor=x")),
    "another host": (400, "invalid_request", another_host),
    "too long a question": (400, "context_too_long", lambda s: s.ask("x" * 4_001)),
    "no token": (401, "unauthenticated", lambda s: Api()("GET", API)),
    "a wrong token": (401, "unauthenticated", lambda s: Api("x" * 64)("GET", API)),
    "no token for the dialect": (401, "unauthenticated", lambda s: Api()("POST", CHAT, {})),
    "no token at no address": (401, "unauthenticated", lambda s: Api()("GET", "/v1/x")),
    "the schema": (401, "unauthenticated", lambda s: s.page("GET", "/api/schema/")),
    "no scope": (403, "permission_denied", a_token_that_may_only_read),
    "a session without CSRF": (403, "permission_denied", a_session_without_csrf),
    "a page without CSRF": (403, "permission_denied", a_page_without_csrf),
    "an unknown id": (404, "not_found", lambda s: s.api("GET", f"{API}{NOBODY}/")),
    "a bad id": (404, "not_found", lambda s: s.api("GET", f"{API}5/")),
    "no address": (404, "not_found", lambda s: s.api("GET", "/api/v1/nothing/")),
    "no address of an API": (404, "not_found", lambda s: s.api("GET", "/api/")),
    "no address of the dialect": (404, "not_found", lambda s: s.api("POST", "/v1/audio", {})),
    "no model of that name": (404, "not_found", lambda s: s.ask("hello", model="x")),
    "no page": (404, "not_found", lambda s: s.page("GET", "/nothing")),
    "another method": (405, "invalid_request", lambda s: s.api("DELETE", API)),
    "another method of the dialect": (405, "invalid_request", lambda s: s.api("GET", CHAT)),
    "a busy conversation": (409, "conflict", a_busy_conversation),
    "a repeated name": (409, "idempotency_conflict", an_answer_written_elsewhere),
    "a name of another request": (422, "idempotency_mismatch", a_name_of_another_request),
    "a name used twice": (422, "idempotency_mismatch", a_name_used_twice),
    "a request that runs elsewhere": (409, "idempotency_conflict", a_request_that_runs_elsewhere),
    "a large body": (413, "invalid_request", lambda s: s.api("POST", API, {"title": "x" * 70_000})),
    "a large body of the dialect": (413, "invalid_request", lambda s: s.ask("x" * 70_000)),
    "another media type": (415, "invalid_request", other_media),
    "too many questions": (429, "rate_limited", one_question_too_many),
    "too many tries to sign in": (429, "rate_limited", a_try_to_sign_in_too_many),
    "a view that breaks": (500, "internal", a_view_that_breaks),
    "a page that breaks": (500, "internal", a_page_that_breaks),
    "overload": (503, "overloaded", lambda s: s.ask("/echo fail=overloaded x")),
    "a model that broke": (503, "generation_failed", lambda s: s.ask("/echo error=0 x")),
    "no model": (503, "model_unavailable", no_model),
}  # fmt: skip
#: Told in the stored message, on sockets and in event streams only; or before Django is asked.
ELSEWHERE = {(503, "interrupted"), (431, "invalid_request")}


@pytest.mark.parametrize(("status", "code", "request_"), ERRORS.values(), ids=ERRORS)
def test_it_is_a_problem(status, code, request_, stage):
    reply = request_(stage)
    body = assert_problem(reply, status, code)
    assert body["error"]["type"] == errors.ERRORS[code].type
    assert body["error"]["message"] == body["detail"]
    told = f"{json.dumps(body)} {reply.headers}"
    assert not re.search(r"Traceback|File \\?\"|site-packages|daphne|uvicorn|Django", told)


@pytest.mark.parametrize("name", [name for name, row in ERRORS.items() if row[0] in {429, 503}])
def test_what_passes_says_when_to_try_again(name, stage):
    _, code, request_ = ERRORS[name]
    reply = request_(stage)
    if code != "model_unavailable" and name != "a model that broke":
        assert int(reply["Retry-After"]) > 0
    if name != "too many tries to sign in":
        assert reply["X-Should-Retry"] == ("false" if code == "model_unavailable" else "true")


def test_every_row_of_the_table_is_made_to_happen_and_nothing_else_happens():
    table = {
        (status, code)
        for code, row in errors.ERRORS.items()
        for status in (row.status, *(status for status, _ in row.also))
    }
    assert {(status, code) for status, code, _ in ERRORS.values()} | ELSEWHERE == table


def test_every_error_that_we_raise_has_a_row():
    from assistant import errors as raised

    def below(cls: type[Any]) -> set[type[Any]]:
        return {cls}.union(*(below(sub) for sub in cls.__subclasses__()))

    assert {cls.code for cls in below(raised.AssistantError)} <= set(errors.ERRORS)


def test_the_papers_say_what_the_table_says():
    paper = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert errors.errors_table() in paper, "copy conversations.errors.errors_table() there"


#: What no request is made of.
UNREAD: dict[str, tuple[int, dict[str, Any]]] = {
    "headers that nobody needs": (431, {"headers": [(b"x-%d" % n, b"y") for n in range(200)]}),
    "two lengths": (400, {"headers": [(b"content-length", b"1"), (b"transfer-encoding", b"x")]}),
    "an address that is no text": (400, {"query_string": b"search=\xff"}),
    "a body without an end": (413, {"method": "POST"}),
}


@pytest.mark.parametrize(("status", "scope"), UNREAD.values(), ids=UNREAD)
async def test_what_is_refused_before_there_is_a_request_is_a_problem_too(status, scope, caplog):
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 65_536, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    usual = {"type": "http", "path": API, "method": "GET", "headers": [], "query_string": b""}
    asked = {**usual, **scope}
    asked["headers"] = [*asked["headers"], (b"x-request-id", b"mine")]
    async with asyncio.timeout(5):
        await application(asked, receive, send)
    start, body = sent
    headers = dict(start["headers"])
    reply = HttpResponse(body["body"], status=start["status"])
    reply["Content-Type"] = headers[b"content-type"].decode()
    reply["X-Request-ID"] = headers[b"x-request-id"].decode()
    reply.json = lambda: json.loads(body["body"])  # type: ignore[attr-defined]
    assert assert_problem(reply, status, "invalid_request")["request_id"] == "mine"
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"connection"] == b"close"
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("accept", ["text/html", "text/html,application/json;q=0.9", "*/*", ""])
def test_people_get_pages(accept, ana):
    page = Client().get("/nothing", headers={"Accept": accept} if accept else {})
    assert page.status_code == 404 and page["Content-Type"].startswith("text/html")
    form = Client(enforce_csrf_checks=True).post("/accounts/login/", headers={"Accept": accept})
    assert form.status_code == 403 and form["Content-Type"].startswith("text/html")
