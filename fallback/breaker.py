"""Leaves a backend alone while it fails or dawdles, and comes back to it carefully.

A process judges by its own calls (``circuit``): a counter in the cache would cost every call a
round trip. A trip is told to the others through the cache, for backends that are one thing for all
of them (``shared``); the model in this process is this process's alone. Without a cache each
process has its own breakers, and nothing else changes. Staff may force a state for a while.

Own code, because no kept library fits: pybreaker 1.4 knows no asyncio, purgatory 3.0 needs
redis<6 (Celery needs more), asyncbreaker 2.1 counts failures in a row and needs its Redis up; none
judges streams, slow first words, or a share of a window.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from django.conf import settings
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.cache import BaseCache
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed

from assistant.errors import AssistantError, GenerationFailed, InvalidRequest, ModelUnavailable
from assistant.types import Delta, Event, Waiting
from fallback import shared
from fallback.circuit import Circuit, Clock, Limits, Outcome, Permit, State

log = logging.getLogger(__name__)

#: How old may be what this process knows of the others, in seconds.
REFRESH_S = 1.0
#: A half-open breaker whose processes all ended is forgotten after this.
_HALF_KEPT_S = 3_600
#: Bounds of a forced state: maintenance ends, people forget.
LEAST_FORCED_S, USUAL_FORCED_S, MOST_FORCED_S = 60, 4 * 3_600, 7 * 86_400


class BreakerOpen(GenerationFailed):
    """The backend is being left alone. ``forced``: by staff, for maintenance."""

    def __init__(self, target: str, retry_after_s: float, *, forced: bool = False) -> None:
        why = "is off for maintenance" if forced else "failed just now and is left alone"
        super().__init__(
            f"The backend {target!r} {why}. Try again shortly.",
            retry_after_s=max(1.0, retry_after_s),
        )
        self.forced = forced


# --- Between processes ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forced:
    """What staff decided, until it ends by itself."""

    state: Literal["open", "closed"]
    note: str = ""
    by: str = ""


def _forced(told: object) -> Forced | None:
    """What the cache holds, if it is what we put there."""
    if not isinstance(told, dict) or told.get("state") not in {"open", "closed"}:
        return None
    return Forced(told["state"], str(told.get("note", "")), str(told.get("by", "")))


class _Board:
    """What processes tell each other of one target. Sync, one round trip each. Raises: Away.

    ``open`` and ``half`` are entries that end by themselves: open while both are there, half-open
    while only the second is.
    """

    def __init__(self, target: str, limits: Limits) -> None:
        self._limits = limits
        self._open, self._half, self._forced = (
            f"breaker:{target}:{name}" for name in ("open", "half", "forced")
        )
        self._probes = [f"breaker:{target}:probe:{at}" for at in range(limits.probes)]

    def read(self) -> tuple[State, Forced | None]:
        found = shared.ask(lambda cache: cache.get_many([self._open, self._half, self._forced]))
        told = found.get(self._forced)
        forced = _forced(told)
        if self._open in found:
            return State.OPEN, forced
        return (State.HALF_OPEN if self._half in found else State.CLOSED), forced

    def tell(self, state: State) -> None:
        shared.ask(self._opened if state is State.OPEN else self._closed)

    def _opened(self, cache: BaseCache) -> None:
        cache.set(self._half, 1, _HALF_KEPT_S)
        cache.set(self._open, 1, self._limits.open_s)

    def _closed(self, cache: BaseCache) -> None:
        cache.delete_many([self._open, self._half, *self._probes])

    def claim(self) -> str | None:
        """A probe's place among all processes, or None if all are taken."""
        ttl = self._limits.probe_s
        return shared.ask(
            lambda cache: next((key for key in self._probes if cache.add(key, 1, ttl)), None)
        )

    def give_back(self, place: str) -> None:
        shared.ask(lambda cache: cache.delete(place))

    def force(self, forced: Forced | None, for_s: int) -> None:
        if forced is None:
            shared.ask(lambda cache: cache.delete(self._forced))
        else:
            told = {"state": forced.state, "note": forced.note, "by": forced.by}
            shared.ask(lambda cache: cache.set(self._forced, told, for_s))


class Breaker:
    """One target, as this process and the others know it."""

    def __init__(self, target: str, limits: Limits, clock: Clock = time.monotonic) -> None:
        self.target = target
        self.circuit = Circuit(limits, clock)
        self._board = _Board(target, limits)
        self._clock, self._slow_s = clock, limits.slow_s
        self.shared = target in limits.shared
        self._read_at = float("-inf")
        self._untold = False  # something the others do not know: on its way, or the cache was away
        self.forced: Forced | None = None
        self._unsaid: tuple[Forced | None, int] | None = None  # of staff, while the cache is away

    # -- what is known

    @property
    def stale(self) -> bool:
        return self._clock() - self._read_at >= REFRESH_S

    def refresh(self) -> None:
        """Read what the others and staff say. Sync: one round trip; a cache that is away changes
        nothing."""
        self._read_at = self._clock()  # first: others go on with what is known meanwhile
        with suppress(shared.Away):
            self._say()
            self._catch_up()
            state, self.forced = self._board.read()
            if self.shared and not self._untold:
                self.circuit.adopt(state, REFRESH_S)

    def _catch_up(self) -> None:
        """Tell now what could not be told before."""
        state = self.circuit.state
        if self._untold and state is not State.HALF_OPEN:
            self._board.tell(state)
            self._untold = False

    @property
    def state(self) -> State:
        """With what staff decided; as fresh as the last ``refresh``."""
        if self.forced is not None:
            return State.OPEN if self.forced.state == "open" else State.CLOSED
        return self.circuit.state

    # -- one call

    async def enter(self) -> Call:
        """A call that may be made. Raises: BreakerOpen."""
        if self.stale:
            await asyncio.to_thread(self.refresh)
        if self.forced is not None:
            if self.forced.state == "open":
                raise BreakerOpen(self.target, REFRESH_S, forced=True)
            return Call(self, None, self._clock, self._slow_s)
        permit = self.circuit.ask()
        if permit is None:
            raise BreakerOpen(self.target, self.circuit.retry_after_s())
        call = Call(self, permit, self._clock, self._slow_s)
        if self.shared and self.circuit.state is State.HALF_OPEN:
            await self._claim(call)
        return call

    async def _claim(self, call: Call) -> None:
        """A probe's place among all processes, if they can be asked. Raises: BreakerOpen."""
        try:
            call.place = await asyncio.to_thread(self._board.claim)
        except shared.Away:
            return
        except BaseException:
            call.end("void")
            raise
        if call.place is None:
            call.end("void")
            raise BreakerOpen(self.target, REFRESH_S)

    def ended(self, call: Call, outcome: Outcome, lost_s: float) -> None:
        """Count it; the others hear of a change from another thread, never waited for."""
        if call.permit is None:
            return
        changed = self.circuit.end(call.permit, outcome, lost_s)
        if changed is not None:
            event = "circuit_opened" if changed is State.OPEN else "circuit_closed"
            log.warning(event, extra={"backend": self.target})
        if self.shared and (changed is not None or call.place):
            self._untold = self._untold or changed is not None
            asyncio.get_running_loop().run_in_executor(None, self._tell, changed, call.place)

    def _tell(self, changed: State | None, place: str | None) -> None:
        try:
            if place:
                self._board.give_back(place)
            if changed is not None:
                self._board.tell(changed)
                self._untold = False
        except shared.Away:
            log.info("the breaker of %s is this process's alone for now", self.target)

    # -- staff

    def force(self, forced: Forced | None, for_s: int) -> None:
        """Obey from now on. Raises: Away, and then the others are told when the cache is back."""
        self.forced, self._read_at = forced, self._clock()
        self._unsaid = (forced, for_s)
        self._say()

    def _say(self) -> None:
        if self._unsaid is not None:
            self._board.force(*self._unsaid)
            self._unsaid = None


class Call:
    """One call under a breaker: hears of the first words and of the end, and judges."""

    def __init__(
        self, breaker: Breaker, permit: Permit | None, clock: Clock, slow_s: float
    ) -> None:
        self.permit = permit
        self.place: str | None = None  # of a probe, among all processes
        self._breaker, self._clock, self._slow_s = breaker, clock, slow_s
        self._begun_at, self._waited_s = clock(), -1.0
        self._moved_at = self._begun_at  # when it last told a place in its queue, or wrote
        self._heard = False

    def heard(self, event: Event) -> None:
        if isinstance(event, Waiting | Delta):
            self._moved_at = self._clock()
        if isinstance(event, Waiting):
            return
        self._heard = True
        if self._waited_s < 0 and isinstance(event, Delta):
            self._waited_s = self._clock() - self._begun_at

    def finished(self) -> None:
        """It came to its end; slowly is badly, unless it is our own queue that is long."""
        slow = self._breaker.shared and self._wait() >= self._slow_s
        self.end("bad" if slow else "good")

    def left(self) -> None:
        """Nobody wants the rest: says something only if there was enough time to say something,
        since its queue moved last, or its words did."""
        if self._clock() - self._moved_at >= self._slow_s:
            self.end("bad")
        elif self._waited_s >= 0:
            self.finished()
        else:
            self.end("good" if self._heard else "void")

    def failed(self, error: Exception) -> None:
        self.end("bad" if _is_fault(error) else "void")

    def end(self, outcome: Outcome) -> None:
        self._breaker.ended(self, outcome, self._wait())

    def _wait(self) -> float:
        """Seconds until the first words, or until now."""
        return self._waited_s if self._waited_s >= 0 else self._clock() - self._begun_at


def _is_fault(error: Exception) -> bool:
    """Whether the backend is to blame. Refusals (a full queue, a spent budget, a bad question) say
    nothing of its health."""
    if isinstance(error, InvalidRequest):
        return False
    return isinstance(error, (GenerationFailed, ModelUnavailable)) or not isinstance(
        error, AssistantError
    )


# --- For the router and for staff ----------------------------------------------------------------

_breakers: dict[str, Breaker] = {}
_lock = threading.Lock()


def of(target: str) -> Breaker:
    """The breaker of that backend's alias. Raises: ImproperlyConfigured for unknown settings."""
    with _lock:
        if target not in _breakers:
            _breakers[target] = Breaker(target, _limits())
        return _breakers[target]


async def guarded(target: str, stream: Callable[[], AsyncIterator[Event]]) -> AsyncIterator[Event]:
    """The events of ``stream``, which is called only if the breaker lets it be.

    Raises: BreakerOpen before the first event, and whatever the stream raises.
    """
    call = await of(target).enter()
    try:
        async with aclosing(cast(Any, stream())) as events:
            async for event in events:
                call.heard(event)
                yield event
    except (GeneratorExit, asyncio.CancelledError):
        call.left()
        raise
    except Exception as error:
        call.failed(error)
        raise
    call.finished()


def states() -> dict[str, int]:
    """Every backend's state as a number, for the gauge. Sync: asks the cache."""
    return {target: int(breaker.state) for target, breaker in _all().items()}


def maintenance() -> dict[str, Forced]:
    """What staff has forced, for the admin and the banner. Sync: asks the cache."""
    return {target: found for target, one in _all().items() if (found := one.forced) is not None}


#: What users read while staff keeps a backend off, unless the note says it better.
_NOTICE = "Part of the assistant is off for maintenance. Some answers come from prepared texts."


def notice() -> str:
    """What to tell everybody while staff keeps a backend off: their note's words after ``public:``,
    or a usual sentence; empty if all may work. Sync: asks the cache."""
    off = [found.note for found in maintenance().values() if found.state == "open"]
    told = [words.strip() for note in off if (words := note.partition("public:")[2]).strip()]
    return " ".join(dict.fromkeys(told)) or (_NOTICE if off else "")


def force(
    target: str,
    state: Literal["open", "closed"] | None,
    *,
    by: Any,
    note: str = "",
    for_s: int = USUAL_FORCED_S,
) -> None:
    """Force a backend off or on for a while, or (None) stop forcing; kept in the admin's log.

    ``by``: the staff member. Sync: database and cache. Raises: ValueError for an unknown backend
    or a time out of bounds; Away if other processes could not be told yet.
    """
    if target not in settings.ASSISTANT["BACKENDS"]:
        raise ValueError(f"There is no backend {target!r}.")
    if not LEAST_FORCED_S <= for_s <= MOST_FORCED_S:
        raise ValueError(f"A state is forced for {LEAST_FORCED_S} to {MOST_FORCED_S} seconds.")
    forced = Forced(state, note[:200], str(by)) if state else None
    until = f" for {for_s} s: {note[:200]}" if state else ""
    LogEntry.objects.create(
        user=by,
        object_id=target,
        object_repr=f"breaker of {target}",
        action_flag=CHANGE,
        change_message=f"forced {state}{until}" if state else "no longer forced",
    )
    of(target).force(forced, for_s)


def reset(**_: Any) -> None:
    """Forget what this process knows; every breaker starts closed."""
    with _lock:
        _breakers.clear()


def _all() -> dict[str, Breaker]:
    found = {target: of(target) for target in settings.ASSISTANT["BACKENDS"]}
    for breaker in found.values():
        if breaker.stale:
            breaker.refresh()
    return found


def _limits() -> Limits:
    given = settings.ASSISTANT.get("BREAKER", {})
    known = {field.name for field in fields(Limits)}
    if unknown := set(given) - known:
        raise ImproperlyConfigured(
            f"ASSISTANT['BREAKER'] has no option {', '.join(sorted(unknown))}; it knows "
            f"{', '.join(sorted(known))}."
        )
    # Below the time after which the router gives up, so that a hung backend is a slow one.
    slow_s = 0.8 * settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"]
    return Limits(**{"slow_s": slow_s, **given, "shared": tuple(given.get("shared", ()))})


def _on_setting_changed(*, setting: str, **_: Any) -> None:
    if setting == "ASSISTANT":
        reset()


setting_changed.connect(_on_setting_changed)
