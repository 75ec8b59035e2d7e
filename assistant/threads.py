"""Between coroutines and threads that talk to the database: nobody waits with a connection in hand.

A pool has few connections and many may wait for answers: whoever held one while waiting would keep
it from the very turn that is waited for.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from channels.db import DatabaseSyncToAsync  # type: ignore[import-untyped]
from django.conf import settings
from django.db import close_old_connections

from assistant.errors import Overloaded

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """What ``function`` returns, beside the running loop. Raises: whatever it raises."""
    return await DatabaseSyncToAsync(function, thread_sensitive=False)(*args)  # type: ignore[no-any-return]


def waited(work: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What ``work`` comes to, for a view in a thread. Raises: whatever it raises."""
    close_old_connections()
    with room.lent():
        return async_to_sync(work)(*args)


class Room:
    """Bounds how many requests are worked on at once; who only waits for an answer is not.

    Places are taken and given back on a loop; a thread may lend its own out meanwhile. Whoever
    finds none waits for ``patience_s``, longer while the crowd is younger than ``burst_s`` and
    nobody was refused for ``calm_s``, and is then refused, which costs no thread.
    Source: Maurer, "Fail at Scale", 2015 (controlled delay).
    """

    def __init__(
        self, places: int, patience_s: float, burst_s: float = 0.0, calm_s: float = 10.0
    ) -> None:
        self._free, self._patience_s, self._burst_s = places, patience_s, burst_s
        self._calm_s, self._refused_at = calm_s, -math.inf
        self._waiting, self._crowded_since = 0, 0.0
        self._lock = threading.Lock()
        self._crowd: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._mine = threading.local()

    async def take(self) -> bool:
        """Whether there is a place, now or in a moment."""
        if self._took():
            return True
        began = asyncio.get_running_loop().time()
        if not self._waiting:
            self._crowded_since = began
        self._waiting += 1
        try:
            return await self._waited(began)
        finally:
            self._waiting -= 1

    async def _waited(self, began: float) -> bool:
        loop = asyncio.get_running_loop()
        until = began + self._patience_s
        if began - self._refused_at > self._calm_s:
            until = max(until, self._crowded_since + self._burst_s)
        while not self._took():
            if loop.time() >= until:
                self._refused_at = loop.time()
                return False
            waiter = loop.create_future()
            self._crowd.append((loop, waiter))
            with suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await waiter
        return True

    def _took(self) -> bool:
        with self._lock:
            if self._free <= 0:
                return False
            self._free -= 1
            return True

    def leave(self) -> None:
        """Give the place back and wake who waits longest. From any thread."""
        with self._lock:
            self._free += 1
        while self._crowd:
            loop, waiter = self._crowd.popleft()
            if not waiter.done():
                with suppress(RuntimeError):  # its loop has closed
                    loop.call_soon_threadsafe(_wake, waiter)
                return

    @contextmanager
    def worked_in(self) -> Iterator[None]:
        """In this thread work is done in a place that was taken."""
        self._mine.taken = True
        try:
            yield
        finally:
            self._mine.taken = False

    @contextmanager
    def lent(self) -> Iterator[None]:
        """While this thread waits, its place is somebody else's; back it is taken at once."""
        if not getattr(self._mine, "taken", False):
            yield
            return
        self.leave()
        try:
            yield
        finally:
            with self._lock:
                self._free -= 1


def crowded() -> Overloaded:
    """What is told to whoever found no place, over any transport."""
    told = "More is asked here than can be answered. Try again in a moment."
    return Overloaded(told, retry_after_s=2.0)


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


#: An interpreter works on one request at a time; more of them only keep the loop, and with it the
#: answers being written, from its turn: with 8 places a model wrote 59 % of its usual at five times
#: its capacity, with 3 of them 92 %. Patience is a third of the 0.3 s to say no in: who waits
#: longer in such a crowd is only later.
room = Room(settings.ASSISTANT_REQUESTS_AT_ONCE, patience_s=0.1, burst_s=0.8)
