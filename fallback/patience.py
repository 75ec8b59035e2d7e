"""How long a question waits for words: for the first until a time, or until whoever asks has had
enough; for each later one as long as its backend says.

One ``Patience`` for one question. Knows nothing of models and routes; the router waits through it,
and takes what is known once it is over.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar, cast

from django.conf import settings

from assistant.backends.base import Backend
from assistant.types import Delta, Event

T = TypeVar("T")


class Hurried(Exception):
    """Whoever asks would rather have what is known now."""


class Patience:
    """``over`` once they said so. On the loop of the question, but for reading ``over``."""

    def __init__(self) -> None:
        self.over = False
        self._limit: asyncio.Timeout | None = None

    def end(self) -> None:
        """Whatever is waited for now, and from now on, is given up."""
        self.over = True
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def wait(self, work: Callable[[], Awaitable[T]], until: float | None = None) -> T:
        """What ``work`` comes to. Raises: Hurried; TimeoutError at that time of the loop."""
        if self.over:
            raise Hurried
        try:
            async with asyncio.timeout_at(until) as self._limit:
                return await work()
        except TimeoutError:
            if self.over:
                raise Hurried from None
            raise
        finally:
            self._limit = None


async def in_time(
    events: AsyncIterator[Event],
    patience: Patience,
    idle_s: float = Backend.idle_s,
    until: float = math.inf,
) -> AsyncIterator[Event]:
    """The events. Before the first delta: Hurried, and TimeoutError if that takes longer than
    settings allow; later TimeoutError where nothing comes for ``idle_s``; and at ``until``, of the
    loop's clock, in any case."""
    clock = asyncio.get_running_loop().time
    first = min(until, clock() + settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"])
    shown = False
    async with aclosing(cast(Any, events)):

        async def another() -> Event | None:
            return await anext(events, None)

        while True:
            if shown:
                async with asyncio.timeout_at(min(until, clock() + idle_s)):
                    event = await another()
            else:
                event = await patience.wait(another, first)
            if event is None:
                return
            shown = shown or isinstance(event, Delta)
            yield event
