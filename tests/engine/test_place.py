"""Who waits knows its place and how long it takes, paced answers ahead of it included."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from assistant.backends import line
from assistant.backends.line import served
from assistant.engine import Engine, Generation, worker
from assistant.engine.scheduler import Rates, Request, Scheduler, Waiting
from assistant.types import Waiting as Told
from tests.engine.conftest import FakeRunner, MakeEngine, ids


@pytest.fixture(autouse=True)
def counted_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_COUNT_LINE_S", 0.0)


def step(runner: FakeRunner) -> None:
    """Let the step that is held end, and wait until the next one has begun."""
    runner.finish()
    runner.begun()


def held(engine: Engine, runner: FakeRunner, *scopes: str) -> list[Generation]:
    """An answer that holds the only slot, in a step, and behind it one of each scope."""
    runner.pause()
    first = engine.submit([1, 2], max_new_tokens=100)
    runner.begun()
    return [first, *(engine.submit([3, 4], max_new_tokens=2, scope=scope) for scope in scopes)]


def test_the_line_is_the_order_in_which_slots_are_given() -> None:
    rng = random.Random(3)
    for _ in range(200):
        waiting = Waiting()
        for _ in range(rng.randrange(12)):
            waiting.add(Request([1], 1, scope=rng.choice("abcd")))
        running = Counter({scope: rng.randrange(3) for scope in "abcd"})
        line = waiting.in_order(running)
        taken = []
        while waiting:
            taken.append(waiting.take(running))
            running[taken[-1].scope] += 1
        assert line == taken


def test_looking_at_the_line_changes_nothing() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    for scope in "aab":
        scheduler.add(Request([1], 1, scope=scope))
    assert scheduler.line() == scheduler.line() and len(scheduler.waiting) == 3


def test_places_are_told_at_once_and_move_up(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1)
    first, *rest = held(engine, runner, "a", "b", "c")
    assert [one.place for one in (first, *rest)] == [0, 1, 2, 3]
    rest[0].close()
    assert rest[0].place == 0, "it waits no more"
    step(runner)
    step(runner)
    assert [one.place for one in rest] == [0, 1, 2]
    first.close()
    step(runner)
    assert [one.place for one in rest] == [0, 0, 1]
    runner.resume()
    assert len(ids(rest[2])) == 2 and rest[2].place == 0


def test_places_are_those_of_a_fair_queue(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=1)
    _, *rest = held(engine, runner, "a", "a", "a", "b")
    step(runner)
    step(runner)
    assert [one.place for one in rest] == [1, 3, 4, 2], (
        "who asks once is not behind who asks thrice"
    )
    assert sorted(one.wait_s for one in rest) == [rest[at].wait_s for at in (0, 3, 1, 2)]


def test_a_free_slot_is_no_place_in_line(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=3)
    assert [one.place for one in held(engine, runner, "a", "b", "c")] == [0, 0, 0, 1]


# -- how long ------------------------------------------------------------------------------------


def test_behind_paced_answers_the_pace_is_what_is_waited_for(make_engine: MakeEngine) -> None:
    engine, runner = make_engine(max_batch=2, reading_tokens_per_s=25)
    assert engine.expected_wait_s() < 0.5
    runner.pause()
    running = [engine.submit([1, 2], max_new_tokens=100) for _ in range(2)]
    runner.begun()
    step(runner)
    usual = Rates().answer_tokens / 25
    assert engine.expected_wait_s() == pytest.approx(usual, rel=0.1), "2.6 s, not 0.1"
    waiting = engine.submit([3], max_new_tokens=5)
    assert waiting.wait_s == pytest.approx(usual, rel=0.1)
    for one in running:
        one.close()


def test_the_wait_is_what_the_running_answers_have_left() -> None:
    rates = Rates(prefill_s=0.0, step_s=0.01, answer_tokens=60)
    far, near, over, short = (Request([1], 100, written=n) for n in (10, 50, 80, 0))
    short.max_new_tokens = 3
    left = rates.left([far, near, over, short])
    assert left == [50, 12, 12, 3]

    def wait(ahead: int) -> float:
        told: Any = {"prompt_tokens": 0, "slots": 4, "free": False, "left": left}
        return rates.eta_s(ahead=ahead, **told)

    assert [round(wait(ahead), 3) for ahead in range(4)] == [0.03, 0.12, 0.12, 0.5]
    assert wait(4) == pytest.approx(0.03 + 0.6), "behind everybody, and a whole answer"


# -- as a backend tells it -----------------------------------------------------------------------


async def test_a_place_is_told_until_the_first_token(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "TELL_EVERY_S", 0.01)
    engine, runner = make_engine(max_batch=1, reading_tokens_per_s=1)
    first, second, third = held(engine, runner, "a", "b")
    told = served(third)
    place = await anext(told)
    assert isinstance(place, Told) and place.place == 2
    second.close()
    step(runner)
    step(runner)
    moved = await anext(told)
    assert isinstance(moved, Told) and moved.place == 1 and moved.seconds < place.seconds
    first.close()
    runner.resume()
    rest = [got async for got in told]
    assert sum(len(got) for got in rest if isinstance(got, list)) == 2
    assert all(isinstance(got, list) for got in rest[-2:])


async def test_a_short_wait_is_not_told_and_an_unchanged_one_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(line, "TELL_EVERY_S", 0.01)

    class Standing:
        place = 1

        def __init__(self, *waits: float) -> None:
            self._waits, self._at = waits, 0

        @property
        def wait_s(self) -> float:
            self._at += 1
            if self._at >= len(self._waits):
                self.place = 0
            return self._waits[min(self._at, len(self._waits)) - 1]

        def __aiter__(self) -> Standing:
            return self

        async def __anext__(self) -> list[int]:
            if self.place:
                await asyncio.Event().wait()
            raise StopAsyncIteration

    async def told(*waits: float) -> list[float]:
        generation: Any = Standing(*waits)
        return [one.seconds async for one in served(generation) if isinstance(one, Told)]

    assert await told(0.1, 0.2, 0.1) == []
    assert await told(2.9, 2.8, 2.1, 1.9, 1.8) == [2.9, 1.9]
