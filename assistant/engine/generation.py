"""One answer on its way: written by the engine's thread, read from any thread or event loop.

``Ticket`` is the side of the thread, ``Generation`` the side of the caller. Speaks token ids; knows
nothing of slots, batches or the model.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

from assistant.engine.embedding import Embedding
from assistant.engine.errors import EngineClosed, EngineError
from assistant.engine.sampling import FirstTokenRule, Sampling, Verdict
from assistant.engine.scheduler import FinishReason, Request


class Token(NamedTuple):
    """A generated token. ``logprob`` is the model's own, in nats, whatever the sampling."""

    id: int
    logprob: float


_AsyncWaiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]
Waiter = _AsyncWaiter | threading.Event


class Ticket:
    """A request on its way through: written by the worker, read by one Generation.

    The buffer is bounded by ``max_new_tokens``. The lock guards the buffer and the waiter only.
    """

    __slots__ = ("_ids", "_lock", "_logprobs", "_waiter", "_woken_s", "asked_s", "closed",
                 "error", "finish_reason", "first", "place", "prefill_s", "promised_s", "queue_s",
                 "request", "sampling", "verdict", "wait_s")  # fmt: skip

    def __init__(self, request: Request, sampling: Sampling, first: FirstTokenRule | None) -> None:
        self.request, self.sampling, self.first = request, sampling, first
        self.verdict: Verdict | None = None
        self.finish_reason: FinishReason | None = None
        self.error: EngineError | None = None
        self.closed = False
        #: When it was asked, until its first token; and the wait that was promised.
        self.asked_s: float | None = None
        self.promised_s = 0.0
        #: Its number in the queue, 0 with a slot; and the wait for its first token from there.
        self.place = 0
        self.wait_s = 0.0
        #: How long it waited for a slot, and from there for its first token.
        self.queue_s: float | None = None
        self.prefill_s: float | None = None
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._waiter: Waiter | None = None
        self._woken_s = -math.inf
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def unjudged(self) -> bool:
        """Whether its first token is a verdict that is still to come."""
        return self.first is not None and self.verdict is None

    def push(
        self, token: int, logprob: float, now_s: float = 0.0, every_s: float = 0.0
    ) -> Waiter | None:
        """Add a token; whom to wake: nobody who was woken less than ``every_s`` ago."""
        with self._lock:
            self._ids.append(token)
            self._logprobs.append(logprob)
            if self._waiter is None or now_s - self._woken_s < every_s:
                return None
            waiter, self._waiter, self._woken_s = self._waiter, None, now_s
        return waiter

    def end(self, reason: FinishReason | None, error: EngineError | None = None) -> Waiter | None:
        """Mark the end, once; whom to wake."""
        with self._lock:
            if not self.done:
                self.finish_reason, self.error = reason, error
            waiter, self._waiter = self._waiter, None
        return waiter

    def take(self, waiter: Callable[[], Waiter]) -> list[Token] | Waiter | None:
        """New tokens; or a waiter that will be woken for them; or None at the end.

        Raises: the error that ended the generation, after its last tokens.
        """
        with self._lock:
            if self.closed:
                return None
            if self._ids:
                tokens = [Token(*pair) for pair in zip(self._ids, self._logprobs, strict=True)]
                self._ids, self._logprobs = [], []
                return tokens
            if self.error is not None:
                # A new one each time: many readers may share the fault, none its traceback.
                raise type(self.error)(*self.error.args) from self.error.__cause__
            if self.finish_reason is not None:
                return None
            if isinstance(self._waiter, tuple) and not self._waiter[1].done():
                raise RuntimeError("a generation has one reader, and this one is being read")
            self._waiter = waiter()
            return self._waiter

    def orphan(self) -> None:
        """In a forked child: no thread will ever serve this ticket, or release its lock."""
        self._lock = threading.Lock()
        self.end(None, EngineClosed("this answer belongs to the process that was forked"))


@dataclass(frozen=True, slots=True)
class Share:
    """A command: compute these ids once and put them in front of prompts that begin with them."""

    ids: Sequence[int]


#: A ticket means "start", or "stop" when it is closed; None ends the thread.
Command = Ticket | Share | Embedding | None


class Generation:
    """One answer being written: iterate it (async, or ``tokens_sync``) for batches of tokens.

    One reader. ``verdict`` is set before the first batch arrives, ``finish_reason`` before the
    iteration ends. ``close()`` may come from anywhere, any number of times; dropping the object
    closes it too.
    """

    def __init__(self, ticket: Ticket, commands: SimpleQueue[Command]) -> None:
        self._ticket = ticket
        self._commands = commands

    @property
    def verdict(self) -> Verdict | None:
        return self._ticket.verdict

    @property
    def place(self) -> int:
        """Its number in the queue, 1 for the next; 0 once it has a slot, or has ended."""
        return 0 if self._ticket.closed or self._ticket.done else self._ticket.place

    @property
    def wait_s(self) -> float:
        """About how many seconds its first token is away, as of when ``place`` was counted."""
        return self._ticket.wait_s

    @property
    def queue_s(self) -> float | None:
        """Seconds in the queue; None before a slot was free. Set before the first batch arrives."""
        return self._ticket.queue_s

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the slot to the first token. Set before the first batch arrives."""
        return self._ticket.prefill_s

    @property
    def finish_reason(self) -> FinishReason | None:
        ticket = self._ticket
        return "cancelled" if ticket.closed and not ticket.done else ticket.finish_reason

    def close(self) -> None:
        """Give the row back within one step; the iteration ends."""
        # No lock: this also runs as a finaliser, at any point of any thread.
        ticket = self._ticket
        if not ticket.closed:
            ticket.closed = True
            if not ticket.done:
                self._commands.put(ticket)

    def __del__(self) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self

    async def __anext__(self) -> list[Token]:
        loop = asyncio.get_running_loop()
        while True:
            got = self._ticket.take(lambda: (loop, loop.create_future()))
            if isinstance(got, list):
                return got
            if got is None:
                raise StopAsyncIteration
            assert isinstance(got, tuple)
            await got[1]

    def tokens_sync(self) -> Iterator[list[Token]]:
        """The same batches for a thread without an event loop."""
        while (got := self._ticket.take(threading.Event)) is not None:
            if isinstance(got, list):
                yield got
            elif isinstance(got, threading.Event):
                got.wait()
