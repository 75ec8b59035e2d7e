"""What each step of the policy would make of a question, without answering it.

Asks the model for its first word only, calls no larger model, keeps nothing and counts nothing.
Where ``route`` stops at the first step that answers, this goes on, so that staff see every rung.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

from django.conf import settings
from django.utils import timezone

from assistant import backends, facts
from assistant.errors import AssistantError, InvalidRequest
from assistant.types import Message, Params, Started
from fallback import answers, breaker, budget, cache, router, upstream
from fallback.circuit import State
from fallback.matching import Book
from fallback.router import Ask
from fallback.rules import RuleText

#: What is shown of an answer.
_SHOWN_CHARS = 200


@dataclass(frozen=True, slots=True)
class Rung:
    """One step: whether it would answer, how sure it is (as it counts, None where it does not), and
    why. ``text``: the beginning of its answer, where that is known beforehand."""

    step: str
    answers: bool
    score: float | None
    why: str
    text: str = ""


def first_question(text: str) -> Ask:
    """A question that nobody in particular asks first. Sync: touches the database.

    Raises: InvalidRequest where it is empty or longer than people may write.
    """
    most = settings.ASSISTANT_MAX_TEXT_CHARS
    if not 0 < len(text.strip()) <= most:
        raise InvalidRequest(f"Write a question of 1 to {most:,} characters.")
    params = Params(max_new_tokens=settings.ASSISTANT["MAX_NEW_TOKENS"], facts=facts.known_facts())
    return Ask((Message("user", text),), params, answers.known())


async def rungs(ask: Ask) -> list[Rung]:
    """Every step in order, a person last. Touches the cache; the first one that ``answers`` is the
    one that would."""
    own: dict[str, Callable[[Ask], Awaitable[Rung]]] = {
        "reviewed": _reviewed,
        "cache": lambda ask: _kept("cache", ask, stale=False),
        "stale": lambda ask: _kept("stale", ask, stale=True),
        "rules": _rules,
        "human": _human,
    }
    await asyncio.to_thread(_load)
    steps = dict.fromkeys((*ask.policy.steps, "human"))
    return [await (own[step](ask) if step in own else _backend(step, ask)) for step in steps]


def _load() -> None:
    """A model that is not loaded yet has no version, and so no answers that were kept."""
    with suppress(AssistantError):
        if alias := backends.answering():
            backends.get(alias).check()


async def _reviewed(ask: Ask) -> Rung:
    if not ask.first:
        return Rung("reviewed", False, None, "only a first question can be answered by heart")
    if found := ask.known.reviewed_for(ask.question):
        return Rung("reviewed", True, 1.0, "the very words", _beginning(found.answer))
    verdict = await ask.known.near_for(ask.question)
    whys = {
        "near": "other words for the same, and the model agrees",
        "same_words": "other words for the same",
        "no_candidate": "no reviewed question asks for the same things",
        "too_far": "the words agree, but the model finds them too different",
        "too_close": "two reviewed questions are about as near",
        "other_intent": "the model sees another intent",
    }
    entry = verdict.entry
    text = _beginning(entry.answer) if entry else ""
    return Rung("reviewed", entry is not None, verdict.score, whys[verdict.why], text)


async def _kept(step: str, ask: Ask, *, stale: bool) -> Rung:
    key = router.key_of(ask)
    if key is None:
        return Rung(step, False, None, "an answer to this depends on more than the question")
    found = await cache.lookup(key)
    if found is None:
        return Rung(step, False, None, "nobody has asked this lately")
    if not found.fresh and not stale:
        return Rung(step, False, None, "the answer of then is too old")
    return Rung(step, True, None, "answered before", _beginning(found.answer.text))


async def _rules(ask: Ask) -> Rung:
    ranked = _book(ask).rank(ask.question, now=timezone.now())
    if not ranked:
        return Rung("rules", False, 0.0, "no rule has anything to do with it")
    best, least = ranked[0], ask.policy.rule_score
    sure = best.is_sure(least)
    why = f'rule "{best.rule.name}": {"; ".join(best.why)}'
    if not sure:
        why += f" (needs {least:g})"
    return Rung("rules", sure, best.score, why, _beginning(best.rule.answer) if sure else "")


def _book(ask: Ask) -> Book:
    known = ask.known.rules
    return known if isinstance(known, Book) else Book(cast("list[RuleText]", list(known)))


async def _human(ask: Ask) -> Rung:
    return Rung("human", True, None, "always", _beginning(router.hand_over_text()))


async def _backend(alias: str, ask: Ask) -> Rung:
    try:
        backend = backends.get(alias)
        if backend.route == "upstream":
            backend.check()
            return await asyncio.to_thread(_elsewhere, alias, ask)
        return await _first_word(alias, ask)
    except (AssistantError, TimeoutError) as error:
        return Rung(alias, False, None, f"cannot answer: {error or 'too slow'}")


def _elsewhere(alias: str, ask: Ask) -> Rung:
    """Sync: a consent function may touch the database."""
    if breaker.states()[alias] == int(State.OPEN):
        return Rung(alias, False, None, "left alone: it failed just now, or staff turned it off")
    if not upstream.consents(ask.params.scope):
        return Rung(alias, False, None, "this user's questions stay in the house")
    left = budget.left(ask.params.scope)
    return Rung(alias, left > 0, None, f"{left} calls are left today")


async def _first_word(alias: str, ask: Ask) -> Rung:
    """What the model makes of the question, as far as its first word."""
    events = router.guarded(backends.get(alias), ask)
    async with asyncio.timeout(settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"]):
        async with aclosing(cast(Any, events)) as stream:
            async for event in stream:
                if isinstance(event, Started):
                    return _judged(alias, event, ask)
    return Rung(alias, False, None, "it said nothing")


def _judged(alias: str, started: Started, ask: Ask) -> Rung:
    least = ask.policy.confidence_min
    words = {
        "answer": "sure",
        "caution": "not quite sure: answers with caution",
        "hand_on": "too unsure: hands on",
        "out_of_scope": "not ours: politely declines",
    }
    answers, found = router.is_sure_enough(started, least), words[started.band]
    if not answers and started.band != "hand_on":
        found = f"less sure than {least:.0%}"
    why = f"{started.intent or 'no intent'}, in scope {_percent(started.scope)}: {found}"
    if answers and (rule := router.rule_for_person(ask, started)):
        why += f'; wants a person: one is asked, and rule "{rule.name}" says so'
        return Rung(alias, True, started.confidence, why, _beginning(rule.answer))
    return Rung(alias, answers, started.confidence, why)


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _beginning(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARS else f"{flat[:_SHOWN_CHARS]}..."
