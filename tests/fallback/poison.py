"""An echo whose native code has a fault: words that kill its process, as a segment fault does."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Sequence

from assistant.backends.echo import EchoBackend
from assistant.types import Event, Message, Params


class PoisonedEcho(EchoBackend):
    in_process = True

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        if "poison" in messages[-1].text:
            os.kill(os.getpid(), signal.SIGSEGV)
        async for event in super().stream(messages, params):
            yield event
