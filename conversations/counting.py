"""How much of a limit is used: counted in this process, and in the cache for all processes.

Both count and the stricter one wins. The cache's windows are fixed (django-ratelimit's): alone they
would let twice the limit through at their edge. This process's windows slide, and a cache that was
emptied forgives nobody here. While the cache is away this process goes on alone, at a quarter of
each limit: others may be counting beside it. Knows no caller and no setting; refusing is not done
here.
"""

from __future__ import annotations

import hashlib
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from django.core.cache import BaseCache, caches
from django_ratelimit.core import get_usage

from fallback import shared

#: Of each limit, while the cache is away.
EMERGENCY_SHARE = 4
#: A sliding window forgets in steps of this part of it.
SLICES = 60
#: Counters in the cache outlive their window by this, so that none ends early.
_KEPT_S = 5

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True, slots=True)
class Limit:
    """At most ``quota`` units (requests, tokens) in ``window_s`` seconds."""

    name: str
    quota: int
    window_s: int

    @property
    def emergency(self) -> int:
        """What one process lets through while it cannot ask how much the others did."""
        return max(1, self.quota // EMERGENCY_SHARE)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a key stands: units left of ``quota``, and seconds until there will be more."""

    limit: Limit
    quota: int
    left: int
    reset_s: int
    refused: bool


@lru_cache(64)
def limit_of(name: str, rate: str) -> Limit:
    """The limit that is written as ``20/m``. Raises: ValueError."""
    found = re.fullmatch(r"(\d+)/(\d*)([smhd])", rate)
    if found is None:
        raise ValueError(f"{rate!r} is not a rate such as 20/m or 20/5m")
    count, multiple, unit = found.groups()
    return Limit(name, int(count), int(multiple or 1) * _SECONDS[unit])


# --- In this process -----------------------------------------------------------------------------


class Recent:
    """What each key used of one limit lately. Forgets up to a slice late, never early.

    Kept in this process's memory cache, which is bounded and drops who was not heard of for a
    window: of each key the amounts by slice, oldest first.
    """

    #: Of all limits: looking and counting are one step.
    _lock = threading.Lock()

    def __init__(self, limit: Limit, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._clock = limit, clock
        self._slice_s = limit.window_s / SLICES
        self._prefix = f"recent:{limit.name}:{limit.quota}:{limit.window_s}:"
        #: One for all threads, which ``caches`` would look for at every call.
        self._memory = caches.create_connection("local")

    def take(self, key: str) -> Standing:
        """Count one, unless the limit is reached; all in one step."""
        with self._lock:
            slices, now = self._read(key)
            if sum(slices.values()) < self._limit.quota:
                self._write(key, slices, now, 1)
                return self._standing(slices, now, self._limit.quota, taken=True)
            return self._standing(slices, now, self._limit.quota)

    def look(self, key: str, quota: int, *, taken: bool = False) -> Standing:
        """Where it stands if so much is allowed; ``taken``: for one that is counted already."""
        slices, now = self._read(key)
        return self._standing(slices, now, quota, taken=taken)

    def add(self, key: str, amount: int) -> None:
        """Count that amount; a negative one gives back."""
        with self._lock:
            slices, now = self._read(key)
            self._write(key, slices, now, amount)

    def _read(self, key: str) -> tuple[dict[int, int], float]:
        """The slices of which a part is younger than a window; and now."""
        now = self._clock()
        slices: dict[int, int] = self._memory.get(self._prefix + key) or {}
        oldest = int(now / self._slice_s) - SLICES
        if slices and next(iter(slices)) < oldest:
            slices = {at: amount for at, amount in slices.items() if at >= oldest}
        return slices, now

    def _write(self, key: str, slices: dict[int, int], now: float, amount: int) -> None:
        at = int(now / self._slice_s)
        slices[at] = slices.get(at, 0) + amount
        kept_s = self._limit.window_s + self._slice_s
        self._memory.set(self._prefix + key, slices, math.ceil(kept_s) + _KEPT_S)

    def _standing(
        self, slices: dict[int, int], now: float, quota: int, *, taken: bool = False
    ) -> Standing:
        used = sum(slices.values())
        oldest = next(iter(slices), int(now / self._slice_s))
        reset_s = math.ceil((oldest + SLICES + 1) * self._slice_s - now)
        return Standing(
            self._limit,
            quota,
            max(0, quota - used),
            max(1, min(reset_s, self._limit.window_s)),
            used > quota if taken else used >= quota,
        )


@lru_cache(64)
def _recent_of(limit: Limit) -> Recent:
    return Recent(limit)


# --- One at a time: requests ---------------------------------------------------------------------


def take(limit: Limit, key: str) -> Standing:
    """Count one by ``key``, if the limit lets it. Sync: up to two calls of the cache."""
    recent = _recent_of(limit)
    own = recent.take(key)
    if own.refused or not shared.elsewhere():
        return own  # the cache is spared the flood, or it would only count the same once more
    try:
        usage = shared.ask(lambda _: _count_in_cache(limit, key))
    except shared.Away:
        standing = recent.look(key, limit.emergency, taken=True)
    else:
        left = usage["limit"] - usage["count"]
        standing = _stricter(own, left, usage["time_left"], usage["should_limit"])
    if standing.refused:
        recent.add(key, -1)
    return standing


def _count_in_cache(limit: Limit, key: str) -> Mapping[str, Any]:
    """django-ratelimit's count, this one included. Raises: whatever the cache does."""
    usage: Mapping[str, Any] | None = get_usage(
        SimpleNamespace(method="POST", META={}),
        group=limit.name,
        key=lambda group, request: key,
        rate=(limit.quota, limit.window_s),
        increment=True,
    )
    if usage is None or usage["limit"] == 0:  # the library's word for "my cache is away"
        raise shared.Away
    return usage


def _stricter(own: Standing, left: int, reset_s: int, refused: bool) -> Standing:
    """``own``, or what the cache says if that is less."""
    if left > own.left:
        return own
    return Standing(own.limit, own.quota, max(0, left), max(1, reset_s), refused)


# --- By amount: tokens ---------------------------------------------------------------------------


def look(limits: Sequence[Limit], key: str) -> list[Standing]:
    """Where ``key`` stands with each limit; nothing is counted. Sync: a cache call at most."""
    if not limits:
        return []
    if not shared.elsewhere():
        return [_recent_of(limit).look(key, limit.quota) for limit in limits]
    names = [_name(limit, key) for limit in limits]
    try:
        found = shared.ask(lambda cache: cache.get_many(names))
    except shared.Away:
        return [_recent_of(limit).look(key, limit.emergency) for limit in limits]
    return [
        _looked(limit, key, int(found.get(name, 0)))
        for limit, name in zip(limits, names, strict=True)
    ]


def _looked(limit: Limit, key: str, used: int) -> Standing:
    own = _recent_of(limit).look(key, limit.quota)
    left, reset_s = limit.quota - used, limit.window_s - int(time.time()) % limit.window_s
    return _stricter(own, left, reset_s, left <= 0)


def spend(limits: Sequence[Limit], key: str, amount: int) -> None:
    """Count that amount, whatever is left. Sync: up to two calls of the cache for each limit."""
    for limit in limits:
        _recent_of(limit).add(key, amount)
    if not shared.elsewhere():
        return

    def count(cache: BaseCache) -> None:
        for limit in limits:
            name = _name(limit, key)
            if not cache.add(name, amount, limit.window_s + _KEPT_S):
                cache.incr(name, amount)

    with suppress(shared.Away):  # then it is counted here, and nowhere else
        shared.ask(count)


def _name(limit: Limit, key: str) -> str:
    """The counter of the running window; an address goes into no key."""
    whose = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    return f"used:{limit.name}:{limit.window_s}:{whose}:{int(time.time()) // limit.window_s}"


# --- At the same time: sockets -------------------------------------------------------------------


class Places:
    """What is open at the same time, by whose it is; in this process, which also holds it open."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, key: str, most: int) -> bool:
        """Whether there was a place left; then it is taken."""
        with self._lock:
            if self._held[key] >= most:
                return False
            self._held[key] += 1
            return True

    def give_back(self, key: str) -> None:
        with self._lock:
            self._held[key] -= 1
            if self._held[key] <= 0:
                del self._held[key]

    def held(self, key: str) -> int:
        return self._held.get(key, 0)
