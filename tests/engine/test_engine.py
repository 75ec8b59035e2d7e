"""The loop: with a fake model for who runs when, with tiny ONNX models for what comes out."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
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
from assistant.modelkit import quality
from assistant.modelkit.build import build
from assistant.modelkit.checkpoint import SHAPES, Checkpoint, write_checkpoint
from assistant.modelkit.graph import build_graph
from assistant.modelkit.quality import open_session
from assistant.modelkit.quantise import Tapped
from tests.engine.conftest import PATIENCE_S, FakeRunner, MakeEngine, ids, pairs

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
    prompts = [batch.counts[1:].sum() for batch in runner.batches[1:8]]
    assert sum(prompts) == 50 and max(prompts) == 8
    assert all(batch.slots[0] == 0 and batch.counts[0] == 1 for batch in runner.batches[1:8])


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


def test_who_joins_no_queue_leaves_a_slot_for_who_comes_next(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=4, step_tokens=8)
    held = busy(engine, runner, 1)  # a step is being held: nobody else is given a slot yet
    held += [engine.submit([5], max_new_tokens=2, queues=False) for _ in range(2)]
    with pytest.raises(Overloaded):
        engine.submit([6], max_new_tokens=2, queues=False)
    held.append(engine.submit([6], max_new_tokens=2))
    assert held[-1].place == 0, "there is one for somebody who waits for it"


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


# -- what is kept between answers ----------------------------------------------------------------


async def test_a_reader_is_woken_for_the_first_token_then_no_more_often_than_asked_and_at_the_end(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, runner = make_engine(wake_every_s=3600.0)
    step = runner.step
    monkeypatch.setattr(runner, "step", lambda batch: (time.sleep(0.005), step(batch))[1])
    batches = [[t.id for t in batch] async for batch in engine.submit([1, 2], max_new_tokens=9)]
    assert len(batches) <= 2
    assert [token for batch in batches for token in batch] == runner.greedy([1, 2], 9)


def ask(engine: Engine, prompt: list[int], scope: str = "ana", count: int = 6) -> list[int]:
    return ids(engine.submit(prompt, max_new_tokens=count, scope=scope))


def reused(engine: Engine) -> int:
    """Prompt tokens that were reused so far, once all is handled."""
    settled(engine)
    return engine.stats().reused_tokens


def test_the_next_turns_of_a_chat_read_only_what_is_new(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    prompt = list(range(20))
    answer = ask(engine, prompt)
    for turn in range(6):
        known, new = [*prompt, *answer], [40 + turn, 41, 42]
        before = reused(engine)
        runner.batches.clear()
        prompt = [*known, *new]
        answer = ask(engine, prompt)
        assert answer == runner.greedy(prompt, 6)
        assert runner.batches[0].starts.tolist() == [len(known) - 1], "its last token never ran"
        assert runner.batches[0].ids.tolist() == [known[-1], *new]
        assert reused(engine) - before == len(known) - 1
    assert engine.stats().kept_chats == 1, "each turn takes the place of the last"


def test_an_edited_question_is_read_again_from_where_it_differs(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    ask(engine, list(range(30)))
    edited = [*range(18), 60, 61, 62, 63]
    assert ask(engine, edited) == runner.greedy(edited, 6)
    assert reused(engine) == 18
    assert ask(engine, edited) == runner.greedy(edited, 6)
    assert reused(engine) == 18 + len(edited) - 2, "two tokens at least are read"


def test_many_chats_at_once_are_what_each_would_be_alone(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=8, context_tokens=200, prefix_bytes=4000, max_queue=999)
    engine.share_prefix(list(range(10)))
    rng = random.Random(8)
    chats: list[tuple[str, list[int]]] = [(scope, []) for scope in "aabbcd"] + [("", [])]
    for _ in range(25):
        turns = []
        for scope, past in chats:
            start = past if len(past) < 120 else rng.choice([[], list(range(10)), past[:50]])
            prompt = [*start, *(rng.randrange(64) for _ in range(rng.randint(1, 20)))]
            count = rng.randint(1, 12)
            turns.append((prompt, count, engine.submit(prompt, max_new_tokens=count, scope=scope)))
        for at, (prompt, count, generation) in enumerate(turns):
            answer = ids(generation)
            assert answer == runner.greedy(prompt, count)
            chats[at] = (chats[at][0], [*prompt, *answer])
    assert reused(engine) > 3000
    assert engine.stats().kept_bytes <= 4000


def test_callers_never_find_what_others_asked(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    prompt = list(range(20))
    ask(engine, prompt, "ana")
    for scope in ("ben", "", "ana2"):
        assert ask(engine, prompt, scope) == runner.greedy(prompt, 6)
        assert reused(engine) == 0
    ask(engine, prompt, "ana")
    assert reused(engine) == len(prompt) - 2


def test_nothing_is_kept_for_the_empty_scope_nor_where_there_is_no_memory_for_it(
    make_engine: MakeEngine,
) -> None:
    for scope, memory in (("", 64 << 20), ("ana", 0)):
        engine, runner = make_engine(prefix_bytes=memory)
        for _ in range(3):
            assert ask(engine, list(range(20)), scope) == runner.greedy(range(20), 6)
        assert reused(engine) == 0
        assert (engine.stats().kept_chats, engine.stats().kept_bytes) == (0, 0)


def test_a_cache_of_a_few_tokens_is_not_worth_keeping(make_engine: MakeEngine) -> None:
    engine, _ = make_engine()
    ask(engine, [1, 2, 3, 4], count=4)
    settled(engine)
    assert engine.stats().kept_chats == 0, "seven tokens were run"
    ask(engine, [1, 2, 3, 4, 5], count=4)
    settled(engine)
    assert engine.stats().kept_chats == 1


def test_what_was_read_before_a_cancel_is_kept(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    prompt = list(range(50))
    runner.pause()
    talking = engine.submit([*prompt[:20]], max_new_tokens=50, scope="ana")
    reading = engine.submit(prompt[::-1], max_new_tokens=50, scope="ben")
    runner.begun()
    for _ in range(2):
        runner.finish()
        runner.begun()
    talking.close()
    reading.close()
    runner.resume()
    settled(engine)
    assert engine.stats().kept_chats == 2
    shown = runner.greedy(prompt[:20], 3)
    follows = [*prompt[:20], *shown, 9, 9, 9]
    assert ask(engine, follows) == runner.greedy(follows, 6)
    first = reused(engine)
    assert 20 <= first <= 23
    assert ask(engine, prompt[::-1], "ben") == runner.greedy(prompt[::-1], 6)
    assert reused(engine) - first >= 8


def test_a_request_that_never_ran_leaves_nothing(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1)
    held = busy(engine, runner, 1)
    waits = engine.submit(list(range(40)), max_new_tokens=5, scope="ana")
    waits.close()
    held[0].close()
    runner.resume()
    settled(engine)
    assert engine.stats().kept_chats == 0


def test_the_least_recently_used_chats_make_room(make_engine: MakeEngine) -> None:
    one_chat = 2 * 8 * (20 + 5)  # ids, and what the fake runner saves of them
    engine, runner = make_engine(prefix_bytes=3 * one_chat)
    prompts = {scope: [ord(scope) % 64] * 20 for scope in "abcd"}
    for scope in "abc":
        ask(engine, prompts[scope], scope)
    ask(engine, prompts["a"], "a")
    ask(engine, prompts["d"], "d")
    settled(engine)
    assert engine.stats().kept_bytes == 3 * one_chat
    for scope, known in (("a", True), ("d", True), ("b", False)):
        before = reused(engine)
        follows = [*prompts[scope], *runner.greedy(prompts[scope], 6), 9, 9]
        assert ask(engine, follows, scope, count=1) == runner.greedy(follows, 1)
        assert (reused(engine) > before) == known


# -- slots that move -----------------------------------------------------------------------------


def moved(make_engine: MakeEngine) -> tuple[Engine, FakeRunner, list[Generation]]:
    """Answers of two callers whose slots moved down because six between them left."""
    engine, runner = make_engine(max_batch=8)
    generations = busy(engine, runner, 6)
    generations.append(engine.submit([7] * 12, max_new_tokens=60, scope="ana"))
    generations.append(engine.submit([8] * 12, max_new_tokens=60, scope="ben"))
    runner.finish()
    runner.begun()
    for generation in generations[1:6]:
        generation.close()
    runner.resume()
    return engine, runner, [generations[0], *generations[6:]]


def test_an_answer_goes_on_after_its_slot_moved(make_engine: MakeEngine) -> None:
    engine, runner, (first, ana, ben) = moved(make_engine)
    assert ids(ana) == runner.greedy([7] * 12, 60)
    assert ids(ben) == runner.greedy([8] * 12, 60)
    assert ids(first) == runner.greedy([1, 2, 3], 100)
    assert [(source, target) for source, target, _ in runner.copies] == [(7, 1), (6, 2)]
    settled(engine)
    assert slots(engine) == list(range(8))


def test_what_moved_is_kept_from_where_it_ended(make_engine: MakeEngine) -> None:
    engine, runner, (first, *both) = moved(make_engine)
    for scope, token, generation in zip(("ana", "ben"), (7, 8), both, strict=True):
        follows = [token] * 12 + ids(generation) + [5, 5]
        before = reused(engine)
        assert ask(engine, follows, scope) == runner.greedy(follows, 6)
        assert reused(engine) - before == 12 + 59
    assert runner.copies
    first.close()


def test_seeded_answers_and_penalties_move_with_their_slot(make_engine: MakeEngine) -> None:
    sampling = Sampling(temperature=2.0, seed=4, repetition_penalty=1.5)
    engine, runner = make_engine(max_batch=8)
    alone = ids(engine.submit([7] * 12, max_new_tokens=40, sampling=sampling))
    generations = busy(engine, runner, 7)
    generations.append(engine.submit([7] * 12, max_new_tokens=40, sampling=sampling))
    runner.finish()
    runner.begun()
    for generation in generations[1:7]:
        generation.close()
    runner.resume()
    assert ids(generations[-1]) == alone
    assert runner.copies


# -- the shared prefix ---------------------------------------------------------------------------

SYSTEM = list(range(30, 50))


def shared_chunks(runner: FakeRunner, row: int) -> list[int]:
    """Tokens of each step that computed a prefix, in the row behind the last slot."""
    return [len(batch.ids) for batch in runner.batches if batch.slots.tolist() == [row]]


def test_a_shared_prefix_is_computed_once_and_serves_every_caller(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    engine.share_prefix(SYSTEM)
    for at, scope in enumerate(("ana", "ben", "", "eve")):
        prompt = [*SYSTEM, 50 + at, 2, 3]
        assert ask(engine, prompt, scope) == runner.greedy(prompt, 6)
        assert reused(engine) == len(SYSTEM) * (at + 1)
    assert sum(shared_chunks(runner, 4)) == len(SYSTEM)
    assert engine.stats().prompt_tokens == 4 * 3 + 4, "and what settling takes"


@pytest.mark.parametrize("length", [2, 8, 15, 16, 17, 18, 31, 32, 33, 34, 48, 49, 100])
def test_a_shared_prefix_is_never_cut_so_that_one_token_runs_alone(
    make_engine: MakeEngine, length: int
) -> None:
    """One token in a run is rounded differently: prompts would tell whether they were shared."""
    engine, runner = make_engine(step_tokens=16)
    prefix = [i % 60 for i in range(length)]
    engine.share_prefix(prefix)
    prompt = [*prefix, 61, 62, 63]
    assert ask(engine, prompt) == runner.greedy(prompt, 6)
    assert reused(engine) == length
    chunks = shared_chunks(runner, 4)
    assert sum(chunks) == length
    assert 2 <= min(chunks) <= max(chunks) <= 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (SYSTEM, 0),
        (SYSTEM[:-1], 0),
        ([*SYSTEM, 1], 0),
        ([*SYSTEM, 1, 2], 20),
        ([*SYSTEM[:-1], 63, 1, 2], 0),
        ([1, *SYSTEM, 2, 3], 0),
    ],
)
def test_only_prompts_that_begin_with_all_of_the_prefix_get_it(
    make_engine: MakeEngine, prompt: list[int], expected: int
) -> None:
    engine, runner = make_engine()
    engine.share_prefix(SYSTEM)
    assert ask(engine, prompt) == runner.greedy(prompt, 6)
    assert reused(engine) == expected


def test_chats_behind_a_shared_prefix_are_kept_without_it(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    engine.share_prefix(SYSTEM)
    chats = {"ana": [*SYSTEM, *range(12)], "ben": [*SYSTEM, *range(5, 17)]}
    for scope, prompt in chats.items():
        follows = [*prompt, *ask(engine, prompt, scope), 9, 9, 9]
        before = reused(engine)
        assert ask(engine, follows, scope, count=1) == runner.greedy(follows, 1)
        assert reused(engine) - before == len(prompt) + 5
    per_chat = 8 * (len(SYSTEM) + 2 * (12 + 6 + 3))
    assert engine.stats().kept_bytes == 2 * per_chat, "ids whole, saved tokens without the prefix"


def test_a_new_shared_prefix_replaces_the_old_and_what_stood_on_it(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    engine.share_prefix(SYSTEM)
    prompt = [*SYSTEM, *range(12)]
    ask(engine, prompt)
    engine.share_prefix(SYSTEM[:6])
    settled(engine)
    assert engine.stats().kept_chats == 0
    before = reused(engine)
    assert ask(engine, prompt) == runner.greedy(prompt, 6)
    assert reused(engine) - before == 6
    other = [60, 61, 62, 63]
    engine.share_prefix(other)
    assert ask(engine, [*other, 1, 2], "ben") == runner.greedy([*other, 1, 2], 6)
    assert reused(engine) - before == 6 + 4


def test_a_prefix_is_shared_in_the_midst_of_answers(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    generations = busy(engine, runner, 4)
    engine.share_prefix(SYSTEM)
    runner.resume()
    prompts = [[1, 2, 3 + i] for i in range(4)]
    assert [ids(g) for g in generations] == [runner.greedy(prompt, 100) for prompt in prompts]
    prompt = [*SYSTEM, 1, 2]
    assert ask(engine, prompt) == runner.greedy(prompt, 6)
    assert reused(engine) == len(SYSTEM)


@pytest.mark.parametrize("wrong", [[], [64], [-1, 2], [1.5], ["a"], [[1]]])
def test_a_prefix_that_would_break_the_thread_is_refused(
    make_engine: MakeEngine, wrong: Any
) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError):
        engine.share_prefix(wrong)
    settled(engine)


def test_a_prefix_that_leaves_no_room_is_refused_and_so_is_a_closed_engine(
    make_engine: MakeEngine,
) -> None:
    engine, _ = make_engine(context_tokens=16)
    with pytest.raises(PromptTooLong, match="16 tokens leaves no room"):
        engine.share_prefix([1] * 16)
    engine.share_prefix([1] * 13)
    assert len(ask(engine, [1] * 15)) == 1
    engine.close()
    with pytest.raises(EngineClosed):
        engine.share_prefix([1])


# -- fairness and pace ---------------------------------------------------------------------------


def test_a_hog_s_requests_delay_another_caller_by_one_answer_at_most(
    make_engine: MakeEngine,
) -> None:
    engine, runner = make_engine(max_batch=2)
    runner.pause()
    hog = [engine.submit([0, 1], max_new_tokens=3, scope="hog")]
    runner.begun()
    hog += [engine.submit([0, 1 + i], max_new_tokens=3, scope="hog") for i in range(60)]
    quiet = engine.submit([5, 5], max_new_tokens=3, scope="quiet")
    runner.resume()
    assert ids(quiet) == runner.greedy([5, 5], 3)
    for generation in hog:
        assert len(ids(generation)) == 3
    prompts = [
        batch.ids.tolist()[place]
        for batch in runner.batches
        for place, start in zip(np.cumsum(batch.counts) - batch.counts, batch.starts, strict=True)
        if start == 0
    ]
    assert prompts.count(0) == 61
    assert prompts.index(5) <= 2, "behind the two that ran when it came"


def test_short_prompts_pass_a_long_one_which_ends_all_the_same(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(step_tokens=16, context_tokens=400)
    runner.pause()
    first = engine.submit([1, 1], max_new_tokens=1)
    runner.begun()
    long = engine.submit([i % 64 for i in range(300)], max_new_tokens=1)
    short = [engine.submit([9, i], max_new_tokens=1) for i in range(2)]
    runner.resume()
    for generation in (first, *short, long):
        assert len(ids(generation)) == 1
    ends = {
        slot: at
        for at, batch in enumerate(runner.batches)
        for slot, samples in zip(batch.slots.tolist(), batch.samples, strict=True)
        if samples
    }
    assert max(ends.values()) == len(runner.batches) - 1
    assert sorted(ends.values())[:2] <= [2, 2], "the short ones did not wait for the long one"


def test_a_paced_answer_keeps_a_reader_s_pace_and_rests_between(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(reading_tokens_per_s=40)
    began = time.perf_counter()
    assert ask(engine, [1, 2], count=17) == runner.greedy([1, 2], 17)
    seconds = time.perf_counter() - began
    assert seconds >= 12 / 40 - 0.001, "four tokens at once, the others at the reader's pace"
    settled(engine)
    assert engine.stats().steps == len(runner.batches) == 17 + 1, "no step ran for nothing"


def test_a_resting_engine_takes_who_comes_at_once(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(reading_tokens_per_s=0.05)
    paced = engine.submit([1, 2], max_new_tokens=50)
    shown = paced.tokens_sync()
    while len(runner.batches) < 4:
        next(shown)
    began = time.perf_counter()
    assert ask(engine, [5, 6], count=4) == runner.greedy([5, 6], 4)
    paced.close()
    settled(engine)
    assert time.perf_counter() - began < 10, "the next token is due in twenty seconds"
    assert slots(engine) == [0, 1, 2, 3]


def test_a_step_gives_prompts_no_more_time_than_answers_can_spare(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(step_tokens=64, context_tokens=400, most_step_s=1e-9)
    (held,) = busy(engine, runner, 1)
    long = engine.submit([2] * 300, max_new_tokens=1)
    runner.resume()
    assert ids(long) == runner.greedy([2] * 300, 1)
    held.close()
    beside = [int(b.counts[1:].sum()) for b in runner.batches if len(b.slots) > 1]
    assert max(beside) == 16, "the least that moves a prompt on"


# -- figures -------------------------------------------------------------------------------------


def test_the_figures_say_what_runs_waits_and_is_kept(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=2, most_step_s=60.0)
    held = busy(engine, runner, 5)
    runner.finish()
    runner.begun()
    stats = engine.stats()
    assert (stats.state, stats.slots, stats.running, stats.waiting) == ("running", 2, 2, 3)
    assert stats.waiting_tokens == 9
    assert stats.kv_bytes == 8 * (3 + 1 + 3), "one answer has one token behind its prompt"
    assert stats.kv_usage == pytest.approx(7 / (2 * 128))
    assert (stats.steps, stats.prompt_tokens, stats.generated_tokens) == (2, 6, 3)
    assert stats.prefill_per_s > 0 and stats.step_s > 0 and stats.busy_s > 0
    for generation in held:
        generation.close()
    runner.resume()
    ask(engine, [4] * 10)
    settled(engine)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens, stats.kv_bytes) == (0, 0, 0, 0)
    assert (stats.cancelled, stats.finished) == (5, 1 + 1)
    assert (stats.kept_chats, stats.kept_bytes) == (1, 2 * 8 * 15)
    assert stats.eta_error > 0, "no promise is exact"


def test_an_engine_that_ended_claims_no_memory(make_engine: MakeEngine) -> None:
    engine, runner = make_engine()
    ask(engine, [4] * 10)
    held = busy(engine, runner, 2)
    runner.finish()
    runner.begun()
    assert engine.stats().kept_chats == 1
    closer = threading.Thread(target=engine.close)
    closer.start()
    runner.resume()
    closer.join(PATIENCE_S)
    assert held
    stats = engine.stats()
    assert (stats.running, stats.kv_usage, stats.kv_bytes) == (0, 0, 0)
    assert (stats.kept_chats, stats.kept_bytes) == (0, 0)


def test_a_crash_forgets_what_was_kept_and_the_next_life_starts_empty(
    make_engine: MakeEngine,
) -> None:
    engine, runner = make_engine()
    prompt = [*SYSTEM, *range(12)]
    engine.share_prefix(SYSTEM)
    ask(engine, prompt)
    assert reused(engine) == len(SYSTEM)
    runner.fault = RuntimeError("kernel failed")
    with pytest.raises(EngineCrashed):
        ask(engine, prompt)
    engine.restart()
    assert ask(engine, prompt) == runner.greedy(prompt, 6)
    assert reused(engine) == 0
    assert engine.stats().kept_chats == 1
    engine.share_prefix(SYSTEM)
    assert ask(engine, prompt, "ben") == runner.greedy(prompt, 6)
    assert reused(engine) == len(SYSTEM)


# -- what is drawn -------------------------------------------------------------------------------


def reference(row: Floats, sampling: Sampling, prompt: list[int]) -> list[float]:
    """The distribution that ``sampling`` asks for, token by token and without a trick."""
    scores = row.astype(float)
    for token in set(prompt):
        scores[token] *= sampling.repetition_penalty
    order = sorted(range(len(scores)), key=lambda token: -scores[token])
    order = order[: sampling.top_k or 64]
    weights = {t: math.exp((scores[t] - scores[order[0]]) / sampling.temperature) for t in order}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for token in order:
        if mass < sampling.top_p and weights[token] >= sampling.min_p * weights[order[0]]:
            kept[token] = weights[token]
        mass += weights[token] / total
    return [kept.get(token, 0.0) / sum(kept.values()) for token in range(len(scores))]


def chi_square(counts: Counter[int], shares: list[float]) -> tuple[float, float]:
    """The statistic, rare tokens taken together, and the value that one in a thousand exceeds.

    *Source*: Wilson and Hilferty 1931, for the second.
    """
    total = sum(counts.values())
    common = [token for token, share in enumerate(shares) if share * total >= 5]
    pairs = [(counts[token], shares[token] * total) for token in common]
    rest = (total - sum(n for n, _ in pairs), total - sum(n for _, n in pairs))
    pairs += [rest] if rest[1] >= 5 else []
    degrees = len(pairs) - 1
    spread = 2 / (9 * degrees)
    statistic = sum((found - wanted) ** 2 / wanted for found, wanted in pairs)
    return statistic, degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=20),
        Sampling(temperature=1.5, top_p=0.8),
        Sampling(temperature=2.0, min_p=0.1),
        Sampling(temperature=2.0, top_k=24, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_the_formulas_say(
    make_engine: MakeEngine, sampling: Sampling
) -> None:
    engine, runner = make_engine(max_batch=64, max_queue=3000, max_queue_tokens=9999)
    prompt = [7, 8, 9]
    generations = [
        engine.submit(prompt, max_new_tokens=1, sampling=dataclasses.replace(sampling, seed=seed))
        for seed in range(3000)
    ]
    counts = Counter(token for generation in generations for token in ids(generation))
    shares = reference(runner.logprobs(prompt), sampling, prompt)
    assert all(shares[token] > 0 for token in counts)
    statistic, most = chi_square(counts, shares)
    assert statistic < most
    warmer = dataclasses.replace(sampling, temperature=sampling.temperature * 1.3)
    statistic, most = chi_square(counts, reference(runner.logprobs(prompt), warmer, prompt))
    assert statistic > most, "the test would tell"


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
    engine, runner = make_engine(max_batch=1, step_tokens=4)
    generations = [engine.submit([i, 7], max_new_tokens=3) for i in range(5)]
    assert [ids(g) for g in generations] == [runner.greedy([i, 7], 3) for i in range(5)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_batch": 0},
        {"max_queue": 0},
        {"max_queue_tokens": 0},
        {"step_tokens": 3},
        {"context_tokens": 7},
        {"threads": -1},
        {"kv_bytes": -1},
        {"prefix_bytes": -1},
        {"reading_tokens_per_s": -0.1},
        {"reading_tokens_per_s": math.nan},
        {"wake_every_s": -0.1},
        {"wake_every_s": math.nan},
        {"most_step_s": 0.0},
        {"most_step_s": math.nan},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"starts? at|not negative|above 0") as refusal:
        EngineConfig(Path("unused"), **wrong)
    assert next(iter(wrong)) in str(refusal.value)


def test_the_least_settings_work(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(
        max_batch=1, max_queue=1, max_queue_tokens=1, step_tokens=4, context_tokens=8
    )
    assert ids(engine.submit([1, 2, 3, 4, 5], max_new_tokens=9)) == runner.greedy(
        [1, 2, 3, 4, 5], 3
    )


def test_importing_the_engine_loads_neither_django_nor_onnxruntime() -> None:
    code = (
        "import sys, assistant.engine\n"
        "bad = {'django', 'onnxruntime', 'torch', 'onnx'} & set(sys.modules)\n"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- real arithmetic -----------------------------------------------------------------------------


def split(rows: list[tuple[int, int]], decoding: int = 0) -> list[tuple[int, int, int, int]]:
    """(first row, row behind the last, lowest slot, slots) of each run of ``rows``."""
    slots, counts = zip(*rows, strict=True)
    nothing = [0] * len(rows)
    batch = Batch.of(slots, nothing, nothing, [range(count) for count in counts], decoding)
    return [(part.start, part.stop, low, size) for part, low, size in runs(batch)]


def test_decode_rows_run_by_themselves_and_prompts_share_a_run_unless_padding_costs() -> None:
    decode = [(slot, 1) for slot in range(31)]
    assert split(decode) == [(0, 31, 0, 31)]
    assert split([*decode, (31, 64)]) == [(0, 31, 0, 31), (31, 32, 31, 1)]
    assert split([(0, 1), (1, 1), (2, 20), (3, 19)]) == [(0, 2, 0, 2), (2, 4, 2, 2)]
    assert split([(0, 60), (1, 2)]) == [(0, 1, 0, 1), (1, 2, 1, 1)], "58 columns of padding"
    assert split([(0, 20), (9, 20)]) == [(0, 1, 0, 1), (1, 2, 9, 1)], "8 slots between them"
    assert split([(5, 1)]) == [(0, 1, 5, 1)]
    assert split([(7, 1), (4, 1)]) == [(0, 2, 4, 4)]
    guessed = [(0, 8), (1, 1), (2, 4), (3, 90)]
    assert split(guessed, decoding=3) == [(0, 3, 0, 3), (3, 4, 3, 1)], "guesses run with the rest"


def test_decode_rows_far_apart_do_not_pay_for_the_idle_slots_between_them() -> None:
    assert split([(0, 1), (1, 1), (90, 1)]) == [(0, 2, 0, 2), (2, 3, 90, 1)]
    assert split([(0, 1), (12, 1)]) == [(0, 2, 0, 13)], "a run of its own costs more than 11 slots"
    assert split([(3, 1), (60, 1), (120, 30)]) == [(0, 1, 3, 1), (1, 2, 60, 1), (2, 3, 120, 1)]


def test_every_row_of_a_step_is_in_exactly_one_run_and_inside_its_slots() -> None:
    rng = random.Random(3)
    for _ in range(300):
        total = rng.choice([1, 3, 6, 8, 32])
        used = sorted(rng.sample(range(total), rng.randint(1, total)))
        rng.shuffle(used)
        decoding = rng.randint(0, len(used))
        rows = [(s, 1 if i < decoding else rng.randint(1, 90)) for i, s in enumerate(used)]
        seen: list[int] = []
        for first, behind, low, size in split(rows):
            slots = [slot for slot, _ in rows[first:behind]]
            assert (low, size) == (min(slots), max(slots) - min(slots) + 1)
            seen += range(first, behind)
        assert seen == list(range(len(rows)))


def test_inputs_kept_between_steps_never_outlive_the_rows_they_describe(
    models: dict[str, Path],
) -> None:
    """Same shapes, other rows: what was bound for the last step must not serve this one."""
    runner = open_runner(models["fp32"], slots=32)
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
    assert len(list(runs(batch))) == 2
    np.testing.assert_allclose(runner.step(batch)[31], alone_prompt, atol=1e-4)
    runner.close()


@pytest.fixture(scope="module", params=["fp32", "row8", "static8"])
def real(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Engine]:
    engine = Engine(EngineConfig(models[request.param], threads=1, max_batch=6, step_tokens=24))
    engine.start()
    yield engine
    engine.close()


#: Tokens with activations that are out of all proportion, and the others.
WILD = tuple(range(20, 512, 7))
CALM = tuple(sorted(set(range(20, 512)) - set(WILD)))


def write_wild(directory: Path) -> Checkpoint:
    """Random weights with outliers as trained ones have: one channel that most tokens never use, a
    few fill, and every layer multiplies."""
    from safetensors.numpy import load_file, save_file

    shape = dataclasses.replace(SHAPES["tiny"], tie_word_embeddings=False)
    write_checkpoint(directory, shape, seed=3)
    weights = load_file(directory / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    table[:, 5] = 0
    table[WILD, 5] = 50
    for name, value in weights.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight", "v_proj.weight")):
            value[:, 5] *= value.dtype.type(50)
        elif name.endswith(("down_proj.weight", "o_proj.weight")):
            value[5] = 0
    save_file(weights, directory / "model.safetensors")
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of ``source``, and of builds whose static scales were measured without outliers."""
    root = tmp_path_factory.mktemp("wild")
    write_wild(root / "source")
    rng = random.Random(0)
    calm = [rng.choices(CALM, k=12) for _ in range(24)]
    for quant in ("row8", "static8", "int4"):
        build(root / "source", root / quant, quant, prompts=calm)
    return root


def test_the_wild_model_has_activations_many_times_as_large_as_usual(wild: Path) -> None:
    checkpoint = Checkpoint.open(wild / "source")
    model = build_graph(checkpoint, Tapped, context_tokens=64)
    session = open_session(model.SerializeToString())
    rng = random.Random(1)
    peaks = []
    for tokens in (CALM, WILD):
        prompt = rng.choices(tokens, k=30)
        found = quality.Batch(session, checkpoint.shape, 1, 40).run([prompt], every=True)
        peaks.append(float(found["peak:layer_0.down"].max()))
    assert peaks[1] > 20 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["row8", "static8", "int4"])
def test_five_hundred_random_batches_give_each_the_answer_it_gets_alone(
    wild: Path, quant: str
) -> None:
    """Joins, cancels, lengths and slots at random, among neighbours of every size."""
    rng = random.Random(500)
    engine = Engine(EngineConfig(wild / quant, threads=1, max_batch=12, step_tokens=24))
    engine.start()
    moves = counted_copies(engine)
    pool = [
        rng.choices(rng.choice([CALM, WILD, CALM + WILD]), k=rng.choice([1, 2, *range(3, 40)]))
        for _ in range(150)
    ]
    alone = [ids(engine.submit(prompt, max_new_tokens=12)) for prompt in pool]
    assert len({tuple(answer) for answer in alone}) > 60, "a model that always says the same"
    compared = 0
    for _ in range(500):
        asked = []
        for at in rng.sample(range(150), rng.randint(2, 10)):
            count = rng.randint(1, 12)
            asked.append((at, count, engine.submit(pool[at], max_new_tokens=count)))
            if rng.random() < 0.2:
                leaver = rng.choice(asked)
                if rng.random() < 0.5:
                    next(leaver[2].tokens_sync(), None)
                leaver[2].close()
                asked.remove(leaver)
        for at, count, generation in asked:
            assert ids(generation) == alone[at][:count]
            compared += 1
    settled(engine)
    assert engine.stats().reused_tokens == 0, "every prompt was read anew"
    assert compared > 2000 and len(moves) > 50
    engine.close()


def counted_copies(engine: Engine) -> list[int]:
    """Grows with each slot that moves."""
    assert engine._worker is not None
    runner, found = engine._worker.loaded.runner, []
    copy = runner.copy

    def counted(source: int, target: int, tokens: int) -> None:
        found.append(tokens)
        copy(source, target, tokens)

    runner.copy = counted  # type: ignore[method-assign]
    return found


@pytest.mark.slow
def test_a_hundred_random_batches_in_full_precision_are_those_alone(
    models: dict[str, Path],
) -> None:
    rng = random.Random(60)
    engine = Engine(EngineConfig(models["fp32"], threads=1, max_batch=6, step_tokens=24))
    engine.start()
    for _ in range(100):
        size = rng.randint(2, 9)
        prompts = [[rng.randrange(20, 512) for _ in range(rng.randint(1, 40))] for _ in range(size)]
        together = [engine.submit(prompt, max_new_tokens=6) for prompt in prompts]
        rng.choice(together).close()  # someone leaves in the middle
        closed = [generation.finish_reason == "cancelled" for generation in together]
        found = [ids(generation) for generation in together]
        for prompt, answer, left in zip(prompts, found, closed, strict=True):
            assert left or answer == ids(engine.submit(prompt, max_new_tokens=6))
    engine.close()


@pytest.mark.parametrize("length", [2, 7, 23, 24, 25, 26, 48, 49, 60])
def test_an_answer_behind_a_shared_prefix_is_the_same(real: Engine, length: int) -> None:
    prefix = [20 + 7 * i % 480 for i in range(length)]
    prompts = [[*prefix, 30 + i, 40, 50 + i] for i in range(8)]
    alone = [pairs(real.submit(prompt, max_new_tokens=6)) for prompt in prompts]
    real.share_prefix(prefix)
    before = reused(real)
    found = [pairs(real.submit(prompt, max_new_tokens=6)) for prompt in prompts]
    real.share_prefix([19, 19])  # which no other test begins with
    assert reused(real) - before == 8 * length
    assert real.manifest is not None
    if real.manifest.quant == "fp32":  # its products round by how many rows there are
        for one, other in zip(found, alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
    else:
        assert found == alone


def test_a_next_turn_from_what_was_kept_is_the_same_answer(real: Engine) -> None:
    """What was generated ran one token at a time, which attention rounds differently: the
    probabilities agree closely, not to the last bit."""
    rng = random.Random(11)
    before = reused(real)
    for chat in range(12):
        prompt = rng.choices(range(20, 512), k=rng.randint(8, 40))
        for _ in range(3):
            kept = pairs(real.submit(prompt, max_new_tokens=8, scope=f"chat {chat}"))
            cold = pairs(real.submit(prompt, max_new_tokens=8))
            assert [token for token, _ in kept] == [token for token, _ in cold]
            np.testing.assert_allclose(
                [logprob for _, logprob in kept], [logprob for _, logprob in cold], atol=0.1
            )
            prompt = [*prompt, *(token for token, _ in kept), *rng.choices(range(20, 512), k=4)]
    assert reused(real) - before > 12 * 2 * 12


def open_runner(
    folder: Path, slots: int = 6, model: str = "model.onnx", context_tokens: int = 96
) -> OnnxRunner:
    return OnnxRunner(
        folder / model,
        Manifest.load(folder).architecture,
        slots=slots,
        step_tokens=32,
        context_tokens=context_tokens,
        threads=1,
    )


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is in memory")
def test_a_slot_costs_the_memory_of_its_tokens_and_not_of_its_context(
    models: dict[str, Path],
) -> None:
    runner = open_runner(models["fp32"], context_tokens=20_000)
    runner.step(Batch.of([3], [0], [True], [list(range(100, 130))]))
    slots = [cache[3] for cache in runner._caches.values()]
    assert sum(map(resident_kb, slots)) < 128 * len(slots)
    assert min(slot.nbytes for slot in slots) > 512 << 10
    runner.close()


def resident_kb(array: Floats) -> int:
    """KiB in memory of the mapping in which ``array`` begins."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (head := re.match("([0-9a-f]+)-([0-9a-f]+) ", line)) is not None:
            inside = int(head[1], 16) <= array.ctypes.data < int(head[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1])
    raise LookupError("the array lies in no mapping")


@pytest.mark.parametrize("quant", ["fp32", "row8", "static8"])
def test_a_cache_saved_loaded_or_copied_answers_as_where_it_was_made(
    models: dict[str, Path], quant: str
) -> None:
    runner = open_runner(models[quant])
    prompt = list(range(100, 130))
    runner.step(Batch.of([0], [0], [True], [prompt]))

    def follow(slot: int) -> Floats:
        return runner.step(Batch.of([slot], [30], [True], [[40, 41]])).copy()

    expected = follow(0)
    saved, tail = runner.save(0, 0, 30), runner.save(0, 12, 30)
    assert sum(part.nbytes for part in saved) == 30 * runner.token_bytes
    runner.copy(0, 3, 30)
    runner.load(4, 0, saved, 30)
    runner.load(5, 0, saved, 12)
    runner.load(5, 12, tail, 18)
    runner.step(Batch.of([0], [0], [True], [prompt[::-1]]))  # what was taken is a copy
    for slot in (3, 4, 5):
        np.testing.assert_array_equal(follow(slot), expected)
    runner.close()


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_a_prompt_of_one_token_is_the_same_in_any_run(models: dict[str, Path], quant: str) -> None:
    runner = open_runner(models[quant])
    for token in range(20, 60):
        alone = runner.step(Batch.of([0], [0], [True], [[token]]))[0].copy()
        batch = Batch.of([1, 0], [0, 0], [True, True], [[70, 71, 72, token], [token]])
        assert len(list(runs(batch))) == 1
        np.testing.assert_array_equal(runner.step(batch)[1], alone)
    runner.close()


def test_keys_and_values_lower_the_number_of_slots_to_what_memory_holds(
    models: dict[str, Path],
) -> None:
    per_token = open_runner(models["fp32"]).token_bytes
    for room, expected in ((3 * 64 * per_token, 3), (4 * 64 * per_token - 1, 3), (1 << 40, 8)):
        engine = Engine(
            EngineConfig(
                models["fp32"],
                threads=1,
                max_batch=8,
                step_tokens=16,
                context_tokens=64,
                kv_bytes=room,
            )
        )
        engine.start()
        found = [engine.submit([30 + i, 40], max_new_tokens=5) for i in range(10)]
        assert all(len(ids(generation)) == 5 for generation in found)
        assert engine.stats().slots == expected
        engine.close()


def test_memory_that_holds_no_context_is_refused_with_the_cure(models: dict[str, Path]) -> None:
    engine = Engine(EngineConfig(models["fp32"], kv_bytes=1000))
    with pytest.raises(EngineError, match=r"hold no context of 1024 tokens.*raise kv_bytes"):
        engine.start()


def test_a_graph_of_another_version_is_refused_with_the_cure(
    models: dict[str, Path], tmp_path: Path
) -> None:
    import onnx

    model = onnx.load(models["fp32"] / "model.onnx")
    for one in model.graph.input:
        if one.name == "query_seqlens":
            one.name = "lengths"
    for node in model.graph.node:
        node.input[:] = ["lengths" if name == "query_seqlens" else name for name in node.input]
    onnx.save(model, tmp_path / "old.onnx")
    with pytest.raises(ManifestError, match=r"another version.*build_model"):
        open_runner(models["fp32"], model=str(tmp_path / "old.onnx"))


def test_a_graph_that_the_runtime_does_not_read_is_refused_in_one_line(
    models: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "odd.onnx").write_bytes(b"\x3a\x00")  # an ONNX model with nothing in it
    with pytest.raises(ManifestError, match=r"odd\.onnx cannot be loaded.*build_model") as refusal:
        open_runner(models["fp32"], model=str(tmp_path / "odd.onnx"))
    assert "\n" not in str(refusal.value)


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
