"""Fitting the wide half: it learns what it is shown, a revision keeps what nobody corrected."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from assistant.facts import mask
from assistant.modelkit import corpus, wide
from assistant.modelkit.corpus import Corpus, Sample, Turn
from assistant.modelkit.corrections import Case, Said
from assistant.modelkit.labels import OUT_OF_SCOPE

pytestmark = pytest.mark.train

TEXTS = {
    "cancel_order": ("stop my order", "I do not want it any more", "please cancel the purchase"),
    "track_order": ("where is my parcel", "has it been shipped", "track the delivery for me"),
    "get_refund": ("give me my money back", "refund me", "I want my money returned"),
    OUT_OF_SCOPE: ("who won the match", "write a poem", "what is the capital of Peru"),
}


def rows() -> Iterator[Sample]:
    for intent, texts in TEXTS.items():
        for text in texts:
            yield Sample((Turn(text, intent),), "written")


@pytest.fixture(scope="module")
def small() -> Corpus:
    return Corpus(labelled=list(rows()))


@pytest.fixture(scope="module")
def fitted(small: Corpus) -> wide.Wide:
    return wide.fit(wide.examples(small, mask), epochs=20)


def taken(table: wide.Wide, text: str) -> tuple[str, float]:
    (found,) = wide.opinions(table, mask, [text])
    return wide.TOPICS[int(found.intents.argmax())], found.scope


def test_it_knows_what_it_was_shown_and_what_is_like_it(fitted: wide.Wide) -> None:
    for intent, texts in TEXTS.items():
        for text in texts:
            topic, scope = taken(fitted, text)
            assert (topic == intent or intent == OUT_OF_SCOPE) and (scope > 0) == (
                intent != OUT_OF_SCOPE
            )
    assert taken(fitted, "cancel my order please")[0] == "cancel_order"


def test_fitting_twice_gives_the_same_table(small: Corpus, fitted: wide.Wide) -> None:
    again = wide.fit(wide.examples(small, mask), epochs=20)
    assert (again.table == fitted.table).all() and (again.bias == fitted.bias).all()


def test_a_correction_is_learned_and_the_rest_stays(small: Corpus, fitted: wide.Wide) -> None:
    question = "the snorkel should not come to me after all"
    case = Case("1", "row 1", (Said("user", question),), "cancel_order")
    before = {text: taken(fitted, text)[0] for texts in TEXTS.values() for text in texts}
    revised = wide.revise(fitted, [case], small, mask)
    assert taken(revised, question)[0] == "cancel_order"
    assert taken(revised, question)[1] > 0
    after = {text: taken(revised, text)[0] for texts in TEXTS.values() for text in texts}
    assert {t: i for t, i in after.items() if t not in TEXTS[OUT_OF_SCOPE]} == {
        t: i for t, i in before.items() if t not in TEXTS[OUT_OF_SCOPE]
    }


def test_with_a_history_the_same_words_may_mean_something_else() -> None:
    said = [
        wide.Labelled((wide.Exchange("a", before), wide.Exchange("and how long")), intent, "made")
        for before, intent in (
            ("get_refund", "track_refund"),
            ("place_order", "delivery_period"),
        )
        for _ in range(20)
    ]
    table = wide.fit(said, epochs=30)
    for before, intent in (("get_refund", "track_refund"), ("place_order", "delivery_period")):
        found = table._of(
            wide.rows_of(
                wide.features([wide.Exchange("a", before), wide.Exchange("and how long")]),
                wide.ROWS,
            )
        )
        assert wide.TOPICS[int(found.intents.argmax())] == intent


def test_the_share_is_what_makes_the_right_answers_likeliest() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 5, 400)
    good = np.eye(5)[wanted] * 3 + rng.normal(size=(400, 5))
    noise = rng.normal(size=(400, 5))
    assert wide.best_share(good, noise, list(wanted)) == 0.0
    assert wide.best_share(noise, good, list(wanted)) == max(wide.SHARES)


def test_the_projects_own_rows_give_examples_of_every_kind() -> None:
    found = wide.examples(corpus.own(), mask)
    assert {one.kind for one in found} == {"alone", "dialogue", "made", "behind", "ended"}
    assert all(1 <= len(one.exchanges) <= 3 for one in found)
    assert all(bool(one.exchanges[-1].answer) == (one.kind == "ended") for one in found)
    assert all(one.exchanges[-1].intent == "" for one in found)
