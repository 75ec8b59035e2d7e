"""A generation as its reader meets it: its place in the queue while it has one, then its tokens.

Knows how often a place is worth telling; not what is done with it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from assistant.engine import Generation
from assistant.engine.generation import Token
from assistant.types import Waiting

#: A shorter wait is over before it is read.
LEAST_TOLD_S = 0.3
#: Who waits hears of it again at most this often.
TELL_EVERY_S = 0.5


async def served(generation: Generation) -> AsyncGenerator[Waiting | list[Token]]:
    """Places that changed, then batches of tokens. Raises: EngineError."""
    told: Waiting | None = None
    while generation.place:
        now = Waiting(generation.place, generation.wait_s)
        if _news(now, told):
            told = now
            yield now
        try:
            async with asyncio.timeout(TELL_EVERY_S):
                first = await anext(aiter(generation), None)
        except TimeoutError:
            continue
        if first is None:
            return
        yield first
    async for tokens in generation:
        yield tokens


async def held_back(
    parts: AsyncGenerator[Waiting | list[Token]], count: int
) -> AsyncIterator[Waiting | list[Token]]:
    """The same, but the first ``count`` tokens come in one batch; fewer if there are no more."""
    held: list[Token] = []
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, Waiting):
                yield part
                continue
            held += part
            if len(held) >= count:
                yield held
                held, count = [], 0
    if held:
        yield held


def _news(now: Waiting, told: Waiting | None) -> bool:
    """Whether somebody who reads whole seconds would see a difference."""
    if told is None:
        return now.seconds >= LEAST_TOLD_S
    return (now.place, math.ceil(now.seconds)) != (told.place, math.ceil(told.seconds))
