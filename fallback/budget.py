"""How often the upstream may be called in a day: by one user and by all. Counted before each call.

Atomic: every call takes a number that nobody else gets, so 50 at once under a budget of 10 are
exactly 10. Counted in the cache for all processes and in this process too: a cache that was emptied
cannot give a day's budget twice to one process, and while it is away a process may go on to a
quarter of each limit. A day is a UTC day. Knows nothing of what a call is or who answers.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from django.conf import settings
from django.core.cache import BaseCache, caches

from assistant.errors import RateLimited
from fallback import shared

#: Of each limit, while the cache is away: others may be counting the same way beside us.
EMERGENCY_SHARE = 4
#: Longer than a day, so that a counter outlives the day it counts.
_KEPT_S = 2 * 86_400


class BudgetSpent(RateLimited):
    """The day's calls are used up; ``retry_after_s`` is the time until the next day."""


@dataclass(slots=True)
class _Counter:
    """One number that only grows within a day, and how far it may."""

    key: str
    limit: int
    whose: str
    #: Whether the last number taken was taken in the shared cache too.
    in_shared: bool = False

    def take(self) -> bool:
        """Whether the number taken is within the limit; if not, nothing was taken."""
        own = self._raise(caches["local"])
        try:
            used, limit, self.in_shared = max(own, shared.ask(self._raise)), self.limit, True
        except shared.Away:
            used, limit = own, self._alone()
        if used > limit:
            self.give_back()
        return used <= limit

    def give_back(self) -> None:
        self._lower(caches["local"])
        if self.in_shared:
            # If the cache went away since: counted once too much, which is stricter, never laxer.
            with suppress(shared.Away):
                shared.ask(self._lower)

    def _alone(self) -> int:
        return min(self.limit, max(1, self.limit // EMERGENCY_SHARE))

    def _raise(self, cache: BaseCache) -> int:
        cache.add(self.key, 0, _KEPT_S)
        return int(cache.incr(self.key))

    def _lower(self, cache: BaseCache) -> None:
        with suppress(ValueError):  # emptied meanwhile
            cache.decr(self.key)

    def left(self) -> int:
        own = int(caches["local"].get(self.key) or 0)
        try:
            used, limit = max(own, shared.ask(self._shown)), self.limit
        except shared.Away:
            used, limit = own, self._alone()
        return max(0, limit - used)

    def _shown(self, cache: BaseCache) -> int:
        return int(cache.get(self.key) or 0)


def take(who: str, *, now: datetime | None = None) -> None:
    """Count one call by ``who`` (any text; empty: nobody in particular). Sync: touches the cache.

    Raises: BudgetSpent, and then nothing was counted.
    """
    now = now or datetime.now(UTC)
    own, total = _counters(who, now)
    if not own.take():
        raise _spent(own, now)
    if not total.take():
        own.give_back()
        raise _spent(total, now)


def left(who: str, *, now: datetime | None = None) -> int:
    """How many calls ``who`` could still make today. Sync: touches the cache."""
    return min(counter.left() for counter in _counters(who, now or datetime.now(UTC)))


def left_for_all(*, now: datetime | None = None) -> int:
    """How many calls everybody together could still make today. Sync: touches the cache."""
    return _counters("", now or datetime.now(UTC))[1].left()


def _counters(who: str, now: datetime) -> tuple[_Counter, _Counter]:
    """The user's and everybody's; a user's name goes into no key."""
    day = f"upstream:{now:%Y-%m-%d}"
    name = hashlib.sha256(who.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    conf = settings.ASSISTANT["UPSTREAM"]
    return (
        _Counter(f"{day}:by:{name}", conf["CALLS_PER_USER_DAY"], "your"),
        _Counter(f"{day}:all", conf["CALLS_PER_DAY"], "everybody's"),
    )


def _spent(counter: _Counter, now: datetime) -> BudgetSpent:
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    return BudgetSpent(
        f"The larger model was asked as often today as {counter.whose} budget allows. "
        "It can be asked again tomorrow.",
        retry_after_s=max(1.0, (midnight - now).total_seconds()),
    )
