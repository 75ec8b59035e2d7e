"""The loop: with a fake model for who runs when, with tiny ONNX models for what comes out."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assistant.engine import (
    Engine,
    EngineClosed,
    EngineConfig,
    EngineCrashed,
    EngineError,
    FirstTokenRule,
    Generation,
    ManifestError,
    Overloaded,
    PromptTooLong,
    Sampling,
    Slot,
)
from assistant.engine.manifest import Manifest
from assistant.engine.runner import Batch, OnnxRunner, runs
from assistant.engine.sampling import Floats
from assistant.engine.text import ChatTurn, Codec
from assistant.engine.worker import Loaded
from tests.engine.conftest import PATIENCE_S, FakeRunner, MakeEngine, ids

ROOT = Path(__file__).parents[2]


def busy(engine: Engine, runner: FakeRunner, count: int) -> list[Generation]:
    """``count`` generations held in the middle of their first common step."""
    runner.pause()
    first = engine.submit([1, 2, 3], max_new_tokens=100)
    runner.begun()
    rest = [engine.submit([1, 2, 3 + i], max_new_tokens=100) for i in range(1, count)]
    runner.finish()
    runner.begun()
    return [first, *rest]


def slots(engine: Engine) -> list[int]:
    assert engine._worker is not None
    return sorted(engine._worker._scheduler._free)


def settled(engine: Engine) -> None:
    """Wait until every command given so far was handled and its step published."""
    assert ids(engine.submit([1], max_new_tokens=1))


# -- what comes out ------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_writes_alone(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(step_tokens=6)
    prompt = list(range(12))
    generation = engine.submit(prompt, max_new_tokens=9)
    assert ids(generation) == runner.greedy(prompt, 9)
    assert generation.finish_reason == "length"


def test_many_answers_at_once_are_what_each_would_be_alone(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    rng = random.Random(1)
    prompts = [[rng.randrange(64) for _ in range(rng.randint(1, 40))] for _ in range(40)]
    generations = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    assert [ids(g) for g in generations] == [runner.greedy(prompt, 12) for prompt in prompts]


async def test_async_readers_get_the_same_and_logprobs_are_the_model_s(
    make_engine: MakeEngine,
) -> None:
    engine, runner = make_engine()

    async def read(prompt: list[int]) -> list[tuple[int, float]]:
        generation = engine.submit(prompt, max_new_tokens=6)
        return [(t.id, t.logprob) async for batch in generation for t in batch]

    found = await asyncio.gather(*(read([i, i + 1]) for i in range(12)))
    for i, answer in enumerate(found):
        assert [token for token, _ in answer] == runner.greedy([i, i + 1], 6)
        assert answer[0][1] == pytest.approx(float(runner.logprobs([i, i + 1]).max()))


def test_a_stop_id_ends_the_answer_and_is_not_shown(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    alone = runner.greedy([5, 6], 8)
    at = next(i for i, token in enumerate(alone) if token not in alone[:i] and i > 1)
    generation = engine.submit([5, 6], max_new_tokens=8, stop_ids=[alone[at]])
    assert ids(generation) == alone[:at]
    assert generation.finish_reason == "stop"


def test_an_answer_ends_by_length_where_the_context_ends(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(context_tokens=20)
    generation = engine.submit([1] * 15, max_new_tokens=100)
    assert len(ids(generation)) == 5
    assert generation.finish_reason == "length"


def test_banned_tokens_are_never_written(make_engine: MakeEngine) -> None:
    banned = tuple(range(0, 64, 2))
    engine, runner = make_engine(banned=banned)
    assert ids(engine.submit([3], max_new_tokens=20)) == runner.greedy([3], 20, banned)


def test_the_first_token_is_a_verdict_fed_but_never_shown(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(banned=(1, 2, 3, 4, 5))
    row = runner.logprobs([9, 9])
    gap = float(row[1] - row[2])
    for threshold_bias, fed in ((30.0, 4 if row[4] > row[3] else 3), (-30.0, 5)):
        rule = FirstTokenRule((3, 4), 5, 1, 2, scope_bias=threshold_bias - gap)
        generation = engine.submit([9, 9], max_new_tokens=4, first=rule)
        batches = generation.tokens_sync()
        shown = next(batches)
        verdict = generation.verdict
        assert verdict is not None
        assert verdict.token_id == fed
        assert verdict.intent_id == (4 if row[4] > row[3] else 3)
        shown += [token for batch in batches for token in batch]
        assert [t.id for t in shown] == runner.greedy([9, 9, fed], 4, (1, 2, 3, 4, 5))


def test_rows_with_and_without_a_verdict_share_a_step(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    (held,) = busy(engine, runner, 1)
    rule = FirstTokenRule((3,), 5, 1, 2, scope_threshold=0.0)
    judged = [engine.submit([i, 9], max_new_tokens=4, first=rule) for i in (10, 11)]
    plain = engine.submit([12, 9], max_new_tokens=4)
    runner.resume()
    assert [ids(g) for g in judged] == [runner.greedy([i, 9, 3], 4) for i in (10, 11)]
    assert ids(plain) == runner.greedy([12, 9], 4)
    assert runner.batches[2].slots.tolist() == [0, 1, 2, 3]
    held.close()


def test_a_verdict_is_known_even_when_the_answer_is_empty(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    rule = FirstTokenRule((3, 4), 5, 1, 2)
    generation = engine.submit([9], max_new_tokens=4, first=rule, stop_ids=range(64))
    assert ids(generation) == []
    assert generation.verdict is not None
    assert generation.finish_reason == "stop"


def test_rows_without_numbers_fail_alone(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.poison = 60
    runner.pause()
    ill, well = engine.submit([60], max_new_tokens=3), engine.submit([7], max_new_tokens=3)
    runner.resume()
    with pytest.raises(EngineError, match="not numbers"):
        ids(ill)
    assert ids(well) == runner.greedy([7], 3)


# -- who runs when -------------------------------------------------------------------------------


def test_requests_join_and_leave_between_steps(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    runner.pause()
    long = engine.submit([1], max_new_tokens=5)
    runner.begun()
    short = engine.submit([2], max_new_tokens=2)
    runner.resume()
    assert ids(long) == runner.greedy([1], 5)
    assert ids(short) == runner.greedy([2], 2)
    assert [batch.slots.tolist() for batch in runner.batches] == [[0], [0, 1], [0, 1], [0], [0]]


def test_a_long_prompt_is_cut_to_the_budget_and_others_keep_talking(
    make_engine: MakeEngine,
) -> None:
    engine, runner = make_engine(max_batch=2, step_tokens=8)
    runner.pause()
    talker = engine.submit([1], max_new_tokens=12)
    runner.begun()
    intruder = engine.submit(list(range(50)), max_new_tokens=1)
    runner.resume()
    assert ids(intruder) == runner.greedy(list(range(50)), 1)
    assert ids(talker) == runner.greedy([1], 12)
    assert max(len(batch.ids) for batch in runner.batches) == 8
    assert all(batch.slots[0] == 0 and batch.counts[0] == 1 for batch in runner.batches[1:9])


def test_closing_frees_the_row_within_one_step(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    first, second = busy(engine, runner, 2)
    first.close()
    runner.finish()
    runner.begun()
    runner.resume()
    settled(engine)
    assert runner.batches[1].slots.tolist() == [0, 1]
    assert runner.batches[2].slots.tolist()[0] == 1, "the step after the close runs without it"
    assert 0 not in runner.batches[2].slots[runner.batches[2].starts > 0]
    assert first.finish_reason == "cancelled"
    second.close()


def test_closing_a_waiting_request_frees_its_place(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1, step_tokens=8, max_queue=1)
    (holder,) = busy(engine, runner, 1)
    waits = engine.submit([5], max_new_tokens=2)
    with pytest.raises(Overloaded):
        engine.submit([6], max_new_tokens=2)
    waits.close()
    runner.finish()
    runner.begun()
    assert ids(waits) == []
    next_one = engine.submit([6], max_new_tokens=2)
    holder.close()
    runner.resume()
    assert ids(next_one) == runner.greedy([6], 2)
    assert 5 not in np.concatenate([batch.ids for batch in runner.batches[:3]])


def test_closing_again_or_late_or_from_many_threads_is_harmless(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    (one,) = busy(engine, runner, 1)
    threads = [threading.Thread(target=one.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runner.resume()
    settled(engine)
    one.close()
    assert engine.stats().cancelled == 1
    finished = engine.submit([4], max_new_tokens=2)
    ids(finished)
    finished.close()
    assert finished.finish_reason == "length"


def test_closing_wakes_whoever_reads(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    (one,) = busy(engine, runner, 1)
    found: list[list[int]] = []
    reader = threading.Thread(target=lambda: found.append(ids(one)))
    reader.start()
    one.close()
    runner.resume()
    reader.join(PATIENCE_S)
    assert len(found) == 1


def test_a_generation_nobody_holds_any_more_gives_its_row_back(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    generations = busy(engine, runner, 3)
    generations.clear()
    gc.collect()
    runner.resume()
    settled(engine)
    assert engine.stats().cancelled == 3
    assert slots(engine) == [0, 1, 2, 3]


def test_whatever_is_submitted_and_closed_nothing_leaks(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_queue=6, max_queue_tokens=120)
    served: list[bool] = []

    def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(60):
            prompt = [rng.randrange(64) for _ in range(rng.randint(1, 60))]
            count = rng.randint(1, 12)
            with suppress(Overloaded):
                generation = engine.submit(prompt, max_new_tokens=count)
                fate = rng.randrange(4)
                if fate == 0:
                    generation.close()
                elif fate == 1:
                    next(generation.tokens_sync())
                    generation.close()
                elif fate == 2:
                    served.append(ids(generation) == runner.greedy(prompt, count))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    gc.collect()
    settled(engine)
    settled(engine)
    assert served and all(served)
    assert slots(engine) == [0, 1, 2, 3]
    assert engine._worker is not None and not engine._worker._tickets
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens, stats.kv_usage) == (0, 0, 0, 0)


# -- refusing ------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once_and_says_how_long(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1, step_tokens=8, max_queue=3)
    held = busy(engine, runner, 1)
    held += [engine.submit([5], max_new_tokens=2) for _ in range(3)]
    began = time.perf_counter()
    with pytest.raises(Overloaded, match="3 requests wait") as refusal:
        engine.submit([6], max_new_tokens=2)
    assert time.perf_counter() - began < 0.1, "a step is being held: refusing must not wait for it"
    assert 0 < refusal.value.eta_s < 60


def test_the_queue_is_bounded_in_prompt_tokens_too(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1, step_tokens=8, max_queue_tokens=50)
    held = busy(engine, runner, 1)
    held.append(engine.submit([5] * 100, max_new_tokens=2))  # an empty queue takes any prompt
    with pytest.raises(Overloaded):
        engine.submit([5], max_new_tokens=2)
    assert engine._worker is not None
    assert engine._worker.gate.tokens == 100


def test_a_prompt_without_room_for_an_answer_is_refused(make_engine: MakeEngine) -> None:
    engine, _ = make_engine(context_tokens=16)
    with pytest.raises(PromptTooLong, match="16 tokens and the context holds 16"):
        engine.submit([1] * 16, max_new_tokens=1)
    rule = FirstTokenRule((3, 4), 5, 1, 2)
    with pytest.raises(PromptTooLong):
        engine.submit([1] * 15, max_new_tokens=1, first=rule)
    assert len(ids(engine.submit([1] * 15, max_new_tokens=9))) == 1
    assert len(ids(engine.submit([1] * 14, max_new_tokens=9, first=rule))) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": []},
        {"prompt": [64]},
        {"prompt": [-1]},
        {"prompt": [1.5]},
        {"prompt": ["a"]},
        {"prompt": [[1]]},
        {"max_new_tokens": 0},
        {"first": FirstTokenRule((3, 99), 5, 1, 2)},
        {"first": FirstTokenRule((3, 4), -5, 1, 2)},
    ],
)
def test_a_request_that_would_break_the_thread_is_refused_to_its_caller(
    make_engine: MakeEngine, wrong: dict[str, Any]
) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError):
        engine.submit(**{"prompt": [1], "max_new_tokens": 3, **wrong})
    settled(engine)


# -- when things break ---------------------------------------------------------------------------


class NativeFault(BaseException):
    """Not even an Exception, like the worst a native library may raise."""


@pytest.mark.parametrize("fault", [RuntimeError("kernel failed"), NativeFault()])
def test_a_dead_thread_fails_everyone_and_a_new_one_can_be_started(
    make_engine: MakeEngine, fault: BaseException
) -> None:
    engine, runner = make_engine(max_batch=2, step_tokens=8)
    generations = busy(engine, runner, 4)
    shown = next(generations[0].tokens_sync())
    runner.fault = fault
    runner.resume()
    for generation in generations:
        with pytest.raises(EngineCrashed, match="start"):
            ids(generation)
        assert generation.finish_reason is None
    assert [token.id for token in shown] == runner.greedy([1, 2, 3], 1)
    with pytest.raises(EngineCrashed):
        engine.submit([1], max_new_tokens=1)
    assert engine.stats().state == "crashed"
    assert engine._worker is not None
    engine._worker._thread.join(PATIENCE_S)
    assert runner.closed
    engine.start()
    assert ids(engine.submit([1], max_new_tokens=3)) == runner.greedy([1], 3)


async def test_async_readers_learn_of_the_crash_too(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    generations = busy(engine, runner, 3)

    async def read(generation: Generation) -> str:
        try:
            async for _ in generation:
                pass
        except EngineCrashed:
            return "crashed"
        return "ended"

    tasks = [asyncio.create_task(read(generation)) for generation in generations]
    await asyncio.sleep(0)
    runner.fault = RuntimeError("kernel failed")
    runner.resume()
    assert await asyncio.gather(*tasks) == ["crashed"] * 3


def test_a_loop_that_vanished_harms_nobody_and_its_rows_are_freed(
    make_engine: MakeEngine,
) -> None:
    engine, runner = make_engine()
    gone, stays = busy(engine, runner, 2)
    _leave_a_closed_loop(gone)
    runner.resume()
    assert ids(stays) == runner.greedy([1, 2, 4], 100)
    settled(engine)
    assert engine.stats().cancelled == 1
    assert slots(engine) == [0, 1, 2, 3]


def _leave_a_closed_loop(generation: Generation) -> None:
    """Wait for the generation's next batch in an event loop, and close that under the reader."""
    loop = asyncio.new_event_loop()

    async def wait() -> None:
        await generation.__anext__()
        await generation.__anext__()

    task = loop.create_task(wait())
    loop.call_later(0.01, loop.stop)
    loop.run_forever()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


async def test_a_cancelled_reader_may_be_followed_by_another(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    (one,) = busy(engine, runner, 1)
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    first = await one.__anext__()
    task = asyncio.create_task(one.__anext__())
    await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    runner.resume()
    await asyncio.to_thread(settled, engine)
    rest = [token async for batch in one for token in batch]
    assert [t.id for t in first + rest] == runner.greedy([1, 2, 3], 100)
    assert not faults


async def test_two_readers_of_one_generation_are_refused(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    (one,) = busy(engine, runner, 1)
    await one.__anext__()
    task = asyncio.create_task(one.__anext__())
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="one reader"):
        await one.__anext__()
    runner.resume()
    await task


async def test_a_step_wakes_an_event_loop_once_however_many_read(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = make_engine()
    loop = asyncio.get_running_loop()
    calls: list[int] = []
    wake = loop.call_soon_threadsafe

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(runner.batches))
        return wake(*args, **kwargs)

    async def read(i: int) -> int:
        generation = engine.submit([i], max_new_tokens=20)
        return sum([len(batch) async for batch in generation])

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    assert await asyncio.gather(*(read(i) for i in range(4))) == [20] * 4
    assert calls and len(calls) == len(set(calls))


# -- starting and closing ------------------------------------------------------------------------


def counting(loads: list[FakeRunner]) -> Engine:
    def load(_: EngineConfig) -> Loaded:
        loads.append(FakeRunner())
        return Loaded(loads[-1])

    return Engine(EngineConfig(Path("unused"), max_batch=2, step_tokens=8), load=load)


def test_an_engine_loads_once_and_lazily_whoever_starts_it() -> None:
    loads: list[FakeRunner] = []
    engine = counting(loads)
    assert (loads, engine.stats().state) == ([], "new")
    threads = [threading.Thread(target=engine.start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ids(engine.submit([1], max_new_tokens=2)) == loads[0].greedy([1], 2)
    assert len(loads) == 1
    engine.close()


def test_the_first_submit_starts_an_engine_that_never_ran() -> None:
    loads: list[FakeRunner] = []
    engine = counting(loads)
    assert len(ids(engine.submit([1], max_new_tokens=2))) == 2
    engine.close()


def test_closing_ends_every_wait_and_frees_the_model(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    generations = busy(engine, runner, 3)
    closer = threading.Thread(target=engine.close)
    closer.start()
    runner.resume()
    closer.join(PATIENCE_S)
    for generation in generations:
        with pytest.raises(EngineClosed):
            ids(generation)
    with pytest.raises(EngineClosed):
        engine.submit([1], max_new_tokens=1)
    assert (runner.closed, engine.stats().state) == (True, "closed")
    engine.close()
    engine.restart()
    settled(engine)


def test_a_closed_engine_does_not_start_by_itself() -> None:
    engine = counting([])
    engine.close()
    with pytest.raises(EngineClosed):
        engine.submit([1], max_new_tokens=1)


def test_an_engine_nobody_holds_any_more_ends_its_thread() -> None:
    engine = counting([])
    engine.start()
    assert engine._worker is not None
    thread = engine._worker._thread
    del engine
    gc.collect()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_the_self_check_refuses_a_model_whose_rows_see_each_other() -> None:
    class Leaky(FakeRunner):
        def step(self, batch: Batch) -> Any:
            return np.roll(super().step(batch), len(batch.slots) - 1, axis=1)

    runner = Leaky()
    config = EngineConfig(Path("unused"), max_batch=2, step_tokens=8)
    engine = Engine(config, load=lambda _: Loaded(runner))
    with pytest.raises(EngineError, match="self-check"):
        engine.start()
    assert runner.closed
    assert engine.stats().state == "new"


def test_an_engine_of_one_row_serves_one_after_another(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1, step_tokens=3)
    generations = [engine.submit([i, 7], max_new_tokens=3) for i in range(5)]
    assert [ids(g) for g in generations] == [runner.greedy([i, 7], 3) for i in range(5)]


@pytest.mark.parametrize(
    "wrong", [{"max_batch": 0}, {"max_queue": 0}, {"step_tokens": 3}, {"threads": -1}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least|start at"):
        EngineConfig(Path("unused"), **wrong)


def test_importing_the_engine_loads_neither_django_nor_onnxruntime() -> None:
    code = (
        "import sys, assistant.engine\n"
        "bad = {'django', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- real arithmetic -----------------------------------------------------------------------------


def batch_of(rows: list[tuple[int, int]]) -> Batch:
    slots, counts = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    return Batch(slots, slots * 0, counts, slots >= 0, np.arange(counts.sum()))


def test_decode_rows_run_by_themselves_and_prompts_share_a_run_unless_padding_costs() -> None:
    decode = [(slot, 1) for slot in range(31)]
    assert list(runs(batch_of(decode), 32)) == [(slice(0, 31), 0, 32)]
    assert list(runs(batch_of([*decode, (31, 64)]), 32)) == [
        (slice(0, 31), 0, 32),
        (slice(31, 32), 31, 1),
    ]
    assert list(runs(batch_of([(0, 1), (1, 1), (2, 20), (3, 19)]), 32)) == [
        (slice(0, 2), 0, 2),
        (slice(2, 4), 2, 2),
    ]
    assert list(runs(batch_of([(5, 1)]), 32)) == [(slice(0, 1), 5, 1)]
    assert list(runs(batch_of([(5, 1)]), 6)) == [(slice(0, 1), 5, 1)]
    assert list(runs(batch_of([(4, 1), (5, 1)]), 6)) == [(slice(0, 2), 4, 2)]


def test_every_row_of_a_step_is_in_exactly_one_run_and_inside_its_slots() -> None:
    rng = random.Random(3)
    for _ in range(300):
        total = rng.choice([1, 3, 6, 8, 32])
        used = sorted(rng.sample(range(total), rng.randint(1, total)))
        rng.shuffle(used)
        decoding = rng.randint(0, len(used))
        rows = [(s, 1 if i < decoding else rng.randint(1, 90)) for i, s in enumerate(used)]
        seen: list[int] = []
        for part, low, size in runs(batch_of(rows), total):
            assert all(low <= slot < low + size <= total for slot, _ in rows[part])
            seen += range(len(rows))[part]
        assert seen == list(range(len(rows)))


def test_inputs_kept_between_steps_never_outlive_the_rows_they_describe(
    models: dict[str, Path],
) -> None:
    """Same shapes, other rows: what was bound for the last step must not serve this one."""
    architecture = Manifest.load(models["fp32"]).architecture
    runner = OnnxRunner(
        models["fp32"] / "model.onnx",
        architecture,
        slots=32,
        step_tokens=96,
        context_tokens=96,
        threads=1,
    )
    prompts = [[20 + 50 * slot + i for i in range(4 + slot)] for slot in range(4)]
    starts = [len(prompt) for prompt in prompts]

    def decode(slots: list[int], samples: list[bool]) -> Floats:
        ids = [[400 + slot] for slot in slots]
        batch = Batch.of(slots, [starts[slot] for slot in slots], samples, ids)
        return runner.step(batch).copy()

    for slot, prompt in enumerate(prompts):
        runner.step(Batch.of([slot], [0], [True], [prompt]))
    alone = [decode([slot], [True])[0] for slot in range(4)]
    for slots in ([0, 1, 3], [0, 2, 3], [3, 2, 0], [0, 1, 3]):
        expected = np.array([alone[slot] for slot in slots])
        np.testing.assert_allclose(decode(slots, [True] * 3), expected, atol=1e-4)
    for samples in ([True, False, True], [False, True, True], [False, True, False]):
        expected = np.array([alone[slot] for slot, kept in enumerate(samples) if kept])
        np.testing.assert_allclose(decode([0, 1, 2], samples), expected, atol=1e-4)
    # The same prompt in the same slot, first by itself, then behind decode rows of another run.
    prompt = list(range(20, 84))
    alone_prompt = runner.step(Batch.of([31], [0], [True], [prompt]))[0].copy()
    batch = Batch.of(range(32), [0] * 32, [True] * 32, [*([row] for row in range(31)), prompt])
    assert len(list(runs(batch, 32))) == 2
    np.testing.assert_allclose(runner.step(batch)[31], alone_prompt, atol=1e-4)
    runner.close()


@pytest.fixture(scope="module", params=["fp32", "row8"])
def real(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(EngineConfig(models[request.param], threads=1, max_batch=6, step_tokens=24))
    engine.start()
    yield engine
    engine.close()


def test_sixty_random_batches_give_each_the_answer_it_gets_alone(real: Engine) -> None:
    rng = random.Random(60)
    for _ in range(60):
        size = rng.randint(2, 9)
        prompts = [[rng.randrange(20, 512) for _ in range(rng.randint(1, 40))] for _ in range(size)]
        together = [real.submit(prompt, max_new_tokens=6) for prompt in prompts]
        rng.choice(together).close()  # someone leaves in the middle
        closed = [generation.finish_reason == "cancelled" for generation in together]
        found = [ids(generation) for generation in together]
        for prompt, answer, left in zip(prompts, found, closed, strict=True):
            assert left or answer == ids(real.submit(prompt, max_new_tokens=6))


def test_seeded_answers_repeat_whoever_sits_beside(real: Engine) -> None:
    sampling = Sampling(temperature=1.3, top_p=0.95, seed=5)
    alone = ids(real.submit([30, 40, 50], max_new_tokens=30, sampling=sampling))
    crowd = [
        real.submit([60 + i] * 20, max_new_tokens=40, sampling=Sampling(temperature=1.0))
        for i in range(5)
    ]
    again = ids(real.submit([30, 40, 50], max_new_tokens=30, sampling=sampling))
    other = Sampling(temperature=1.3, top_p=0.95, seed=6)
    assert alone == again
    assert alone != ids(real.submit([30, 40, 50], max_new_tokens=30, sampling=other))
    for generation in crowd:
        generation.close()


def test_a_conversation_runs_end_to_end_without_a_control_token_shown(tiny: Engine) -> None:
    codec, manifest = tiny.codec, tiny.manifest
    assert isinstance(codec, Codec) and manifest is not None
    prompt = codec.encode_chat([ChatTurn("user", ("cancel ", Slot("Order Number"), " <|end|>"))])
    for seed in range(30):
        generation = tiny.submit(
            prompt,
            max_new_tokens=20,
            sampling=Sampling(temperature=3.0, seed=seed),
            stop_ids=[codec.end_id],
            first=manifest.first_token_rule(),
        )
        assert not set(ids(generation)) & codec.control_ids
        verdict = generation.verdict
        assert verdict is not None
        assert 0 < verdict.confidence < 1 and 0 < verdict.scope < 1


def test_a_full_context_runs_to_its_last_token(tiny: Engine) -> None:
    generations = [tiny.submit([30] * n, max_new_tokens=99) for n in (1020, 1000, 5)]
    assert [len(ids(generation)) for generation in generations] == [4, 24, 99]


def test_a_broken_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    engine = Engine(EngineConfig(tmp_path))
    with pytest.raises(ManifestError, match=r"model\.json is missing"):
        engine.start()
    with pytest.raises(ManifestError):
        engine.submit([1], max_new_tokens=1)


FORKING = """
import os, sys
from pathlib import Path
from assistant.engine import Engine, EngineClosed, EngineConfig
engine = Engine(EngineConfig(Path(sys.argv[1]), threads=2, max_batch=4))
read = lambda g: [t.id for batch in g.tokens_sync() for t in batch]
expected = read(engine.submit([30, 40], max_new_tokens=5))
held = engine.submit([30] * 500, max_new_tokens=500)
child = os.fork()
if not child:
    try:
        read(held)
    except EngineClosed:
        same = read(engine.submit([30, 40], max_new_tokens=5)) == expected
        sys.exit(7 if same else 8)
    sys.exit(9)
held.close()
status = os.waitpid(child, 0)[1]
same = read(engine.submit([30, 40], max_new_tokens=5)) == expected
sys.exit(os.waitstatus_to_exitcode(status) if same else 10)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_an_engine_of_its_own_and_exits(models: dict[str, Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKING, str(models["fp32"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 7, done.stderr
