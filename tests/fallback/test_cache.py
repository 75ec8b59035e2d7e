"""The answer cache: whose answer it is, how old, how often it is made, and life without it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
from django.core.cache import BaseCache, caches
from hypothesis import given
from hypothesis import strategies as st

from assistant.types import Message, Params
from fallback import cache, shared
from fallback.cache import Answer, Found, Key, Versions, flight, get_or_make, lookup, purge, store
from tests.conftest import ROOT
from tests.services.conftest import Redis, redis  # noqa: F401 - a fixture

ONE = Versions("support@1", "p1", "r1")
SO = Answer("So.", "cancel_order", "support@1")


@pytest.fixture(autouse=True)
def rested(settings: Any) -> Iterator[None]:
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "CACHE": {"FRESH_S": 60.0, "STALE_S": 600.0, "WAIT_S": 2.0},
        "FACTS": {"Support Phone": "555-0100"},
    }
    shared.forget()
    yield
    shared.forget()
    assert cache._flights == {}, "every flight ends"


@pytest.fixture
def clock(monkeypatch: Any) -> Callable[[float], None]:
    """Lets seconds pass."""
    now = [1_000_000.0]
    monkeypatch.setattr(cache, "_clock", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def key(
    text: str = "How do I cancel my order?",
    scope: str = "user:1",
    versions: Versions = ONE,
    *,
    facts: dict[str, str] | None = None,
    **params: Any,
) -> Key:
    found = cache.key_for(
        [Message("user", text)], Params(scope=scope, facts=facts or {}, **params), versions
    )
    assert found is not None
    return found


async def kept(answer: Answer = SO, of: Key | None = None) -> Key:
    place = of or key()
    await store(place, answer, begun=cache._clock())
    return place


# -- whose answer it is ----------------------------------------------------------------------------


async def test_a_question_about_nobody_is_answered_once_for_all():
    await kept(of=key("How do I cancel my order?", "user:1"))
    assert await lookup(key("how do I  CANCEL my order", "user:2")) == Found(SO, fresh=True)
    assert await lookup(key("how do I cancel my order", "")) == Found(SO, fresh=True)


PERSONAL = [
    "cancel order 48213377",
    "my name is Ana Lopez, where is my parcel",
    "write to ana@example.com",
    "I paid $350",
    "it came on 2026-05-04",
    "call me on +44 20 7946 0958",
    "my password is hunter22",
    "send it to 12 Elm Street",
]


@pytest.mark.parametrize("text", PERSONAL)
async def test_a_question_with_a_personal_value_is_its_callers_alone(text):
    await kept(of=key(text, "user:1"))
    assert await lookup(key(text, "user:1")) == Found(SO, fresh=True)
    assert await lookup(key(text, "user:2")) is None
    assert cache.key_for([Message("user", text)], Params(), ONE) is None, "nobody in particular"


async def test_a_value_that_the_product_knows_makes_question_or_answer_personal():
    anas, bens = {"Client Name": "Ana"}, {"Client Name": "Ben"}
    await kept(of=key("what does ana owe", "user:1", facts=anas))
    assert await lookup(key("what does ana owe", "user:2", facts=bens)) is None
    about_her = Answer("Hello ANA, so.")
    await kept(about_her, of=key("hello there", "user:1", facts=anas))
    assert await lookup(key("hello there", "user:2", facts=bens)) is None
    assert await lookup(key("hello there", "user:1", facts=anas)) == Found(about_her, fresh=True)
    await kept(of=key("where is it", "user:1", facts=anas))
    assert await lookup(key("where is it", "user:2", facts=bens)) == Found(SO, fresh=True)


async def test_whoever_has_no_such_value_is_not_told_that_of_one_who_has():
    await kept(of=key(facts={"Client Name": "Ana"}))
    assert await lookup(key(facts={})) is None


async def test_facts_of_the_company_are_nobodys_and_a_new_one_is_a_new_answer(settings):
    await kept(of=key(facts={"Support Phone": "555-0100"}))
    assert await lookup(key(scope="user:2", facts={"Support Phone": "555-0100"})) is not None
    settings.ASSISTANT = {**settings.ASSISTANT, "FACTS": {"Support Phone": "555-0199"}}
    assert await lookup(key(scope="user:2", facts={"Support Phone": "555-0199"})) is None


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_question_that_leans_on_something_before_it_is_not_kept(role):
    messages = [Message(role, "before"), Message("user", "and now?")]
    assert cache.key_for(messages, Params(scope="user:1"), ONE) is None


def test_a_drawn_answer_is_kept_only_if_it_can_be_drawn_again():
    question = [Message("user", "hello")]
    assert cache.key_for(question, Params(temperature=0.7), ONE) is None
    assert cache.key_for(question, Params(temperature=0.7, seed=4), ONE) is not None


def test_a_very_long_question_is_not_asked_twice():
    assert cache.key_for([Message("user", "why " * 251)], Params(scope="user:1"), ONE) is None


PARTS: dict[str, Any] = {
    "text": "How do I cancel my order now?",
    "versions": replace(ONE, model="support@2"),
    "max_new_tokens": 12,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 3,
    "repetition_penalty": 1.5,
    "stop": ("x",),
}


@pytest.mark.parametrize("part", [*PARTS, "prompt", "policy"])
def test_every_part_makes_another_key(part):
    parts = {**PARTS, "prompt": None, "policy": None}
    changed = {part: parts[part]}
    if part in ("prompt", "policy"):
        changed = {"versions": replace(ONE, **{part: "other"})}
    one, other = key(seed=1), key(seed=1, **changed)
    assert set(one.places).isdisjoint(other.places)


@pytest.mark.slow
@given(st.text(max_size=40), st.text(max_size=40))
def test_different_texts_have_different_keys(one, other):
    same = cache.normalised(one) == cache.normalised(other)
    assert (key(one).own == key(other).own) is same


@given(st.text(max_size=8), st.text(min_size=1, max_size=8))
def test_the_ends_of_parts_cannot_be_moved(one, other):
    first = key("x", "user:1", Versions(one + other, ""))
    second = key("x", "user:1", Versions(one, other))
    assert set(first.places).isdisjoint(second.places)


def test_signs_are_part_of_the_text_and_marks_at_the_end_are_not():
    assert key("Is it free?").shared == key("is it  FREE").shared
    assert key("is it 5%").shared != key("is it 5").shared


async def test_no_question_and_no_name_lies_in_a_key():
    await kept(of=key("my name is Ana Lopez", "user:ana"))
    names = str(list(caches["default"]._cache))  # type: ignore[attr-defined]
    assert "answer" in names
    assert not any(word in names.casefold() for word in ("lopez", "ana", "support@1"))


# -- how old it is ---------------------------------------------------------------------------------


async def test_an_answer_is_fresh_then_stale_then_gone(clock):
    place = await kept()
    clock(59)
    assert await lookup(place) == Found(SO, fresh=True)
    clock(2)
    assert await lookup(place) == Found(SO, fresh=False)
    clock(600)
    assert await lookup(place) is None


async def test_a_clock_that_is_put_back_makes_nothing_fresh_for_longer(clock):
    place = await kept()
    clock(-3600)
    assert await lookup(place) == Found(SO, fresh=False)


@pytest.mark.parametrize("what", [{}, {"intent": "cancel_order"}, {"model": "support@1"}])
async def test_purging_reaches_what_was_begun_before_and_nothing_begun_later(clock, what):
    place = await kept()
    purge(**what)
    assert await lookup(place) is None
    clock(5)
    await kept()
    assert await lookup(place) is not None


async def test_an_answer_that_was_being_made_while_it_was_purged_is_not_given_again(clock):
    async with flight(key()) as one:
        clock(5)
        purge(intent="cancel_order")
        clock(5)
        await one.land(SO)
    assert await lookup(key()) is None


@pytest.mark.parametrize("written_by", ["support@1", "upstream:big"])
async def test_purging_a_model_reaches_what_it_wrote_under_the_name_that_people_see(
    clock, written_by
):
    """The key knows the version with its digest, and a larger model's answer lies beside it."""
    place = key(versions=Versions("support@1:0123456789ab"))
    await kept(Answer("So.", "", written_by), place)
    purge(model=written_by)
    assert await lookup(place) is None


async def test_purging_one_thing_leaves_the_others(clock):
    place, other = await kept(), await kept(Answer("No.", "refund"), key("a refund"))
    clock(5)
    purge(question="how do i cancel MY order")
    purge(intent="track_order")
    purge(model="support@0")
    assert await lookup(place) is None
    assert await lookup(other) is not None


@pytest.mark.parametrize(
    "value",
    ["text", 5, [], {}, {"text": "So."}, {"text": 1, "intent": "", "model": "", "begun": 1e6}],
)
async def test_a_value_that_is_not_ours_is_a_miss(value):
    place = key()
    caches["default"].set(f"answer:{place.shared}", value)
    assert await lookup(place) is None
    await kept()
    assert await lookup(place) is not None


async def test_an_answer_without_end_is_not_kept():
    place = await kept(Answer("x" * (cache.MOST_CHARS + 1)))
    assert await lookup(place) is None
    await kept(Answer("", "cancel_order"))
    assert await lookup(place) is None


# -- how often it is made --------------------------------------------------------------------------


class Maker:
    """Makes answers, slowly, and counts them."""

    def __init__(self, answer: Answer = SO, error: Exception | None = None) -> None:
        self.made, self.answer, self.error = 0, answer, error

    async def __call__(self) -> Answer:
        self.made += 1
        await asyncio.sleep(0.1)
        if self.error:
            raise self.error
        return self.answer


async def test_a_hundred_equal_questions_at_once_are_one_generation():
    make = Maker()
    keys = [key(scope=f"user:{number}") for number in range(100)]
    assert await asyncio.gather(*(get_or_make(one, make) for one in keys)) == [SO] * 100
    assert make.made == 1
    assert await get_or_make(key(), make) == SO
    assert make.made == 1, "and then it is kept"


async def test_different_questions_do_not_wait_for_each_other():
    make = Maker()
    start = time.monotonic()
    await asyncio.gather(*(get_or_make(key(f"question {number}"), make) for number in range(50)))
    assert make.made == 50
    assert time.monotonic() - start < 1.5


async def test_an_answer_about_its_caller_is_handed_to_nobody_who_waits():
    make = Maker(Answer("Hello Ana."))
    anas = [key("hello there", "user:1", facts={"Client Name": "Ana"})] * 2
    bens = [key("hello there", "user:2", facts={"Client Name": "Ben"})]
    makers = [make, Maker(), Maker(Answer("Hello Ben."))]
    found = await asyncio.gather(*map(get_or_make, anas + bens, makers))
    assert "Ana" not in found[2].text
    assert makers[2].made == 1


async def test_a_question_that_is_not_kept_is_made_each_time():
    make = Maker()
    await asyncio.gather(*(get_or_make(None, make) for _ in range(3)))
    assert make.made == 3


async def test_an_error_is_its_own_makers_and_the_others_make_their_own():
    broken, fine = Maker(error=RuntimeError("broke")), Maker()
    found = await asyncio.gather(
        get_or_make(key(), broken),
        *(get_or_make(key(), fine) for _ in range(5)),
        return_exceptions=True,
    )
    assert isinstance(found[0], RuntimeError)
    assert found[1:] == [SO] * 5


async def test_if_the_maker_goes_away_one_of_the_others_takes_over():
    first, then = Maker(), Maker()
    leader = asyncio.create_task(get_or_make(key(), first))
    await asyncio.sleep(0.03)
    others = [asyncio.create_task(get_or_make(key(), then)) for _ in range(20)]
    await asyncio.sleep(0.03)
    leader.cancel()
    assert await asyncio.gather(*others) == [SO] * 20
    assert (first.made, then.made) == (1, 1)


async def test_one_who_waits_and_leaves_disturbs_nobody():
    make = Maker()
    leader = asyncio.create_task(get_or_make(key(), make))
    await asyncio.sleep(0.03)
    leaving = asyncio.create_task(get_or_make(key(), make))
    await asyncio.sleep(0.03)
    leaving.cancel()
    assert await leader == SO
    assert make.made == 1


async def test_waiting_has_an_end(settings):
    conf = settings.ASSISTANT["CACHE"]
    settings.ASSISTANT = {**settings.ASSISTANT, "CACHE": {**conf, "WAIT_S": 0.1}}
    quick = Maker()
    async with flight(key()):
        start = time.monotonic()
        assert await get_or_make(key(), quick) == SO
        assert time.monotonic() - start < 1
    assert quick.made == 1


async def test_an_answer_may_be_handed_to_those_who_wait_and_not_be_kept():
    waiting = asyncio.Event()

    async def follow() -> Answer:
        waiting.set()
        return await get_or_make(key(), Maker(Answer("another")))

    async with flight(key()) as one:
        follower = asyncio.create_task(follow())
        await waiting.wait()
        await asyncio.sleep(0.05)
        await one.land(SO, keep=False)
    assert await follower == SO
    assert await lookup(key()) is None


async def test_flights_are_bounded(monkeypatch):
    monkeypatch.setattr(cache, "MOST_FLIGHTS", 2)
    make = Maker()
    await asyncio.gather(*(get_or_make(key(f"question {number}"), make) for number in range(5)))
    assert make.made == 5
    assert await lookup(key("question 4")) is not None


async def test_another_loop_of_this_process_gets_the_answer_too():
    make = Maker()
    async with flight(key()) as one:
        other = asyncio.create_task(
            asyncio.to_thread(lambda: asyncio.run(get_or_make(key(scope="user:2"), make)))
        )
        await asyncio.sleep(0.2)
        await one.land(SO)
    start = time.monotonic()
    assert await other == SO
    assert time.monotonic() - start < 1
    assert make.made == 0


async def test_a_lock_that_ran_out_is_left_to_its_next_holder():
    place = key()
    async with flight(place):
        caches["default"].set(f"answer:lock:{place.shared}", "the next one's")
    assert caches["default"].get(f"answer:lock:{place.shared}") == "the next one's"
    caches["default"].clear()
    async with flight(place):
        assert caches["default"].get(f"answer:lock:{place.shared}") is not None
    assert caches["default"].get(f"answer:lock:{place.shared}") is None


# -- between processes, and without ----------------------------------------------------------------


@pytest.fixture
def on_redis(redis: Redis, settings: Any) -> Redis:  # noqa: F811
    options = {
        "SERIALIZER": "django_redis.serializers.json.JSONSerializer",
        "SOCKET_CONNECT_TIMEOUT": 0.2,
        "SOCKET_TIMEOUT": 0.2,
    }
    settings.CACHES = {
        **settings.CACHES,
        "default": {
            "BACKEND": "django_redis.cache.RedisCache",
            "LOCATION": redis.url,
            "OPTIONS": options,
        },
    }
    return redis


async def test_redis_keeps_answers_and_purges_without_looking_for_keys(on_redis):
    place = await kept()
    assert await lookup(place) == Found(SO, fresh=True)
    await asyncio.to_thread(purge, intent="cancel_order")
    assert await lookup(place) is None
    with on_redis.client() as client:
        commands = client.info("commandstats")
    assert not {"cmdstat_keys", "cmdstat_scan"} & set(commands)


async def test_a_redis_that_is_emptied_meanwhile_makes_nobody_ask_twice(on_redis):
    """A hundred equal questions, and FLUSHALL while their answer is being made."""
    make = Maker()
    asked = [asyncio.create_task(get_or_make(key(), make)) for _ in range(50)]
    await asyncio.sleep(0.03)
    with on_redis.client() as client:
        client.flushall()
    asked += [asyncio.create_task(get_or_make(key(), make)) for _ in range(50)]
    assert await asyncio.gather(*asked) == [SO] * 100
    assert make.made == 1


async def test_a_pickle_in_redis_is_not_run_and_counts_as_missing(on_redis, tmp_path):
    touched = tmp_path / "touched"
    bomb = f"cposix\nsystem\n(S'touch {touched}'\ntR.".encode()
    place = key()
    with on_redis.client() as client:
        for name in (place.shared, place.own):
            client.set(f":1:answer:{name}", bomb)
    assert await lookup(place) is None
    assert not touched.exists()
    await kept()
    with on_redis.client() as client:
        assert client.get(f":1:answer:{place.shared}") != bomb
    assert await lookup(place) == Found(SO, fresh=True), "the cache was not taken for away"


OTHER = """
import asyncio, sys, time
import django
django.setup()
from fallback import cache
from assistant.types import Message, Params
key = cache.key_for([Message("user", "hello there")], Params(), cache.Versions("m"))
made = []
async def make():
    made.append(1)
    await asyncio.sleep(0.5)
    return cache.Answer("So.")
async def main():
    await asyncio.to_thread(cache.shared.ask, lambda there: there.get("warm"))
    print("ready", flush=True)
    sys.stdin.readline()
    found = await asyncio.gather(*(cache.get_or_make(key, make) for _ in range(20)))
    assert {one.text for one in found} == {"So."}
    print(len(made))
asyncio.run(main())
"""


@pytest.mark.slow
def test_two_processes_make_one_answer(on_redis, tmp_path):
    environment = {
        "PATH": "/usr/bin:/bin",
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "REDIS_URL": on_redis.url,
        "SECRET_KEY": "only for this test",
        "ASSISTANT_DATA_DIR": str(tmp_path),
    }
    with ExitStack() as ended:
        both = [ended.enter_context(another(environment)) for _ in range(2)]
        assert [one.stdout.readline() for one in both] == ["ready\n"] * 2
        for one in both:
            one.stdin.write("\n")
            one.stdin.flush()
        made = [int(one.communicate(timeout=30)[0]) for one in both]
    assert sorted(made) == [0, 1]


@contextmanager
def another(environment: dict[str, str]) -> Iterator[Any]:
    """A process that asks when it is told to; it does not outlive the test."""
    command = [sys.executable, "-c", OTHER]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_lock_whose_holder_died_is_waited_for_a_while_only(on_redis, settings):
    conf = settings.ASSISTANT["CACHE"]
    settings.ASSISTANT = {**settings.ASSISTANT, "CACHE": {**conf, "WAIT_S": 0.3}}
    place = key()
    caches["default"].set(f"answer:lock:{place.shared}", "somebody's", 60)
    make, start = Maker(), time.monotonic()
    assert await asyncio.gather(*(get_or_make(place, make) for _ in range(10))) == [SO] * 10
    assert time.monotonic() - start < 1.5
    assert caches["default"].get(f"answer:lock:{place.shared}") == "somebody's"


@pytest.mark.parametrize("end", [Redis.kill, Redis.hang], ids=["refused", "hung"])
async def test_without_redis_everybody_is_answered_and_waits_a_moment(on_redis, end):
    await kept()
    end(on_redis)
    make, start = Maker(), time.monotonic()
    assert await asyncio.gather(*(get_or_make(key(), make) for _ in range(100))) == [SO] * 100
    assert time.monotonic() - start < 0.1 + 5 * cache.PATIENCE_S
    assert make.made == 1, "in one process it is still one"
    start = time.monotonic()
    assert await lookup(key()) is None
    assert time.monotonic() - start < cache.PATIENCE_S + 0.1
    with pytest.raises(shared.Away):
        purge()


async def test_a_cache_that_hangs_longer_than_it_should_is_left_after_a_moment(monkeypatch):
    class Hanging(BaseCache):
        def __init__(self) -> None:
            super().__init__({})

        def get_many(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            time.sleep(0.6)
            return {}

    monkeypatch.setattr(shared, "caches", {"default": Hanging()})
    start = time.monotonic()
    assert await lookup(key()) is None
    assert time.monotonic() - start < cache.PATIENCE_S + 0.15
