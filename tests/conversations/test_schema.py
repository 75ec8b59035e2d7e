"""The API's description is complete, up to date and true; and its pages are for people inside."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from django.test import Client
from drf_spectacular.generators import SchemaGenerator
from drf_spectacular.renderers import OpenApiYamlRenderer

from conversations import schema, wire
from conversations.models import Conversation, Message
from conversations.tokens import issue
from tests.conftest import ROOT
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db

PAPER = ROOT / "docs" / "openapi.yaml"
PAPER_TEXT = PAPER.read_text(encoding="utf-8")
DOCUMENT: dict[str, Any] = yaml.safe_load(PAPER_TEXT)
OPERATIONS = {
    (verb.upper(), path): operation
    for path, verbs in DOCUMENT["paths"].items()
    for verb, operation in verbs.items()
}


def test_the_paper_is_what_the_code_says():
    made = SchemaGenerator().get_schema(request=None, public=True)
    assert OpenApiYamlRenderer().render(made, renderer_context={}).decode() == PAPER_TEXT, (
        "Run: python manage.py spectacular --file docs/openapi.yaml"
    )


def test_it_is_openapi_3_1_and_every_operation_is_in_the_table():
    assert DOCUMENT["openapi"].startswith("3.1")
    assert len(OPERATIONS) == len(schema.OPERATIONS)
    assert all(operation["summary"] for operation in OPERATIONS.values())
    names = [operation["operationId"] for operation in OPERATIONS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("key", sorted(OPERATIONS), ids=" ".join)
def test_every_error_of_every_operation_is_a_problem(key):
    told = {int(code): reply for code, reply in OPERATIONS[key]["responses"].items()}
    assert {401, 403} <= set(told)
    verb, path = key
    paged = any(one["name"] == "cursor" for one in OPERATIONS[key].get("parameters", ()))
    model = path.startswith("/v1/") and verb == "POST"
    assert ("{" in path or paged or model) == (404 in told)
    if "requestBody" in OPERATIONS[key]:
        assert {400, 413, 415} <= set(told)
    for code, reply in told.items():
        if code >= 400:
            media = reply["content"]["application/problem+json"]
            assert media["schema"] == {"$ref": "#/components/schemas/Problem"}
            assert reply["description"]


def test_a_question_may_be_answered_as_events_and_erasing_takes_a_word():
    asks = OPERATIONS["POST", "/api/v1/conversations/{id}/messages/"]["responses"]
    assert set(asks["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"200", "400", "401", "403", "404", "409", "422", "429", "503"} <= set(asks)
    erase = OPERATIONS["DELETE", "/api/v1/me/data/"]["requestBody"]
    assert erase["content"]["application/json"]["schema"]["$ref"].endswith("/EraseBody")


def test_what_is_described_is_what_is_sent(ana, token_of):
    conversation = Conversation.objects.create(user=ana)
    message = Message(conversation=conversation, seq=1)

    def described(name: str) -> set[str]:
        return set(DOCUMENT["components"]["schemas"][name]["properties"])

    assert set(wire.conversation_json(conversation)) == described("Conversation")
    assert set(wire.message_json(message)) == described("Message")
    problem = wire.problem("not_found", 404, "x", None)
    assert set(problem) == described("Problem")
    assert set(problem["error"]) == described("ProblemError")
    assert set(problem["errors"][0]) == described("ProblemPart")
    page = Api(token_of(ana))("GET", API).json()
    assert set(page) == described("ConversationPage")


def test_the_pages_are_for_people_with_an_account(ana, settings):
    for accept in ("application/json", "*/*"):
        reply = Client(headers={"Accept": accept}).get("/api/schema/")
        assert_problem(reply, 401, "unauthenticated")
    assert Client().get("/api/docs/")["Location"] == "/accounts/login/?next=/api/docs/"
    settings.ASSISTANT_ANONYMOUS = True
    visitor = Client()
    visitor.get("/")
    assert visitor.get("/api/schema/").status_code in {401, 403}
    by_token = Api(issue(ana, "x", ["read"]))("GET", "/api/schema/")
    assert by_token.status_code == 200 and by_token.json() == DOCUMENT


def test_the_docs_load_nothing_from_elsewhere_and_keep_the_policy(ana):
    client = Client()
    client.force_login(ana)
    page = client.get("/api/docs/")
    html = page.content.decode()
    assert page.status_code == 200 and "https://" not in html and "<style" not in html
    assert html.count("<script") == html.count("<script src=") == 3
    policy = page["Content-Security-Policy"]
    assert "unsafe-inline" not in policy and "img-src 'self' data:" in policy
    script = client.get("/api/docs/?script=")
    assert script["Content-Type"].startswith("application/javascript")
    assert "/api/schema/" in script.content.decode()
