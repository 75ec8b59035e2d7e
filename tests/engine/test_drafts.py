"""Guesses: what is found, how far it is trusted, and that it never shows in an answer."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assistant.engine import Engine, EngineConfig, Manifest, ManifestError, Sampling
from assistant.engine.drafts import FILE, Guess, Known, Lookup, read, save
from assistant.engine.engine import load_onnx
from assistant.engine.manifest import MODEL, TOKENIZER, describe_files
from assistant.engine.runner import Batch, OnnxRunner
from assistant.engine.scheduler import best_width
from assistant.engine.worker import Loaded
from tests.engine.conftest import FakeRunner, ids

TEXTS = [[7, 20, 21, 22, 23, 24, 25, 9], [8, 20, 21, 30, 31, 32, 9]]


def following(known: Known, tokens: Sequence[int], most: int = 4) -> Guess:
    guess = Guess(known, most)
    for token in tokens:
        guess.saw(token)
    return guess


# -- what is found ---------------------------------------------------------------------------------


def test_an_answer_that_follows_a_known_text_finds_what_comes_next() -> None:
    known = Known(TEXTS)
    assert following(known, [7, 20]).ahead(9) == [21, 22, 23]
    assert following(known, [8, 20]).ahead(9) == [21, 30, 31], "the beginnings tell them apart"
    assert following(known, [7, 20, 21, 22, 23]).ahead(2) == [24, 25]
    assert following(known, [8, 20, 21, 30, 31, 32]).ahead(9) == [9], "no further than its text"
    assert following(known, [8, 20, 21, 30, 31, 32, 9]).ahead(9) == []


def test_an_answer_nobody_knows_finds_nothing_until_it_comes_back() -> None:
    guess = following(Known(TEXTS), [40, 41, 42])
    assert guess.ahead(9) == []
    for token in (21, 22, 23):
        guess.saw(token)
    assert guess.ahead(9) == [24, 25, 9]
    guess.saw(50)
    assert guess.ahead(9) == []


def test_where_several_texts_go_on_differently_the_first_counts() -> None:
    known = Known([[1, 2, 3, 4], [1, 2, 3, 5]])
    assert following(known, [1, 2, 3]).ahead(9) == [4]
    assert following(known, [1, 2, 3, 5]).ahead(9) == []


def test_no_texts_and_empty_texts_are_no_harm() -> None:
    assert following(Known(), [1, 2, 3]).ahead(9) == []
    assert following(Known([[], [1, 2], []]), [1]).ahead(9) == [2]


def test_trust_grows_while_guesses_hold_and_falls_to_what_held() -> None:
    guess = following(Known([range(1, 60)]), [1], most=15)
    assert len(guess.ahead(99)) == 3
    guess.held(3, 3)
    assert len(guess.ahead(99)) == 8
    guess.held(8, 8)
    assert len(guess.ahead(99)) == 15, "no more than is allowed"
    guess.held(2, 15)
    assert len(guess.ahead(99)) == 3
    guess.held(0, 3)
    assert len(guess.ahead(99)) == 1


def test_a_prompt_and_the_answer_itself_are_looked_up() -> None:
    guess = Lookup([11, 12, 13, 14, 15, 99], most=8)
    for token in (12, 13):
        guess.saw(token)
    assert guess.ahead(9) == [], "two tokens prove nothing"
    guess.saw(14)
    assert guess.ahead(9) == [15, 99, 12], "the text goes on with the answer"
    for token in (70, 71, 72, 73, 70, 71, 72):
        guess.saw(token)
    assert guess.ahead(1) == [73]


def test_the_width_pays_for_all_rows() -> None:
    widths = [2, 4, 8, 16]
    assert best_width([range(15)], widths) == 16
    assert best_width([range(15)] * 8, widths) == 16
    assert best_width([range(15), *[()] * 15], widths) == 2, "one row's guesses cost all others"
    assert best_width([range(3)], widths) == 4


# -- beside a model ------------------------------------------------------------------------------


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    save(tmp_path, TEXTS)
    assert read(tmp_path, 64) == TEXTS
    save(tmp_path, [])
    assert read(tmp_path, 64) == []


def test_a_table_never_grows_beyond_what_is_read(tmp_path: Path) -> None:
    save(tmp_path, [[1] * 100_000, [2] * 100_000, [3] * 100_000])
    assert [answer[0] for answer in read(tmp_path, 64)] == [1, 2]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[1]",
        "[[1, 64]]",
        "[[-1]]",
        "[[true]]",
        "[[1.0]]",
        '[["1"]]',
        "[" * 100_000,
        json.dumps([[1] * 300_000]),
    ],
    ids=lambda content: content[:12],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ManifestError, match="drafts"):
        Known.load(tmp_path, 64)
    (tmp_path / FILE).unlink()
    with pytest.raises(ManifestError, match="drafts"):
        Known.load(tmp_path, 64)


def with_table(source: Path, target: Path, answers: Sequence[Sequence[int]]) -> Path:
    shutil.copytree(source, target)
    save(target, answers)
    manifest = Manifest.load(source)
    files = {**manifest.files, **describe_files(target, [MODEL, TOKENIZER, FILE])}
    replace(manifest, files=files).write(target)
    return target


@pytest.mark.parametrize(
    ("table", "asked", "drafted"),
    [(False, None, 0), (True, None, 15), (True, 0, 0), (True, 7, 7), (False, 5, 5)],
)
def test_a_model_that_ships_answers_guesses_and_others_where_asked_to(
    models: dict[str, Path], tmp_path: Path, table: bool, asked: int | None, drafted: int
) -> None:
    folder = with_table(models["fp32"], tmp_path / "m", TEXTS) if table else models["fp32"]
    loaded = load_onnx(EngineConfig(folder, threads=1, max_batch=2, draft_tokens=asked))
    assert loaded.draft_tokens == drafted
    assert (loaded.known is not None) == table
    loaded.runner.close()


@pytest.mark.parametrize("wrong", [-1, 32])
def test_guesses_without_bounds_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match="draft_tokens"):
        EngineConfig(Path("unused"), draft_tokens=wrong)


# -- never in an answer ----------------------------------------------------------------------------


def engine_of(loaded: Loaded, **config: Any) -> Engine:
    settings = {"max_batch": 4, "step_tokens": 16, "context_tokens": 128, **config}
    engine = Engine(EngineConfig(Path("unused"), **settings), load=lambda _: loaded)
    engine.start()
    return engine


def test_right_guesses_save_steps_and_wrong_ones_cost_no_token() -> None:
    alone = FakeRunner().greedy([5, 6], 40)
    wrong = [*alone[:10], 63, 62, 61, *alone[13:]]
    steps = []
    for known in ([], [alone], [wrong]):
        runner = FakeRunner()
        engine = engine_of(Loaded(runner, known=Known(known), draft_tokens=15))
        runner.batches.clear()
        assert ids(engine.submit([5, 6], max_new_tokens=40)) == alone
        steps.append(len(runner.batches))
        stats = engine.stats()
        assert stats.generated_tokens == 40 and stats.accepted_tokens <= stats.drafted_tokens
        engine.close()
    assert steps[0] == 40 and steps[1] < 12 and steps[1] < steps[2] < 30, steps


def test_an_answer_ends_within_its_guesses() -> None:
    """By a stop token or by its length: nothing behind it is shown."""
    alone = FakeRunner().greedy([5, 6], 40)
    stop = next(token for at, token in enumerate(alone) if at > 8 and token not in alone[:at])
    runner = FakeRunner()
    engine = engine_of(Loaded(runner, known=Known([alone]), draft_tokens=15))
    generation = engine.submit([5, 6], max_new_tokens=40, stop_ids=[stop])
    assert ids(generation) == alone[: alone.index(stop)]
    assert generation.finish_reason == "stop"
    for count in range(1, 12):
        generation = engine.submit([5, 6], max_new_tokens=count)
        assert ids(generation) == alone[:count]
        assert generation.finish_reason == "length"
    assert ids(engine.submit([5, 6] * 60, max_new_tokens=90)) == FakeRunner().greedy([5, 6] * 60, 8)
    engine.close()


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0.7, seed=3), Sampling(repetition_penalty=1.3)]
)
def test_choices_that_depend_on_earlier_ones_are_made_one_at_a_time(sampling: Sampling) -> None:
    found = []
    for drafted in (0, 15):
        runner = FakeRunner()
        known = Known([runner.greedy([5, 6], 40)])
        engine = engine_of(Loaded(runner, known=known, draft_tokens=drafted))
        found.append(ids(engine.submit([5, 6], max_new_tokens=30, sampling=sampling)))
        assert engine.stats().drafted_tokens == 0
        engine.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("quant", ["fp32", "row8", "static8"])
def test_every_width_gives_what_one_token_at_a_time_gives(
    models: dict[str, Path], quant: str
) -> None:
    """Whatever stands beside and behind a token; with constant scales to the bit."""
    folder = models[quant]
    runner = OnnxRunner(
        folder / MODEL,
        Manifest.load(folder).architecture,
        slots=6,
        step_tokens=32,
        context_tokens=128,
        threads=1,
        drafting=True,
    )
    rng = random.Random(4)
    prompts = [[rng.randrange(20, 512) for _ in range(9 + 4 * slot)] for slot in range(3)]
    answers = [[rng.randrange(20, 512) for _ in range(24)] for _ in range(3)]
    starts = [len(prompt) for prompt in prompts]
    runner.step(Batch.of([0, 1, 2], [0, 0, 0], [0, 0, 0], prompts))
    expected = []
    for at in range(24):
        batch = Batch.of(
            range(3), [s + at for s in starts], [1] * 3, [[one[at]] for one in answers], 3
        )
        expected.append(runner.step(batch).copy())
    for _ in range(12):
        at, counts = rng.randrange(8), [rng.randint(1, 16) for _ in range(3)]
        drafts = [answers[row][at : at + counts[row]] for row in range(3)]
        found = runner.step(Batch.of(range(3), [s + at for s in starts], counts, drafts, 3))
        whole = [expected[at + i][row] for row in range(3) for i in range(counts[row])]
        if quant == "static8":
            np.testing.assert_array_equal(found, np.array(whole))
        else:
            np.testing.assert_allclose(found, np.array(whole), atol=1e-5)
    runner.close()


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_guesses_never_show_in_answers_whoever_sits_beside(
    models: dict[str, Path], quant: str
) -> None:
    """Guesses that hold, that do not, and rows without any, against an engine that has none."""
    rng = random.Random(8)
    config = EngineConfig(models[quant], threads=1, max_batch=6, step_tokens=24, draft_tokens=15)
    pool = [[rng.randrange(20, 512) for _ in range(rng.randint(1, 30))] for _ in range(24)]
    alone = Engine(config, load=lambda config: replace(load_onnx(config), known=Known()))
    expected = [ids(alone.submit(prompt, max_new_tokens=24)) for prompt in pool]
    assert alone.stats().drafted_tokens == 0
    alone.close()
    texts = [list(answer) for answer in expected[::2]]
    for text in texts[::3]:
        text[rng.randrange(4, 20)] = 20
    engine = Engine(config, load=lambda config: replace(load_onnx(config), known=Known(texts)))
    for _ in range(40):
        some = rng.sample(range(len(pool)), rng.randint(1, 8))
        lengths = [rng.randint(1, 24) for _ in some]
        asked = [
            engine.submit(pool[at], max_new_tokens=most)
            for at, most in zip(some, lengths, strict=True)
        ]
        for at, most, generation in zip(some, lengths, asked, strict=True):
            assert ids(generation) == expected[at][:most]
    stats = engine.stats()
    assert 0.5 * stats.drafted_tokens < stats.accepted_tokens < stats.drafted_tokens
    engine.close()
