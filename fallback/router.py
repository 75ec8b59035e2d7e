"""Who answers, and why: the steps of ``ASSISTANT["ROUTE"]`` in turn until one speaks.

Yields ``Routed`` (again whenever the choice changes, never after the first delta) and then the
events of ``assistant.types``. Knows nothing of conversations, callers or storage, and touches no
database: what staff wrote comes with the ``Ask``.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from django.conf import settings

from assistant import backends, facts
from assistant.errors import AssistantError, GenerationFailed, InvalidRequest, Overloaded
from assistant.types import Delta, Event, Finished, Message, Params, Started, Usage
from fallback import rules
from fallback.answers import Known

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ask:
    """A question with all that is needed to answer it; the last message is the question.

    ``steps``: who was asked for by name, instead of the route in settings. A model that was asked
    for alone answers even if unsure, and its failure is told instead of handed on.
    """

    messages: tuple[Message, ...]
    params: Params
    known: Known
    steps: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        return self.messages[-1].text

    @property
    def first(self) -> bool:
        """Whether nothing was said before that the question could lean on."""
        return sum(message.role == "user" for message in self.messages) == 1


@dataclass(frozen=True, slots=True)
class Routed:
    """From here on this route answers; ``reason`` says why it is not the best one, if so."""

    route: str
    reason: str = ""


class _HandOn(Exception):
    """A step passes the question to the next, for a reason (empty: it just had no answer)."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason)
        self.reason = reason


async def route(ask: Ask) -> AsyncIterator[Routed | Event]:
    """Events of the first step that answers.

    Raises: AssistantError from a model that broke after its first delta, and InvalidRequest.
    """
    reason = ""
    for step in ask.steps or settings.ASSISTANT["ROUTE"]:
        try:
            async with aclosing(_step(step, ask, reason)) as events:
                async for event in events:
                    yield event
            return
        except _HandOn as hand_on:
            reason = hand_on.reason or reason
    async with aclosing(_step("human", ask, reason)) as events:
        async for event in events:
            yield event


def _step(name: str, ask: Ask, reason: str) -> Any:
    if name == "reviewed":
        return _reviewed(ask)
    if name == "rules":
        return _rules(ask, reason)
    return _human(ask, reason) if name == "human" else _model(name, ask)


async def _reviewed(ask: Ask) -> AsyncIterator[Routed | Event]:
    found = ask.known.reviewed_for(ask.question) if ask.first else None
    if found is None:
        raise _HandOn
    for event in _whole("reviewed", "", found.answer, found.intent, ask):
        yield event


async def _rules(ask: Ask, reason: str) -> AsyncIterator[Routed | Event]:
    rule = rules.match(ask.question, ask.known.rules, score=settings.ASSISTANT["RULE_SCORE"])
    if rule is None:
        raise _HandOn
    for event in _whole("rules", reason, rule.answer, rule.intent, ask):
        yield event


async def _human(ask: Ask, reason: str) -> AsyncIterator[Routed | Event]:
    for event in _whole("human", reason, hand_over_text(), "", ask):
        yield event


async def _model(alias: str, ask: Ask) -> AsyncIterator[Routed | Event]:
    """The model's events. Anything that goes wrong before its first delta hands the question on."""
    shown, alone = False, ask.steps == (alias,)
    try:
        stream = backends.get(alias).stream(ask.messages, ask.params)
        async with aclosing(cast(Any, stream)) as events:
            async for event in _in_time(events):
                if isinstance(event, Started):
                    yield Routed("model", _judged(event, alone=alone))
                shown = shown or isinstance(event, Delta)
                yield event
    except (InvalidRequest, _HandOn):
        raise
    except Exception as error:
        if not isinstance(error, (AssistantError, TimeoutError)):
            log.exception("backend %s broke", alias)
            error = GenerationFailed("The model broke. Please try again.")
        if shown or alone:
            raise error from None
        raise _HandOn(_reason(error)) from error


def _judged(started: Started, *, alone: bool) -> str:
    """The reason to mark the answer with. Raises: _HandOn if the model had better not answer."""
    if started.band == "out_of_scope":
        return "out_of_scope"  # its own polite refusal is the right answer
    if started.band == "hand_on" and not alone:
        raise _HandOn("low_confidence")
    return "low_confidence" if started.band == "hand_on" else ""


def _reason(error: Exception) -> str:
    if isinstance(error, Overloaded):
        return "overload"
    return "timeout" if isinstance(error, TimeoutError) else "error"


async def _in_time(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """The events; TimeoutError if the first delta takes longer than settings allow."""
    loop = asyncio.get_running_loop()
    deadline: float | None = loop.time() + settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"]
    while True:
        async with asyncio.timeout_at(deadline):  # around one await: never across a yield
            event = await anext(events, None)
        if event is None:
            return
        if isinstance(event, Delta):
            deadline = None  # the turn's own limit holds from here
        yield event


def _whole(route: str, reason: str, answer: str, intent: str, ask: Ask) -> list[Routed | Event]:
    """An answer that is known in full, as the events of one that was written."""
    text = facts.fill(answer, {**facts.known_facts(), **ask.params.facts})
    for stop in ask.params.stop:
        text = text.partition(stop)[0]
    return [
        Routed(route, reason),
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
