"""Whether the logins behind open sockets and event streams still stand: a look every two seconds.

Logging out, a new password, a revoked token and a closed account show in three tables, whichever
process wrote them. One query a table compares what is there with what was there before; only a
one with a difference is judged, by the rules that judged it when it came. Needs no Redis and no
signal, which a change by ``QuerySet.update`` or another program would not send.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from django.contrib.auth import get_user_model
from django.contrib.sessions.models import Session
from django.utils import timezone
from knox.models import AuthToken
from rest_framework.permissions import SAFE_METHODS
from rest_framework.request import Request

from assistant.errors import AssistantError
from assistant.threads import in_thread
from conversations.access import Credential, caller_by, caller_of, credential_of
from conversations.log import Completed, Failed
from conversations.wire import Readable

log = logging.getLogger(__name__)

#: Whoever is signed out is put out within 5 s: this, and what a look takes.
LOOK_EVERY_S = 2.0

#: What a login rests on, as it is stored; compared, never read.
State = tuple[object, ...]


@dataclass(eq=False, slots=True)
class Watch:
    """One of them. ``stands``: sync, in a worker thread; ``end``: on the loop it was made on."""

    shown: Credential
    user_id: int | None
    stands: Callable[[], bool]
    end: Callable[[], None]
    state: State | None = field(default=None)


class Watched:
    """Those of one event loop, and the task that looks after them while there are any."""

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


class LoginEnded(AssistantError):
    """Told as the last event of a stream."""

    code: ClassVar[str] = "unauthenticated"
    permanent: ClassVar[bool] = True


class WhileSignedIn:
    """A reader for the one who made that request, as long as they may read.

    Iterating raises: LoginEnded, once, instead of the end that is not told any more.
    """

    def __init__(self, reader: Readable, request: Request) -> None:
        self._reader = reader
        caller, shown = caller_of(request), credential_of(request)
        needed = "read" if request.method in SAFE_METHODS else "chat"

        def stands() -> bool:
            now = caller_by(shown, needed)
            return now is not None and now.key == caller.key

        self._watch = Watch(shown, caller.user_id, stands, self._sign_out)
        self._watched: Watched | None = None
        self._told_end = self._put_out = False

    async def __anext__(self) -> Any:
        if self._watched is None:
            self._watched = watched()
            self._watched.add(self._watch)
        try:
            event = await anext(self._reader)
        except StopAsyncIteration:
            self.close()
            if self._told_end or not self._put_out:
                raise
            self._told_end = True
            told = "The login or token behind this stream has ended. Sign in again."
            raise LoginEnded(told) from None
        self._told_end = isinstance(getattr(event, "event", event), Completed | Failed)
        return event

    def _sign_out(self) -> None:
        self._put_out = True
        self.close()

    def close(self) -> None:
        """From any thread."""
        if self._watched is not None:
            self._watched.remove(self._watch)
        self._reader.close()


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
