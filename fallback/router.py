"""Who answers, and why: the steps of the policy in turn until one speaks.

Yields ``Routed`` and then the events of ``assistant.types``. The choice changes again only before
the first delta; a model that breaks off after it is continued, marked, by what is sure. Knows
nothing of conversations, callers or storage, and touches no database: what staff wrote comes with
the ``Ask``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, cast

from django.conf import settings
from django.dispatch import Signal
from django.utils import timezone

from assistant import backends, facts
from assistant.backends.base import Backend
from assistant.errors import AssistantError, GenerationFailed, InvalidRequest, Overloaded
from assistant.types import Delta, Event, Finished, Message, Params, Started, Usage
from fallback import breaker, cache, quarantine
from fallback.answers import Known
from fallback.budget import BudgetSpent
from fallback.matching import sure
from fallback.patience import Hurried, Patience, in_time
from fallback.policy import Policy, policy
from fallback.rules import Button, RuleText
from fallback.upstream import NoConsent

log = logging.getLogger(__name__)

#: Between what a model wrote until it broke and what is told instead.
INTERRUPTED = "\n\n*The answer was interrupted; here is what I can say for sure:*\n\n"

#: A queue is joined if its wait is promised to be over in this part of the time for a first word. A
#: promise that is missed is the worst of both: the wait, and then a rule's answer.
WORTH_WAITING = 0.6

#: Sent when a kept answer was looked for, with ``kind`` (exact: to the same question; semantic: to
#: one that means the same) and ``hit``.
looked_up = Signal()


@dataclass(frozen=True, slots=True)
class Ask:
    """A question with all that is needed to answer it; the last message is the question.

    ``steps``: who was asked for by name, instead of the policy's. A model that was asked for alone
    answers even if unsure, and its failure is told instead of handed on.
    """

    messages: tuple[Message, ...]
    params: Params
    known: Known
    steps: tuple[str, ...] = ()
    #: What the asker reads, as browsers say it, in lower case; empty: unknown.
    languages: tuple[str, ...] = ()
    #: Over: nothing is waited for any more, what is known answers.
    patience: Patience = field(default_factory=Patience, compare=False)

    @property
    def question(self) -> str:
        return self.messages[-1].text

    @property
    def policy(self) -> Policy:
        return self.known.policy or policy()

    @property
    def first(self) -> bool:
        """Whether nothing was said before that the question could lean on."""
        return sum(message.role == "user" for message in self.messages) == 1


@dataclass(frozen=True, slots=True)
class Routed:
    """From here on this route answers; ``reason`` says why it is not the best one, if so."""

    route: str
    reason: str = ""
    #: Quick replies below the answer, and whether a person is to take over.
    buttons: tuple[Button, ...] = ()
    hand_over: bool = False


Events = AsyncIterator[Routed | Event]


class _HandOn(Exception):
    """A step passes the question to the next, for a reason (empty: it just had no answer)."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class _Way:
    """How far a question has come: why nobody answered yet, and what was shown of an answer."""

    ask: Ask
    steps: tuple[str, ...]
    stack: AsyncExitStack
    #: When a model has had its time, by the loop's clock; what is known comes at any time.
    until: float
    reason: str = ""
    shown: bool = False
    flight: cache.Flight | None = None

    def alone(self, alias: str) -> bool:
        return self.ask.steps == (alias,)


async def route(ask: Ask) -> Events:
    """Events of the first step that answers.

    Raises: InvalidRequest, and AssistantError from a model that was asked for alone.
    """
    async with AsyncExitStack() as stack:
        until = asyncio.get_running_loop().time() + settings.ASSISTANT["REQUEST_TIMEOUT_S"]
        way = _Way(ask, ask.steps or ask.policy.steps, stack, until)
        for step in (*way.steps, "human"):
            try:
                async with aclosing(cast(Any, _step(step, way))) as events:
                    async for event in events:
                        yield event
                return
            except _HandOn as hand_on:
                way.reason = hand_on.reason or way.reason
            except (AssistantError, TimeoutError) as error:
                if not way.shown or way.alone(step):
                    raise
                way.reason = _reason(error)
                break
        for event in _continued(way):
            yield event


def _step(name: str, way: _Way) -> Events:
    own: dict[str, Callable[[_Way], Events]] = {
        "reviewed": _reviewed,
        "cache": _cached,
        "stale": _stale,
        "rules": _rules,
        "human": _human,
    }
    return own[name](way) if name in own else _model(name, way)


# --- Answers that are known ----------------------------------------------------------------------


async def _reviewed(way: _Way) -> Events:
    """By exact words, else near them; what was written for other words shows nothing personal."""
    ask = way.ask
    found = ask.known.reviewed_for(ask.question) if ask.first else None
    if found is not None:
        for event in _whole(_by_heart(found.intent), found.answer, found.intent, way):
            yield event
        return
    verdict = await ask.known.near_for(ask.question) if ask.first else None
    if verdict is None:
        raise _HandOn
    looked_up.send_robust(sender=type(verdict), kind="semantic", hit=verdict.entry is not None)
    if verdict.entry is None:
        raise _HandOn
    entry = verdict.entry
    routed = _by_heart(entry.intent)
    for event in _whole(routed, entry.answer, entry.intent, way, personal=False):
        yield event


def _by_heart(intent: str) -> Routed:
    """Whoever asks for a person gets one, whatever staff wrote for the question."""
    return Routed("reviewed", hand_over=intent in settings.ASSISTANT["HAND_OVER_INTENTS"])


async def _cached(way: _Way) -> Events:
    """The fresh answer; else whoever answers after this does so for all who ask the same."""
    if (key := key_of(way.ask)) is None:
        raise _HandOn
    try:
        flying = cache.flight(key)
        way.flight = await way.ask.patience.wait(lambda: way.stack.enter_async_context(flying))
    except Hurried:
        raise _HandOn("hurry") from None
    looked_up.send_robust(sender=cache.Flight, kind="exact", hit=way.flight.answer is not None)
    if way.flight.answer is None:
        raise _HandOn
    for event in _again(way.flight.answer, ""):
        yield event


async def _stale(way: _Way) -> Events:
    key = key_of(way.ask)
    found = await cache.lookup(key) if key else None
    if found is None:
        raise _HandOn
    for event in _again(found.answer, way.reason):
        yield event


async def _rules(way: _Way) -> Events:
    rule = _rule(way.ask)
    if rule is None:
        raise _HandOn
    for event in _by_rule(rule, way):
        yield event


async def _human(way: _Way) -> Events:
    for event in _by_person(way):
        yield event


def _by_person(way: _Way) -> list[Routed | Event]:
    return _whole(Routed("human", way.reason, hand_over=True), hand_over_text(), "", way)


def _rule(ask: Ask) -> RuleText | None:
    """The surest; of equals one in the language they like best, if any is in one they read."""
    found = sure(ask.question, ask.known.rules, score=ask.policy.rule_score, now=timezone.now())
    best = [one.rule for one in found if round(one.score) == round(found[0].score)]
    return _liked(best, ask)


def _liked(rules: Sequence[RuleText], ask: Ask) -> RuleText | None:
    """People ask in more languages than their browser says: one in none of them is better than
    silence."""
    return min(rules, key=lambda rule: rule.place_in(ask.languages), default=None)


def rule_for_person(ask: Ask, started: Started) -> RuleText | None:
    """What staff say to who wants a person: a model cannot know that one is being asked.

    Where the model knows no intents, as a larger one elsewhere, rules say who wants one."""
    if started.intent is None:
        rule = _rule(ask)
        return rule if rule is not None and rule.hand_over else None
    if not _wants_person(started):
        return None
    now = timezone.now()
    rules = [
        rule
        for rule in ask.known.rules
        if rule.hand_over and rule.intent == started.intent and rule.answers_at(now)
    ]
    return _liked(rules, ask)


def _wants_person(started: Started) -> bool:
    wanted = started.intent in settings.ASSISTANT["HAND_OVER_INTENTS"]
    return wanted and started.band != "out_of_scope"


def _by_rule(rule: RuleText, way: _Way) -> list[Routed | Event]:
    routed = Routed("rules", way.reason, rule.buttons, rule.hand_over)
    return _whole(routed, rule.answer, rule.intent, way)


def _continued(way: _Way) -> list[Routed | Event]:
    """After a text that broke off: marked, and only what was written beforehand."""
    rule = _rule(way.ask)
    routed, _, *rest = _by_rule(rule, way) if rule else _by_person(way)
    return [routed, Delta(INTERRUPTED), *rest]


# --- Models --------------------------------------------------------------------------------------


async def _model(alias: str, way: _Way) -> Events:
    """The model's events. Anything that goes wrong before its first delta hands the question on,
    and so does somebody who will not wait for it."""
    alone = way.alone(alias)
    if way.ask.patience.over:
        raise _HandOn("hurry")
    try:
        backend = backends.get(alias)
        guard = guarded(backend, way.ask)
        stream = in_time(guard, way.ask.patience, backend.idle_s, way.until)
        async with aclosing(cast(Any, stream)) as events:
            async for event in _judged(backend.route, events, way, alone=alone):
                way.shown = way.shown or isinstance(event, Delta)
                yield event
    except (InvalidRequest, _HandOn):
        raise
    except Hurried:
        raise _HandOn("hurry") from None
    except Exception as error:
        if not isinstance(error, (AssistantError, TimeoutError)):
            log.exception("backend %s broke", alias)
            error = GenerationFailed("The model broke. Please try again.")
        if way.shown or alone:
            raise error from None
        raise _HandOn(_reason(error)) from error


async def _judged(called: str, events: AsyncIterator[Event], way: _Way, *, alone: bool) -> Events:
    """The events behind their route, and a sure answer kept for others. Raises: _HandOn."""
    parts: list[str] = []
    begun: Started | None = None
    reason = ""
    async for event in events:
        if isinstance(event, Started):
            begun, reason = event, _judge(event, way.ask.policy.confidence_min, alone=alone)
            if not alone and (rule := rule_for_person(way.ask, event)):
                for told in _by_rule(rule, way):
                    yield told
                return
            yield Routed(called, reason or way.reason, hand_over=_wants_person(event))
        elif isinstance(event, Delta):
            parts.append(event.text)
        yield event
        if isinstance(event, Finished) and begun and _worth_keeping(begun, event, reason):
            answer = cache.Answer("".join(parts), begun.intent or "", begun.model)
            if way.flight is not None and _as_expected(called, way, begun):
                await way.flight.land(answer)


def _worth_keeping(started: Started, finished: Finished, reason: str) -> bool:
    """A kept answer would ask no person for whoever wants one."""
    sure = finished.reason == "stop" and started.band == "answer" and not reason
    return sure and not _wants_person(started)


def _as_expected(called: str, way: _Way, begun: Started) -> bool:
    """Whether the version wrote that the answer would be kept for: another may have taken over
    meanwhile, or stood in for one that could not."""
    if called != "model" or way.flight is None:
        return True
    name, known, _ = way.flight.model.rpartition(":")
    return not known or name == begun.model


def guarded(backend: Backend, ask: Ask) -> AsyncIterator[Event]:
    """The backend's stream, if it is well and its queue short enough; batch work joins no queue.

    Raises: Overloaded; later Quarantined, BreakerOpen, and whatever the stream raises.
    """
    if ask.params.batch and backend.crowded():
        raise Overloaded("People are being answered; batch work may come later.", retry_after_s=10)
    wait_s = backend.expected_wait_s()
    if wait_s > settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"] * WORTH_WAITING:
        raise Overloaded("The queue is too long to wait for.", retry_after_s=wait_s)
    events = breaker.guarded(backend.alias, lambda: backend.stream(ask.messages, ask.params))
    return quarantine.watched(backend, ask.messages, events) if backend.in_process else events


def _judge(started: Started, least: float, *, alone: bool) -> str:
    """The reason to mark the answer with. Raises: _HandOn if the model had better not answer."""
    if is_sure_enough(started, least):
        return started.band if started.band in ("out_of_scope", "caution") else ""
    if not alone:
        raise _HandOn("low_confidence")
    return "low_confidence"


def is_sure_enough(started: Started, least: float) -> bool:
    """Whether the model may answer; its own polite refusal of what is not ours is always right."""
    if started.band in ("out_of_scope", "hand_on"):
        return started.band == "out_of_scope"
    return started.confidence is None or started.confidence >= least


def _reason(error: Exception) -> str:
    """A word of the closed set of ``degraded_reason``."""
    if isinstance(error, breaker.BreakerOpen):
        return "breaker_open"
    if isinstance(error, (BudgetSpent, NoConsent)):
        return ""  # the larger model was not to be asked: what came before is the reason
    if isinstance(error, Overloaded):
        return "overload"
    return "timeout" if isinstance(error, TimeoutError) else "error"


# --- Shapes --------------------------------------------------------------------------------------


def key_of(ask: Ask) -> cache.Key | None:
    """Where the answer is kept; None also for a backend whose answers are not worth keeping."""
    alias = backends.answering()
    try:
        version = backends.get(alias).version(ask.params) if alias else ""
    except AssistantError:
        return None
    if not version:
        return None
    return cache.key_for(ask.messages, ask.params, cache.Versions(version, "", ask.policy.name))


def _again(answer: cache.Answer, reason: str) -> list[Routed | Event]:
    """An answer that was written before, as the events of one that is written now."""
    return [
        Routed("cache", reason),
        Started(model=answer.model, intent=answer.intent or None),
        *([Delta(answer.text)] if answer.text else []),
        Finished("stop", Usage()),
    ]


def _whole(
    routed: Routed, answer: str, intent: str, way: _Way, *, personal: bool = True
) -> list[Routed | Event]:
    """An answer that is known in full, as the events of one that was written."""
    own = way.ask.params.facts if personal else {}
    text = facts.fill(answer, {**facts.known_facts(), **own})
    for stop in way.ask.params.stop:
        text = text.partition(stop)[0]
    return [
        routed,
        Started(model="", intent=intent or None),
        *([Delta(text)] if text else []),
        Finished("stop", Usage()),
    ]


def hand_over_text() -> str:
    """The way to a person, from the support contacts in settings."""
    known = settings.ASSISTANT["FACTS"]
    ways = [
        wording.format(known[name])
        for name, wording in (
            ("Support Phone", "call {}"),
            ("Support Email", "write to {}"),
            ("Live Chat", "open our live chat at {}"),
            ("Website", "visit {}"),
        )
        if known.get(name)
    ]
    text = "I'm sorry, I can't answer that well enough myself, so a person should. "
    text += f"You can {' or '.join(ways)}." if ways else "Please contact our support team."
    if ways and known.get("Support Hours"):
        text += f" They are there {known['Support Hours']}."
    return text
