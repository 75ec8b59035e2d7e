"""Between coroutines and threads that talk to the database: nobody waits with a connection in hand.

A pool has few connections and many may wait for answers: whoever held one while waiting would keep
it from the very turn that is waited for.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from asgiref.sync import async_to_sync
from channels.db import DatabaseSyncToAsync  # type: ignore[import-untyped]
from django.db import close_old_connections

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """What ``function`` returns, beside the running loop. Raises: whatever it raises."""
    return await DatabaseSyncToAsync(function, thread_sensitive=False)(*args)  # type: ignore[no-any-return]


def waited(work: Callable[..., Awaitable[T]], *args: Any) -> T:
    """What ``work`` comes to, for a view in a thread. Raises: whatever it raises."""
    close_old_connections()
    return async_to_sync(work)(*args)
