"""The training mix: what goes in, what must never go in."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from assistant.modelkit import corpus, labels, scoring
from assistant.modelkit.corpus import CorpusError, HeldOut

GOLDEN = Path(__file__).parents[2] / "monitoring" / "golden" / "support-en.jsonl"
USER_SLOTS = scoring.USER_SLOTS


def write(path: Path, rows: list[dict[str, object]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with a few rows of every public set."""

    def row(
        source: str, text: str, intent: str, split: str = "train", **more: object
    ) -> dict[str, object]:
        return {"source": source, "text": text, "intent": intent, "split": split, **more}

    write(
        tmp_path / "support_queries.jsonl.gz",
        [
            {
                "query": "cancel purchase {{Order Number}}",
                "intent": "cancel_order",
                "split": "train",
            },
            {"query": "i forgot my pass", "intent": "recover_password", "split": "dev"},
            {"query": "I forgot my  PASS!", "intent": "recover_password", "split": "train"},
        ],
    )
    write(tmp_path / "support_qa.jsonl.gz", [])
    write(
        tmp_path / "intents_banking77.jsonl.gz",
        [
            row(
                "banking77",
                "close my account now",
                "terminate_account",
                support_intent="delete_account",
            ),
            row("banking77", "what is your exchange rate", "exchange_rate"),
        ],
    )
    write(tmp_path / "intents_natcs.jsonl.gz", [])
    write(
        tmp_path / "intents_clinc150.jsonl.gz",
        [
            row("clinc150", "hello there friend", "greeting"),
            row("clinc150", "tell me a story", "oos", scope="out"),
            row("clinc150", "order me some milk", "order"),
        ],
    )
    write(tmp_path / "intents_nlupp.jsonl.gz", [])
    write(tmp_path / "user_turns_multidogo.jsonl.gz", [])
    return tmp_path


@pytest.mark.slow
def test_the_mix_holds_every_kind_and_no_evaluation_row(data: Path) -> None:
    found = corpus.build(data, seed=3, evaluation=[GOLDEN])
    texts = {sample.turns[-1].question: sample.turns[-1].intent for sample in found.labelled}
    assert texts["close my account now"] == "delete_account"
    assert texts["tell me a story"] == texts["what is your exchange rate"] == "out_of_scope"
    assert texts["hello there friend"] == "greeting"
    assert "order me some milk" not in texts
    assert not any("PASS" in text for text in texts), "it equals a development row"
    assert any(text.startswith("cancel purchase") and "{{" not in text for text in texts)
    apart = [row["query"] for row in corpus.read_rows(GOLDEN) if "query" in row]
    apart += [row["text"] for row in corpus.written("natural_dev")]
    kept_out = {corpus.normalise(text) for text in apart} - {""}
    assert not kept_out & {corpus.normalise(text) for text in texts}


def test_the_mix_is_the_same_for_the_same_seed(data: Path) -> None:
    assert corpus.build(data, seed=1).labelled == corpus.build(data, seed=1).labelled


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"support_queries\.jsonl\.gz is missing.*README"):
        corpus.build(tmp_path)


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{oops\n')
    with pytest.raises(CorpusError, match="line 2 is not JSON"):
        list(corpus.read_rows(path))


def test_near_equal_texts_are_held_out_and_others_are_not() -> None:
    held = HeldOut(["How long will my delivery to Boston take?", "ok"])
    assert "how long will my delivery to boston take" in held
    assert "How long will my delivery to Bostom take?" in held
    assert "How long does a refund take?" not in held


@pytest.mark.slow
def test_near_duplicates_are_found_as_a_full_search_would() -> None:
    rng = random.Random(7)
    texts = [row["text"] for row in corpus.written("natural_dev")]
    probes = [corpus.typo(rng.choice(texts), rng) for _ in range(150)]
    held = HeldOut(texts, limit=0.7)
    for probe in probes:
        grams = corpus.trigrams(probe)
        best = max(len(grams & g) / len(grams | g) for g in map(corpus.trigrams, texts))
        assert (probe in held) == (
            best >= 0.7 or corpus.normalise(probe) in map(corpus.normalise, texts)
        )


def test_every_intent_has_natural_wordings_and_a_set_apart() -> None:
    train = Counter(
        r["intent"]
        for name in ("natural_a", "natural_b", "natural_c", "natural_d", "rude")
        for r in corpus.written(name)
    )
    dev = Counter(r["intent"] for r in corpus.written("natural_dev"))
    assert all(train[intent] >= 30 and dev[intent] >= 10 for intent in labels.SUPPORT)


def test_written_answers_are_short_finished_and_keep_their_promises() -> None:
    known = frozenset(labels.PLACEHOLDERS)
    for row in corpus.written("answers"):
        given = {name: "{{" + name + "}}" for name in row["requires"]}
        assert row["intent"] in labels.INTENTS
        assert len(row["text"].split()) <= 60
        assert scoring.well_ended(row["text"], finished=True), row["text"]
        assert scoring.placeholders_ok(row["text"], given, known), row["text"]


def test_dialogues_alternate_and_name_an_intent_for_every_question() -> None:
    for row in [*corpus.written("dialogues"), *corpus.written("dialogues_b")]:
        roles = [turn["role"] for turn in row["turns"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(turn["intent"] in labels.INTENTS for turn in row["turns"][::2])


def test_augmentation_never_loses_a_question() -> None:
    rng = random.Random(1)
    for text in ["Where is order 48213377?", "hi", "a"] * 200:
        assert corpus.augment(text, rng).strip()


def test_words_are_exchanged_for_synonyms_and_for_nothing_else():
    rng = random.Random(0)
    seen = {corpus.reworded("cancel my order", rng) for _ in range(200)}
    assert seen == {
        "cancel my order", "call off my order", "cancel my purchase", "call off my purchase"
    }  # fmt: skip
    assert corpus.reworded("xyzzy plugh", rng) == "xyzzy plugh"


def test_no_synonym_leads_to_a_word_of_another_intent():
    groups = [set(row["words"]) for row in corpus.written("synonyms")]
    for one, other in (("cancel", "change"), ("refund", "cancel"), ("delete", "edit")):
        assert not any({one, other} <= group for group in groups)
