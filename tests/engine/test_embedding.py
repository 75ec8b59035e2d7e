"""Embeddings: unit vectors of whole prompts, the same in any company, and answers go first."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from assistant.engine import Engine, EngineClosed, EngineConfig, EngineCrashed, EngineError
from assistant.engine.embedding import ROWS, Embedding, Embeddings
from assistant.engine.errors import NoEmbeddings, Overloaded, PromptTooLong
from assistant.engine.runner import Batch
from assistant.engine.sampling import Floats
from tests.engine.conftest import PATIENCE_S, MakeEngine, ids

PROMPTS = [[5, 6, 7, 8], [9, 8, 7], [1, 2], [int(n) % 64 for n in range(40)], [9, 8, 7]]


def unit(rows: list[np.ndarray]) -> np.ndarray:
    stacked = np.stack(rows)
    return stacked / np.linalg.norm(stacked, axis=1, keepdims=True)


def test_vectors_are_of_unit_length_in_order_and_of_whole_prompts(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    found = engine.embed(PROMPTS).result(PATIENCE_S)
    assert (found.shape, found.dtype) == ((5, 4), np.float32)
    assert np.allclose(found, unit([runner.logprobs(prompt)[:4] for prompt in PROMPTS]))
    assert engine.stats().embedded_tokens == sum(map(len, PROMPTS))


def test_short_prompts_share_a_run_and_long_ones_are_cut(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(step_tokens=16)
    engine.embed([[1, 2]] * 20 + [[3] * 40]).result(PATIENCE_S)
    assert [len(batch.slots) for batch in runner.pooled[:3]] == [ROWS, ROWS, 4]
    assert [batch.ids.tolist() for batch in runner.pooled[3:]] == [[3] * 16, [3] * 16, [3] * 8]
    assert min(batch.slots.min() for batch in runner.pooled) > 4, "an answer's row was used"


def test_no_prompts_have_no_vectors(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    assert engine.embed([]).result(0).shape == (0, 4)
    assert runner.pooled == []


def test_a_real_model_gives_the_same_vector_alone_together_and_in_pieces(
    models: dict[str, Path],
) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, 200, size=size).tolist() for size in (3, 9, 2, 30, 70, 9)]
    for quant, folder in models.items():
        engine = Engine(EngineConfig(folder, threads=1, max_batch=2, step_tokens=32))
        together = engine.embed(prompts).result(PATIENCE_S)
        generation = engine.submit(prompts[1], max_new_tokens=40)
        beside = engine.embed(prompts).result(PATIENCE_S)
        assert len(ids(generation)) == 40
        alone = np.concatenate([engine.embed([one]).result(PATIENCE_S) for one in prompts])
        engine.close()
        assert np.array_equal(together, alone) and np.array_equal(beside, alone), quant
        assert np.allclose(np.linalg.norm(alone, axis=1), 1, atol=1e-5)
        assert len(np.unique(alone.round(4), axis=0)) == len(prompts), "they say nothing"


def test_answers_are_the_same_whether_embeddings_are_read_beside_them(tiny: Engine) -> None:
    prompt = list(range(20, 60))
    alone = ids(tiny.submit(prompt, max_new_tokens=60))
    futures = [tiny.embed([[int(n) + 10 for n in range(50)]] * 8) for _ in range(6)]
    assert ids(tiny.submit(prompt, max_new_tokens=60)) == alone
    for future in futures:
        assert len(future.result(PATIENCE_S)) == 8


def test_while_answers_are_written_embeddings_get_a_part_of_the_time(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes a second of this clock, a piece two: so eight steps follow each."""
    engine, runner = make_engine(context_tokens=512)
    now, step, beside = [0.0], runner.step, [0]

    def timed(batch: Batch) -> Floats:
        now[0] += 1 + (len(batch.slots) == ROWS)
        if len(batch.slots) == 1:  # the answer's; the last one counts
            beside[0] = len(runner.pooled)
        return step(batch)

    monkeypatch.setattr(runner, "step", timed)
    monkeypatch.setattr("assistant.engine.worker.time.perf_counter", lambda: now[0])
    runner.pause()
    generation = engine.submit([1, 2, 3], max_new_tokens=200)
    runner.begun()
    future = engine.embed([[4, 5]] * (ROWS * 200))
    runner.resume()
    ids(generation)
    assert 20 <= beside[0] <= 27, "of 200 steps"
    assert len(future.result(PATIENCE_S)) == ROWS * 200, "the rest comes once nobody is answered"
    assert len(runner.pooled) == 200


def test_what_nobody_wants_any_more_is_not_read(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(step_tokens=4)
    runner.pause()
    future = engine.embed([[1, 2, 3]] * 50)
    runner.begun()
    assert future.cancel()
    runner.resume()
    assert len(engine.embed([[5, 6]]).result(PATIENCE_S)) == 1
    assert len(runner.pooled) <= 3
    with pytest.raises(CancelledError):
        future.result(0)


async def test_a_task_that_is_cancelled_cancels_its_future(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.pause()
    future = engine.embed([[1, 2, 3]] * 50)
    runner.begun()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await asyncio.wrap_future(future)
    assert future.cancelled()
    runner.resume()


def test_a_short_question_overtakes_a_long_list(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.pause()
    long = engine.embed([[1, 2, 3, 4, 5, 6, 7]] * 200)
    runner.begun()
    short = engine.embed([[8, 9]])
    runner.resume()
    assert len(short.result(PATIENCE_S)) + len(long.result(PATIENCE_S)) == 201
    at = [batch.ids.tolist() for batch in runner.pooled].index([8, 9])
    assert at < 3 < len(runner.pooled) - 20


def test_a_cut_prompt_is_finished_before_another_takes_its_row() -> None:
    queue = Embeddings(slot=7, most_tokens=1000)
    long, short = Embedding([[1] * 20, [2] * 3]), Embedding([[4, 5]])
    for job in (long, short):
        assert queue.enter(job)
    queue.add(long)
    states = np.ones((1, 2), np.float32)
    queue.advance(queue.plan(8), states)  # [2] * 3
    queue.advance(queue.plan(8), states[:0])
    queue.add(short)
    seen = []
    while queue:
        piece = queue.plan(8)
        assert piece is not None
        seen.append((piece.job is long, piece.batch.starts.tolist(), piece.batch.counts.tolist()))
        queue.advance(piece, states[: len(piece.ends)])
    assert seen == [(True, [8], [8]), (True, [16], [4]), (False, [0], [2])]
    assert queue.tokens == 0


def test_what_does_not_fit_is_refused_at_once(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_embedding_tokens=30, context_tokens=64)
    with pytest.raises(PromptTooLong, match="65 tokens"):
        engine.embed([[1], [2] * 65])
    for wrong in ([[]], [[1], []], [[64]], [[-1]], [["a"]]):
        with pytest.raises(ValueError, match="token id"):
            engine.embed(wrong)
    runner.pause()
    first = engine.embed([[1] * 20])
    runner.begun()
    with pytest.raises(Overloaded) as refused:
        engine.embed([[2] * 11])
    assert refused.value.eta_s > 0
    second = engine.embed([[2] * 10])
    runner.resume()
    assert len(first.result(PATIENCE_S)) == len(second.result(PATIENCE_S)) == 1
    assert len(engine.embed([[3] * 40]).result(PATIENCE_S)) == 1, "an empty queue takes any"


def test_a_model_without_embeddings_says_so(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.width = 0
    with pytest.raises(NoEmbeddings, match="via optimum"):
        engine.embed([[1, 2]])


def test_nobody_waits_for_a_thread_that_died_or_was_closed(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.pause()
    reading = engine.embed([[1, 2]] * 50)
    runner.begun()
    waiting = engine.embed([[3, 4]])
    runner.fault = RuntimeError("kernel")
    runner.resume()
    for future in (reading, waiting):
        with pytest.raises(EngineCrashed, match="kernel"):
            future.result(PATIENCE_S)
    engine.close()
    with pytest.raises(EngineError):
        engine.embed([[1, 2]])
    engine.start()
    assert len(engine.embed([[1, 2]]).result(PATIENCE_S)) == 1
    engine.close()
    with pytest.raises(EngineClosed):
        engine.embed([[1, 2]])


def test_states_that_are_no_numbers_fail_their_own_texts_only(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.poison = 13
    bad, good = engine.embed([[1, 13]]), engine.embed([[1, 2]])
    with pytest.raises(EngineError, match="not numbers"):
        bad.result(PATIENCE_S)
    assert len(good.result(PATIENCE_S)) == 1
