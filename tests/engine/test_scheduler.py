"""The books alone: no model, no threads, no arrays."""

from __future__ import annotations

import random

import pytest

from assistant.engine.scheduler import Rates, Request, Scheduler, Step


def request(prompt: int, answer: int = 4) -> Request:
    return Request(list(range(prompt)), answer, frozenset({99}))


def run(scheduler: Scheduler) -> Step:
    """One step in which every sampling row chooses token 7."""
    step = scheduler.plan()
    scheduler.advance(step)
    for chunk in step.chunks:
        if chunk.samples and scheduler.accept(chunk.request, 7):
            scheduler.remove(chunk.request)
    return step


def test_the_lowest_free_slot_is_given_first() -> None:
    scheduler = Scheduler(slots=4, step_tokens=64)
    first, second, third = (request(3) for _ in range(3))
    for each in (first, second, third):
        scheduler.add(each)
    scheduler.plan()
    scheduler.remove(third)
    scheduler.remove(first)
    fourth = request(3)
    scheduler.add(fourth)
    assert scheduler.plan().admitted == [fourth]
    assert (fourth.slot, second.slot) == (0, 1)


def test_decode_rows_come_first_and_prompts_share_what_they_leave() -> None:
    scheduler = Scheduler(slots=4, step_tokens=8)
    scheduler.add(request(2))
    run(scheduler)
    scheduler.add(request(5))
    scheduler.add(request(30))
    step = scheduler.plan()
    assert [(c.start, c.count, c.samples) for c in step.chunks] == [
        (2, 1, True),
        (0, 5, True),
        (0, 2, False),
    ]
    assert list(step.chunks[0].tokens()) == [7]
    assert list(step.chunks[2].tokens()) == [0, 1]


def test_a_long_prompt_never_skips_a_decode_step_of_the_others() -> None:
    scheduler = Scheduler(slots=2, step_tokens=4)
    talker = request(1, answer=20)
    scheduler.add(talker)
    run(scheduler)
    scheduler.add(request(30))
    for _ in range(10):
        assert run(scheduler).chunks[0].request is talker


def test_no_step_exceeds_the_budget_and_every_request_ends_whatever_comes() -> None:
    rng = random.Random(5)
    for _ in range(50):
        slots = rng.randint(1, 6)
        budget = slots + rng.randint(2, 11)
        scheduler = Scheduler(slots=slots, step_tokens=budget)
        requests = [request(rng.randint(1, 40), rng.randint(1, 9)) for _ in range(12)]
        for each in requests:
            scheduler.add(each)
        while scheduler.busy:
            step = run(scheduler)
            assert sum(chunk.count for chunk in step.chunks) <= budget
            assert len({chunk.request.slot for chunk in step.chunks}) <= slots
            if rng.random() < 0.1:
                scheduler.remove(rng.choice(requests))
        assert sorted(scheduler._free) == list(range(slots))


def test_a_prompt_is_never_cut_so_that_one_token_runs_alone() -> None:
    """One token in a chunk is rounded differently: how a prompt was cut would show."""
    rng = random.Random(6)
    for _ in range(50):
        scheduler = Scheduler(slots=3, step_tokens=rng.randint(5, 9))
        for _ in range(6):
            scheduler.add(request(rng.randint(2, 40), rng.randint(1, 9)))
        while scheduler.busy:
            for chunk in run(scheduler).chunks:
                assert chunk.count > 1 or chunk.start >= len(chunk.request.prompt)


def test_waiting_requests_are_served_in_order() -> None:
    scheduler = Scheduler(slots=1, step_tokens=64)
    requests = [request(2, answer=1) for _ in range(3)]
    for each in requests:
        scheduler.add(each)
    assert [run(scheduler).chunks[0].request for _ in requests] == requests


def test_a_stop_token_is_not_counted_and_the_last_token_ends_by_length() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    one = request(2, answer=2)
    assert scheduler.accept(one, 5) is None
    assert scheduler.accept(one, 99) == "stop"
    assert one.written == 1
    assert scheduler.accept(one, 6) == "length"


def test_a_fed_token_runs_next_without_being_counted() -> None:
    scheduler = Scheduler(slots=1, step_tokens=8)
    one = request(2)
    scheduler.add(one)
    scheduler.advance(scheduler.plan())
    scheduler.feed(one, 42)
    assert list(scheduler.plan().chunks[0].tokens()) == [42]
    assert one.written == 0


def test_removing_twice_frees_one_slot() -> None:
    scheduler = Scheduler(slots=2, step_tokens=8)
    one, waits = request(2), request(2)
    scheduler.add(one)
    scheduler.plan()
    scheduler.add(waits)
    for each in (one, one, waits, waits):
        scheduler.remove(each)
    assert sorted(scheduler._free) == [0, 1]
    assert not scheduler.busy


def test_a_budget_below_the_number_of_slots_is_refused_because_prompts_would_starve() -> None:
    with pytest.raises(ValueError, match="max_batch"):
        Scheduler(slots=8, step_tokens=7)


def test_the_promised_wait_follows_measured_rates() -> None:
    rates = Rates()
    for _ in range(200):
        rates.ran(prefill_tokens=0, seconds=0.01)
        rates.ran(prefill_tokens=100, seconds=0.11)
        rates.finished(50)
    wait = rates.eta_s(prompt_tokens=1000, ahead=4, slots=4, free=False)
    assert wait == pytest.approx(1000 * 0.001 + 1.5 * 50 * 0.01, rel=0.01)
    assert rates.eta_s(prompt_tokens=1000, ahead=4, slots=4, free=True) == pytest.approx(
        1, rel=0.01
    )
