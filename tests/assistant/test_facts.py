"""Masking before the model, filling after it."""

import random

import pytest

from assistant.engine.text import Slot
from assistant.facts import PLAIN_WORDS, Filler, fill, mask
from assistant.modelkit import labels


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("cancel order 48213377 please", {"Order Number": "48213377"}),
        ("where is #00108?", {"Order Number": "#00108"}),
        ("ORD-99231 has not come", {"Order Number": "ORD-99231"}),
        ("send me invoice 37777", {"Invoice Number": "37777"}),
        ("the bill #12588 looks wrong", {"Invoice Number": "#12588"}),
        ("INV-2024-001 again", {"Invoice Number": "INV-2024-001"}),
        ("write to ana.b+shop@mail.example.org", {"Email": "ana.b+shop@mail.example.org"}),
        ("you charged $49.90 twice", {"Amount": "$49.90"}),
        ("a refund of 30 euros", {"Amount": "30 euros"}),
        ("ordered on 12 May 2026", {"Date": "12 May 2026"}),
        ("due 2026-05-12", {"Date": "2026-05-12"}),
        ("call +44 20 7946 0958", {"Phone": "+44 20 7946 0958"}),
        ("my name is Ana Lopez and", {"Client Name": "Ana Lopez"}),
    ],
)
def test_a_value_is_taken_out_of_the_text(text: str, values: dict[str, str]) -> None:
    masked = mask(text)
    assert masked.values == values
    (name,) = values
    assert Slot(name) in [part for part in masked.parts if isinstance(part, Slot)]
    assert values[name] not in "".join(part for part in masked.parts if type(part) is str)


@pytest.mark.parametrize(
    "text",
    [
        "how do I cancel?",
        "I bought 2 shirts in size 42",
        "may I decide 12 hours later",
        "is it 24/7",
        "my name is on the list",
        "{{Order Number}}",
        "",
    ],
)
def test_a_text_without_values_stays_as_it_is(text: str) -> None:
    assert mask(text).values == {}
    assert "".join(mask(text).parts) == text


def test_masking_loses_nothing_but_the_values_whatever_is_typed() -> None:
    rng = random.Random(5)
    alphabet = "ab 1234567890#-@.$€{}<|>,:/\n\u00e9\u4e2d\U0001f600"
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(60)))
        rest = text
        for part in mask(text).parts:
            if type(part) is str:
                before, _, rest = rest.partition(part)
                assert before == "" or part in text


def test_two_values_of_a_kind_keep_the_first() -> None:
    assert mask("order 111111, not 222222").values == {"Order Number": "111111"}


def test_masking_a_long_hostile_text_takes_no_time_to_speak_of() -> None:
    import time

    began = time.perf_counter()
    for text in ("1 " * 2000, "a@" * 2000, "1,234" * 800, "+1 22 " * 600, "my name is " * 300):
        mask(text[:4000])
    assert time.perf_counter() - began < 5  # a bound against catastrophe, not a timing


def test_an_answer_is_filled_however_it_is_cut() -> None:
    answer = "Open order {{Order Number}} at {{Website}}, or use {braces} {{ }} {{Nobody Knows}}."
    whole = fill(answer, {"Order Number": "48213377"})
    assert whole == "Open order 48213377 at our website, or use {braces} {{ }} nobody knows."
    for size in range(1, 12):
        filler = Filler({"Order Number": "48213377"})
        pieces = [answer[at : at + size] for at in range(0, len(answer), size)]
        assert "".join(filler.push(piece) for piece in pieces) + filler.flush() == whole


def test_a_filler_holds_back_no_more_than_a_placeholder() -> None:
    filler = Filler({})
    shown = filler.push("{{" + "x" * 500)
    assert len(shown) > 400


def test_every_placeholder_of_the_model_has_plain_words() -> None:
    assert set(labels.PLACEHOLDERS) == set(PLAIN_WORDS)
    assert not any("{" in words for words in PLAIN_WORDS.values())
