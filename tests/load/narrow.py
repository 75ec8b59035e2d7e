"""An echo with few places: a model whose capacity is known, for tests of what happens beyond it.

Who finds all places taken waits for the one that is free first; how long is known, as answers take
equally long. Knows nothing of the routes and limits that should keep people from queueing here.
"""

from __future__ import annotations

import asyncio
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

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        self._inside += 1
        try:
            async with self._free:
                async for event in super().stream(messages, params):
                    yield event
        finally:
            self._inside -= 1

    def expected_wait_s(self) -> float:
        options = self.options
        ahead = max(0, self._inside - options.places + 1)
        return float(ahead * options.words * options.delay_s / options.places)
