"""Pages, admin, commands: what people see who are not API clients."""

from __future__ import annotations

import io
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.core.management import CommandError, call_command
from django.test import Client

from conversations.models import Conversation, Message
from fallback import answers

pytestmark = pytest.mark.django_db(transaction=True)


def signed_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def test_the_chat_page_tells_the_template_what_it_needs(ana):
    reply = signed_in(ana).get("/")
    assert reply.status_code == 200
    expected = {
        "conversation_id": None,
        "model_ready": True,
        "model_problem": "",
        "anonymous": False,
    }
    assert {key: reply.context[key] for key in expected} == expected
    assert reply.context["assistant_name"] and reply.context["examples"]
    assert "csrftoken" in reply.cookies


def test_who_sees_the_page_does_not_wait_for_the_rules_to_learn(ana, django_assert_num_queries):
    answers.forget()
    assert signed_in(ana).get("/").status_code == 200
    with django_assert_num_queries(0):
        answers.known()


def test_a_broken_model_is_named_to_staff_only(ana, sam, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["missing", "rules", "human"]}
    seen = {user.username: signed_in(user).get("/").context for user in (ana, sam)}
    assert not seen["ana"]["model_ready"] and not seen["sam"]["model_ready"]
    assert "missing" in seen["sam"]["model_problem"]
    assert seen["ana"]["model_problem"] == ""


def test_a_conversations_page_is_its_owners(ana, ben):
    conversation = Conversation.objects.create(user=ana)
    path = f"/c/{conversation.pk}/"
    assert signed_in(ana).get(path).context["conversation_id"] == conversation.pk
    assert signed_in(ben).get(path).status_code == 404


def test_visitors_are_sent_to_the_login_unless_they_are_welcome(settings):
    client = Client()
    assert client.get("/")["Location"] == "/accounts/login/?next=/"
    settings.ASSISTANT_ANONYMOUS = True
    assert client.get("/").context["anonymous"] is True


def test_the_session_cookies_value_is_stored_nowhere(settings):
    settings.ASSISTANT_ANONYMOUS = True
    client = Client()
    client.get("/")
    client.post("/api/v1/conversations/", "{}", "application/json")
    conversation = Conversation.objects.get()
    assert conversation.session_key
    assert conversation.session_key != client.cookies["sessionid"].value


@pytest.mark.parametrize("path", ["/", "/accounts/login/", "/admin/login/", "/nothing"])
def test_every_page_carries_the_policy_and_loads_nothing_from_elsewhere(path, ana, sam):
    client = Client() if "login" in path else signed_in(ana)
    reply = client.get(path)
    policy = reply["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "object-src 'none'" in policy
    assert "unsafe-inline" not in policy and "unsafe-eval" not in policy.replace("wasm-unsafe", "")
    assert reply["X-Content-Type-Options"] == "nosniff"
    assert reply["Cross-Origin-Opener-Policy"] == "same-origin"


def test_logging_out_is_a_post(ana):
    client = signed_in(ana)
    assert client.get("/accounts/logout/").status_code == 405
    assert client.post("/accounts/logout/").status_code == 302
    assert client.get("/").status_code == 302


def test_livez_needs_nothing(django_assert_num_queries):
    with django_assert_num_queries(0):
        assert Client().get("/livez").content == b"ok"


def test_no_error_page_shows_how_it_is_made(ana, settings):
    client = signed_in(ana)
    for path in ("/nothing", "/c/5/", "/api/v1/nothing/"):
        body = client.get(path).content.decode()
        assert "Traceback" not in body and "site-packages" not in body


# --- Admin ---------------------------------------------------------------------------------------


@pytest.fixture
def reader(sam: User) -> Client:
    names = ["view_conversation", "view_message"]
    sam.user_permissions.set(Permission.objects.filter(codename__in=names))
    return signed_in(sam)


@pytest.fixture
def talked(ana: User) -> Conversation:
    conversation = Conversation.objects.create(user=ana, title="<script>alert(1)</script>")
    conversation.messages.create(seq=1, role="user", text="where is <b>my</b> refund")
    conversation.messages.create(
        seq=2, role="assistant", text="soon", status="failed", route="model"
    )
    return conversation


ADMIN = "/admin/conversations/conversation/"


def test_staff_with_the_permission_read_and_search(reader, talked):
    page = reader.get(f"{ADMIN}{talked.pk}/change/").content.decode()
    assert "where is &lt;b&gt;my&lt;/b&gt; refund" in page
    assert "<script>alert" not in page
    for query, found in [
        ("?q=refund", 1),
        ("?q=ana", 1),
        ("?q=nothing", 0),
        ("?status=failed", 1),
        ("?status=stopped", 0),
        ("?route=model", 1),
        ("?route=rules", 0),
        ("?q=%25(.*%5B", 0),
    ]:
        assert reader.get(ADMIN + query).context["cl"].result_count == found, query
    assert reader.get("/admin/conversations/message/?q=refund").status_code == 200


def test_staff_without_the_permission_see_nothing(sam, talked):
    client = signed_in(sam)
    for path in (ADMIN, f"{ADMIN}{talked.pk}/change/", "/admin/conversations/message/"):
        assert client.get(path).status_code == 403


def test_nobody_changes_anything_not_even_a_superuser(sam, talked):
    sam.is_superuser = True
    sam.save()
    client = signed_in(sam)
    for path in (f"{ADMIN}add/", f"{ADMIN}{talked.pk}/delete/"):
        assert client.post(path, {"post": "yes"}).status_code == 403
    assert client.post(f"{ADMIN}{talked.pk}/change/", {"title": "x"}).status_code == 403
    assert Message.objects.count() == 2


def test_the_list_costs_the_same_for_any_number_of_rows(reader, ana, django_assert_max_num_queries):
    Conversation.objects.bulk_create(Conversation(user=ana, title=str(n)) for n in range(120))
    with django_assert_max_num_queries(10):
        assert reader.get(ADMIN).status_code == 200


def test_rules_and_reviewed_answers_are_edited_in_the_admin(sam):
    from fallback import answers

    sam.is_superuser = True
    sam.save()
    client = signed_in(sam)
    assert not answers.known().rules
    form = {"name": "r", "patterns": '["cancel"]', "answer": "So.", "priority": 0, "active": "on"}
    assert client.post("/admin/fallback/rule/add/", form).status_code == 302
    assert [rule.name for rule in answers.known().rules] == ["r"]
    form["name"], form["patterns"] = "bad", '{"a": 1}'
    assert client.post("/admin/fallback/rule/add/", form).status_code == 200
    for expected in (302, 200):  # the second time there is one already
        form = {"question": "Where IS it?", "answer": "There.", "active": "on"}
        assert client.post("/admin/fallback/reviewedanswer/add/", form).status_code == expected


# --- Commands ------------------------------------------------------------------------------------


def issued(*args: Any, **kwargs: Any) -> str:
    out = io.StringIO()
    call_command("issue_token", *args, stdout=out, **kwargs)
    return out.getvalue()


def test_issue_token_prints_a_token_that_works_and_nothing_else(ana):
    key = issued("ana")
    assert key == key.strip() + "\n"
    client = Client(headers={"Authorization": f"Bearer {key.strip()}"})
    assert client.get("/api/v1/conversations/").status_code == 200


def test_the_token_itself_is_not_stored(ana):
    from knox.models import AuthToken

    key = issued("ana").strip()
    (row,) = AuthToken.objects.values()
    assert key not in map(str, row.values())


@pytest.mark.parametrize(("args", "kwargs"), [(("nobody",), {}), (("ana",), {"days": 0})])
def test_issue_token_says_in_one_line_what_is_wrong(args, kwargs, ana):
    with pytest.raises(CommandError) as refused:
        issued(*args, **kwargs)
    assert "\n" not in str(refused.value)
