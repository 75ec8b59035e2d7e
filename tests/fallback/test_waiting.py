"""Waiting for a model: what is told meanwhile, and what answers whoever has had enough of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from django.contrib.auth.models import User

from assistant import backends
from assistant.backends.versioned import VersionedBackend, _Model, _Now
from assistant.errors import GenerationFailed
from assistant.types import Delta, Event, Finished, Message, Params, Started, Usage, Waiting
from fallback import breaker, cache
from fallback.answers import Known, Reviewed
from fallback.patience import Hurried, Patience, in_time
from fallback.router import Ask, Routed, route
from fallback.rules import RuleText

KNOWN = Known(
    rules=(RuleText("cancel", ("cancel my order",), "Open My Orders."),),
    reviewed={"where is my refund": Reviewed("Within three days.", "track_refund")},
)
LINE = "/echo queue=3 place=0.01"
#: Longer than any test waits: only somebody in a hurry gets past it.
LONG = "/echo queue=2 place=60"


def ask(text: str, steps: tuple[str, ...] = ()) -> Ask:
    return Ask((Message("user", text),), Params(), KNOWN, steps)


async def hurried(question: Ask, *, at: type[Any] = Waiting) -> list[Any]:
    """The events, with an end of patience at the first one of that kind."""
    seen: list[Any] = []
    async with asyncio.timeout(10):
        async for event in route(question):
            seen.append(event)
            if isinstance(event, at):
                question.patience.end()
    return seen


def of(events: list[Any], kind: type[Any]) -> list[Any]:
    return [event for event in events if isinstance(event, kind)]


# -- told ----------------------------------------------------------------------------------------


async def test_places_come_before_the_route_and_the_words():
    events = [event async for event in route(ask(f"{LINE} one two"))]
    assert of(events, Waiting) == [Waiting(n, n * 0.01) for n in (3, 2, 1)]
    assert events[:3] == of(events, Waiting) and events[3] == Routed("model")
    assert "".join(event.text for event in of(events, Delta)) == "one two"


async def test_a_line_is_no_first_word_to_the_time_limit(settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "FIRST_TOKEN_TIMEOUT_S": 0.05}
    events = [event async for event in route(ask("/echo queue=9 place=0.03 cancel my order"))]
    assert of(events, Routed) == [Routed("rules", "timeout")]


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ((), "bad"),
        ((Waiting(9, 30.0),), "bad"),  # nothing moved since: it may well hang
        ((Waiting(9, 30.0), Waiting(8, 26.0)), "void"),
        ((Waiting(2, 6.0), Waiting(1, 3.0), Started("m")), "good"),
        ((Started("m"), Delta("a"), Delta("b")), "good"),
        ((Delta("a"),), "bad"),  # and then not a word more
    ],
    ids=["silent", "stuck", "moving", "begun", "writing", "fell silent"],
)
def test_a_queue_that_moves_is_no_fault_of_its_backend(told, outcome, monkeypatch):
    now = [0.0]
    ended: list[str] = []
    call = breaker.Call(breaker.of("echo"), None, lambda: now[0], slow_s=4.0)
    monkeypatch.setattr(call, "end", ended.append)
    for event in told:
        call.heard(event)
        now[0] += 2.5
    now[0] = 5.0
    call.left()
    assert ended == [outcome]


# -- enough of it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("cancel my order", Routed("rules", "hurry")),
        ("blue cheese", Routed("human", "hurry", hand_over=True)),
    ],
)
async def test_whoever_will_not_wait_gets_what_is_known(words, told):
    question = ask(f"{LONG} {words}")
    events = await hurried(question)
    assert of(events, Routed) == [told]
    assert of(events, Waiting) == [Waiting(2, 120.0)] and len(of(events, Finished)) == 1
    assert of(events, Delta)


async def test_an_answer_that_was_kept_is_known_too(settings, monkeypatch):
    monkeypatch.setattr(backends.get("echo"), "version", lambda params=None: "echo@1")
    monkeypatch.setattr(backends, "answering", lambda: "echo")
    old = cache.Answer("Yesterday's answer.", "", "echo@1")
    monkeypatch.setattr(cache, "lookup", lambda key: _found(old))
    events = await hurried(ask(f"{LONG} blue cheese"))
    assert of(events, Routed) == [Routed("cache", "hurry")]
    assert of(events, Delta) == [Delta("Yesterday's answer.")]


async def _found(answer: cache.Answer) -> cache.Found:
    return cache.Found(answer, fresh=False)


async def test_no_model_is_asked_after_that(settings):
    steps = ("echo", "echo", "rules")
    events = await hurried(ask(f"{LONG} cancel my order", steps))
    assert len(of(events, Waiting)) == 1
    assert of(events, Routed) == [Routed("rules", "hurry")]


async def test_one_in_a_hurry_from_the_start_waits_for_nothing():
    question = ask(f"{LONG} cancel my order")
    question.patience.end()
    events = [event async for event in route(question)]
    assert of(events, Waiting) == [] and of(events, Routed) == [Routed("rules", "hurry")]


async def test_a_reviewed_answer_is_not_marked_by_a_hurry():
    question = ask("Where is my refund?")
    question.patience.end()
    assert of([event async for event in route(question)], Routed) == [Routed("reviewed")]


async def test_words_that_are_shown_go_on():
    events = await hurried(ask("/echo delay=0.01 one two three"), at=Delta)
    assert of(events, Routed) == [Routed("model")]
    assert "".join(event.text for event in of(events, Delta)) == "one two three"


async def test_whoever_waits_for_anothers_answer_may_hurry_too(monkeypatch):
    monkeypatch.setattr(backends.get("echo"), "version", lambda params=None: "echo@1")
    monkeypatch.setattr(backends, "answering", lambda: "echo")
    words = f"{LONG} cancel my order"
    first, second = ask(words), ask(words)
    leader = asyncio.create_task(hurried(first, at=Finished))
    await asyncio.sleep(0.05)
    follower = asyncio.create_task(hurried(second, at=Finished))
    await asyncio.sleep(0.05)
    second.patience.end()
    assert of(await asyncio.wait_for(follower, 5), Routed) == [Routed("rules", "hurry")]
    assert not leader.done(), "the other one still waits"
    first.patience.end()
    assert of(await asyncio.wait_for(leader, 5), Routed) == [Routed("rules", "hurry")]


async def test_the_model_that_is_not_waited_for_is_left():
    closed = asyncio.Event()

    async def endless() -> AsyncIterator[Event]:
        try:
            yield Waiting(1, 60.0)
            await asyncio.Event().wait()
        finally:
            closed.set()

    patience = Patience()
    events = in_time(endless(), patience)
    await anext(events)
    asyncio.get_running_loop().call_later(0.02, patience.end)
    with pytest.raises(Hurried):
        await anext(events)
    assert closed.is_set()
    patience.end()
    with pytest.raises(Hurried):
        await patience.wait(lambda: asyncio.sleep(0))


async def test_a_failure_of_its_own_is_not_taken_for_a_hurry():
    async def fails() -> AsyncIterator[Event]:
        yield Waiting(1, 60.0)
        raise GenerationFailed("broken")

    with pytest.raises(GenerationFailed):
        [event async for event in in_time(fails(), Patience())]


async def test_a_canary_that_only_queued_can_still_be_stood_in_for(monkeypatch):
    """The active version answers where the canary told a place and then broke."""

    class Written:
        def __init__(self, *events: Any) -> None:
            self.events = events

        async def stream(self, messages: Any, params: Any) -> AsyncIterator[Event]:
            for event in self.events:
                if isinstance(event, Exception):
                    raise event
                yield event

    ended = (Started("active"), Delta("hello"), Finished("stop", Usage()))
    models = []
    for name, events in (("a", ended), ("c", (Waiting(1, 2.0), GenerationFailed("broken")))):
        model: Any = object.__new__(_Model)
        model.backend, model.name, model.users, model.sha256 = Written(*events), name, 0, name
        models.append(model)
    backend = VersionedBackend("model", VersionedBackend.options_class("nowhere"))
    backend._now = _Now(models[0], models[1], 100)
    events = [event async for event in backend.stream([Message("user", "x")], Params(sticky="s"))]
    assert events == [Waiting(1, 2.0), *ended]


# -- maintenance ---------------------------------------------------------------------------------


@pytest.mark.django_db
def test_everybody_is_told_of_what_staff_keeps_off(sam: User) -> None:
    assert breaker.notice() == ""
    breaker.force("echo", "closed", by=sam, note="public: it is on")
    assert breaker.notice() == "", "nothing is missing"
    breaker.force("model", "open", by=sam, note="disk of host 7 is full")
    assert "maintenance" in breaker.notice() and "host 7" not in breaker.notice()
    breaker.force("model", "open", by=sam, note="host 7; public: Back at noon. ")
    assert breaker.notice() == "Back at noon."
    breaker.force("echo", "open", by=sam, note="public:")
    assert breaker.notice() == "Back at noon."
    breaker.force("echo", "open", by=sam, note="public:Back at noon.")
    assert breaker.notice() == "Back at noon.", "once"
    breaker.force("model", None, by=sam)
    breaker.force("echo", None, by=sam)
    assert breaker.notice() == ""
