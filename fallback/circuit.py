"""The states of a circuit breaker, pure: closed, open, half-open, over a sliding window of calls.

::

    closed --(failing share of the window is too large)--> open --(open_s)--> half-open
       ^---(probes good calls)--------------------------------------------------|  ^
                                                            open <--(a bad one)-'

Time comes from a clock passed in. Knows no backend, no cache and no other process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

Clock = Callable[[], float]
Outcome = Literal["good", "bad", "void"]

#: The most calls a window remembers; at more than 30 a second it is shorter than ``window_s``.
_MOST_CALLS = 1_000


class State(IntEnum):
    """As the gauge ``assistant_circuit_state`` shows it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """``ASSISTANT["BREAKER"]``. A call is bad if it fails, or was given up after ``slow_s`` without
    a word, or (``shared`` backends only: our own model's waits are our own queue) took that long.

    Open when of the calls in ``window_s`` at least ``failure_share`` were bad, and these were
    ``failures`` or cost ``lost_s`` of waiting together: one time-out of 5 s is enough for a quiet
    hour, and nothing against a hundred good calls.
    """

    window_s: float = 30.0
    failure_share: float = 0.5
    failures: int = 5
    lost_s: float = 2.0
    slow_s: float = 4.0
    open_s: float = 5.0
    #: Let through at once while half-open; as many good ones close it.
    probes: int = 2
    #: After this a probe that was never heard of again no longer takes a place.
    probe_s: float = 90.0
    shared: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Permit:
    """One call that was let through, when and in which run of a state."""

    at: float
    run: int


class Circuit:
    """The states of one target. Pure but for the clock passed in; any thread may call it."""

    def __init__(self, limits: Limits, clock: Clock) -> None:
        self._limits, self._clock = limits, clock
        self._lock = threading.RLock()
        self._state, self._run, self._until = State.CLOSED, 0, 0.0
        self._window: deque[tuple[float, float | None]] = deque(maxlen=_MOST_CALLS)
        self._probing: list[Permit] = []
        self._good = 0

    @property
    def state(self) -> State:
        with self._lock:
            if self._state is State.OPEN and self._clock() >= self._until:
                self._enter(State.HALF_OPEN)
            return self._state

    def ask(self) -> Permit | None:
        """A permit to call, to be given back by ``end``; None: leave it alone."""
        with self._lock:
            now, state = self._clock(), self.state
            permit = Permit(now, self._run)
            if state is State.OPEN:
                return None
            if state is State.HALF_OPEN:
                since = now - self._limits.probe_s
                self._probing = [one for one in self._probing if one.at > since]
                if len(self._probing) >= self._limits.probes:
                    return None
                self._probing.append(permit)
            return permit

    def end(self, permit: Permit, outcome: Outcome, lost_s: float = 0.0) -> State | None:
        """The state this leads to, if another; what was begun in an earlier state says nothing.

        *Units*: ``lost_s`` is the seconds somebody waited for nothing.
        """
        with self._lock:
            state = self.state
            if permit.run != self._run:
                return None
            if state is State.HALF_OPEN:
                return self._probed(permit, outcome)
            if outcome != "void":
                self._window.append((self._clock(), lost_s if outcome == "bad" else None))
            return self._enter(State.OPEN) if outcome == "bad" and self._failing() else None

    def retry_after_s(self) -> float:
        with self._lock:
            return max(0.0, self._until - self._clock())

    def adopt(self, state: State, for_s: float) -> None:
        """Go along with what another process found out, until it is looked at again."""
        with self._lock:
            if state is State.OPEN:
                if self.state is not State.OPEN:
                    self._enter(State.OPEN)
                self._until = self._clock() + for_s
            elif state is not self.state:
                self._enter(state)

    def _probed(self, permit: Permit, outcome: Outcome) -> State | None:
        if permit in self._probing:
            self._probing.remove(permit)
        if outcome == "bad":
            return self._enter(State.OPEN)
        self._good += outcome == "good"
        return self._enter(State.CLOSED) if self._good >= self._limits.probes else None

    def _failing(self) -> bool:
        limits, since = self._limits, self._clock() - self._limits.window_s
        while self._window and self._window[0][0] < since:
            self._window.popleft()
        bad = [lost for _, lost in self._window if lost is not None]
        enough = len(bad) >= limits.failures or sum(bad) >= limits.lost_s
        return enough and len(bad) >= limits.failure_share * len(self._window)

    def _enter(self, state: State) -> State:
        self._state, self._run, self._good = state, self._run + 1, 0
        self._until = self._clock() + self._limits.open_s if state is State.OPEN else 0.0
        self._window.clear()
        self._probing.clear()
        return state
