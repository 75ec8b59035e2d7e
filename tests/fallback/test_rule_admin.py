"""Rules in the admin: lines, tests on saving, a sentence to try, bulk switches with a history."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ValidationError
from django.test import Client
from django.utils import timezone

from fallback import answers, rulebook
from fallback.models import PolicyChange, Rule
from tests.conftest import ROOT

LIST = "/admin/fallback/rule/"


@pytest.fixture
def client(sam: User) -> Client:
    sam.is_superuser = True
    sam.save()
    client = Client()
    client.force_login(sam)
    return client


@pytest.fixture
def wrap(db: None) -> Rule:
    return Rule.objects.create(name="Gift wrap", patterns=["gift wrap"], answer="We do.")


def form(**changes: Any) -> dict[str, Any]:
    return {
        "name": "r",
        "patterns": "gift wrap",
        "answer": "So.",
        "priority": 0,
        "active": "on",
    } | (changes)


# --- One rule ------------------------------------------------------------------------------------


def test_lists_are_written_one_entry_a_line(client):
    lines = form(
        patterns="gift wrap\n\n  /gift ?card/ ",
        examples="Do you wrap, too?\nIs wrapping free?",
        buttons="Prices | What does wrapping cost?\nThanks",
    )
    assert client.post(f"{LIST}add/", lines).status_code == 302
    rule = Rule.objects.get()
    assert rule.patterns == ["gift wrap", "/gift ?card/"]
    assert rule.examples == ["Do you wrap, too?", "Is wrapping free?"]
    assert rule.buttons == [
        {"label": "Prices", "text": "What does wrapping cost?"},
        {"label": "Thanks", "text": "Thanks"},
    ]
    shown = client.get(f"{LIST}{rule.pk}/change/").content.decode()
    assert "Prices | What does wrapping cost?" in shown
    assert "gift wrap\n/gift ?card/" in shown


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"patterns": "/(/"}, "cannot be used"),
        ({"patterns": ""}, "it never answers"),
        ({"buttons": f"{'x' * 41} | y"}, "label has 1 to 40"),
        ({"must_match": "gift wrap\nblue cheese"}, "blue cheese&quot; should match"),
        ({"must_not_match": "a gift wrap"}, "a gift wrap&quot; should not match"),
    ],
)
def test_a_rule_that_is_wrong_or_fails_its_tests_is_not_saved(client, changes, fault):
    shown = client.post(f"{LIST}add/", form(**changes))
    assert shown.status_code == 200
    assert fault in shown.content.decode()
    assert not Rule.objects.exists()


def test_what_a_change_breaks_of_other_rules_is_told(client, wrap):
    Rule.objects.filter(pk=wrap.pk).update(must_match=["gift wrap please"])
    stealing = form(patterns="gift wrap please", priority=5)
    told = client.post(f"{LIST}add/", stealing, follow=True).content.decode()
    assert (
        "Fails: Gift wrap: &quot;gift wrap please&quot; should match, but went to &quot;r" in told
    )


# --- The list ------------------------------------------------------------------------------------


def test_a_sentence_is_tried_on_the_list(client, wrap):
    shown = client.get(LIST, {"try": "do you have gift wrap?", "active__exact": 1})
    text = shown.content.decode()
    assert shown.status_code == 200
    assert f'<a href="{LIST}{wrap.pk}/change/">Gift wrap</a> <strong>answers</strong>' in text
    assert "contains &quot;gift wrap&quot;" in text
    assert "from a score of 70 on" in text
    nothing = client.get(LIST, {"try": "<script>"}).content.decode()
    assert "Nothing speaks for any active rule" in nothing
    assert "<script>&rdquo;" not in nothing


def test_rules_are_searched_by_what_they_listen_for_and_filtered(client, wrap):
    Rule.objects.create(name="Other", keywords=["engrave ring"], answer="Yes.", active=False)
    for query, found in (
        ({"q": "gift wr"}, [True, False]),
        ({"q": "ENGRAVE"}, [False, True]),
        ({"q": "blue cheese"}, [False, False]),
        ({"active__exact": 1}, [True, False]),
    ):
        shown = client.get(LIST, query).content.decode()
        assert [f">{name}</a></th>" in shown for name in ("Gift wrap", "Other")] == found, query


def test_a_rule_whose_time_is_over_does_not_answer_a_tried_sentence(client, wrap):
    Rule.objects.update(active_until=timezone.now() - timedelta(hours=1))
    assert "<strong>answers" not in client.get(LIST, {"try": "gift wrap"}).content.decode()


def test_rules_are_switched_in_bulk_and_every_switch_is_in_the_history(client, sam, wrap):
    chosen = {"_selected_action": [wrap.pk]}
    told = client.post(LIST, {"action": "disable", **chosen}, follow=True).content.decode()
    assert "1 rules disabled." in told
    assert not Rule.objects.get().active
    assert not answers.known().rules
    client.post(LIST, {"action": "enable", **chosen})
    client.post(LIST, {"action": "enable", **chosen})  # nothing to do: nothing to note
    assert Rule.objects.get().active
    notes = LogEntry.objects.filter(object_id=str(wrap.pk), user=sam)
    assert [note.get_change_message() for note in notes] == ["Changed active."] * 2


def test_the_tests_of_selected_rules_are_run(client, wrap):
    run = {"action": "run_tests", "_selected_action": [wrap.pk]}
    assert "All tests pass." in client.post(LIST, run, follow=True).content.decode()
    Rule.objects.update(must_match=["blue cheese"])
    told = client.post(LIST, run, follow=True).content.decode()
    assert "Fails: Gift wrap: &quot;blue cheese&quot;" in told
    Rule.objects.update(active=False)
    asleep = client.post(LIST, run, follow=True).content.decode()
    assert "1 are not active and were not tested." in asleep


def test_who_may_only_look_can_try_a_sentence_but_switch_nothing(sam, wrap):
    sam.user_permissions.add(Permission.objects.get(codename="view_rule"))
    client = Client()
    client.force_login(sam)
    assert "<strong>answers" in client.get(LIST, {"try": "gift wrap"}).content.decode()
    client.post(LIST, {"action": "disable", "_selected_action": [wrap.pk]})
    assert Rule.objects.get().active


# --- Live in every process -----------------------------------------------------------------------


def test_a_book_is_kept_until_a_rule_changes(wrap, django_assert_num_queries):
    book = rulebook.current()
    with django_assert_num_queries(1):
        assert rulebook.current() is book
    for change in (
        lambda: wrap.save(),
        lambda: wrap.save(update_fields=["answer"]),
        lambda: Rule.objects.update(answer="b"),
        lambda: Rule.objects.bulk_create([Rule(name="s", patterns=["s"], answer="s")]),
        lambda: Rule.objects.filter(name="s").delete(),
    ):
        change()
        fresh = rulebook.current()
        assert fresh is not book
        book = fresh


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
def test_a_change_in_another_process_is_noticed(database_file):
    Rule.objects.create(name="Gift wrap", patterns=["gift wrap"], answer="We do.")
    assert rulebook.current()[0].answer == "We do."
    program = (
        "import django; django.setup(); from fallback.models import Rule; "
        "Rule.objects.update(answer='We did.')"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        check=True,
        env={
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "DATABASE_URL": f"sqlite:///{database_file}",
            "SECRET_KEY": django_settings.SECRET_KEY,
            "ASSISTANT_DATA_DIR": str(database_file.parent),
        },
    )
    assert rulebook.current()[0].answer == "We did."


def test_a_rule_without_a_reason_to_answer_or_with_a_wrong_span_is_no_rule(db):
    now = timezone.now()
    with pytest.raises(ValidationError) as refused:
        Rule(name="x", answer="{{", active_from=now, active_until=now).full_clean()
    assert refused.value.message_dict.keys() == {"patterns", "answer", "active_until"}


def test_a_sentence_and_the_tests_are_tried_at_the_score_in_force(client: Client) -> None:
    Rule.objects.create(
        name="gift", keywords=["wrap"], answer="We wrap.", must_match=["can you wrap it"]
    )
    page = client.get(LIST, {"try": "can you wrap it"})
    assert not page.context["found"][0]["answers"]
    assert len(rulebook.failing(rulebook.current())) == 1
    PolicyChange.objects.create(rule_score=20)
    page = client.get(LIST, {"try": "can you wrap it"})
    assert page.context["found"][0]["answers"] and page.context["needed"] == "20"
    assert rulebook.failing(rulebook.current()) == []
