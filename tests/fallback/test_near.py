"""Near matches: other words that mean the same are found, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from assistant import backends
from assistant.backends.echo import EchoBackend
from assistant.errors import ModelUnavailable
from fallback import answers, near
from fallback.answers import Known, Reviewed
from fallback.models import ReviewedAnswer
from fallback.near import Entry, Reading, Shelf
from fallback.words import ideas

SAME = [
    ("How do I cancel my order?", "I need help cancelling an order, please"),
    ("How do I cancel my order?", "how to cancel a purchase"),
    ("where can I see my invoice", "where could i check the bill?"),
    ("I want to change my delivery address", "can you help me update the shipping address"),
    ("what payment methods do you accept", "which payment options do you accept?"),
    ("speak with customer service", "I'd like to talk to customer support"),
    ("I don't know how to get a refund", "could you help me to obtain my money back"),
    ("get my invoice from Mr. Jones", "i want to get the bill from mr jones"),
    ("cancel order #48213377", "how do I cancel purchase 48213377?"),
    ("delete my gold account", "how can I remove a gold acocunt"),
    ("refund $350", "please reimburse $350!"),
    ("I can't log in to my account", "i cannot sign in to my profile"),
]
DIFFERENT = [
    ("subscribe to the newsletter", "unsubscribe from the newsletter"),
    ("cancel my subscription to the newsletter", "reactivate my subscription to the newsletter"),
    ("turn on email updates", "turn off email updates"),
    ("open my account", "close my account"),
    ("cancel the order before shipping", "cancel the order after shipping"),
    ("create a gold account", "create a platinum account"),
    ("do you ship orders to Dublin", "do you ship orders to Detroit"),
    ("get my invoice from Mr. Jones", "get my invoice from Ms. Hawkings"),
    ("cancel order 48213377", "cancel order 48213378"),
    ("refund $350", "refund €350"),
    ("refund 350 dollars", "refund 1350 dollars"),
    ("refund 5%", "refund 5"),
    ("send the bill to ana.lopez@example.com", "send the bill to ana-lopez@example.com"),
    ("deliver the order on Monday", "deliver the order on Tuesday"),
    ("send the parcel in 4 days", "send the parcel in 4 weeks"),
    ("change dollars to euros", "change euros to dollars"),
    ("transfer money from savings to current", "transfer money from current to savings"),
    ("I want to cancel, not change, my order", "I want to change, not cancel, my order"),
    ("I want to pay my order", "I do not want to pay my order"),
    ("my order was cancelled", "cancel my order"),
    ("how long does delivery take", "when does delivery take place"),
    ("how much is delivery", "how is delivery"),
    ("why do I need an account to order", "open an account to order"),
    ("call me about my order", "call you about my order"),
    ("did you get my payment", "did I get my payment"),
    ("change my name", "change your name"),
    ("see my invoice", "download my invoice"),
    ("switch to the free account", "change the free account"),
    ("ask for a refund", "my refund request"),
    ("casncel my newsletter", "cancel my newsletter"),
    ("my contract with customer service", "my contact with customer service"),
    ("ship parcels to the U.S.", "ship parcels"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_request_in_other_words_is_a_candidate(one, other):
    assert [e.question for e in Shelf([Entry(one, "so")]).candidates(other)] == [one]
    assert [e.question for e in Shelf([Entry(other, "so")]).candidates(one)] == [other]


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_another_request_in_the_same_words_is_none(one, other):
    assert Shelf([Entry(one, "so")]).candidates(one), "found by its own words"
    assert Shelf([Entry(one, "so")]).candidates(other) == []
    assert Shelf([Entry(other, "so")]).candidates(one) == []


@pytest.mark.parametrize(
    "text",
    [
        *("", "   ", "and now?", "yes, the new one", "please help me", "why"),
        *("\ud800", "\0", "👍", "?" * 499, "cancel my order " * 40),
    ],
)
def test_what_asks_for_nothing_in_particular_has_no_near_match(text):
    assert ideas(text) is None
    assert Shelf([Entry(text, "so")]).candidates(text) == []


# -- the model's word ------------------------------------------------------------------------------

ASKED, STORED = "how to cancel a purchase", Entry("How do I cancel my order?", "So.", "cancel")
OTHER = Entry("cancel the order", "Otherwise.", "cancel")


def reader(**vectors: Any) -> near.Reader:
    by_text = {ASKED: "asked", STORED.question: "stored", OTHER.question: "other"}

    async def read(texts: Sequence[str]) -> list[Reading]:
        return [vectors[by_text[text]] for text in texts]

    return read


def at(x: float, intent: str | None = None) -> Reading:
    """A unit vector whose cosine with ``at(1)`` is ``x``."""
    return Reading([x, (1 - x * x) ** 0.5], intent)


async def found(read: near.Reader, *entries: Entry) -> near.Verdict:
    return await near.find(ASKED, Shelf(entries or [STORED]), read)


async def test_words_and_model_agree():
    verdict = await found(reader(asked=at(1), stored=at(0.9)))
    assert (verdict.entry, verdict.why, verdict.second) == (STORED, "near", None)
    assert verdict.score == pytest.approx(0.9)


async def test_the_model_may_refuse_what_the_words_allow():
    verdict = await found(reader(asked=at(1), stored=at(0.3)))
    assert (verdict.entry, verdict.why) == (None, "too_far")


async def test_the_model_is_not_asked_where_the_words_differ():
    async def read(texts: Sequence[str]) -> list[Reading]:
        raise AssertionError("asked")

    verdict = await near.find("how to pay an order", Shelf([STORED]), read)
    assert (verdict.entry, verdict.why) == (None, "no_candidate")


async def test_another_intent_is_no_match():
    verdict = await found(reader(asked=at(1, "track"), stored=at(0.9, "cancel")))
    assert (verdict.entry, verdict.why) == (None, "other_intent")


async def test_two_answers_need_a_margin_and_one_answer_twice_does_not():
    close = reader(asked=at(1), stored=at(0.9), other=at(0.899))
    verdict = await found(close, STORED, OTHER)
    assert (verdict.entry, verdict.why) == (None, "too_close")
    twice = Entry(OTHER.question, STORED.answer)
    assert (await found(close, STORED, twice)).why == "near"
    apart = reader(asked=at(1), stored=at(0.7), other=at(0.9))
    assert (await found(apart, STORED, OTHER)).entry == OTHER


async def test_a_vector_of_noughts_is_far_from_everything():
    verdict = await found(reader(asked=Reading([0, 0]), stored=at(1)))
    assert (verdict.why, verdict.score) == ("too_far", 0.0)


# -- the backend's embeddings ----------------------------------------------------------------------


class Embedding(EchoBackend):
    """Echo with the embeddings that a test wants."""

    given: ClassVar[Any] = None

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        result: list[list[float]] = await type(self).given(texts)
        return result


@pytest.fixture
def embedding(settings: Any) -> type[Embedding]:
    conf = settings.ASSISTANT
    path = f"{__name__}.Embedding"
    settings.ASSISTANT = {
        **conf,
        "BACKENDS": {**conf["BACKENDS"], "embedding": {"BACKEND": path}},
        "ROUTE": ["reviewed", "embedding", "rules", "human"],
        "NEAR": {**conf["NEAR"], "READ_TIMEOUT_S": 0.05},
    }
    backends.reset()
    backend = backends.get("embedding")
    return type(backend)  # type: ignore[return-value]


async def test_the_answering_backend_is_asked_for_its_embeddings(embedding, monkeypatch):
    async def far(texts: Sequence[str]) -> list[list[float]]:
        assert texts == [ASKED, STORED.question]
        return [[1.0, 0.0], [0.0, 1.0]]

    monkeypatch.setattr(embedding, "given", far)
    assert (await near.find(ASKED, Shelf([STORED]))).why == "too_far"


@pytest.mark.parametrize("trouble", [ModelUnavailable("gone"), RuntimeError("broke"), None])
async def test_without_a_model_that_is_well_the_words_decide_at_once(
    embedding, monkeypatch, trouble
):
    async def broken(texts: Sequence[str]) -> list[list[float]]:
        if trouble:
            raise trouble
        await asyncio.sleep(60)
        raise AssertionError("waited")

    monkeypatch.setattr(embedding, "given", broken)
    async with asyncio.timeout(1):
        assert await near.find(ASKED, Shelf([STORED])) == near.Verdict(STORED, "same_words")
        both = await near.find(ASKED, Shelf([STORED, OTHER]))
    assert (both.entry, both.why) == (None, "too_close")


async def test_a_route_without_a_model_has_near_matches_too(settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["reviewed", "rules", "human"]}
    assert (await near.find(ASKED, Shelf([STORED]))).entry == STORED


# -- what staff reviewed ---------------------------------------------------------------------------


@pytest.mark.django_db
def test_what_staff_reviewed_is_on_the_shelf_until_it_is_switched_off(settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["reviewed", "rules", "human"]}
    row = ReviewedAnswer.objects.create(
        question=STORED.question, answer=STORED.answer, intent="cancel"
    )
    known = answers.known()
    verdict = asyncio.run(known.near_for(ASKED))
    assert verdict.entry == STORED
    row.active = False
    row.save()
    assert asyncio.run(answers.known().near_for(ASKED)).entry is None


def test_the_same_words_with_another_sign_are_another_question():
    known = Known((), {"refund 350": Reviewed("so", "", "refund $350")})
    assert known.reviewed_for("Refund $350!") is not None
    assert known.reviewed_for("refund €350") is None
    assert known.reviewed_for("refund 350") is None
