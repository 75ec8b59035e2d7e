"""An echo with few places: a model whose capacity is known, for tests of what happens beyond it.

Who finds all places taken waits for the one that is free first; how long is told from how long
answers took lately, as an engine does. Knows nothing of the routes and limits that should keep
people from queueing here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from assistant.backends.echo import EchoBackend
from assistant.types import Event, Message, Params


class NarrowEcho(EchoBackend):
    """``places`` answers at once, each of ``words`` words and ``delay_s`` a word."""

    @dataclass(frozen=True, slots=True)
    class Options(EchoBackend.Options):
        places: int = 4

    options_class = Options

    def __init__(self, alias: str, options: Options) -> None:
        super().__init__(alias, options)
        self._free = asyncio.Semaphore(options.places)
        self._inside = 0
        self._answer_s = float(options.words * options.delay_s)

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        self._inside += 1
        try:
            async with self._free:
                began = time.monotonic()
                async for event in super().stream(messages, params):
                    yield event
                self._answer_s += 0.1 * (time.monotonic() - began - self._answer_s)
        finally:
            self._inside -= 1

    def expected_wait_s(self) -> float:
        places: int = self.options.places
        return max(0, self._inside - places + 1) * self._answer_s / places
