"""Conversations made of single questions: every kind, rightly labelled, from the project's rows."""

from __future__ import annotations

import random
import re

import pytest

from assistant.modelkit import corpus, labels
from assistant.modelkit.followups import FollowUps, shown

ROWS = corpus.written("followups")
KINDS = ("next", "number", "email", "second", "same", "aside", "correction", "change", "filler")
ASKING = ("ask", "ask_invoice", "ask_email")


def made(kind: str = "") -> FollowUps:
    rows = [row for row in ROWS if not kind or row["kind"] in (kind, *ASKING)]
    return FollowUps(rows, lambda intent: f"About {intent}", lambda intent: f"Do {intent}.")


def conversations(kind: str = "", count: int = 200) -> list[list[tuple[str, str, str | None]]]:
    rng, source = random.Random(5), made(kind)
    return [source.draw(rng) for _ in range(count)]


def test_every_conversation_has_two_or_three_questions_of_known_intents() -> None:
    found = conversations(count=800)
    assert {len(one) for one in found} == {2, 3}
    assert {intent for one in found for _, intent, _ in one} <= set(labels.INTENTS)
    last = {one[-1][1] for one in found}
    assert last >= set(labels.SUPPORT), "each is asked for in a second turn"
    assert not any("{n}" in text for one in found for text, _, _ in one)


def test_a_follow_up_says_after_what_it_means_what_it_means() -> None:
    after = {(row["after"], row["text"]): row["intent"] for row in ROWS if row["kind"] == "next"}
    for *_, (_, before, _), (text, intent, _) in conversations("next"):
        assert after[before, text] == intent


@pytest.mark.parametrize("kind", ["number", "second"])
def test_a_number_goes_on_with_the_request_before(kind: str) -> None:
    for *_, (_, before, answer), (text, intent, _) in conversations(kind):
        assert intent == before and re.search(r"\d{5}", text)
        assert (answer is not None) == (kind == "number")
        assert answer is None or "number" in answer.split(". ", 1)[1]


def test_an_address_goes_on_with_a_request_about_an_account() -> None:
    for *_, (_, before, answer), (text, intent, _) in conversations("email"):
        assert intent == before and "@" in text and "{" not in text
        assert "e-mail address" in answer


def test_words_that_ask_nothing_stay_with_what_was_asked() -> None:
    texts = {row["text"] for row in ROWS if row["kind"] == "filler"}
    found = [one for one in conversations(count=400) if len(one) == 3 and one[1][0] in texts]
    assert found
    assert all(one[1][1] == one[0][1] for one in found)


def test_a_correction_and_a_change_are_about_what_is_asked_last() -> None:
    for kind in ("correction", "change"):
        for *_, (text, intent, _) in conversations(kind):
            assert text.lower().endswith(f"about {intent}")
    assert any(one[-1][1] == labels.OUT_OF_SCOPE for one in conversations("change"))


def test_the_written_rows_name_known_kinds_and_intents_once() -> None:
    assert {row["kind"] for row in ROWS} == {*KINDS, *ASKING}
    named = [row[key] for row in ROWS for key in ("after", "intent") if key in row]
    assert set(named) <= {*labels.SUPPORT, *labels.SMALL_TALK}
    assert len({(row["kind"], row.get("after"), row["text"]) for row in ROWS}) == len(ROWS)


def test_an_earlier_answer_shows_facts_as_a_product_fills_them() -> None:
    words = {"Support Phone": ("our line",), "Website": ("our website",)}
    text = "Call {{Support Phone}} about {{Order Number}}, see {{Website}}."
    filled = shown(text, words, random.Random(1))
    assert filled == "Call our line about {{Order Number}}, see our website."
