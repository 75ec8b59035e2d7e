"""The cache as a helper between processes: never an error, and never slow twice in a row.

Whoever uses it has an answer of its own for ``Away``. After one failure nobody asks again for
``REST_S``, so that a cache that hangs costs one time-out and not one per question. Without a
``REDIS_URL`` the cache is this process's memory, and "between processes" means nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from django.core.cache import BaseCache, caches
from django.core.cache.backends.locmem import LocMemCache
from django.dispatch import Signal

log = logging.getLogger(__name__)

T = TypeVar("T")

#: How long a cache that failed is left alone. Back within 5 s of its return (reliability F5).
REST_S = 4.0

#: Sent each time the cache failed to do what it was asked, with ``error``: what it raised, by name.
failed = Signal()

_away_until = 0.0


class Away(Exception):
    """The cache did not answer; count or remember in this process instead."""


def ask(operation: Callable[[BaseCache], T]) -> T:
    """What ``operation`` returns of the shared cache. Sync: up to one time-out. Raises: Away."""
    global _away_until
    if time.monotonic() < _away_until:
        raise Away
    try:
        return operation(caches["default"])
    except Exception as error:  # any of redis-py's and django-redis'; a helper must not stop us
        _away_until = time.monotonic() + REST_S
        log.warning("the cache is away: %s", type(error).__name__)
        failed.send_robust(sender=Away, error=type(error).__name__)
        raise Away from error


def elsewhere() -> bool:
    """Whether what is kept there outlives this process, and others see it."""
    return not isinstance(caches["default"], LocMemCache)


def forget() -> None:
    """Ask again at once."""
    global _away_until
    _away_until = 0.0
