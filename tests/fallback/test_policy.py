"""The policy in force, what explains it, and the page where staff change it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.urls import reverse

from assistant.errors import InvalidRequest
from assistant.types import Message, Params, Started
from fallback import answers, breaker, explain, router
from fallback.matching import Book, Ranked
from fallback.models import PolicyChange, ReviewedAnswer, Rule
from fallback.policy import policy
from fallback.router import Ask
from fallback.rules import RuleText

pytestmark = pytest.mark.django_db(transaction=True)
PAGE = "admin:fallback_policychange_changelist"


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    answers.forget()
    yield
    answers.forget()


def test_the_newest_active_change_is_in_force_and_another_name() -> None:
    assert answers.known().policy is None
    PolicyChange.objects.create(confidence_min=0.5)
    PolicyChange.objects.create(rule_score=90)
    PolicyChange.objects.create(steps=["rules"], active=False)
    in_force = answers.known().policy
    assert in_force is not None
    assert (in_force.confidence_min, in_force.rule_score) == (0.0, 90.0)
    assert in_force.steps == policy().steps and in_force.name != policy().name


@pytest.mark.parametrize("steps", [["nobody"], ["rules", "rules"], "rules", [1]])
def test_steps_that_nobody_knows_are_refused(steps: object) -> None:
    with pytest.raises(ValidationError):
        PolicyChange(steps=steps).full_clean()


def test_steps_of_the_settings_and_backends_are_known() -> None:
    PolicyChange(steps=["rules", "echo", "cache", "stale", "reviewed", "human"]).full_clean()


# --- Explaining -----------------------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    call_command("explain", *args)
    return capsys.readouterr().out


def test_every_step_is_shown_with_its_score_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    Rule.objects.create(name="cancel", patterns=["cancel my order"], answer="Go to orders.")
    rungs = json.loads(told(capsys, "/echo confidence=0.2 cancel my order", "--json"))
    by_step = {rung["step"]: rung for rung in rungs}
    assert list(by_step) == ["reviewed", "cache", "echo", "stale", "rules", "human"]
    assert not by_step["echo"]["answers"] and by_step["echo"]["score"] == 0.2
    assert "hands on" in by_step["echo"]["why"]
    assert by_step["rules"]["answers"] and by_step["rules"]["text"] == "Go to orders."


def test_who_wants_a_person_is_answered_by_the_rule_that_asks_one() -> None:
    rule = RuleText("person", (), "One is asked.", "contact_human_agent", hand_over=True)
    ask = Ask((Message("user", "somebody real"),), Params(), answers.Known((rule,), {}))
    wanted = Started("m", intent="contact_human_agent", confidence=0.9, band="answer")
    rung = explain._judged("model", wanted, ask)
    assert rung.answers and rung.text == "One is asked." and '"person" says so' in rung.why
    unsure = explain._judged("model", replace(wanted, band="hand_on"), ask)
    assert not unsure.answers and not unsure.text


def test_the_step_that_answers_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    ReviewedAnswer.objects.create(question="Do you ship to Mars?", answer="Not yet.")
    lines = told(capsys, "do you ship to mars").splitlines()
    assert lines[0].split()[:2] == ["reviewed", "answers"]
    assert lines[1].strip() == "Not yet."
    assert "would" in lines[-1]


def test_explaining_stores_nothing_and_counts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from conversations.models import Conversation

    for _ in range(3):
        told(capsys, "hello")
    assert not Conversation.objects.exists()
    assert breaker.states()["echo"] == 0


@pytest.mark.parametrize("text", ["", "  ", "x" * 4001])
def test_a_question_nobody_could_ask_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        explain.first_question(text)
    with pytest.raises(CommandError, match="1 to 4,000 characters"):
        call_command("explain", text)


@pytest.mark.parametrize("band", ["answer", "caution", "hand_on", "out_of_scope"])
@pytest.mark.parametrize("confidence", [None, 0.3, 0.6])
@pytest.mark.parametrize("least", [0.0, 0.5])
def test_a_model_is_said_to_answer_exactly_if_it_would(
    band: Any, confidence: float | None, least: float
) -> None:
    started = Started("m", intent="get_refund", confidence=confidence, band=band)
    known = answers.Known((), {}, policy=policy({"confidence_min": least}))
    rung = explain._judged("model", started, Ask((Message("user", "hi"),), Params(), known))
    try:
        router._judge(started, least, alone=False)
        answered = True
    except router._HandOn:
        answered = False
    assert rung.answers is answered, rung.why


async def test_a_rule_is_said_to_answer_exactly_if_it_would(monkeypatch: Any) -> None:
    rule = RuleText("cancel", ("cancel my order",), "Go to orders.")
    monkeypatch.setattr(Book, "rank", lambda *_, **__: [Ranked(rule, 59.6, ("by a hair",))])
    for least, answers_it in ((60.0, True), (61.0, False)):
        known = answers.Known(Book([rule]), {}, policy=policy({"rule_score": least}))
        ask = Ask((Message("user", "cancel it"),), Params(), known)
        assert (router._rule(ask) is not None) is answers_it
        assert (await explain._rules(ask)).answers is answers_it


def test_a_larger_model_that_lacks_its_address_is_not_said_to_answer(
    settings: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"BACKEND": "fallback.upstream.UpstreamBackend",
             "OPTIONS": {"base_url": "http://example.com/v1", "model": "big"}}  # fmt: skip
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BACKENDS": {**settings.ASSISTANT["BACKENDS"], "upstream": entry},
        "ROUTE": ["upstream", "rules"],
        "UPSTREAM": {"CALLS_PER_DAY": 10, "CALLS_PER_USER_DAY": 10, "CONSENT": "all"},
    }
    rung = json.loads(told(capsys, "hello", "--json"))[0]
    assert not rung["answers"] and "must be https" in rung["why"]


# --- The page -------------------------------------------------------------------------------------


def test_staff_try_a_sentence_and_see_every_step(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    page = client.get(reverse(PAGE), {"try": "<b>hello</b>"}).content.decode()
    assert "Who would answer" in page and "&lt;b&gt;hello" in page and "<b>hello" not in page
    for step in policy().steps:
        assert f'<th scope="row">{step}</th>' in page


def test_a_backend_is_taken_off_and_back_and_written_down(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    client.post(reverse("admin:fallback_force"), {"target": "echo", "state": "open", "note": "x"})
    assert breaker.states()["echo"] == 2
    assert "forced open" in LogEntry.objects.latest("pk").change_message
    client.post(reverse("admin:fallback_force"), {"target": "echo", "state": ""})
    assert breaker.states()["echo"] == 0


@pytest.mark.parametrize(
    "told",
    [{"target": "nobody", "state": "open"}, {"state": "open"}, {"target": "echo", "state": "?"}],
)
def test_a_wrong_form_changes_nothing(client: Any, admin_user: Any, told: dict[str, str]) -> None:
    client.force_login(admin_user)
    page = client.post(reverse("admin:fallback_force"), told, follow=True)
    assert "error" in [message.level_tag for message in page.context["messages"]]
    assert breaker.states()["echo"] == 0


def test_kept_answers_are_purged_and_it_is_written_down(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    page = client.post(reverse("admin:fallback_purge"), {"intent": "get_refund"}, follow=True)
    assert "not given again" in page.content.decode()
    assert LogEntry.objects.latest("pk").change_message == "purged kept answers: intent"


def test_a_policy_under_which_rules_fail_their_tests_says_so(client: Any, admin_user: Any) -> None:
    Rule.objects.create(name="r", keywords=["wrap"], answer="Yes.", must_match=["can you wrap it"])
    client.force_login(admin_user)
    told = []
    for score in (20, 90):
        form = {"active": "on", "rule_score": score, "steps": "null"}
        page = client.post(reverse("admin:fallback_policychange_add"), form, follow=True)
        told.append([m.message for m in page.context["messages"] if m.level_tag == "warning"])
    assert PolicyChange.objects.count() == 2 and told[0] == []
    assert "1 tests of rules fail" in told[1][0] and '"can you wrap it" should' in told[1][0]


@pytest.mark.parametrize("name", ["admin:fallback_force", "admin:fallback_purge"])
def test_who_may_not_change_policies_changes_nothing(client: Any, sam: Any, name: str) -> None:
    sam.is_superuser = False
    sam.user_permissions.clear()
    sam.save()
    client.force_login(sam)
    assert client.post(reverse(name), {"target": "echo", "state": "open"}).status_code == 403
    assert client.get(reverse(name)).status_code in {403, 405}
    assert breaker.states()["echo"] == 0
