"""The wide half: what it reads, what it refuses, and that the engine's verdict follows it."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assistant.engine import ChatTurn, Engine, EngineConfig, Manifest, ManifestError, Slot
from assistant.engine.manifest import describe_files
from assistant.engine.sampling import FirstTokenRule, judge
from assistant.engine.wide import FILE, Exchange, Wide, features, plain, rows_of
from tests.engine.conftest import ids

TOPICS = ("cancel", "track", "refund")
ROWS = 4096


def table(**weights: dict[str, int]) -> Wide:
    """A table in which each word pulls to a column: ``cancel={"stop": 1}``."""
    found = np.zeros((ROWS, len(TOPICS) + 1), np.int8)
    for topic, words in weights.items():
        for word, weight in words.items():
            found[rows_of({word}, ROWS), [*TOPICS, "scope"].index(topic)] = weight
    ones = np.ones(len(TOPICS) + 1, np.float32)
    return Wide(found, ones, ones * 0, np.ones(ROWS, np.float16))


def user(*parts: str) -> ChatTurn:
    return ChatTurn("user", parts)


def best(wide: Wide, *turns: ChatTurn) -> str:
    return TOPICS[int(wide.opinion(turns, TOPICS).intents.argmax())]


def test_words_decide_whatever_their_case_and_numbers() -> None:
    wide = table(cancel={"stop": 9}, track={"where": 9, "order 0": 5})
    assert best(wide, user("STOP it")) == "cancel"
    assert best(wide, user("Where is order 8841?")) == "track"
    assert features([Exchange("order 12")]) == features([Exchange("order 99387")])


def test_a_placeholder_is_a_word_and_typed_like_one_it_is_another() -> None:
    assert "<ordernumber>" in plain(user("cancel", Slot("Order Number")))
    wide = table(refund={"<ordernumber>": 9})
    assert wide.opinion([user("x ", Slot("Order Number"))], TOPICS).intents[2] > 0
    assert plain(user("\u2019s")) == "'s"


def test_what_was_asked_before_counts_by_what_it_was_answered_as() -> None:
    wide = table(track={"@cancel": 9}, refund={"@track": 9})
    asked = user("first"), user("and then")
    told = ChatTurn("assistant", ("yes",), "cancel")
    assert best(wide, asked[0], told, asked[1]) == "track"
    assert best(wide, asked[0], replace(told, intent="track"), asked[1]) == "refund"


def test_an_answer_of_no_known_intent_is_taken_for_what_its_question_says() -> None:
    wide = table(cancel={"stop": 9}, refund={"@cancel": 9})
    told = ChatTurn("assistant", ("done",))
    assert best(wide, user("stop"), told, user("money")) == "refund"


def test_what_an_answer_says_tells_the_topic_better_than_what_its_question_was_taken_for() -> None:
    wide = table(cancel={"!cancelled": 9}, refund={"@cancel": 9})
    told = ChatTurn("assistant", ("It can be cancelled.",), "track")
    assert best(wide, user("pull the plug"), told, user("12345")) == "refund"
    assert best(wide, user("pull the plug"), replace(told, parts=("So.",)), user("1")) != "refund"


def test_a_number_goes_on_with_what_was_asked_two_questions_ago() -> None:
    wide = table(cancel={"stop": 9}, refund={"~1cancel@2": 9})
    said = [ChatTurn("assistant", ("Which one?",)), ChatTurn("assistant", ("Under My Orders.",))]
    turns = user("stop"), said[0], user("where is that"), said[1], user("it's 5512")
    assert best(wide, *turns) == "refund"


@pytest.mark.parametrize("turns", [[], [user("")], [user("   ")], [user("😀" * 5000)]])
def test_nothing_to_read_is_no_opinion_and_no_error(turns: list[ChatTurn]) -> None:
    found = table(cancel={"stop": 9}).opinion(turns, TOPICS)
    assert found.intents.shape == (3,) and np.isfinite(found.intents).all()


def test_a_long_question_is_read_from_its_end_in_bounded_time() -> None:
    wide = table(cancel={"stop": 9})
    assert best(wide, user("where " * 200_000 + "stop")) == "cancel"


def test_a_prior_moves_the_verdict_and_its_confidence() -> None:
    rule = FirstTokenRule(intent_ids=(0, 1, 2), out_of_scope_id=3, in_id=4, out_id=5)
    logprobs = np.log(np.array([0.5, 0.3, 0.1, 0.01, 0.05, 0.04], np.float32))
    assert judge(logprobs, rule).intent_id == 0
    moved = replace(rule, prior=(0.0, 5.0, 0.0), scope_prior=-9.0)
    verdict = judge(logprobs, moved)
    assert (verdict.intent_id, verdict.token_id) == (1, 3)
    assert verdict.confidence > 0.98 and verdict.scope < 0.01
    with pytest.raises(ValueError, match="one score an intent"):
        replace(rule, prior=(1.0,))


# -- files ---------------------------------------------------------------------------------------


def test_it_is_the_same_after_being_stored(tmp_path: Path) -> None:
    wide = table(cancel={"stop": 9})
    wide.save(tmp_path)
    again = Wide.load(tmp_path, 3)
    asked = [user("stop that now")]
    one, other = wide.opinion(asked, TOPICS), again.opinion(asked, TOPICS)
    assert one.intents.tolist() == other.intents.tolist() and one.scope == other.scope


def _packed(folder: Path) -> None:
    table().save(folder)
    with zipfile.ZipFile(folder / FILE) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(folder / FILE, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in parts.items():
            packed.writestr(name, data)


def _objects(folder: Path) -> None:
    arrays = dict.fromkeys(("scale", "bias", "rarity"), np.zeros(4, np.float32))
    np.savez(folder / FILE, table=np.array([{}], dtype=object), **arrays)


BROKEN = {
    "no file": lambda folder: None,
    "no archive": lambda folder: (folder / FILE).write_bytes(b"PK but not really"),
    "cut off": lambda folder: (table().save(folder), _cut(folder / FILE)),
    "packed": _packed,
    "objects": _objects,
    "an array too few": lambda folder: np.savez(folder / FILE, table=np.zeros((4, 4), np.int8)),
    "another width": lambda folder: replace(table(), scale=np.ones(9, np.float32)).save(folder),
    "another type": lambda folder: replace(table(), table=np.zeros((ROWS, 4))).save(folder),
    "not a number": lambda folder: replace(table(), bias=np.full(4, np.nan, np.float32)).save(
        folder
    ),
    "no rows": lambda folder: Wide(
        np.zeros((0, 4), np.int8), np.ones(4, np.float32), np.ones(4, np.float32),
        np.zeros(0, np.float16),
    ).save(folder),
}  # fmt: skip


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_table_is_refused_by_name(tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path)
    with pytest.raises(ManifestError, match=FILE.replace(".", r"\.")):
        Wide.load(tmp_path, 3)


# -- in the engine -------------------------------------------------------------------------------


def test_the_engine_answers_as_network_and_table_say_together(
    models: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models["row8"], folder)
    manifest = Manifest.load(folder)
    wanted = manifest.topics[-1]
    found = np.zeros((ROWS, len(manifest.topics) + 1), np.int8)
    found[rows_of({"please"}, ROWS), len(manifest.topics) - 1] = 127
    ones = np.ones(len(manifest.topics) + 1, np.float32)
    Wide(found, ones * 10, ones * 0, np.ones(ROWS, np.float16)).save(folder)
    names = (*manifest.files, FILE)
    replace(manifest, files=describe_files(folder, names)).write(folder)

    engine = Engine(EngineConfig(folder, threads=1))
    engine.start()
    try:
        assert engine.codec is not None
        verdicts = []
        for turns in ([user("please")], [user("thanks")]):
            prompt = engine.codec.encode_chat(turns)
            rule = engine.first_token_rule(turns)
            generation = engine.submit(prompt, max_new_tokens=2, first=rule)
            ids(generation)
            verdicts.append(generation.verdict)
    finally:
        engine.close()
    assert verdicts[0] is not None and verdicts[0].intent_id == manifest.intents[wanted]
    assert verdicts[0].confidence > 0.99
    assert verdicts[1] is not None and verdicts[1].confidence < 0.9
    (folder / FILE).write_bytes(b"altered")
    with pytest.raises(ManifestError, match=r"wide\.npz"):
        Engine(EngineConfig(folder)).start()
