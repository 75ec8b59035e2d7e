"""The breaker: its states by rules and by chance, streams under it, and what processes tell."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import User
from django.core.cache import BaseCache, caches
from django.core.exceptions import ImproperlyConfigured
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from assistant import backends
from assistant.errors import (
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    RateLimited,
)
from assistant.types import Delta, Event, Finished, Message, Params, Started, Usage
from fallback import breaker, shared
from fallback.breaker import Breaker, BreakerOpen, Forced, guarded
from fallback.circuit import Circuit, Limits, Permit, State
from tests.services.conftest import Redis, redis  # noqa: F401 - a fixture

LIMITS = Limits(slow_s=4.0)


class FakeClock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def circuit(clock: FakeClock) -> Circuit:
    return Circuit(LIMITS, clock)


@pytest.fixture(autouse=True)
def rested() -> Iterator[None]:
    shared.forget()
    breaker.reset()
    yield
    shared.forget()
    breaker.reset()


def call(circuit: Circuit, outcome: Any, lost_s: float = 0.0) -> State | None:
    permit = circuit.ask()
    assert permit is not None, "left alone"
    return circuit.end(permit, outcome, lost_s)


def trip(circuit: Circuit) -> None:
    for _ in range(LIMITS.failures):
        call(circuit, "bad")
    assert circuit.state is State.OPEN


# -- the states ----------------------------------------------------------------------------------


def test_five_failures_open_it_and_four_do_not(circuit: Circuit) -> None:
    assert [call(circuit, "bad") for _ in range(5)] == [None] * 4 + [State.OPEN]
    assert circuit.ask() is None
    assert circuit.retry_after_s() == LIMITS.open_s


def test_one_timeout_is_enough_when_nothing_else_went_well(circuit: Circuit) -> None:
    assert call(circuit, "bad", 5.0) is State.OPEN


def test_one_timeout_among_good_calls_is_not(circuit: Circuit) -> None:
    for _ in range(20):
        call(circuit, "good")
    assert call(circuit, "bad", 5.0) is None
    assert circuit.state is State.CLOSED


def test_failures_that_the_window_has_left_behind_do_not_count(
    circuit: Circuit, clock: FakeClock
) -> None:
    for _ in range(4):
        call(circuit, "bad")
    clock.now += LIMITS.window_s + 1
    assert call(circuit, "bad") is None


def test_what_says_nothing_is_not_counted(circuit: Circuit) -> None:
    for _ in range(50):
        call(circuit, "void", 9.0)
    assert [call(circuit, "bad") for _ in range(5)][-1] is State.OPEN


def test_after_a_while_probes_are_let_through_and_close_it(
    circuit: Circuit, clock: FakeClock
) -> None:
    trip(circuit)
    clock.now += LIMITS.open_s
    assert circuit.state is State.HALF_OPEN
    first, second = circuit.ask(), circuit.ask()
    assert first is not None and second is not None
    assert circuit.ask() is None, "no more than the probe budget at once"
    assert circuit.end(first, "good") is None
    assert circuit.end(second, "good") is State.CLOSED


def test_a_bad_probe_opens_it_again(circuit: Circuit, clock: FakeClock) -> None:
    trip(circuit)
    clock.now += LIMITS.open_s
    assert call(circuit, "bad") is State.OPEN
    clock.now += LIMITS.open_s - 0.1
    assert circuit.ask() is None


def test_a_probe_that_never_comes_back_frees_its_place(circuit: Circuit, clock: FakeClock) -> None:
    trip(circuit)
    clock.now += LIMITS.open_s
    assert circuit.ask() and circuit.ask() and circuit.ask() is None
    clock.now += LIMITS.probe_s
    assert circuit.ask() is not None


def test_calls_from_before_it_opened_say_nothing_about_it_now(
    circuit: Circuit, clock: FakeClock
) -> None:
    old = circuit.ask()
    assert old is not None
    trip(circuit)
    clock.now += LIMITS.open_s
    assert circuit.end(old, "bad", 30.0) is None
    assert circuit.state is State.HALF_OPEN
    assert circuit.end(old, "good") is None and circuit.end(old, "good") is None
    assert circuit.state is State.HALF_OPEN


class Chance(RuleBasedStateMachine):
    """Any order of calls, ends and waiting; a plain model of what must hold beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = FakeClock()
        self.circuit = Circuit(LIMITS, self.clock)
        self.out: list[Permit] = []
        self.opened_at: float | None = None
        self.bad_since_closed: list[tuple[float, float]] = []

    @rule()
    def ask(self) -> None:
        before = self.circuit.state
        permit = self.circuit.ask()
        if before is State.OPEN:
            assert permit is None
        if before is State.CLOSED:
            assert permit is not None
        if permit is not None:
            self.out.append(permit)

    @rule(
        at=st.integers(0, 50),
        outcome=st.sampled_from(["good", "bad", "bad", "void"]),
        lost_s=st.sampled_from([0.0, 0.1, 5.0]),
    )
    def end(self, at: int, outcome: Any, lost_s: float) -> None:
        if not self.out:
            return
        before, permit = self.circuit.state, self.out.pop(at % len(self.out))
        changed = self.circuit.end(permit, outcome, lost_s)
        allowed = {
            State.CLOSED: {None, State.OPEN},
            State.HALF_OPEN: {None, State.OPEN, State.CLOSED},
            State.OPEN: {None},
        }
        assert changed in allowed[before]
        if outcome == "bad":
            self.bad_since_closed.append((self.clock.now, lost_s))
            assert changed is not State.CLOSED
        else:
            assert changed is not State.OPEN
        if before is State.CLOSED and changed is State.OPEN:
            self.opened_for_a_reason()
        if changed is State.OPEN:
            self.opened_at = self.clock.now
        if changed is State.CLOSED:
            self.bad_since_closed.clear()

    def opened_for_a_reason(self) -> None:
        recent = [
            lost for when, lost in self.bad_since_closed
            if when >= self.clock.now - LIMITS.window_s
        ]  # fmt: skip
        assert len(recent) >= LIMITS.failures or sum(recent) >= LIMITS.lost_s

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.5, 5.0, 31.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def it_stays_open_for_its_time_and_no_longer(self) -> None:
        since = None if self.opened_at is None else self.clock.now - self.opened_at
        if self.circuit.state is State.OPEN:
            assert since is not None and since < LIMITS.open_s
        elif since is not None:
            assert since >= LIMITS.open_s

    @invariant()
    def no_more_probes_than_the_budget(self) -> None:
        if self.circuit.state is State.HALF_OPEN:
            assert len(self.circuit._probing) <= LIMITS.probes
        assert 0 <= self.circuit.retry_after_s() <= LIMITS.open_s

    @invariant()
    def everything_kept_is_bounded(self) -> None:
        assert len(self.circuit._window) <= 1_000


TestChance = Chance.TestCase
TestChance.settings = hypothesis_settings(max_examples=60, stateful_step_count=60, deadline=None)


# -- streams under it ----------------------------------------------------------------------------


async def said(*events: Event | Exception, pause_s: float = 0.0) -> AsyncIterator[Event]:
    for event in events:
        await asyncio.sleep(pause_s)
        if isinstance(event, Exception):
            raise event
        yield event


GOOD = (Started("m"), Delta("yes"), Finished("stop", Usage()))


async def run(target: str, *events: Event | Exception, pause_s: float = 0.0) -> list[Event]:
    seen: list[Event] = []
    async for event in guarded(target, lambda: said(*events, pause_s=pause_s)):
        seen.append(event)
    return seen


def quick(settings: Any, **limits: Any) -> None:
    given = {"shared": ["upstream"], "slow_s": 0.1, "open_s": 0.2, "lost_s": 99.0, **limits}
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BREAKER": given,
        "BACKENDS": {
            name: {"BACKEND": "assistant.backends.echo.EchoBackend"}
            for name in ("model", "upstream", "echo")
        },
    }


async def fails(target: str, error: Exception) -> None:
    with pytest.raises(type(error)):
        await run(target, error)


async def test_a_good_stream_passes_unchanged(settings: Any) -> None:
    quick(settings)
    assert await run("model", *GOOD) == list(GOOD)
    assert breaker.of("model").state is State.CLOSED


@pytest.mark.parametrize("target", ["model", "upstream"])
@pytest.mark.parametrize(
    "error", [GenerationFailed("x"), ModelUnavailable("x"), TimeoutError(), ZeroDivisionError()]
)
async def test_a_backend_that_breaks_is_left_alone_and_comes_back(
    settings: Any, target: str, error: Exception
) -> None:
    quick(settings)
    for _ in range(5):
        await fails(target, error)
    asked = []

    def stream() -> AsyncIterator[Event]:
        asked.append(1)
        return said(*GOOD)

    with pytest.raises(BreakerOpen) as left_alone:
        await anext(guarded(target, stream))
    assert asked == []
    assert left_alone.value.retry_after_s == 1.0 and not left_alone.value.forced
    await asyncio.sleep(0.25)
    for _ in range(2):
        assert await run(target, *GOOD) == list(GOOD)
    assert breaker.of(target).state is State.CLOSED


@pytest.mark.parametrize(
    "error", [Overloaded("full"), RateLimited("spent"), InvalidRequest("bad question")]
)
async def test_a_refusal_says_nothing_of_its_health(settings: Any, error: Exception) -> None:
    quick(settings)
    for _ in range(20):
        await fails("model", error)
    assert breaker.of("model").state is State.CLOSED


async def test_a_failure_after_the_first_words_counts_too(settings: Any) -> None:
    quick(settings, failures=1)
    with pytest.raises(GenerationFailed):
        await run("model", Started("m"), Delta("ye"), GenerationFailed("cut"))
    assert breaker.of("model").state is State.OPEN


async def test_slow_first_words_count_against_a_server_and_not_against_our_own_queue(
    settings: Any,
) -> None:
    quick(settings, failures=1)
    assert await run("model", *GOOD, pause_s=0.06) == list(GOOD)
    assert breaker.of("model").state is State.CLOSED
    assert await run("upstream", *GOOD, pause_s=0.06) == list(GOOD)
    assert breaker.of("upstream").state is State.OPEN


async def test_a_hung_model_costs_one_wait(settings: Any) -> None:
    """The router's own time-out closes the stream; the next question is not kept waiting."""
    quick(settings, lost_s=0.1)
    backend = backends.get("echo")
    ask = [Message("user", "/echo hang=0 hello")]

    async def first_words() -> None:
        async with asyncio.timeout(0.15):
            async for event in guarded("echo", lambda: backend.stream(ask, Params())):
                assert not isinstance(event, Delta)

    with pytest.raises(TimeoutError):
        await first_words()
    begun = time.monotonic()
    with pytest.raises(BreakerOpen):
        await first_words()
    assert time.monotonic() - begun < 0.1


async def test_a_reader_who_leaves_early_says_nothing(settings: Any) -> None:
    quick(settings, failures=1)
    for events in ((Started("m"),), ()):
        stream: Any = guarded("model", lambda events=events: said(*events, *GOOD, pause_s=0.01))
        await anext(stream)
        await stream.aclose()
    assert breaker.of("model").state is State.CLOSED


async def test_closing_closes_the_stream_below(settings: Any) -> None:
    quick(settings)
    closed = []

    async def watched() -> AsyncIterator[Event]:
        try:
            for event in GOOD:
                yield event
        finally:
            closed.append(True)

    stream: Any = guarded("model", watched)
    await anext(stream)
    await stream.aclose()
    assert closed == [True]


async def test_probes_at_once_are_bounded(settings: Any) -> None:
    quick(settings, failures=1, probes=2)
    await fails("model", GenerationFailed("x"))
    await asyncio.sleep(0.25)
    results = await asyncio.gather(
        *(run("model", *GOOD, pause_s=0.02) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(one, list) for one in results) == 2
    assert sum(isinstance(one, BreakerOpen) for one in results) == 18


# -- between processes ---------------------------------------------------------------------------


def another(target: str, **limits: Any) -> Breaker:
    """The same target as a process beside this one has it."""
    return Breaker(target, Limits(shared=("upstream",), open_s=0.4, failures=1, **limits))


async def made_bad(one: Breaker) -> None:
    (await one.enter()).failed(GenerationFailed("x"))
    await settled()


async def settled() -> None:
    """What was told to the others from another thread has arrived."""
    await asyncio.sleep(0.05)


async def looks(one: Breaker) -> State:
    await asyncio.to_thread(one.refresh)
    return one.state


async def test_a_trip_is_known_to_the_others_and_so_is_the_recovery(caplog: Any) -> None:
    caplog.set_level("INFO", logger="fallback.breaker")
    here, there = another("upstream", probes=1), another("upstream", probes=1)
    await made_bad(here)
    assert await looks(there) is State.OPEN
    with pytest.raises(BreakerOpen):
        await there.enter()
    await asyncio.sleep(0.5)
    assert await looks(here) is State.HALF_OPEN and await looks(there) is State.HALF_OPEN
    (await there.enter()).finished()
    await settled()
    assert there.state is State.CLOSED
    assert await looks(here) is State.CLOSED
    assert await looks(another("upstream")) is State.CLOSED, "nothing is left behind"
    told = [(record.message, record.backend) for record in caplog.records]
    assert told == [("circuit_opened", "upstream"), ("circuit_closed", "upstream")]


async def test_the_probe_budget_is_one_for_all_processes() -> None:
    all_of_them = [another("upstream", probes=2) for _ in range(4)]
    await made_bad(all_of_them[0])
    await asyncio.sleep(0.45)
    for one in all_of_them:
        assert await looks(one) is State.HALF_OPEN
    let_through = []
    for one in all_of_them:
        with contextlib.suppress(BreakerOpen):
            let_through.append(await one.enter())
    assert len(let_through) == 2
    for probe in let_through:
        probe.end("void")
    await settled()
    assert await all_of_them[3].enter(), "their places are free again"


async def test_the_model_in_this_process_is_this_process_alone() -> None:
    here, there = another("model"), another("model")
    await made_bad(here)
    assert await looks(here) is State.OPEN and await looks(there) is State.CLOSED


@pytest.fixture
def away(monkeypatch: Any) -> list[int]:
    """The shared cache is hung: every call takes its time-out and fails. How often it was asked."""
    asked: list[int] = []

    class Hung(BaseCache):
        def __init__(self) -> None:
            super().__init__({})

        def get_many(self, *args: Any, **kwargs: Any) -> Any:
            asked.append(1)
            time.sleep(0.2)
            raise TimeoutError("hung")

        add = set = delete = delete_many = get_many

    monkeypatch.setattr(shared, "caches", {"default": Hung(), "local": caches["local"]})
    return asked


async def test_without_the_cache_it_is_a_breaker_all_the_same(away: list[int]) -> None:
    one = another("upstream", probes=1)
    begun = time.monotonic()
    await made_bad(one)
    for _ in range(50):
        with pytest.raises(BreakerOpen):
            await one.enter()
    assert time.monotonic() - begun < 0.4, "one time-out, and only one"
    assert len(away) == 1
    await asyncio.sleep(0.45)
    (await one.enter()).finished()
    assert one.state is State.CLOSED


async def test_the_loop_is_not_kept_waiting_by_a_hung_cache(away: list[int]) -> None:
    longest, last = 0.0, time.monotonic()

    async def tick() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0.005)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    ticking = asyncio.create_task(tick())
    await made_bad(another("upstream"))
    ticking.cancel()
    assert longest < 0.15


async def test_a_trip_the_others_never_heard_of_is_not_undone_by_them(monkeypatch: Any) -> None:
    one = another("upstream")
    monkeypatch.setattr(shared, "_away_until", float("inf"))
    await made_bad(one)
    shared.forget()
    assert await looks(one) is State.OPEN
    assert await looks(another("upstream")) is State.OPEN, "now they have heard"


@pytest.mark.parametrize("rubbish", [1, "open", {"state": "ajar"}, {"other": 1}, []])
async def test_rubbish_in_the_cache_forces_nothing(rubbish: object) -> None:
    caches["default"].set("breaker:upstream:forced", rubbish)
    assert await looks(another("upstream")) is State.CLOSED


@pytest.fixture
def on_redis(redis: Redis, settings: Any) -> Redis:  # noqa: F811
    """The shared cache is a real Redis."""
    real = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": redis.url,
        "OPTIONS": {
            "SERIALIZER": "django_redis.serializers.json.JSONSerializer",
            "SOCKET_CONNECT_TIMEOUT": 0.2,
            "SOCKET_TIMEOUT": 0.2,
        },
    }
    settings.CACHES = {**settings.CACHES, "default": real}
    return redis


async def test_all_of_it_over_a_real_redis_that_hangs_and_dies(on_redis: Redis) -> None:
    here, there = another("upstream", probes=1), another("upstream", probes=1)
    await made_bad(here)
    assert await looks(there) is State.OPEN
    await asyncio.sleep(0.5)
    assert await looks(there) is State.HALF_OPEN
    probe = await there.enter()
    with pytest.raises(BreakerOpen):
        await here.enter()
    probe.finished()
    await settled()
    assert await looks(here) is State.CLOSED
    there.force(Forced("open", "maintenance", "sam"), 60)
    assert await looks(here) is State.OPEN
    there.force(None, 60)
    assert await looks(here) is State.CLOSED
    on_redis.hang()
    begun = time.monotonic()
    assert await looks(here) is State.CLOSED
    (await here.enter()).finished()
    assert time.monotonic() - begun < 0.5
    on_redis.kill()
    await made_bad(here)
    assert await looks(here) is State.OPEN, "alone it is a breaker all the same"


# -- staff ---------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_staff_force_a_state_for_a_while_and_it_is_written_down(sam: User, settings: Any) -> None:
    quick(settings)
    breaker.force("upstream", "open", by=sam, note="new contract", for_s=3600)
    assert breaker.states() == {"model": 0, "upstream": 2, "echo": 0}
    assert breaker.maintenance() == {"upstream": Forced("open", "new contract", "sam")}
    breaker.reset()
    assert breaker.states()["upstream"] == 2, "another process knows it from the cache"
    breaker.force("upstream", None, by=sam)
    assert breaker.states()["upstream"] == 0 and breaker.maintenance() == {}
    lines = list(LogEntry.objects.order_by("pk").values_list("user", "object_id", "change_message"))
    assert lines == [
        (sam.pk, "upstream", "forced open for 3600 s: new contract"),
        (sam.pk, "upstream", "no longer forced"),
    ]


@pytest.mark.django_db(transaction=True)
async def test_forced_open_refuses_and_forced_closed_lets_through(sam: User, settings: Any) -> None:
    quick(settings, failures=1)
    await asyncio.to_thread(lambda: breaker.force("model", "open", by=sam))
    with pytest.raises(BreakerOpen) as off:
        await run("model", *GOOD)
    assert off.value.forced and "maintenance" in off.value.message
    await asyncio.to_thread(lambda: breaker.force("model", "closed", by=sam))
    for _ in range(20):
        await fails("model", GenerationFailed("x"))
    assert await run("model", *GOOD) == list(GOOD)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("target", "for_s"), [("nobody", 3600), ("model", 59), ("model", 8 * 86_400)]
)
def test_what_cannot_be_forced_is_refused_and_not_written_down(
    sam: User, settings: Any, target: str, for_s: int
) -> None:
    quick(settings)
    with pytest.raises(ValueError, match=r"backend|seconds"):
        breaker.force(target, "open", by=sam, for_s=for_s)
    assert not LogEntry.objects.exists()


@pytest.mark.django_db
def test_without_the_cache_staff_hear_that_only_this_process_obeys_yet(
    sam: User, settings: Any, monkeypatch: Any
) -> None:
    quick(settings)
    monkeypatch.setattr(shared, "_away_until", float("inf"))
    with pytest.raises(shared.Away):
        breaker.force("model", "open", by=sam)
    assert breaker.states()["model"] == 2
    shared.forget()
    breaker.of("model").refresh()
    breaker.reset()
    assert breaker.states()["model"] == 2, "the others know, now that the cache is back"


def test_an_unknown_option_is_named(settings: Any) -> None:
    quick(settings, patience=3)
    with pytest.raises(ImproperlyConfigured, match="patience"):
        breaker.of("model")


def test_a_hung_backend_is_a_slow_one_whatever_the_routers_patience(settings: Any) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "FIRST_TOKEN_TIMEOUT_S": 2.0, "BREAKER": {}}
    assert breaker.of("model")._slow_s < 2.0
