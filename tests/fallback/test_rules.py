"""Matching rules: what counts as the same question, and what must not."""

from __future__ import annotations

import pytest

from fallback.matching import sure
from fallback.rules import RuleText, normalise

RULES = [
    RuleText("cancel", ("cancel my order", "how do i cancel an order"), "Cancel so."),
    RuleText("refund", ("where is my refund", "refund status"), "Refund so."),
    RuleText("person", ("speak to a person", "human agent"), "People so."),
]


def asked(question: str) -> str | None:
    found = sure(question, RULES, score=70.0)
    return found[0].rule.name if found else None


@pytest.mark.parametrize(
    ("question", "rule"),
    [
        ("Cancel my order", "cancel"),
        ("CANCEL   my order!!", "cancel"),
        ("hello, please cancel my order #1234 now", "cancel"),
        ("cancle my ordr", "cancel"),
        ("Where is my refund?", "refund"),
        ("where's my refund", "refund"),
        ("can I speak to a person please", "person"),
    ],
)
def test_the_same_question_in_other_words_finds_its_rule(question, rule):
    assert asked(question) == rule


@pytest.mark.parametrize(
    "question", ["", "?", "hello", "blue cheese", "order a pizza", "my cat is a person", "👍"]
)
def test_another_question_finds_none(question):
    assert asked(question) is None


def test_between_equal_matches_the_higher_priority_wins():
    low = RuleText("low", ("cancel my order",), "a", priority=1)
    high = RuleText("high", ("cancel my order",), "b", priority=2)
    for rules in ([low, high], [high, low]):
        found = sure("cancel my order", rules, score=70.0)
        assert [one.rule for one in found] == [high, low]


def test_a_negative_priority_still_answers():
    rule = RuleText("only", ("cancel my order",), "a", priority=-5)
    assert [one.rule for one in sure("cancel my order", [rule], score=100.0)] == [rule]


def test_normalising_keeps_words_and_nothing_else():
    assert normalise("  Where\u2019s   my\nREFUND?! ") == "where s my refund"
