"""The engine's thread: drain commands, plan, run, choose, publish; then again, or wait.

One ``Worker`` is one life of the thread, from start to close or crash; whatever ends it, nobody is
left waiting. Knows tickets, the scheduler and a runner; admits nothing by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

from assistant.engine.errors import EngineClosed, EngineCrashed, EngineError
from assistant.engine.generation import Ticket, Waiter
from assistant.engine.manifest import Manifest
from assistant.engine.runner import Batch, Runner
from assistant.engine.sampling import Floats, Sampler, judge
from assistant.engine.scheduler import LEAST_CHUNK, FinishReason, Rates, Request, Scheduler, Step
from assistant.engine.text import Codec


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """``threads=0``: one per core this process may use. The queue counts waiting requests only."""

    model_dir: Path
    threads: int = 0
    max_batch: int = 32
    max_queue: int = 128
    max_queue_tokens: int = 32768
    #: Tokens per step, prompts and answers together: how long a long prompt may hold up the others.
    step_tokens: int = 256
    context_tokens: int = 1024

    def __post_init__(self) -> None:
        if min(self.max_batch, self.max_queue, self.max_queue_tokens) < 1 or self.threads < 0:
            raise ValueError("max_batch, max_queue and max_queue_tokens start at 1, threads at 0")
        if self.step_tokens < self.max_batch + LEAST_CHUNK or self.context_tokens < 8:
            raise ValueError(
                f"step_tokens must be at least max_batch + {LEAST_CHUNK}, context_tokens at least 8"
            )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of the engine. *Units*: ``kv_usage`` 0..1, ``*_s`` seconds, the rest counts."""

    state: Literal["new", "running", "crashed", "closed"] = "new"
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    step_s: float = 0.0
    busy_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to step. ``codec`` and ``manifest`` are for the caller, not for the loop."""

    runner: Runner
    banned: tuple[int, ...] = ()
    context_tokens: int | None = None
    manifest: Manifest | None = None
    codec: Codec | None = None


class _Gate:
    """Bounds what waits, in requests and prompt tokens; shared by callers and the worker."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.inside: set[Ticket] = set()
        self._lock = threading.Lock()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self.inside)

    def enter(self, ticket: Ticket) -> bool:
        """Whether there was room. An empty queue takes any prompt that fits the context."""
        size = len(ticket.request.prompt)
        with self._lock:
            full = len(self.inside) >= self._config.max_queue
            heavy = self.inside and self.tokens + size > self._config.max_queue_tokens
            if full or heavy:
                return False
            self.inside.add(ticket)
            self.tokens += size
        return True

    def leave(self, ticket: Ticket) -> None:
        with self._lock:
            if ticket in self.inside:
                self.inside.remove(ticket)
                self.tokens -= len(ticket.request.prompt)


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    busy_s: float = 0.0


class Worker:
    """One life of the engine's thread, from start to close or crash."""

    def __init__(self, config: EngineConfig, loaded: Loaded) -> None:
        self.loaded = loaded
        self.context_tokens = min(
            config.context_tokens, loaded.context_tokens or config.context_tokens
        )
        self.gate = _Gate(config)
        self.rates = Rates()
        self.stats = EngineStats(state="running")
        self.error: BaseException | None = None
        self._config = config
        self._runner = loaded.runner
        self._scheduler = Scheduler(slots=config.max_batch, step_tokens=config.step_tokens)
        self._sampler = Sampler(config.max_batch, self._runner.vocab_size, loaded.banned)
        self._counters = _Counters()
        self._tickets: dict[Request, Ticket] = {}
        self._wakes: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, asyncio.Future[None]]]]
        self._wakes = {}
        #: A ticket means "start", or "stop" when it is closed; None ends the thread.
        self.commands: SimpleQueue[Ticket | None] = SimpleQueue()
        self._ended = False
        self._intake = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="assistant-engine", daemon=True)
        self._thread.start()

    # Called by any thread.

    @property
    def alive(self) -> bool:
        return not self._ended

    def submit(self, ticket: Ticket) -> bool:
        """Whether the worker took it: False once the thread is ending."""
        with self._intake:
            if not self._ended:
                self.commands.put(ticket)
            return not self._ended

    def stop(self) -> None:
        self.commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def eta_s(self) -> float:
        """What a newcomer would wait for its first token."""
        stats = self.stats
        return self.rates.eta_s(
            prompt_tokens=self.gate.tokens,
            ahead=len(self.gate),
            slots=self._config.max_batch,
            free=stats.running + len(self.gate) < self._config.max_batch,
        )

    def orphan(self) -> None:
        """In a forked child: end what the lost thread was serving."""
        self._ended = True
        for ticket in {*self._tickets.values(), *self.gate.inside}:
            ticket.orphan()

    # Called by the worker's own thread.

    def _live(self) -> None:
        error: EngineError = EngineClosed("the engine was closed while this answer was written")
        try:
            while self._drain():
                self._step()
        except BaseException as crash:
            self.error = crash
            error = EngineCrashed(
                f"the engine's thread died ({type(crash).__name__}: {crash}); "
                f"start() makes a new one"
            )
            error.__cause__ = crash
        self._fail_all(error)

    def _drain(self) -> bool:
        """Take all commands, waiting for one when there is nothing to do; False to end."""
        idle = not self._scheduler.busy
        with contextlib.suppress(Empty):
            while True:
                ticket = self.commands.get(block=idle)
                idle = False
                if ticket is None:
                    return False
                self._handle(ticket)
        return True

    def _handle(self, ticket: Ticket) -> None:
        if ticket.closed:
            self._end(ticket, "cancelled")
        else:
            self._tickets[ticket.request] = ticket
            self._scheduler.add(ticket.request)

    def _step(self) -> None:
        step = self._scheduler.plan()
        for request in step.admitted:
            ticket = self._tickets[request]
            self.gate.leave(ticket)
            self._sampler.open(request.slot, ticket.sampling, request.prompt)
        if step.chunks:
            began = time.perf_counter()
            logprobs = self._runner.step(_batch(step))
            self._scheduler.advance(step)
            self._choose(step, logprobs)
            self._count(step, time.perf_counter() - began)
        self._publish()

    def _choose(self, step: Step, logprobs: Floats) -> None:
        tickets = [self._tickets[chunk.request] for chunk in step.chunks if chunk.samples]
        judging = [
            row for row, ticket in enumerate(tickets) if ticket.first and ticket.verdict is None
        ]
        if judging:
            for row in judging:
                self._judge(tickets[row], logprobs[row])
            rest = sorted(set(range(len(tickets))).difference(judging))
            tickets, logprobs = [tickets[row] for row in rest], logprobs[rest]
        if tickets:
            slots = [ticket.request.slot for ticket in tickets]
            ids, chosen = self._sampler.choose(logprobs, slots)
            for ticket, token, logprob in zip(tickets, ids.tolist(), chosen.tolist(), strict=True):
                self._accept(ticket, token, logprob)

    def _judge(self, ticket: Ticket, logprobs: Floats) -> None:
        assert ticket.first is not None
        ticket.verdict = judge(logprobs, ticket.first)
        self._scheduler.feed(ticket.request, ticket.verdict.token_id)

    def _accept(self, ticket: Ticket, token: int, logprob: float) -> None:
        if logprob != logprob:  # NaN
            error = EngineError("the model's probabilities are not numbers; rebuild the model")
            return self._end(ticket, None, error)
        reason = self._scheduler.accept(ticket.request, token)
        if reason != "stop":
            self._counters.generated_tokens += 1
            self._wake(ticket, ticket.push(token, logprob))
        if reason is not None:
            self.rates.finished(ticket.request.written)
            self._end(ticket, reason)

    def _end(
        self, ticket: Ticket, reason: FinishReason | None, error: EngineError | None = None
    ) -> None:
        """Forget ``ticket``: its slot, its place in the queue, its reader's wait. Once is enough,
        twice is harmless."""
        if not ticket.done:
            self._counters.cancelled += reason == "cancelled"
            self._counters.finished += reason != "cancelled"
        self._scheduler.remove(ticket.request)
        self._tickets.pop(ticket.request, None)
        self.gate.leave(ticket)
        self._wake(ticket, ticket.end(reason, error))

    def _wake(self, ticket: Ticket, waiter: Waiter | None) -> None:
        if isinstance(waiter, threading.Event):
            waiter.set()
        elif waiter is not None:
            loop, future = waiter
            self._wakes.setdefault(loop, []).append((ticket, future))

    def _publish(self) -> None:
        """One call per event loop wakes all its readers; then the figures of this moment."""
        while self._wakes:
            loop, readers = self._wakes.popitem()
            try:
                loop.call_soon_threadsafe(_resolve, [future for _, future in readers])
            except Exception:  # the loop was closed: its readers are gone, whatever it raises
                for ticket, _ in readers:
                    self._end(ticket, "cancelled")
        self._take_figures()

    def _take_figures(self) -> None:
        counters = self._counters
        capacity = self._config.max_batch * self.context_tokens
        self.stats = EngineStats(
            state="running",
            running=len(self._scheduler.running),
            waiting=len(self.gate),
            waiting_tokens=self.gate.tokens,
            kv_usage=self._scheduler.cached_tokens() / capacity,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generated_tokens=counters.generated_tokens,
            finished=counters.finished,
            cancelled=counters.cancelled,
            step_s=self.rates.step_s,
            busy_s=counters.busy_s,
        )

    def _count(self, step: Step, seconds: float) -> None:
        prefill = sum(
            chunk.count for chunk in step.chunks if chunk.start < len(chunk.request.prompt)
        )
        self.rates.ran(prefill_tokens=prefill, seconds=seconds)
        self._counters.steps += 1
        self._counters.prompt_tokens += prefill
        self._counters.busy_s += seconds

    def _fail_all(self, error: EngineError) -> None:
        """Nobody may wait for a thread that has ended, not even who comes this moment."""
        with self._intake:
            self._ended = True
        left = list(self._tickets.values())
        with contextlib.suppress(Empty):
            while True:
                ticket = self.commands.get_nowait()
                if ticket is not None:
                    left.append(ticket)
        for ticket in left:
            # Bookkeeping may be what broke: only what a reader sees is touched.
            self.gate.leave(ticket)
            ended = ("cancelled", None) if ticket.closed else (None, error)
            self._wake(ticket, ticket.end(*ended))
        for loop, readers in self._wakes.items():
            with contextlib.suppress(Exception):
                loop.call_soon_threadsafe(_resolve, [future for _, future in readers])
        with contextlib.suppress(Exception):
            self._runner.close()


def _resolve(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():  # its reader may have been cancelled meanwhile
            future.set_result(None)


def _batch(step: Step) -> Batch:
    chunks = step.chunks
    return Batch.of(
        [chunk.request.slot for chunk in chunks],
        [chunk.start for chunk in chunks],
        [chunk.samples for chunk in chunks],
        [chunk.tokens() for chunk in chunks],
    )
