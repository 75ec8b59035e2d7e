"""A deterministic fake that ships: says the question back, slowly, or breaks, as asked.

For tests, demos and front-end work without a model. OPTIONS set its manners; a question that
starts with ``/echo`` overrides them: ``/echo delay=0.05 error=3 confidence=0.2 words=40``, or
``/echo queue=3 place=0.5`` to be third in line, half a second a place.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np

from assistant.backends.base import Backend, Vector
from assistant.engine import StopFilter
from assistant.errors import (
    AssistantError,
    ContextTooLong,
    GenerationFailed,
    ModelUnavailable,
    Overloaded,
)
from assistant.types import (
    Band,
    Delta,
    Event,
    Finished,
    FinishReason,
    Message,
    Params,
    Started,
    Usage,
    Waiting,
)

_FAILURES: dict[str, AssistantError] = {
    "overloaded": Overloaded("The echo was told to be overloaded.", retry_after_s=2),
    "unavailable": ModelUnavailable("The echo was told to be unavailable."),
    "too_long": ContextTooLong("The echo was told that the question is too long."),
}


#: Values of an embedding: one that all texts share, and as many for their words.
_EMBEDDING_WORDS = 63


class EchoBackend(Backend):
    """Answers with the question's own words, ``words_per_delta`` at a time."""

    @dataclass(frozen=True, slots=True)
    class Options:
        """``hang`` waits for ever before that word; ``error_after`` fails before that word."""

        delay_s: float = 0.0
        first_delay_s: float = 0.0
        queue: int = 0  # places it stands in line, and how long each takes
        place_s: float = 0.5
        words: int = 0  # length of the answer in words; 0: as long as the question
        words_per_delta: int = 1
        error_after: int | None = None
        hang_after: int | None = None
        failure: str = ""  # before the first event: overloaded, unavailable, too_long
        intent: str | None = None
        confidence: float | None = None
        scope: float | None = None
        in_scope_from: float = 0.5
        answer_from: float = 0.6
        caution_from: float = 0.35
        context_tokens: int = 1024

    options_class = Options

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        manner, said = _commanded(self.options, messages[-1].text)
        if manner.failure:
            raise _FAILURES.get(manner.failure, GenerationFailed("The echo was told to fail."))
        for place in range(manner.queue, 0, -1):
            yield Waiting(place, place * manner.place_s)
            await asyncio.sleep(manner.place_s)
        yield Started(self.alias, manner.intent, manner.confidence, manner.scope, _band(manner))
        await asyncio.sleep(manner.first_delay_s)
        words = _words(said, manner.words)
        allowed = words[: params.max_new_tokens]
        stops, stopped, written = StopFilter(params.stop), False, 0
        for at in range(0, len(allowed), manner.words_per_delta):
            await _maybe_break(manner, at)
            piece = allowed[at : at + manner.words_per_delta]
            written += len(piece)
            shown, stopped = stops.push(" " * (at > 0) + " ".join(piece))
            if shown:
                yield Delta(shown)
            if stopped:
                break
            await asyncio.sleep(manner.delay_s)
        if rest := stops.flush():
            yield Delta(rest)
        reason: FinishReason = "stop" if stopped or len(allowed) == len(words) else "length"
        yield Finished(reason, self._usage(messages, written))

    def context_tokens(self) -> int:
        limit: int = self.options.context_tokens
        return limit

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def embedding_width(self) -> int:
        return 1 + _EMBEDDING_WORDS

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        """By the words, each hashed to a place. All vectors lean one way, as a model's do: texts
        without a common word still have a cosine of a half."""
        return [_hashed(text) for text in texts]

    def text_of(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def _usage(self, messages: Sequence[Message], written: int) -> Usage:
        return Usage(sum(self.count_tokens(message.text) for message in messages), written)


def _hashed(text: str) -> Vector:
    vector = np.zeros(1 + _EMBEDDING_WORDS, np.float32)
    for word in text.casefold().split():
        vector[1 + crc32(word.encode("utf-8", "replace")) % _EMBEDDING_WORDS] += 1
    vector[0] = np.linalg.norm(vector) * 1.01 or 1  # a little over a half, whatever is rounded
    return vector / np.linalg.norm(vector)


def _words(said: str, wanted: int) -> list[str]:
    own = said.split() or ["…"]
    return own if not wanted else [own[at % len(own)] for at in range(wanted)]


async def _maybe_break(manner: EchoBackend.Options, at: int) -> None:
    if manner.hang_after is not None and at >= manner.hang_after:
        await asyncio.Event().wait()
    if manner.error_after is not None and at >= manner.error_after:
        raise GenerationFailed("The echo was told to fail.")


def _band(manner: EchoBackend.Options) -> Band:
    if manner.scope is not None and manner.scope < manner.in_scope_from:
        return "out_of_scope"
    if manner.confidence is None or manner.confidence >= manner.answer_from:
        return "answer"
    return "caution" if manner.confidence >= manner.caution_from else "hand_on"


#: command key -> field and type of its value
_COMMANDS: dict[str, tuple[str, type]] = {
    "delay": ("delay_s", float),
    "first": ("first_delay_s", float),
    "queue": ("queue", int),
    "place": ("place_s", float),
    "words": ("words", int),
    "per": ("words_per_delta", int),
    "error": ("error_after", int),
    "hang": ("hang_after", int),
    "fail": ("failure", str),
    "intent": ("intent", str),
    "confidence": ("confidence", float),
    "scope": ("scope", float),
}


def _bounded(value: Any) -> Any:
    """Numbers within 0..10,000: a typed command must not be able to eat the memory."""
    if isinstance(value, str):
        return value
    if not 0 <= value <= 10_000:  # False for NaN as well
        raise ValueError
    return value


def _commanded(options: EchoBackend.Options, text: str) -> tuple[EchoBackend.Options, str]:
    """Options with those of ``/echo key=value ... words to say``, and the words."""
    if not text.startswith("/echo"):
        return options, text
    changes: dict[str, Any] = {}
    rest: list[str] = []
    for part in text.split()[1:]:
        key, equals, value = part.partition("=")
        if equals and key in _COMMANDS:
            name, kind = _COMMANDS[key]
            try:
                changes[name] = _bounded(kind(value))
            except ValueError:
                rest.append(part)
        else:
            rest.append(part)
    changes["words_per_delta"] = max(1, changes.get("words_per_delta", options.words_per_delta))
    return replace(options, **changes), " ".join(rest) or "echo"
