"""Decides what each step computes: who holds a slot, whose tokens run, who is done.

Pure bookkeeping over integers: knows no arrays, no threads, no clock and no model. One step is
``plan()``, a run of the model elsewhere, ``advance()``, and ``accept()`` for each token chosen.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled"]
#: Beside a full batch of decode rows but one, a prompt can always move on: see ``_chunk``.
LEAST_CHUNK = 2


@dataclass(slots=True, eq=False)
class Request:
    """One generation's place in the books. ``slot`` is -1 while it waits and after it ended."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    slot: int = -1
    #: Tokens whose keys and values are in the slot's cache.
    cached: int = 0
    #: Tokens generated and shown.
    written: int = 0
    #: The token to run next, once the prompt is in the cache.
    next_token: int = -1


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of one request to run after ``start`` cached ones; ``samples`` where the
    last of them asks for a next token."""

    request: Request
    start: int
    count: int
    samples: bool

    def tokens(self) -> Sequence[int]:
        if self.start >= len(self.request.prompt):
            return (self.request.next_token,)
        return self.request.prompt[self.start : self.start + self.count]


@dataclass(frozen=True, slots=True)
class Step:
    """Who was just given a slot, and what to run: decode rows first, then prefill chunks."""

    admitted: list[Request]
    chunks: list[Chunk]


class Scheduler:
    """First come, first served; the lowest free slot first, so that busy slots stay together."""

    def __init__(self, *, slots: int, step_tokens: int) -> None:
        if step_tokens < slots + LEAST_CHUNK:
            raise ValueError(
                f"step_tokens ({step_tokens}) must be at least max_batch + {LEAST_CHUNK} ({slots})"
            )
        self._step_tokens = step_tokens
        self._free = list(range(slots))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Take ``request`` out, wherever it is; harmless when it has gone already."""
        if request.slot >= 0:
            heapq.heappush(self._free, request.slot)
            request.slot = -1
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def plan(self) -> Step:
        """The next step. Decode rows always fit; the budget they leave goes to prompts in order."""
        admitted = self._admit()
        chunks = [
            Chunk(request, request.cached, 1, True)
            for request in self.running
            if request.cached >= len(request.prompt)
        ]
        budget = self._step_tokens - len(chunks)
        for request in self.running:
            missing = len(request.prompt) - request.cached
            count = _chunk(missing, budget)
            if count > 0:
                chunks.append(Chunk(request, request.cached, count, count == missing))
                budget -= count
        return Step(admitted, chunks)

    def _admit(self) -> list[Request]:
        admitted = []
        while self.waiting and self._free:
            request = self.waiting.popleft()
            request.slot = heapq.heappop(self._free)
            self.running.append(request)
            admitted.append(request)
        return admitted

    def advance(self, step: Step) -> None:
        """Note that ``step`` ran: its tokens are in the cache."""
        for chunk in step.chunks:
            chunk.request.cached += chunk.count

    def feed(self, request: Request, token: int) -> None:
        """Run ``token`` next without counting or showing it."""
        request.next_token = token

    def accept(self, request: Request, token: int) -> FinishReason | None:
        """Take a chosen token; why the request is over, if it is. A stop token is not shown."""
        if token in request.stop_ids:
            return "stop"
        request.next_token = token
        request.written += 1
        return "length" if request.written >= request.max_new_tokens else None

    def cached_tokens(self) -> int:
        return sum(request.cached for request in self.running)


def _chunk(missing: int, budget: int) -> int:
    """Prompt tokens to run now. Never one of several, nor all but one: a chunk of one token is
    rounded differently in attention, and how a prompt was cut must not show in the answer."""
    count = min(missing, budget)
    if missing - count == 1:
        count -= 1
    return count if count >= 2 or count == missing else 0


@dataclass(slots=True)
class Rates:
    """Measured speeds, and the waiting time they promise. *Units*: seconds, tokens."""

    #: Pessimistic until measured: a refusal must not promise more than a slow machine can hold.
    prefill_s: float = 1e-3
    step_s: float = 20e-3
    answer_tokens: float = 64.0
    _weight: float = field(default=0.1, repr=False)

    def ran(self, *, prefill_tokens: int, seconds: float) -> None:
        """One step took ``seconds``, with this many prompt tokens in it."""
        if prefill_tokens:
            share = max(seconds - self.step_s, 0.25 * seconds) / prefill_tokens
            self.prefill_s += self._weight * (share - self.prefill_s)
        else:
            self.step_s += self._weight * (seconds - self.step_s)

    def finished(self, tokens: int) -> None:
        self.answer_tokens += self._weight * (tokens - self.answer_tokens)

    def eta_s(self, *, prompt_tokens: int, ahead: int, slots: int, free: bool) -> float:
        """Until a newcomer's first token: the prompts before it, and slots to fall free."""
        rounds = 0.0 if free else 0.5 + ahead / slots
        return prompt_tokens * self.prefill_s + rounds * self.answer_tokens * self.step_s
