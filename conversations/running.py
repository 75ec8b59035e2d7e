"""Which turns run in this process: where tabs attach, "stop" arrives and callers are counted.

``running`` is the one registry; a turn enters it when it is opened and leaves it when it is stored.
Knows how to find and close a turn, not how one works; another process is reached through the row.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from conversations.limits import Caller, may_write
from conversations.models import STALE_AFTER, Message
from fallback import shared

if TYPE_CHECKING:
    from conversations.log import Log
    from conversations.turn import Turn

#: Logs of ended turns are kept for readers that come back: so many, for so long.
KEPT_LOGS, KEPT_LOGS_S = 200, 600.0
#: Longer than anything waits for its first word.
HURRY_KEPT_S = 60


class Running:
    """The turns of this process, by conversation."""

    def __init__(self) -> None:
        self._turns: dict[uuid.UUID, Turn] = {}
        self._lock = threading.Lock()
        self._opening: dict[str, int] = {}
        self._ended: OrderedDict[uuid.UUID, tuple[float, Log]] = OrderedDict()

    def get(self, conversation_id: uuid.UUID) -> Turn | None:
        return self._turns.get(conversation_id)

    def add(self, turn: Turn) -> Turn:
        with self._lock:
            self._turns[turn.conversation_id] = turn
        return turn

    def remove(self, turn: Turn) -> None:
        with self._lock:
            if self._turns.get(turn.conversation_id) is turn:
                del self._turns[turn.conversation_id]

    def keep(self, message_id: uuid.UUID, log: Log) -> None:
        """Keep the log of an answer that ends, for readers that come back."""
        with self._lock:
            self._ended.pop(message_id, None)
            self._ended[message_id] = (time.monotonic(), log)
            while len(self._ended) > KEPT_LOGS:
                self._ended.popitem(last=False)

    def log_of(self, message: Message) -> Log | None:
        """The log of that answer, if it is or was written here."""
        turn = self.get(message.conversation_id)
        if turn is not None and turn.message.pk == message.pk:
            return turn.log
        with self._lock:
            since = time.monotonic() - KEPT_LOGS_S
            while self._ended and next(iter(self._ended.values()))[0] < since:
                self._ended.popitem(last=False)
            found = self._ended.get(message.pk)
        return found[1] if found is not None else None

    def of(self, caller: Caller) -> list[Turn]:
        """Every turn of that caller in this process."""
        with self._lock:
            return [turn for turn in self._turns.values() if turn.caller.key == caller.key]

    def all(self) -> list[Turn]:
        """Every turn of this process."""
        with self._lock:
            return list(self._turns.values())

    @contextmanager
    def room_for(self, caller: Caller) -> Iterator[None]:
        """Holds a place while a turn is opened. Raises: RateLimited at the caller's limit."""
        self._take_place(caller.key)
        try:
            yield
        finally:
            with self._lock:
                self._opening[caller.key] -= 1
                if not self._opening[caller.key]:
                    del self._opening[caller.key]

    def _take_place(self, key: str) -> None:
        with self._lock:
            self._drop_unread()
            held = sum(turn.caller.key == key for turn in self._turns.values())
            held += self._opening.get(key, 0)
            may_write(held)
            self._opening[key] = self._opening.get(key, 0) + 1

    def _drop_unread(self) -> None:
        """Turns that were opened and never read (the client left in between) hold no place."""
        limit = time.monotonic() - STALE_AFTER.total_seconds()
        for turn in list(self._turns.values()):
            if not turn.started and turn.opened_at < limit:
                del self._turns[turn.conversation_id]


running = Running()


def stop_all(caller: Caller) -> None:
    """Stop every answer of that caller, wherever it is being written. Sync."""
    for turn in running.of(caller):
        turn.close("stopped")
    rows = Message.objects.visible_to(caller).filter(status=Message.Status.STREAMING)
    rows.update(status=Message.Status.STOPPED, finish_reason="cancelled")


def hurry(message: Message) -> bool:
    """Have that answer come from what is known, if it is still being waited for here; another
    process, which is where its reader's socket is, hears of it in the cache. Sync."""
    turn = running.get(message.conversation_id)
    if turn is not None and turn.message.pk == message.pk:
        return turn.hurry()
    if message.status != Message.Status.STREAMING or message.text:
        return False
    with suppress(shared.Away):
        shared.ask(lambda cache: cache.set(_hurry_key(message), 1, HURRY_KEPT_S))
    return True


def hurried(message: Message) -> bool:
    """Whether another process was told to hurry with that answer. Sync: one round trip."""
    with suppress(shared.Away):
        return bool(shared.ask(lambda cache: cache.get(_hurry_key(message))))
    return False


def _hurry_key(message: Message) -> str:
    return f"hurry:{message.pk}:{message.attempt}"


def stop(message: Message) -> bool:
    """Stop that answer wherever it is being written; False if it has ended already. Sync."""
    turn = running.get(message.conversation_id)
    if turn is not None and turn.message.pk == message.pk:
        turn.close("stopped")
        return True
    # Another process writes it: its next sign of life finds the row ended, and stops.
    rows = Message.objects.filter(pk=message.pk, status=Message.Status.STREAMING)
    return bool(rows.update(status=Message.Status.STOPPED, finish_reason="cancelled"))
