"""Reviewed answers to a question that was asked in other words.

Four things have to agree: what both sentences ask for, word by word (``fallback.words``); the
values in them; the model's embedding of both, by a threshold and by a margin to the second best;
and the intent, where a reading has one. The words decide what is possible, because opposites,
plans, cities and names lie close together in the embedding; the model may only refuse. Without a
model the words decide alone. Knows no database and no route.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from django.conf import settings

from assistant import backends, facts
from fallback.words import Ideas, ideas

log = logging.getLogger(__name__)

#: Questions with the same words that are compared by the model; more say that staff repeat it.
MOST_CANDIDATES = 8

Vector = Sequence[float]
#: ``same_words`` and ``near`` found an answer, without and with the model's word.
Why = Literal["near", "same_words", "no_candidate", "too_far", "too_close", "other_intent"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A reviewed answer and the question it was written for."""

    question: str
    answer: str
    intent: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a model makes of a text: a vector of any length, and its intent if it has such."""

    vector: Vector
    intent: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer that was found, if any, and why. ``score``, ``second``: cosines, -1..1."""

    entry: Entry | None
    why: Why
    score: float | None = None
    second: float | None = None


Reader = Callable[[Sequence[str]], Awaitable[Sequence[Reading] | None]]


class Shelf:
    """Reviewed answers, found by what their questions ask for. Built once, read by any thread."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._by_ideas: dict[Ideas, list[Entry]] = defaultdict(list)
        for entry in entries:
            if (asked := ideas(entry.question)) is not None:
                self._by_ideas[asked].append(entry)

    def candidates(self, question: str) -> list[Entry]:
        """Those whose words and values agree with ``question``."""
        asked = ideas(question)
        if asked is None:
            return []
        values = _values(question)
        return [
            entry
            for entry in self._by_ideas.get(asked, ())
            if asked.same(ideas(entry.question)) and _values(entry.question) == values
        ][:MOST_CANDIDATES]


def _values(text: str) -> Mapping[str, str]:
    """Order numbers, addresses, dates and so on with their own signs; but "#123" is 123."""
    found = facts.mask(text).values
    return {name: value.casefold().lstrip("# ") for name, value in found.items()}


async def read_by_model(texts: Sequence[str]) -> Sequence[Reading] | None:
    """The answering backend's embeddings, in time; None from one that has none or is not well."""
    alias = backends.answering()
    try:
        embed = getattr(backends.get(alias), "embed", None) if alias else None
        if embed is None:
            return None
        async with asyncio.timeout(settings.ASSISTANT["NEAR"]["READ_TIMEOUT_S"]):
            return [Reading(vector) for vector in await embed(list(texts))]
    except Exception as error:  # whatever is wrong with the model, the words still decide
        log.warning("near matches without the model: %s", type(error).__name__)
        return None


async def find(question: str, shelf: Shelf, read: Reader = read_by_model) -> Verdict:
    """The answer reviewed for a question that means the same. Bounded by READ_TIMEOUT_S."""
    candidates = shelf.candidates(question)
    if not candidates:
        return Verdict(None, "no_candidate")
    readings = await read([question, *(entry.question for entry in candidates)])
    if readings is None:
        return _by_words(candidates)
    return _by_model(candidates, readings[0], readings[1:])


def _by_words(candidates: Sequence[Entry]) -> Verdict:
    if len({entry.answer for entry in candidates}) > 1:
        return Verdict(None, "too_close")
    return Verdict(candidates[0], "same_words")


def _by_model(candidates: Sequence[Entry], asked: Reading, readings: Sequence[Reading]) -> Verdict:
    limits = settings.ASSISTANT["NEAR"]
    scores = [cosine(asked.vector, reading.vector) for reading in readings]
    at = max(range(len(scores)), key=scores.__getitem__)
    best, score = candidates[at], scores[at]
    others = (s for entry, s in zip(candidates, scores, strict=True) if entry.answer != best.answer)
    second = max(others, default=None)
    if score < limits["SIMILARITY"]:
        return Verdict(None, "too_far", score, second)
    if second is not None and score - second < limits["MARGIN"]:
        return Verdict(None, "too_close", score, second)
    if None not in (asked.intent, readings[at].intent) and asked.intent != readings[at].intent:
        return Verdict(None, "other_intent", score, second)
    return Verdict(best, "near", score, second)


def cosine(one: Vector, other: Vector) -> float:
    """-1..1; 0 if either is nought."""
    a, b = np.asarray(one, float), np.asarray(other, float)
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0
