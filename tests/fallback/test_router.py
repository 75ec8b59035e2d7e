"""The route: every step's answer, every reason, and no change of mind after the first delta."""

from __future__ import annotations

from typing import Any

import pytest

from assistant.errors import ContextTooLong, GenerationFailed, Overloaded
from assistant.types import Delta, Finished, Message, Params, Started
from fallback import router
from fallback.answers import Known, Reviewed
from fallback.router import Ask, Routed, route
from fallback.rules import RuleText

KNOWN = Known(
    rules=(RuleText("cancel", ("cancel my order",), "Write to {{Support Email}}."),),
    reviewed={"where is my refund": Reviewed("Within {{Date}}.", "track_refund")},
)


def ask(
    text: str,
    *earlier: Message,
    facts: dict[str, str] | None = None,
    stop: tuple[str, ...] = (),
    steps: tuple[str, ...] = (),
) -> Ask:
    params = Params(facts=facts or {}, stop=stop)
    return Ask((*earlier, Message("user", text)), params, KNOWN, steps)


async def events_of(question: Ask) -> list[Any]:
    return [event async for event in route(question)]


def text_of(events: list[Any]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_reviewed_answer_wins_on_the_first_turn_only():
    events = await events_of(ask("Where is MY refund?", facts={"Date": "three days"}))
    assert events[0] == Routed("reviewed")
    assert events[1] == Started(model="", intent="track_refund")
    assert text_of(events) == "Within three days."
    assert isinstance(events[-1], Finished)
    later = await events_of(ask("Where is MY refund?", *[Message("user", "a")]))
    assert later[0] == Routed("model")


async def test_the_model_answers_when_it_is_sure():
    events = await events_of(ask("/echo confidence=0.9 one two"))
    assert events[0] == Routed("model")
    assert text_of(events) == "one two"


async def test_an_unsure_model_shows_nothing_and_hands_on():
    events = await events_of(ask("/echo confidence=0.2 cancel my order"))
    assert [event for event in events if isinstance(event, Routed)] == [
        Routed("rules", "low_confidence")
    ]


async def test_a_rules_placeholders_are_filled_or_worded(settings):
    unknown = await events_of(ask("/echo fail=overloaded cancel my order"))
    assert text_of(unknown) == "Write to our support e-mail address."
    settings.ASSISTANT = {**settings.ASSISTANT, "FACTS": {"Support Email": "help@example.com"}}
    known = await events_of(ask("/echo fail=overloaded cancel my order"))
    assert text_of(known) == "Write to help@example.com."


async def test_after_the_first_delta_a_failure_is_raised_and_not_papered_over():
    seen: list[Any] = []
    with pytest.raises(GenerationFailed):
        async for event in route(ask("/echo error=2 cancel my order")):
            seen.append(event)
    assert [event.route for event in seen if isinstance(event, Routed)] == ["model"]
    assert text_of(seen) == "cancel my"


async def test_a_model_that_is_asked_for_alone_answers_or_fails_itself():
    unsure = await events_of(ask("/echo confidence=0.2 cancel my order", steps=("echo",)))
    assert unsure[0] == Routed("model", "low_confidence")
    assert text_of(unsure) == "cancel my order"
    with pytest.raises(Overloaded) as busy:
        await events_of(ask("/echo fail=overloaded cancel my order", steps=("echo",)))
    assert busy.value.retry_after_s == 2


async def test_rules_that_are_asked_for_alone_answer_or_a_person_does():
    assert (await events_of(ask("cancel my order", steps=("rules",))))[0] == Routed("rules")
    assert (await events_of(ask("blue cheese", steps=("rules",))))[0] == Routed("human")


async def test_a_written_answer_ends_before_a_stop_string_too():
    events = await events_of(ask("Where is MY refund?", stop=("that", "date")))
    assert text_of(events) == "Within "
    assert text_of(await events_of(ask("Where is MY refund?", stop=("With",)))) == ""


async def test_a_question_that_is_too_long_is_the_callers_to_mend():
    with pytest.raises(ContextTooLong):
        await events_of(ask("/echo fail=too_long cancel my order"))


async def test_a_library_that_breaks_is_logged_and_never_shown(monkeypatch, caplog):
    class Broken:
        def stream(self, *args: Any) -> Any:
            raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(router.backends, "get", lambda alias: Broken())
    events = await events_of(ask("blue cheese"))
    assert events[0] == Routed("human", "error")
    assert "secret" not in text_of(events)
    assert "backend echo broke" in caplog.text


async def test_closing_the_route_closes_the_model(monkeypatch):
    closed: list[bool] = []

    class Slow:
        async def stream(self, *args: Any) -> Any:
            try:
                yield Started("slow")
                while True:
                    yield Delta("x")
            finally:
                closed.append(True)

    monkeypatch.setattr(router.backends, "get", lambda alias: Slow())
    events = route(ask("hello"))
    for _ in range(4):
        await anext(events)
    await events.aclose()
    assert closed == [True]


async def test_even_a_route_without_an_end_ends_with_a_person(settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["echo"], "FACTS": {}}
    events = await events_of(ask("/echo fail=overloaded hello"))
    assert events[0] == Routed("human", "overload")
    assert "support team" in text_of(events)
