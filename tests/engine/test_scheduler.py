"""The books alone: no model, no threads, no arrays."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count

import pytest

from assistant.engine.runner import Batch, runs
from assistant.engine.scheduler import (
    _HEAD_START,
    _LEAST_CHUNK,
    LEAST_STEP,
    PACED_BLOCK,
    Chunk,
    Move,
    Rates,
    Request,
    Scheduler,
    Step,
)


def request(prompt: int, answer: int = 4, scope: str = "") -> Request:
    return Request(list(range(prompt)), answer, frozenset({99}), scope)


def run(scheduler: Scheduler, now_s: float = 0.0, prompt_tokens: int | None = None) -> Step:
    """One step in which every sampling row chooses token 7."""
    scheduler.admit()
    step = scheduler.plan(now_s, prompt_tokens)
    scheduler.advance(step)
    for chunk in step.chunks:
        if chunk.samples and scheduler.accept(chunk.request, 7, now_s):
            scheduler.remove(chunk.request)
    return step


def prompts(step: Step) -> list[Chunk]:
    return [chunk for chunk in step.chunks if not chunk.decodes]


# -- slots and steps -------------------------------------------------------------------------------


def test_the_lowest_free_slot_is_given_first() -> None:
    scheduler = Scheduler(slots=4, step_tokens=64)
    first, second, third = (request(3) for _ in range(3))
    for each in (first, second, third):
        scheduler.add(each)
    assert scheduler.admit() == [first, second, third]
    scheduler.remove(third)
    scheduler.remove(first)
    fourth = request(3)
    scheduler.add(fourth)
    assert scheduler.admit() == [fourth]
    assert (fourth.slot, second.slot) == (0, 1)


def test_decode_rows_come_first_and_prompts_share_the_budget() -> None:
    scheduler = Scheduler(slots=4, step_tokens=8)
    scheduler.add(request(2))
    run(scheduler)
    run(scheduler)
    scheduler.add(request(30))
    scheduler.add(request(5))
    scheduler.admit()
    step = scheduler.plan(0.0)
    assert [(c.start, c.count, c.samples) for c in step.chunks] == [
        (3, 1, True),
        (0, 5, True),
        (0, 3, False),
    ]
    assert list(step.chunks[0].tokens()) == [7]
    assert list(step.chunks[2].tokens()) == [0, 1, 2]


def test_a_long_prompt_never_skips_a_decode_step_of_the_others() -> None:
    scheduler = Scheduler(slots=2, step_tokens=4)
    talker = request(1, answer=20)
    scheduler.add(talker)
    run(scheduler)
    scheduler.add(request(30))
    for _ in range(10):
        assert run(scheduler).chunks[0].request is talker


def busy_steps() -> Iterator[tuple[Step, int]]:
    """Steps and their budget under random loads, with who comes and leaves at random."""
    for seed in range(60):
        rng = random.Random(seed)
        slots, budget = rng.randint(1, 6), rng.randint(LEAST_STEP, 40)
        scheduler = Scheduler(slots=slots, step_tokens=budget)
        requests = [request(rng.choice([1, 2, 3, 9, 25, 40]), rng.randint(1, 9)) for _ in range(15)]
        coming = list(requests)
        while scheduler.busy or coming:
            while coming and (rng.random() < 0.4 or not scheduler.busy):
                scheduler.add(coming.pop())
            yield run(scheduler, prompt_tokens=rng.choice([None, 0, 5, 17, 90])), budget
            if rng.random() < 0.1:
                scheduler.remove(rng.choice(requests))
        assert sorted(scheduler._free) == list(range(slots))


def test_no_step_exceeds_the_budget_and_every_request_ends_whatever_comes() -> None:
    for step, budget in busy_steps():
        assert step.chunks, "while somebody is served, every step moves"
        assert sum(chunk.count for chunk in prompts(step)) <= budget
        slots = [chunk.request.slot for chunk in step.chunks if chunk.request.slot >= 0]
        assert len(set(slots)) == len(slots), "a slot runs once a step"


def test_a_prompt_is_never_cut_so_that_one_token_runs_alone() -> None:
    """One token in a chunk is rounded differently: how a prompt was cut would show."""
    for step, _ in busy_steps():
        for chunk in prompts(step):
            assert chunk.count > 1 or len(chunk.request.prompt) == 1


@pytest.mark.parametrize("step_tokens", [LEAST_STEP, 5, 6, 7])
def test_the_least_step_is_enough_for_any_prompt(step_tokens: int) -> None:
    for prompt in range(1, 24):
        scheduler = Scheduler(slots=1, step_tokens=step_tokens)
        scheduler.add(request(prompt, answer=1))
        steps = 0
        while scheduler.busy:
            assert run(scheduler).chunks
            steps += 1
        assert steps <= 1 + prompt // (step_tokens - 1)


def test_a_budget_that_could_not_cut_every_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 4"):
        Scheduler(slots=8, step_tokens=LEAST_STEP - 1)


def test_the_number_of_slots_may_exceed_the_step() -> None:
    """Rows that decode are not counted in the prompts' budget."""
    scheduler = Scheduler(slots=64, step_tokens=LEAST_STEP)
    requests = [request(2, answer=70) for _ in range(64)]
    for each in requests:
        scheduler.add(each)
    for _ in range(40):
        step = run(scheduler)
    assert len(step.chunks) == 64
    late = request(6, answer=1)
    scheduler.remove(requests[0])
    scheduler.add(late)
    assert run(scheduler).chunks[-1].request is late


def test_a_stop_token_is_not_counted_and_the_last_token_ends_by_length() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    one = request(2, answer=2)
    assert scheduler.accept(one, 5, 0.0) is None
    assert scheduler.accept(one, 99, 0.0) == "stop"
    assert one.written == 1
    assert scheduler.accept(one, 6, 0.0) == "length"


def test_a_fed_token_runs_next_without_being_counted() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    one = request(2)
    scheduler.add(one)
    scheduler.admit()
    scheduler.advance(scheduler.plan(0.0))
    scheduler.feed(one, 42)
    step = scheduler.plan(0.0)
    assert list(step.chunks[0].tokens()) == [42]
    assert one.written == 0
    scheduler.advance(step)
    assert (one.fed, one.cached) == ([42], 3)


def test_what_was_fed_is_what_the_cache_holds_after_the_prompt() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    one = request(3, answer=5)
    scheduler.add(one)
    while scheduler.busy:
        run(scheduler)
    assert one.fed == [7] * 4, "the last token was shown and never run"
    assert one.cached == len(one.prompt) + len(one.fed)


def test_a_prompt_that_is_known_in_part_runs_only_its_rest() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64)
    one = request(20)
    scheduler.add(one)
    scheduler.admit()
    one.cached = 15
    (chunk,) = scheduler.plan(0.0).chunks
    assert (chunk.start, list(chunk.tokens()), chunk.samples) == (15, [15, 16, 17, 18, 19], True)
    assert scheduler.cached_tokens() == 15


def test_removing_twice_frees_one_slot() -> None:
    scheduler = Scheduler(slots=2, step_tokens=8)
    one, waits = request(2), request(2)
    scheduler.add(one)
    scheduler.admit()
    scheduler.add(waits)
    for each in (one, one, waits, waits):
        scheduler.remove(each)
    assert sorted(scheduler._free) == [0, 1]
    assert not scheduler.busy
    assert (len(scheduler.waiting), list(scheduler.waiting)) == (0, [])


# -- prompts ---------------------------------------------------------------------------------------


def test_the_shortest_rest_of_a_prompt_is_first_and_the_oldest_every_second_step() -> None:
    scheduler = Scheduler(slots=4, step_tokens=10)
    long, middle, short = request(60), request(12), request(5)
    for each in (long, middle, short):
        scheduler.add(each)
    first = run(scheduler)
    assert [(c.request, c.count) for c in first.chunks] == [(short, 5), (middle, 5)]
    second = run(scheduler)
    assert [(c.request, c.count) for c in prompts(second)] == [(long, 10)]
    third = run(scheduler)
    assert [(c.request, c.count) for c in prompts(third)] == [(middle, 7), (long, 3)]


@pytest.mark.parametrize("prompt_tokens", [None, 0])
def test_a_long_prompt_ends_however_many_short_ones_keep_coming(prompt_tokens: int | None) -> None:
    size = 400
    scheduler = Scheduler(slots=6, step_tokens=_LEAST_CHUNK)
    long = request(size, answer=1)
    scheduler.add(long)
    steps = 0
    while long.missing:
        while len(scheduler.running) + len(scheduler.waiting) < 6:
            scheduler.add(request(_LEAST_CHUNK, answer=1))
        run(scheduler, prompt_tokens=prompt_tokens)
        steps += 1
    # Every second step is its own, and a step may leave one token of its budget.
    assert steps <= 2 * (-(-size // (_LEAST_CHUNK - 1))) + 1


def test_prompts_get_what_the_time_allows_and_never_less_than_a_little() -> None:
    for allowed, expected in ((None, 256), (100, 100), (999, 256), (20, 20), (3, 16), (0, 16)):
        scheduler = Scheduler(slots=2, step_tokens=256)
        scheduler.add(request(600))
        scheduler.admit()
        (chunk,) = scheduler.plan(0.0, allowed).chunks
        assert chunk.count == expected, f"{allowed} prompt tokens were allowed"


def test_a_run_never_holds_a_row_that_decodes_beside_longer_ones() -> None:
    """The operator rounds one token after others differently in a wider rectangle: neighbours
    would show. A prompt of one token has nothing before it, and may run with others."""
    for step, _ in busy_steps():
        batch = Batch.of(
            list(range(len(step.chunks))),
            [chunk.start for chunk in step.chunks],
            [chunk.samples for chunk in step.chunks],
            [[0] * chunk.count for chunk in step.chunks],
        )
        for rows, _, _ in runs(batch):
            decodes = (batch.counts[rows] == 1) & (batch.starts[rows] > 0)
            assert not decodes.any() or batch.counts[rows].max() == 1


# -- fairness --------------------------------------------------------------------------------------


def test_waiting_requests_of_one_caller_are_served_in_order() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64)
    requests = [request(2, answer=1) for _ in range(3)]
    for each in requests:
        scheduler.add(each)
    assert [run(scheduler).chunks[0].request for _ in requests] == requests


def test_callers_take_turns_and_each_one_s_requests_stay_in_order() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64)
    names = ["a", "a", "a", "b", "b", "c"]
    requests = [request(2, answer=1, scope=name) for name in names]
    for each in requests:
        scheduler.add(each)
    served = [run(scheduler).chunks[0].request for _ in requests]
    assert [each.scope for each in served] == ["a", "b", "c", "a", "b", "a"]
    for name in "abc":
        mine = [each for each in served if each.scope == name]
        assert mine == [each for each in requests if each.scope == name]


def test_the_next_free_slot_goes_to_who_has_the_fewest_running() -> None:
    scheduler = Scheduler(slots=4, step_tokens=64)
    running = [request(2, answer=99, scope=name) for name in ("a", "a", "b", "x")]
    for each in running:
        scheduler.add(each)
    scheduler.admit()
    for name in ("a", "b", "c"):
        scheduler.add(request(2, scope=name))
        scheduler.add(request(2, scope=name))
    scheduler.remove(running[3])
    order = []
    for _ in range(5):
        (got,) = scheduler.admit()
        order.append(got.scope)
        scheduler.remove(got)
    assert order == ["c", "c", "b", "b", "a"]


@pytest.mark.parametrize("slots", [1, 2, 4, 32])
def test_a_hog_delays_nobody_by_more_than_one_free_slot(slots: int) -> None:
    scheduler = Scheduler(slots=slots, step_tokens=64)
    for _ in range(100 + slots):
        scheduler.add(request(2, scope="hog"))
    scheduler.admit()
    assert len(scheduler.waiting) == 100
    for name in ("ana", "ben", "eve"):
        scheduler.add(request(2, scope=name))
    served = []
    for _ in range(6):
        scheduler.remove(scheduler.running[0])
        (got,) = scheduler.admit()
        served.append(got.scope)
    others = [name for name in served if name != "hog"]
    assert others == ["ana", "ben", "eve"], "in the order they came"
    assert served.index("eve") <= 3, "at most one slot went to the hog before them"
    assert served[-1] == "hog", "and the hog is not starved for it"


@pytest.mark.parametrize("seed", range(5))
def test_a_free_slot_never_passes_over_a_caller_with_fewer_running(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = Scheduler(slots=5, step_tokens=64)
    asked: list[Request] = []
    for _ in range(500):
        asked.append(request(2, scope=rng.choice("aaaabbc")))
        scheduler.add(asked[-1])
        if scheduler.running and rng.random() < 0.6:
            scheduler.remove(rng.choice(scheduler.running))
        if rng.random() < 0.1:
            scheduler.remove(rng.choice(asked))
        before = [one.scope for one in scheduler.running]
        waiting = {one.scope for one in scheduler.waiting}
        admitted = scheduler.admit()
        if admitted:
            assert before.count(admitted[0].scope) == min(map(before.count, waiting))
        _in_order(asked, admitted)
    assert len(scheduler.waiting) == len(list(scheduler.waiting))


def _in_order(asked: Sequence[Request], admitted: Sequence[Request]) -> None:
    for name in "abc":
        places = [asked.index(one) for one in admitted if one.scope == name]
        assert places == sorted(places)


# -- compaction ------------------------------------------------------------------------------------


def occupying(used: Sequence[int], slots: int = 32) -> Scheduler:
    """A scheduler whose running requests hold exactly the slots ``used``."""
    scheduler = Scheduler(slots=slots, step_tokens=1024)
    for _ in range(slots):
        scheduler.add(request(3, answer=99))
    for each in scheduler.admit():
        if each.slot not in used:
            scheduler.remove(each)
    return scheduler


def taken(scheduler: Scheduler) -> list[int]:
    return sorted(one.slot for one in scheduler.running)


@pytest.mark.parametrize(
    "used", [[], [0], [31], [4, 5, 6], [0, 1, 2, 5], [0, 3], [1, 3, 4, 5, 7, 9], list(range(32))]
)
def test_slots_that_lie_together_well_enough_stay_where_they_are(used: list[int]) -> None:
    scheduler = occupying(used)
    assert scheduler.tidy() is None
    assert taken(scheduler) == used


def test_the_highest_slot_moves_down_into_a_hole_with_what_it_holds() -> None:
    scheduler = occupying([0, 31])
    (low, high) = scheduler.running
    high.cached = 17
    assert scheduler.tidy() == Move(31, 1, 17)
    assert (low.slot, high.slot) == (0, 1)
    assert scheduler.tidy() is None
    newcomer = request(2)
    scheduler.add(newcomer)
    assert (scheduler.admit(), newcomer.slot) == ([newcomer], 2)


def test_moves_end_and_never_meet_a_slot_that_is_used() -> None:
    rng = random.Random(1)
    for _ in range(150):
        total = rng.choice([4, 8, 32])
        scheduler = occupying(rng.sample(range(total), rng.randint(1, total)), total)
        count, before = len(scheduler.running), taken(scheduler)
        for _ in range(count + 1):
            move = scheduler.tidy()
            if move is None:
                break
            after = taken(scheduler)
            assert move.source == before[-1] and move.target not in before
            assert set(after) == {*before, move.target} - {move.source}, "one moved, and it alone"
            assert after[-1] < before[-1], "the highest slot comes down"
            assert sorted([*after, *scheduler._free]) == list(range(total))
            before = after
        assert move is None, "each moves once at most"
        assert before[-1] - before[0] + 1 <= count + max(2, count // 2)


def test_answers_that_move_go_on_and_leave_as_before() -> None:
    scheduler = occupying([0, 20, 31])
    while scheduler.tidy() is not None:
        assert run(scheduler).chunks
    for each in list(scheduler.running):
        scheduler.remove(each)
    assert sorted(scheduler._free) == list(range(32))


# -- pacing ----------------------------------------------------------------------------------------

PERIOD_S = 0.125  # eight tokens a second; exact in binary


def paced(slots: int = 4) -> Scheduler:
    return Scheduler(slots=slots, step_tokens=64, reading_tokens_per_s=1 / PERIOD_S)


def settle(scheduler: Scheduler, now_s: float) -> int:
    """Run at one moment until nothing is due; the steps that took."""
    for steps in count():
        if not run(scheduler, now_s).chunks:
            return steps
    raise AssertionError("unreachable")


def test_an_unpaced_answer_never_waits() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64)
    one = request(2, answer=50)
    scheduler.add(one)
    assert settle(scheduler, 0.0) == 50


def test_a_paced_answer_starts_at_full_speed_and_then_waits_for_its_reader() -> None:
    scheduler = paced()
    one = request(2, answer=50)
    scheduler.add(one)
    settle(scheduler, 10.0)
    assert one.written == _HEAD_START
    step = scheduler.plan(10.0)
    assert (step.chunks, step.wait_s) == ([], PERIOD_S)
    assert scheduler.plan(10.1).wait_s == pytest.approx(PERIOD_S - 0.1)
    assert scheduler.plan(10.0 + PERIOD_S).chunks


def test_a_paced_answer_comes_at_the_reader_s_rate() -> None:
    scheduler = paced()
    one = request(2, answer=10_000)
    scheduler.add(one)
    now = 0.0
    while now < 20:
        now += run(scheduler, now).wait_s
    assert one.written == pytest.approx(20 / PERIOD_S + _HEAD_START, abs=2)


def test_who_fell_behind_gets_what_its_reader_misses_and_no_more() -> None:
    scheduler = paced()
    one = request(2, answer=100)
    scheduler.add(one)
    settle(scheduler, 0.0)
    settle(scheduler, 50 * PERIOD_S)
    assert one.written == _HEAD_START + 50
    assert scheduler.plan(50 * PERIOD_S).wait_s == PERIOD_S


def due(scheduler: Scheduler, at_s: dict[int, float]) -> dict[int, Request]:
    """Paced requests in some slots, whose next tokens are due at given moments."""
    requests = {slot: request(2, answer=100) for slot in range(max(at_s) + 1)}
    for each in requests.values():
        scheduler.add(each)
    settle(scheduler, 0.0)
    for slot, each in requests.items():
        if slot in at_s:
            each.due_s = at_s[slot]
        else:
            scheduler.remove(each)
    return requests


def slots_of(step: Step) -> list[int]:
    return [chunk.request.slot for chunk in step.chunks]


def test_neighbours_share_a_step_when_one_of_them_is_due_and_others_soon() -> None:
    scheduler = paced(slots=2 * PACED_BLOCK)
    due(scheduler, {0: 1.0, 1: 1.0 + PERIOD_S, 2: 1.01 + PERIOD_S, 3: 0.99, PACED_BLOCK: 1.0})
    assert slots_of(scheduler.plan(0.9)) == []
    assert slots_of(scheduler.plan(1.0)) == [0, 1, 3], "at most a token early, and one block"


def test_the_block_of_the_reader_who_is_due_first_runs_first_and_then_the_other() -> None:
    scheduler = paced(slots=3 * PACED_BLOCK)
    far = 2 * PACED_BLOCK
    due(scheduler, {0: 1.0, 1: 1.01, far: 0.99, far + 1: 0.995})
    order = [slots_of(run(scheduler, 1.0)) for _ in range(3)]
    assert order == [[far, far + 1], [0, 1], []]


def test_nobody_runs_before_the_first_is_due_and_the_wait_is_until_then() -> None:
    scheduler = paced(slots=2 * PACED_BLOCK)
    due(scheduler, {0: 2.0, 1: 1.01, PACED_BLOCK: 3.0})
    step = scheduler.plan(1.0)
    assert step.chunks == []
    assert step.wait_s == pytest.approx(0.01)


@pytest.mark.parametrize("load", [1, 5, PACED_BLOCK, 3 * PACED_BLOCK])
def test_every_paced_reader_has_each_token_when_it_is_due(load: int) -> None:
    scheduler = paced(slots=load)
    requests = [request(2, answer=10_000) for _ in range(load)]
    for each in requests:
        scheduler.add(each)
    now, steps, rows = 0.0, 0, 0
    while now < 3.0:
        step = run(scheduler, now)
        steps, rows = steps + bool(step.chunks), rows + len(step.chunks)
        for each in requests:
            if now > 0.5:  # everybody has begun by then
                assert each.written >= (now - 0.5) / PERIOD_S + _HEAD_START - 1
        now += max(step.wait_s, 0.0005)  # what a step takes
    blocks = -(-load // PACED_BLOCK)
    assert steps <= blocks * (3.0 / PERIOD_S + 2 * _HEAD_START + 2), "few steps serve many"
    assert all(each.written <= 3.0 / PERIOD_S + _HEAD_START + 2 for each in requests)


def test_a_first_token_is_never_delayed_by_paced_rows() -> None:
    scheduler = paced(slots=2 * PACED_BLOCK)
    due(scheduler, {0: 5.0, PACED_BLOCK: 0.5})
    newcomer = request(5, answer=20)
    scheduler.add(newcomer)
    first = run(scheduler, 1.0)
    assert [chunk.request for chunk in prompts(first)] == [newcomer]
    assert newcomer.written == 1
    settle(scheduler, 1.0)
    assert newcomer.written == _HEAD_START


def test_with_nothing_at_all_to_do_there_is_nothing_to_wait_for() -> None:
    assert paced().plan(3.0) == Step([], wait_s=0.0)


# -- rates -----------------------------------------------------------------------------------------


def measured() -> Rates:
    """10 ms a step of decoding, 1 ms a prompt token, 50 tokens an answer."""
    rates = Rates()
    for _ in range(200):
        rates.ran(prefill_tokens=0, seconds=0.01)
        rates.ran(prefill_tokens=100, seconds=0.11)
        rates.finished(50)
    return rates


def test_the_promised_wait_follows_measured_rates() -> None:
    rates = measured()
    wait = rates.eta_s(prompt_tokens=1000, ahead=4, slots=4, free=False)
    assert wait == pytest.approx(1000 * 0.001 + 50 * 0.01, rel=0.01)
    wait = rates.eta_s(prompt_tokens=0, ahead=9, slots=4, free=False)
    assert wait == pytest.approx(2 * 50 * 0.01, rel=0.01)
    assert rates.eta_s(prompt_tokens=1000, ahead=4, slots=4, free=True) == pytest.approx(
        1, rel=0.01
    )


def test_the_promised_wait_is_that_of_answers_that_end_evenly() -> None:
    """Slots that free one after another at even distances, as answers of one length do."""
    rates = measured()
    answer_s = rates.answer_tokens * rates.step_s
    ends = [answer_s * (i + 1) / 5 for i in range(4)]
    for ahead in range(4):
        promised = rates.eta_s(prompt_tokens=0, ahead=ahead, slots=4, free=False)
        assert promised == pytest.approx(ends[ahead])


def test_prompts_get_the_time_that_running_answers_leave() -> None:
    rates = measured()
    assert rates.prompt_budget(0.08) == pytest.approx(70, abs=1)
    assert rates.prompt_budget(0.01) <= 1
    assert rates.prompt_budget(0.001) == 0


def test_a_step_faster_than_its_rows_alone_still_costs_its_prompt_something() -> None:
    rates = measured()
    for _ in range(200):
        rates.ran(prefill_tokens=10, seconds=0.008)
    assert rates.prefill_s == pytest.approx(0.25 * 0.008 / 10, rel=0.01)


def test_a_promise_is_held_against_what_came() -> None:
    rates = Rates()
    for _ in range(200):
        rates.waited(promised_s=1.5, real_s=2.0)
    assert rates.waited_s == pytest.approx(2.0, rel=0.01)
    assert rates.missed_s == pytest.approx(0.5, rel=0.01)
