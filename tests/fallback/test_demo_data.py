"""The demo's rules, reviewed answers and conversations, as ``loaddata`` brings them in."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command

from assistant.facts import PLAIN_WORDS
from assistant.modelkit import corpus, labels
from conversations import markdown
from conversations.models import Conversation, Message
from fallback import answers, rulebook
from fallback.matching import sure
from fallback.models import ReviewedAnswer, Rule
from fallback.rules import RuleText, is_expression, normalise


@pytest.fixture
def known(db: None) -> answers.Known:
    """What staff of the demo wrote, as the router gets it."""
    call_command("loaddata", "demo_rules", "demo_reviewed", verbosity=0)
    return answers.known()


@pytest.fixture
def talks(ana: User, ben: User) -> None:
    call_command("loaddata", "demo_conversations", verbosity=0)


def test_the_rules_and_reviewed_answers_can_be_loaded_again(known: answers.Known) -> None:
    before = Rule.objects.count(), ReviewedAnswer.objects.count()
    call_command("loaddata", "demo_rules", "demo_reviewed", verbosity=0)
    assert (Rule.objects.count(), ReviewedAnswer.objects.count()) == before == (37, 8)


def test_every_row_is_one_that_staff_could_save(known: answers.Known) -> None:
    for row in (*Rule.objects.all(), *ReviewedAnswer.objects.all()):
        row.full_clean()


def test_every_intent_has_exactly_one_rule(known: answers.Known) -> None:
    assert Counter(rule.intent for rule in known.rules) == Counter(labels.INTENTS)


def first(question: str, known: answers.Known) -> RuleText | None:
    found = sure(question, known.rules, score=settings.ASSISTANT["RULE_SCORE"])
    return found[0].rule if found else None


def test_every_rule_answers_its_own_patterns(known: answers.Known) -> None:
    stolen = {
        pattern: found.name if found else None
        for rule in known.rules
        for pattern in rule.patterns
        if not is_expression(pattern) and (found := first(pattern, known)) is not rule
    }
    assert stolen == {}


def test_every_rule_carries_tests_and_all_of_them_pass(known: answers.Known) -> None:
    for rule in known.rules:
        assert len(rule.must_match) >= 2 and len(rule.must_not_match) >= 2, rule.name
    assert rulebook.failing(rulebook.current()) == []


def test_every_button_asks_what_another_rule_answers(known: answers.Known) -> None:
    for rule in known.rules:
        for button in rule.buttons:
            assert first(button.text, known) not in (None, rule), button


def test_a_person_is_asked_for_by_the_rule_about_persons_alone(known: answers.Known) -> None:
    assert [rule.intent for rule in known.rules if rule.hand_over] == ["contact_human_agent"]


def test_rules_alone_answer_most_natural_questions_and_rarely_wrongly(known: answers.Known) -> None:
    """Measured: 96 % right of what they say, 85 % of the shop's questions answered rightly."""
    rows = [(row["text"], row["intent"]) for row in corpus.written("natural_dev")]
    said = [
        (rule.intent, wanted)
        for text, wanted in rows
        if (rule := first(text, known)) and rule.intent != labels.OUT_OF_SCOPE
    ]
    right = sum(intent == wanted for intent, wanted in said)
    shop = sum(wanted != labels.OUT_OF_SCOPE for _, wanted in rows)
    assert right / len(said) >= 0.94
    assert right / shop >= 0.82


def test_answers_use_only_known_placeholders(known: answers.Known) -> None:
    texts = [rule.answer for rule in known.rules] + [r.answer for r in known.reviewed.values()]
    for text in texts:
        assert set(re.findall(r"\{\{(.*?)\}\}", text)) <= PLAIN_WORDS.keys(), text
        assert text.count("{") == text.count("}") == 2 * text.count("{{"), text


def test_a_reviewed_answer_is_found_by_its_question(known: answers.Known) -> None:
    for row in ReviewedAnswer.objects.all():
        assert row.normalised == normalise(row.question)
        found = known.reviewed_for(row.question.upper() + " ")
        assert found is not None
        assert found.answer == row.answer
        assert found.intent in labels.INTENTS


def test_the_conversations_can_be_loaded_again(talks: None) -> None:
    before = Conversation.objects.count(), Message.objects.count()
    call_command("loaddata", "demo_conversations", verbosity=0)
    assert (Conversation.objects.count(), Message.objects.count()) == before == (6, 24)
    assert Conversation.objects.filter(user__username="ana").count() == 4


def test_the_conversations_are_stored_as_real_ones_are(talks: None) -> None:
    for conversation in Conversation.objects.all():
        rows = list(conversation.messages.order_by("seq"))
        assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
        assert [row.role for row in rows] == ["user", "assistant"] * (len(rows) // 2)
        assert conversation.title == rows[0].text[:80]
        assert conversation.created_at <= rows[-1].created_at <= conversation.updated_at
    for row in Message.objects.all():
        row.full_clean()
        assert row.html == (markdown.render(row.text) if row.role == "assistant" else "")
        assert row.intent in {"", *labels.INTENTS}


def test_the_conversations_show_every_way_an_answer_can_end_or_come_about(talks: None) -> None:
    said = Message.objects.filter(role="assistant")
    assert {row.status for row in said} == {"complete", "stopped", "failed"}
    assert {row.route for row in said} == {"model", "reviewed", "rules", "human"}
    assert said.filter(route="rules", degraded_reason="low_confidence").count() == 1
    assert said.get(status="failed").text
