"""The numbered log of one turn: the events, who writes them and who reads them from where.

Written on one loop, by the turn; read from any loop, by any number of readers, each at its own
place. Deltas are joined here, one event per 30 ms. Knows no model, database or transport, and of
the turn only two calls: ``start`` when reading begins, ``abandon`` when nobody reads any more.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from django.conf import settings

from assistant.errors import AssistantError
from conversations.models import Conversation, Message

#: One frame per 30 ms: faster than the eye, and a tenth of the frames of a fast model.
COALESCE_S = 0.03


# --- What readers see ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Created:
    """The question is stored; the answer is about to be written. Rows are snapshots."""

    seq: int
    message: Message
    user_message: Message | None
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class Queued:
    """Nothing is written yet: its number in the queue (1: the next), and about how long it is."""

    seq: int
    message_id: uuid.UUID
    position: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Delta:
    seq: int
    message_id: uuid.UUID
    text: str


@dataclass(frozen=True, slots=True)
class Completed:
    """The answer is stored as complete, stopped or interrupted."""

    seq: int
    message: Message


@dataclass(frozen=True, slots=True)
class Failed:
    """The answer broke off after its first delta; what was shown is stored."""

    seq: int
    message: Message
    error: AssistantError


TurnEvent = Created | Queued | Delta | Completed | Failed


# --- The log -------------------------------------------------------------------------------------


class Log:
    """What one turn has told so far, from ``Created`` on; nothing in it ever changes."""

    def __init__(
        self, created: Created, *, start: Callable[[], None], abandon: Callable[[], None]
    ) -> None:
        self.ended = False
        self.loop: asyncio.AbstractEventLoop | None = None  # the writer's, once it has begun
        self._message_id = created.message.pk
        self._events: list[TurnEvent] = [created]
        self._readers: set[Reader] = set()
        self._start, self.abandon = start, abandon
        self._pending: list[str] = []
        self._flush_at = 0.0
        self._flusher: asyncio.TimerHandle | None = None

    # -- writing (on the turn's loop)

    def begin(self) -> None:
        """The loop this is called on is the one that writes."""
        self.loop = asyncio.get_running_loop()

    def queued(self, position: int, seconds: float) -> None:
        self._append(Queued(len(self._events) + 1, self._message_id, position, seconds))

    def write(self, text: str) -> None:
        """Tell the first delta at once, later ones joined per ``COALESCE_S``."""
        self._pending.append(text)
        loop = asyncio.get_running_loop()
        if loop.time() >= self._flush_at:
            self.flush()
        elif self._flusher is None:
            self._flusher = loop.call_at(self._flush_at, self.flush)

    def flush(self) -> None:
        """Tell what is still held back."""
        if self._flusher is not None:
            self._flusher.cancel()
            self._flusher = None
        if self._pending:
            text = "".join(self._pending)
            self._pending.clear()
            self._flush_at = asyncio.get_running_loop().time() + COALESCE_S
            self._append(Delta(len(self._events) + 1, self._message_id, text))

    def end(self, message: Message, error: AssistantError | None) -> None:
        """Tell how the answer is stored; nothing comes after it."""
        seq = len(self._events) + 1
        self._append(Completed(seq, message) if error is None else Failed(seq, message, error))
        self.close()

    def close(self) -> None:
        """Nothing more will come."""
        self.ended = True
        self._wake()
        self._start = self.abandon = _nothing  # a log that is kept does not keep its turn

    def _append(self, event: TurnEvent) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        for reader in tuple(self._readers):
            reader.wake()

    # -- reading

    def read(self, after_seq: int = 0) -> Reader:
        """A reader from there on; any number may read, at different places."""
        return Reader(self, after_seq)

    @property
    def length(self) -> int:
        """The number of its last event so far."""
        return len(self._events)

    def at(self, seq: int) -> TurnEvent | None:
        """The event of that number (the first is 1), or None if it has not happened yet."""
        return self._events[seq - 1] if seq <= len(self._events) else None

    # -- readers come and go (on the turn's loop, or before it has one)

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    def attach(self, reader: Reader) -> None:
        self._readers.add(reader)
        self._start()

    def detach(self, reader: Reader) -> None:
        """The last reader to leave stops the turn, unless somebody is back within the grace."""
        self._readers.discard(reader)
        if not self._readers and self.loop is not None and not self.ended:
            self.loop.call_later(settings.ASSISTANT["ABANDON_GRACE_S"], self._if_abandoned)

    def _if_abandoned(self) -> None:
        if not self._readers and not self.ended:
            self.abandon()


def _nothing() -> None:
    """An ended turn is neither started nor abandoned."""


class Reader:
    """One reader's place in a log: iterate it, and ``close`` it when its client is gone.

    Not an async generator: those are closed by the garbage collector when a server is cancelled
    while blocked in ``send``; this is closed by whoever owns the connection, from any thread.
    """

    def __init__(self, log: Log, after_seq: int) -> None:
        self._log = log
        self._next = after_seq + 1
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news: asyncio.Event | None = None
        self._closed = False

    def __aiter__(self) -> Reader:
        return self

    async def __anext__(self) -> TurnEvent:
        self._begin()
        assert self._news is not None
        while not self._closed:
            self._news.clear()
            ended = self._log.ended  # asked first: the writer, on another loop, sets it last
            event = self._log.at(self._next)
            if event is not None:
                self._next += 1
                return event
            if ended:
                break
            await self._news.wait()
        self.close()
        raise StopAsyncIteration

    def _begin(self) -> None:
        if self._news is None and not self._closed:
            self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
            self._log.attach(self)

    def wake(self) -> None:
        """There is news. Called on the turn's loop; the reader may live on another."""
        if self._loop is None or self._news is None:
            return
        if self._loop is self._log.loop:
            self._news.set()
        else:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._news.set)

    def close(self) -> None:
        """Stop reading; the last reader to leave stops the turn after a short grace."""
        if self._closed:
            return
        self._closed = True
        loop = self._log.loop
        if loop is None:
            self._log.abandon()  # opened, never read
            return
        with suppress(RuntimeError):  # a loop that has closed has no readers
            _soon(loop, self._log.detach, self)
            if self._loop is not None and self._news is not None:
                _soon(self._loop, self._news.set)


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *args: object) -> None:
    """Call it on that loop, from any thread; the loop's own need not wake it. Raises: RuntimeError
    if it has closed."""
    own = asyncio._get_running_loop() is loop
    (loop.call_soon if own else loop.call_soon_threadsafe)(call, *args)
