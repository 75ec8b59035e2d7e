"""Whether the logins behind open sockets still stand: a look at all of them, every two seconds.

Logging out, a new password, a revoked token and a closed account show in three tables, whichever
process wrote them. One query a table compares what is there with what was there before; only a
socket with a difference is judged, by the rules that judged it when it came. Needs no Redis and no
signal, which a change by ``QuerySet.update`` or another program would not send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from django.contrib.auth import get_user_model
from django.contrib.sessions.models import Session
from django.utils import timezone
from knox.models import AuthToken

from assistant.threads import in_thread
from conversations.access import Credential

log = logging.getLogger(__name__)

#: Whoever is signed out is put out within 5 s: this, and what a look takes.
LOOK_EVERY_S = 2.0

#: What a login rests on, as it is stored; compared, never read.
State = tuple[object, ...]


@dataclass(eq=False, slots=True)
class Watch:
    """One socket. ``stands``: sync, in a worker thread; ``end``: on the loop it was made on."""

    shown: Credential
    user_id: int | None
    stands: Callable[[], bool]
    end: Callable[[], None]
    state: State | None = field(default=None)


class Watched:
    """The sockets of one event loop, and the task that looks after them while there are any."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._task: asyncio.Task[None] | None = None

    def add(self, watch: Watch) -> Watch:
        self._watches.add(watch)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._look())
        return watch

    def remove(self, watch: Watch) -> None:
        self._watches.discard(watch)

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if not self._watches:
                return
            for watch in await self._ended():
                if watch in self._watches:
                    watch.end()

    async def _ended(self) -> list[Watch]:
        """Those whose login has ended; nobody while the database is away."""
        try:
            return await in_thread(ended, list(self._watches))
        except Exception as error:
            log.warning("logins could not be looked at: %s", type(error).__name__)
            return []


_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Watched] = WeakKeyDictionary()


def watched() -> Watched:
    """Those of the running loop."""
    return _by_loop.setdefault(asyncio.get_running_loop(), Watched())


def ended(watches: list[Watch]) -> list[Watch]:
    """Those whose login does not stand any more. Sync: a query a table, and some for a change."""
    states = _states(watches)
    changed = [watch for watch in watches if watch.state != states[watch]]
    gone = [watch for watch in changed if not watch.stands()]
    for watch in changed:
        watch.state = states[watch]  # read before it was judged: what came between is seen next
    return gone


def _states(watches: list[Watch]) -> dict[Watch, State]:
    now = timezone.now()
    sessions: dict[str, Any] = Session.objects.in_bulk(
        {watch.shown.session_key for watch in watches}
    )
    tokens: dict[str, Any] = AuthToken.objects.in_bulk(
        {watch.shown.token_digest for watch in watches}
    )
    users: dict[int, Any] = get_user_model()._default_manager.in_bulk(
        {watch.user_id for watch in watches if watch.user_id is not None}
    )

    def state(watch: Watch) -> State:
        session = sessions.get(watch.shown.session_key)
        token = tokens.get(watch.shown.token_digest)
        user = users.get(watch.user_id or 0)
        return (
            session and session.expire_date > now and session.session_data,
            token and (token.expiry is None or token.expiry > now),
            user and (user.is_active, user.password),
        )

    return {watch: state(watch) for watch in watches}
