"""The route: every step's answer, every reason, and no change of mind after the first delta."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from assistant.backends.echo import EchoBackend
from assistant.engine.worker import EngineStats
from assistant.errors import ContextTooLong, GenerationFailed, Overloaded
from assistant.types import Delta, Finished, Message, Params, Started, Usage
from fallback import cache, near, router
from fallback.answers import Known, Reviewed
from fallback.policy import policy
from fallback.router import INTERRUPTED, Ask, Routed, route
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


def routes_of(events: list[Any]) -> list[Routed]:
    return [event for event in events if isinstance(event, Routed)]


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


async def test_after_the_first_delta_a_failure_is_continued_and_marked():
    events = await events_of(ask("/echo error=2 cancel my order"))
    assert [event for event in events if isinstance(event, Routed)] == [
        Routed("model"), Routed("rules", "error")
    ]  # fmt: skip
    broken, _, sure = text_of(events).partition(INTERRUPTED)
    assert (broken, sure) == ("cancel my", "Write to our support e-mail address.")
    assert isinstance(events[-1], Finished)
    nobody = await events_of(ask("/echo error=1 blue cheese"))
    assert nobody[-3:-2] == [Delta(INTERRUPTED)] and "support team" in text_of(nobody)


class Silent(EchoBackend):
    """Writes two words and then nothing more, or a time-out of its own."""

    idle_s = 0.05
    error: Exception | None = None

    async def stream(self, *args: Any) -> Any:
        yield Started("silent")
        yield Delta("cancel my")
        if self.error is not None:
            raise self.error
        await asyncio.Event().wait()


@pytest.mark.parametrize("error", [None, TimeoutError("a socket's")])
async def test_a_model_that_falls_silent_is_continued_and_marked(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(Silent, "error", error)
    backend = Silent("echo", EchoBackend.Options())
    monkeypatch.setattr(router.backends, "get", lambda alias: backend)
    async with asyncio.timeout(5):
        events = await events_of(ask("cancel my order"))
    assert routes_of(events) == [Routed("model"), Routed("rules", "timeout")]
    broken, _, sure = text_of(events).partition(INTERRUPTED)
    assert (broken, sure) == ("cancel my", "Write to our support e-mail address.")
    with pytest.raises(TimeoutError):
        await events_of(ask("cancel my order", steps=("echo",)))


async def test_a_model_that_writes_on_and_on_is_ended_by_what_is_known(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "REQUEST_TIMEOUT_S": 0.2}
    question = ask("/echo delay=0.02 words=1000 cancel my order")
    async with asyncio.timeout(5):
        events = await events_of(question)
    assert routes_of(events) == [Routed("model"), Routed("rules", "timeout")]
    written, _, sure = text_of(events).partition(INTERRUPTED)
    assert written.startswith("cancel my order") and sure == "Write to our support e-mail address."


@pytest.mark.parametrize(
    ("languages", "answer"),
    [
        (("de-at", "en"), "Bitte."),
        (("en-gb",), "You are welcome."),
        ((), "You are welcome."),
        (("fr",), "You are welcome."),
    ],
)
async def test_a_rule_in_a_language_they_read_comes_first(
    languages: tuple[str, ...], answer: str
) -> None:
    english = RuleText("en", ("merci",), "You are welcome.", language="en", priority=1)
    german = RuleText("de", ("merci",), "Bitte.", language="de")
    known = Known((german, english), {})
    asked = replace(ask("merci", steps=("rules",)), known=known, languages=languages)
    assert text_of(await events_of(asked)) == answer


async def test_a_rule_that_is_surer_comes_before_one_in_their_language() -> None:
    english = RuleText("en", ("cancel my order",), "Cancelled.", language="en")
    german = RuleText("de", ("cancel my orders now",), "Storniert.", language="de")
    known = Known((german, english), {}, policy=policy({"rule_score": 60.0}))
    asked = replace(ask("cancel my order", steps=("rules",)), known=known, languages=("de",))
    assert text_of(await events_of(asked)) == "Cancelled."


async def test_who_wants_a_person_is_told_so_in_a_language_they_read(writing, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "HAND_OVER_INTENTS": ["cancel_order"]}
    english = RuleText("en", (), "I've asked.", "cancel_order", hand_over=True, language="en")
    german = RuleText("de", (), "Ich frage.", "cancel_order", hand_over=True, language="de")
    asked = replace(ask("a person please"), known=Known((english, german), {}))
    for languages, told in (((), "I've asked."), (("de",), "Ich frage."), (("fr",), "I've asked.")):
        assert text_of(await events_of(replace(asked, languages=languages))) == told


async def test_a_failure_of_a_model_asked_for_alone_is_raised_after_its_text():
    seen: list[Any] = []
    with pytest.raises(GenerationFailed):
        async for event in route(ask("/echo error=2 cancel my order", steps=("echo",))):
            seen.append(event)
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
    assert (await events_of(ask("blue cheese", steps=("rules",))))[0] == Routed(
        "human", hand_over=True
    )


async def test_a_written_answer_ends_before_a_stop_string_too():
    events = await events_of(ask("Where is MY refund?", stop=("that", "date")))
    assert text_of(events) == "Within "
    assert text_of(await events_of(ask("Where is MY refund?", stop=("With",)))) == ""


async def test_a_question_that_is_too_long_is_the_callers_to_mend():
    with pytest.raises(ContextTooLong):
        await events_of(ask("/echo fail=too_long cancel my order"))


async def test_a_library_that_breaks_is_logged_and_never_shown(monkeypatch, caplog):
    class Broken(EchoBackend):
        def stream(self, *args: Any) -> Any:
            raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(router.backends, "get", lambda alias: Broken(alias, EchoBackend.Options()))
    events = await events_of(ask("blue cheese"))
    assert events[0] == Routed("human", "error", hand_over=True)
    assert "secret" not in text_of(events)
    assert "backend echo broke" in caplog.text


async def test_closing_the_route_closes_the_model(monkeypatch):
    closed: list[bool] = []

    class Slow(EchoBackend):
        async def stream(self, *args: Any) -> Any:
            try:
                yield Started("slow")
                while True:
                    yield Delta("x")
            finally:
                closed.append(True)

    monkeypatch.setattr(router.backends, "get", lambda alias: Slow(alias, EchoBackend.Options()))
    events = route(ask("hello"))
    for _ in range(4):
        await anext(events)
    await events.aclose()
    assert closed == [True]


async def test_even_a_route_without_an_end_ends_with_a_person(settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["echo"], "FACTS": {}}
    events = await events_of(ask("/echo fail=overloaded hello"))
    assert events[0] == Routed("human", "overload", hand_over=True)
    assert "support team" in text_of(events)


# --- The ladder -----------------------------------------------------------------------------------


class Writing(EchoBackend):
    """A backend whose answers are worth keeping; counts how often it writes."""

    written = 0
    wait_s = 0.0
    band = "answer"
    pause_s = 0.0

    def version(self, params: Params | None = None) -> str:
        return "writing@1"

    def expected_wait_s(self) -> float:
        return self.wait_s

    async def stream(self, messages: Any, params: Any) -> Any:
        self.written += 1
        if self.pause_s:
            await asyncio.sleep(self.pause_s)
        yield Started("writing", "cancel_order", 0.9, 0.9, self.band)
        yield Delta(f"Answer {self.written} to {messages[-1].text}")
        yield Finished("stop", Usage(1, 1))


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Writing:
    backend = Writing("echo", EchoBackend.Options())
    monkeypatch.setattr(router.backends, "get", lambda alias: backend)
    return backend


async def test_a_sure_answer_is_written_once_and_told_again(writing: Writing) -> None:
    first, again = [await events_of(ask("how do I pay?")) for _ in range(2)]
    assert first[0] == Routed("model") and again[0] == Routed("cache")
    assert text_of(first) == text_of(again) == "Answer 1 to how do I pay?"
    assert again[1] == Started(model="writing", intent="cancel_order")
    assert writing.written == 1


@pytest.mark.parametrize("band", ["caution", "out_of_scope"])
async def test_an_unsure_answer_is_marked_and_never_kept(writing: Writing, band: str) -> None:
    writing.band = band
    first, again = [await events_of(ask("how do I pay?")) for _ in range(2)]
    assert first[0] == again[0] == Routed("model", band)
    assert writing.written == 2


async def test_a_hundred_who_ask_at_once_are_one_generation(writing: Writing) -> None:
    writing.pause_s = 0.05
    answers = await asyncio.gather(*(events_of(ask("how do I pay?")) for _ in range(100)))
    assert {text_of(events) for events in answers} == {"Answer 1 to how do I pay?"}
    assert writing.written == 1


async def test_a_later_turn_is_neither_kept_nor_told_again(writing: Writing) -> None:
    earlier = [Message("user", "a"), Message("assistant", "b")]
    for _ in range(2):
        assert (await events_of(ask("how do I pay?", *earlier)))[0] == Routed("model")
    assert writing.written == 2


async def test_an_old_answer_stands_in_for_a_model_that_fails(writing, settings, monkeypatch):
    settings.ASSISTANT = {
        **settings.ASSISTANT, "CACHE": {**settings.ASSISTANT["CACHE"], "FRESH_S": 0.0}
    }  # fmt: skip
    moment = time.time()
    await events_of(ask("how do I pay?"))
    monkeypatch.setattr(cache, "_clock", lambda: moment + 30)
    monkeypatch.setattr(writing, "expected_wait_s", lambda: 60.0)
    events = await events_of(ask("how do I pay?"))
    assert events[0] == Routed("cache", "overload")
    assert text_of(events) == "Answer 1 to how do I pay?"


async def test_a_queue_longer_than_anybody_waits_is_not_joined(writing: Writing) -> None:
    writing.wait_s = 60.0
    events = await events_of(ask("cancel my order"))
    assert events[0] == Routed("rules", "overload")
    assert writing.written == 0
    with pytest.raises(Overloaded) as told:
        await events_of(ask("cancel my order", steps=("echo",)))
    assert told.value.retry_after_s == 60.0


@pytest.mark.parametrize(("share", "route"), [(0.5, "model"), (0.7, "rules")])
async def test_a_queue_is_joined_only_if_its_promise_has_time_to_spare(
    writing: Writing, settings: Any, share: float, route: str
) -> None:
    writing.wait_s = share * settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"]
    assert (await events_of(ask("cancel my order")))[0].route == route


@pytest.mark.parametrize(
    ("slots", "running", "waiting", "crowded"),
    [
        (8, 0, 0, False),
        (8, 6, 0, False),
        (8, 7, 0, True),
        (8, 0, 1, True),
        (0, 0, 0, False),
        (1, 0, 0, False),
        (1, 1, 0, True),
    ],
)
async def test_batch_work_is_written_only_while_it_keeps_nobody_waiting(
    writing: Writing, monkeypatch: pytest.MonkeyPatch,
    slots: int, running: int, waiting: int, crowded: bool,
) -> None:  # fmt: skip
    stats = EngineStats(slots=slots, running=running, waiting=waiting)
    engine = SimpleNamespace(stats=lambda: stats)
    monkeypatch.setattr(Writing, "engines", lambda self: (engine,))
    batch = replace(ask("cancel my order"), params=Params(batch=True))
    for _ in range(6):  # it says nothing of how well the model is: no breaker opens
        (routed, *_) = await events_of(batch)
        assert routed == (Routed("rules", "overload") if crowded else routed)
        assert crowded or routed.route in ("model", "cache")
    assert (await events_of(ask("cancel my order")))[0].route in ("model", "cache")


async def test_batch_work_that_asks_for_the_model_alone_is_told_when_to_come_back(
    writing: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writing, "crowded", lambda self: True)
    alone = replace(ask("cancel my order", steps=("echo",)), params=Params(batch=True))
    with pytest.raises(Overloaded) as caught:
        await events_of(alone)
    assert caught.value.retry_after_s == 10


async def test_a_backend_that_keeps_failing_is_left_alone():
    for _ in range(5):
        *_, last = routes_of(await events_of(ask("/echo error=0 cancel my order")))
        assert last == Routed("rules", "error")
    assert routes_of(await events_of(ask("/echo cancel my order"))) == [
        Routed("rules", "breaker_open")
    ]


async def test_staff_may_ask_for_more_certainty_than_the_model_does():
    sure = Known(KNOWN.rules, {}, policy=policy({"confidence_min": 0.95}))
    question = Ask((Message("user", "/echo confidence=0.9 cancel my order"),), Params(), sure)
    assert (await events_of(question))[0] == Routed("rules", "low_confidence")


async def test_staff_may_change_the_order():
    rules_first = Known(KNOWN.rules, {}, policy=policy({"steps": ("rules", "echo")}))
    question = Ask((Message("user", "cancel my order"),), Params(), rules_first)
    assert (await events_of(question))[0] == Routed("rules")


async def test_a_reviewed_answer_to_other_words_shows_nothing_personal():
    entry = near.Entry("where can I see my refund", "Within {{Date}}.", "track_refund")
    known = Known((), {}, near.Shelf([entry]))
    question = Ask(
        (Message("user", "where do I see my refund"),), Params(facts={"Date": "three days"}), known
    )
    events = await events_of(question)
    assert events[0] == Routed("reviewed")
    assert "three days" not in text_of(events)


async def test_who_asks_a_model_for_a_person_gets_its_answer_and_a_person(writing, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "HAND_OVER_INTENTS": ["cancel_order"]}
    assert (await events_of(ask("a person please")))[0] == Routed("model", hand_over=True)
    writing.band = "out_of_scope"
    assert (await events_of(ask("weather please")))[0] == Routed("model", "out_of_scope")


async def test_rules_say_who_wants_a_person_where_the_model_knows_no_intents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(router.backends, "get", lambda alias: Larger("echo", Larger.Options()))
    person = RuleText("person", ("talk to a person",), "I've asked one.", "human", hand_over=True)
    known = Known((*KNOWN.rules, person), {}, policy=policy({"rule_score": 60.0}))
    wanted = replace(ask("talk to a person"), known=known)
    events = await events_of(wanted)
    assert events[0] == Routed("rules", hand_over=True) and text_of(events) == "I've asked one."
    for text in ("cancel my order", "a person told me to ask you about the tides"):
        assert routes_of(await events_of(replace(wanted, messages=ask(text).messages))) == [
            Routed("model")
        ]
    alone = replace(wanted, steps=("echo",))
    assert text_of(await events_of(alone)) == "from elsewhere"


class Larger(EchoBackend):
    """Names no intent, as servers of the OpenAI dialect."""

    async def stream(self, *args: Any) -> Any:
        yield Started("larger")
        yield Delta("from elsewhere")
        yield Finished("stop", Usage(1, 2))


async def test_everybody_who_wants_a_person_gets_one_not_only_who_asks_first(
    writing: Writing, settings: Any
) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "HAND_OVER_INTENTS": ["cancel_order"]}
    for _ in range(2):
        assert (await events_of(ask("a person please")))[0] == Routed("model", hand_over=True)
    settings.ASSISTANT = {**settings.ASSISTANT, "HAND_OVER_INTENTS": ["track_refund"]}
    assert (await events_of(ask("where is my refund")))[0] == Routed("reviewed", hand_over=True)
    entry = near.Entry("where can I see my refund", "Soon.", "track_refund")
    known = Known((), {}, near.Shelf([entry]))
    other_words = Ask((Message("user", "where do I see my refund"),), Params(), known)
    assert (await events_of(other_words))[0] == Routed("reviewed", hand_over=True)


async def test_who_wants_a_person_hears_so_in_words_of_staff_who_know_that_one_is_asked(
    writing, settings
):
    settings.ASSISTANT = {**settings.ASSISTANT, "HAND_OVER_INTENTS": ["cancel_order"]}
    rule = RuleText("person", (), "I've asked a person.", "cancel_order", hand_over=True)
    known = Known((replace(rule, hand_over=False), rule), {})
    events = await events_of(Ask((Message("user", "somebody real please"),), Params(), known))
    assert events[0] == Routed("rules", hand_over=True)
    assert text_of(events) == "I've asked a person."
    alone = await events_of(Ask((Message("user", "cancel it"),), Params(), known, ("echo",)))
    assert alone[0].route == "model" and "asked a person" not in text_of(alone)
