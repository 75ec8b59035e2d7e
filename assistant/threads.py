"""Database work of a coroutine, in a thread that gives its connection back when it is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from channels.db import DatabaseSyncToAsync  # type: ignore[import-untyped]

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any) -> T:
    """What ``function`` returns, beside the running loop. Raises: whatever it raises."""
    return await DatabaseSyncToAsync(function, thread_sensitive=False)(*args)  # type: ignore[no-any-return]
