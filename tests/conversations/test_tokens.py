"""API tokens: made on a page, shown once, held to their scopes, revoked."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from knox.models import AuthToken

from conversations.models import ApiToken, Conversation
from conversations.tokens import MAX_TOKENS, issue
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db

PAGE = "/accounts/tokens/"
FORM = {"name": "<b>ci</b>", "days": 30, "scopes": ["read"]}


@pytest.fixture
def page(ana: User) -> Client:
    client = Client()
    client.force_login(ana)
    return client


def key_on(reply: Any) -> str:
    return re.search(r'id="new-token"[^>]* value="([^"]+)"', reply.content.decode()).group(1)


def test_a_token_is_made_shown_once_listed_and_revoked(page, ana):
    reply = page.post(PAGE, FORM)
    assert reply.status_code == 200 and "no-store" in reply["Cache-Control"]
    key = key_on(reply)
    assert Api(key)("GET", API).status_code == 200
    again = page.get(PAGE).content.decode()
    assert key not in again and "new-token" not in again
    assert "&lt;b&gt;ci&lt;/b&gt;" in again and "<b>ci" not in again
    assert "last used" in again
    token = AuthToken.objects.get()
    assert timedelta(days=29) < token.expiry - timezone.now() <= timedelta(days=30)
    assert page.post(PAGE, {"revoke": token.digest})["Location"] == PAGE
    assert "You have no tokens." in page.get(PAGE).content.decode()
    assert_problem(Api(key)("GET", API), 401, "unauthenticated")


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": "x" * 61},
        {"name": "a\x00b"},
        {"days": 0},
        {"days": 366},
        {"days": "x"},
        {"scopes": []},
        {"scopes": ["admin"]},
        {"scopes": ["read", "root"]},
    ],
)
def test_a_bad_form_makes_nothing_and_says_why(change, page):
    reply = page.post(PAGE, {**FORM, **change})
    assert reply.status_code == 400 and "form-error" in reply.content.decode()
    assert AuthToken.objects.count() == ApiToken.objects.count() == 0


def test_staff_may_make_an_admin_token_which_ends_with_their_being_staff(sam):
    client = Client()
    client.force_login(sam)
    key = key_on(client.post(PAGE, {**FORM, "scopes": ["read", "admin"]}))
    token = AuthToken.objects.get()
    assert ApiToken.objects.use(token) == {"read", "admin"}
    User.objects.filter(pk=sam.pk).update(is_staff=False)
    assert ApiToken.objects.use(AuthToken.objects.get()) == {"read"}
    assert Api(key)("GET", API).status_code == 200


def test_nobody_revokes_or_sees_the_tokens_of_another(page, ben):
    issue(ben, "ben's own", ["read"])
    assert "ben" not in page.get(PAGE).content.decode().replace("benefit", "")
    assert page.post(PAGE, {"revoke": AuthToken.objects.get().digest}).status_code == 404
    assert page.post(PAGE, {"revoke": "x" * 9_999}).status_code == 404
    assert AuthToken.objects.count() == 1


def test_there_is_a_most_number_of_tokens(page, ana):
    for n in range(MAX_TOKENS):
        issue(ana, str(n), ["read"])
    assert page.post(PAGE, FORM).status_code == 400
    AuthToken.objects.filter(user=ana).update(expiry=timezone.now())
    assert page.post(PAGE, FORM).status_code == 200


def test_the_page_is_for_people_who_signed_in_and_posts_carry_csrf(ana, page):
    assert Client().get(PAGE)["Location"] == f"/accounts/login/?next={PAGE}"
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(ana)
    assert strict.post(PAGE, FORM).status_code == 403
    bearer = Client(headers={"Authorization": f"Bearer {issue(ana, 'x', ['read', 'chat'])}"})
    assert bearer.post(PAGE, FORM).status_code == 302  # a token cannot make tokens


def test_a_token_does_what_its_scopes_say_and_nothing_else(ana):
    conversation = Conversation.objects.create(user=ana)
    path = f"{API}{conversation.pk}/"
    reads, chats = (Api(issue(ana, scope, [scope])) for scope in ("read", "chat"))
    assert reads("GET", path).status_code == chats("PATCH", path, {"title": "x"}).status_code == 200
    for api, method, body, needed in [
        (reads, "PATCH", {"title": "y"}, "chat"),
        (reads, "DELETE", None, "chat"),
        (chats, "GET", None, "read"),
        (chats, "OPTIONS", None, "read"),
    ]:
        body = assert_problem(api(method, path, body), 403, "permission_denied")
        assert f'"{needed}"' in body["detail"]
    posted = reads("POST", f"{path}messages/", {"text": "hello"})
    assert_problem(posted, 403, "permission_denied")
    assert conversation.messages.count() == 0


def test_a_token_made_by_other_means_may_what_its_user_may(ana, token_of):
    key = token_of(ana)
    assert ApiToken.objects.count() == 0
    assert Api(key)("POST", API, {}).status_code == 201
    assert ApiToken.objects.get().scopes == ["read", "chat"]


def test_the_last_use_is_noted_at_most_once_a_minute(ana):
    api = Api(issue(ana, "x", ["read"]))
    assert ApiToken.objects.get().last_used_at is None
    api("GET", API)
    first = ApiToken.objects.get().last_used_at
    api("GET", API)
    assert ApiToken.objects.get().last_used_at == first is not None
    ApiToken.objects.update(last_used_at=first - timedelta(minutes=2))
    api("GET", API)
    assert ApiToken.objects.get().last_used_at > first - timedelta(minutes=1)


def test_a_users_expired_tokens_are_cleared_away_when_a_use_is_noted(ana):
    api, old = Api(issue(ana, "x", ["read"])), Api(issue(ana, "old", ["read"]))
    api("GET", API)
    past = timezone.now() - timedelta(seconds=1)
    AuthToken.objects.filter(grant__name="old").update(expiry=past)
    api("GET", API)
    assert AuthToken.objects.count() == 2  # looked at once a minute
    ApiToken.objects.filter(name="x").update(last_used_at=past - timedelta(minutes=1))
    api("GET", API)
    assert AuthToken.objects.get().grant.name == "x"
    assert_problem(old("GET", API), 401, "unauthenticated")


def test_a_token_that_expired_a_moment_ago_opens_nothing_and_is_gone(ana):
    api = Api(issue(ana, "x", ["read"]))
    assert api("GET", API).status_code == 200
    AuthToken.objects.update(expiry=timezone.now() - timedelta(seconds=1))
    assert_problem(api("GET", API), 401, "unauthenticated")
    assert not AuthToken.objects.exists()


@pytest.mark.parametrize("scopes", [["read"], ["chat"], []])
def test_a_socket_opens_only_for_a_token_that_may_chat(scopes, ana):
    from conversations.access import caller_of_socket

    key = issue(ana, "x", scopes)
    scope = {"headers": [(b"authorization", f"Bearer {key}".encode())], "client": ("::1", 1)}
    assert (caller_of_socket(scope) is not None) == ("chat" in scopes)
