"""The engine: one thread that serves many generations at once.

``Engine`` admits and refuses, ``_Worker`` is the thread (drain, plan, run, choose, publish),
``Generation`` is what a caller reads and closes, from any thread or event loop. Speaks token ids
and log-probabilities; knows nothing of texts, messages, users or HTTP. ::

    EngineError
    ├── Overloaded      the queue is full; ``eta_s`` says how long a newcomer would wait
    ├── PromptTooLong   the prompt leaves no room for an answer
    ├── EngineCrashed   the thread died; start() makes a new one
    └── EngineClosed    close() was called
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal, NamedTuple

import numpy as np

from assistant.engine.manifest import MODEL, Manifest
from assistant.engine.runner import Batch, OnnxRunner, Runner, batching_error
from assistant.engine.sampling import FirstTokenRule, Floats, Sampler, Sampling, Verdict, judge
from assistant.engine.scheduler import LEAST_CHUNK, FinishReason, Rates, Request, Scheduler, Step
from assistant.engine.text import Codec


class EngineError(Exception):
    """Base of what the engine raises."""


class Overloaded(EngineError):
    """The queue is full."""

    def __init__(self, message: str, eta_s: float) -> None:
        super().__init__(message)
        self.eta_s = eta_s


class PromptTooLong(EngineError):
    """The prompt leaves no room for an answer."""


class EngineCrashed(EngineError):
    """The engine's thread died with requests in it, or has not been started since."""


class EngineClosed(EngineError):
    """The engine was closed."""


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


class Token(NamedTuple):
    """A generated token. ``logprob`` is the model's own, in nats, whatever the sampling."""

    id: int
    logprob: float


# -- what a caller holds -------------------------------------------------------------------------

_AsyncWaiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]
_Waiter = _AsyncWaiter | threading.Event


class _Ticket:
    """A request on its way through: written by the worker, read by one Generation.

    The buffer is bounded by ``max_new_tokens``. The lock guards the buffer and the waiter only.
    """

    __slots__ = ("_ids", "_lock", "_logprobs", "_waiter", "closed", "error", "finish_reason",
                 "first", "request", "sampling", "verdict")  # fmt: skip

    def __init__(self, request: Request, sampling: Sampling, first: FirstTokenRule | None) -> None:
        self.request, self.sampling, self.first = request, sampling, first
        self.verdict: Verdict | None = None
        self.finish_reason: FinishReason | None = None
        self.error: EngineError | None = None
        self.closed = False
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._waiter: _Waiter | None = None
        self._lock = threading.Lock()

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def push(self, token: int, logprob: float) -> _Waiter | None:
        """Add a token; whom to wake."""
        with self._lock:
            self._ids.append(token)
            self._logprobs.append(logprob)
            waiter, self._waiter = self._waiter, None
        return waiter

    def end(self, reason: FinishReason | None, error: EngineError | None = None) -> _Waiter | None:
        """Mark the end, once; whom to wake."""
        with self._lock:
            if not self.done:
                self.finish_reason, self.error = reason, error
            waiter, self._waiter = self._waiter, None
        return waiter

    def take(self, waiter: Callable[[], _Waiter]) -> list[Token] | _Waiter | None:
        """New tokens; or a waiter that will be woken for them; or None at the end.

        Raises: the error that ended the generation, after its last tokens.
        """
        with self._lock:
            if self.closed:
                return None
            if self._ids:
                tokens = [Token(*pair) for pair in zip(self._ids, self._logprobs, strict=True)]
                self._ids, self._logprobs = [], []
                return tokens
            if self.error is not None:
                # A new one each time: many readers may share the fault, none its traceback.
                raise type(self.error)(*self.error.args) from self.error.__cause__
            if self.finish_reason is not None:
                return None
            if isinstance(self._waiter, tuple) and not self._waiter[1].done():
                raise RuntimeError("a generation has one reader, and this one is being read")
            self._waiter = waiter()
            return self._waiter

    def orphan(self) -> None:
        """In a forked child: no thread will ever serve this ticket, or release its lock."""
        self._lock = threading.Lock()
        self.end(None, EngineClosed("this answer belongs to the process that was forked"))


class Generation:
    """One answer being written: iterate it (async, or ``tokens_sync``) for batches of tokens.

    One reader. ``verdict`` is set before the first batch arrives, ``finish_reason`` before the
    iteration ends. ``close()`` may come from anywhere, any number of times; dropping the object
    closes it too.
    """

    def __init__(self, ticket: _Ticket, commands: SimpleQueue[_Ticket | None]) -> None:
        self._ticket = ticket
        self._commands = commands

    @property
    def verdict(self) -> Verdict | None:
        return self._ticket.verdict

    @property
    def finish_reason(self) -> FinishReason | None:
        ticket = self._ticket
        return "cancelled" if ticket.closed and not ticket.done else ticket.finish_reason

    def close(self) -> None:
        """Give the row back within one step; the iteration ends."""
        # No lock: this also runs as a finaliser, at any point of any thread.
        ticket = self._ticket
        if not ticket.closed:
            ticket.closed = True
            if not ticket.done:
                self._commands.put(ticket)

    def __del__(self) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[list[Token]]:
        return self

    async def __anext__(self) -> list[Token]:
        loop = asyncio.get_running_loop()
        while True:
            got = self._ticket.take(lambda: (loop, loop.create_future()))
            if isinstance(got, list):
                return got
            if got is None:
                raise StopAsyncIteration
            assert isinstance(got, tuple)
            await got[1]

    def tokens_sync(self) -> Iterator[list[Token]]:
        """The same batches for a thread without an event loop."""
        while (got := self._ticket.take(threading.Event)) is not None:
            if isinstance(got, list):
                yield got
            elif isinstance(got, threading.Event):
                got.wait()


# -- the thread ----------------------------------------------------------------------------------


class _Gate:
    """Bounds what waits, in requests and prompt tokens; shared by callers and the worker."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.inside: set[_Ticket] = set()
        self._lock = threading.Lock()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self.inside)

    def enter(self, ticket: _Ticket) -> bool:
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

    def leave(self, ticket: _Ticket) -> None:
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


class _Worker:
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
        self._tickets: dict[Request, _Ticket] = {}
        self._wakes: dict[asyncio.AbstractEventLoop, list[tuple[_Ticket, asyncio.Future[None]]]]
        self._wakes = {}
        #: A ticket means "start", or "stop" when it is closed; None ends the thread.
        self.commands: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._ended = False
        self._intake = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="assistant-engine", daemon=True)
        self._thread.start()

    # Called by any thread.

    @property
    def alive(self) -> bool:
        return not self._ended

    def submit(self, ticket: _Ticket) -> bool:
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

    def _handle(self, ticket: _Ticket) -> None:
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

    def _judge(self, ticket: _Ticket, logprobs: Floats) -> None:
        assert ticket.first is not None
        ticket.verdict = judge(logprobs, ticket.first)
        self._scheduler.feed(ticket.request, ticket.verdict.token_id)

    def _accept(self, ticket: _Ticket, token: int, logprob: float) -> None:
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
        self, ticket: _Ticket, reason: FinishReason | None, error: EngineError | None = None
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

    def _wake(self, ticket: _Ticket, waiter: _Waiter | None) -> None:
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


# -- the engine ----------------------------------------------------------------------------------


class Engine:
    """Admits requests to one worker thread. Nothing heavy happens before ``start()``.

    ``submit`` starts an engine that never ran; do it with ``start()`` where blocking would hurt.
    A forked child finds its engine new: threads and sessions do not survive a fork.
    """

    def __init__(
        self, config: EngineConfig, *, load: Callable[[EngineConfig], Loaded] | None = None
    ) -> None:
        self.config = config
        self._load = load or load_onnx
        self._worker: _Worker | None = None
        self._closed = False
        self._starting = threading.RLock()
        self._stop_last: weakref.finalize[..., Engine] | None = None
        _engines.add(self)

    def start(self) -> None:
        """Load the model, check it, start the thread; nothing if it runs already.

        Raises: ManifestError; EngineError when the self-check fails.
        """
        with self._starting:
            if self._worker is not None and self._worker.alive:
                return
            loaded = self._load(self.config)
            try:
                _self_check(loaded.runner, self.config.max_batch)
            except BaseException:
                loaded.runner.close()
                raise
            self._worker = worker = _Worker(self.config, loaded)
            self._closed = False
            # Also at exit: a daemon thread inside native code must not meet a dying interpreter.
            if self._stop_last is not None:
                self._stop_last.detach()
            self._stop_last = weakref.finalize(self, worker.stop)

    def close(self) -> None:
        """Stop the thread and free the model; who still waits gets EngineClosed."""
        with self._starting:
            self._closed = True
            if self._worker is not None:
                self._worker.stop()

    def restart(self) -> None:
        self.close()
        self.start()

    @property
    def manifest(self) -> Manifest | None:
        return self._worker.loaded.manifest if self._worker else None

    @property
    def codec(self) -> Codec | None:
        return self._worker.loaded.codec if self._worker else None

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] = (),
        first: FirstTokenRule | None = None,
    ) -> Generation:
        """Queue a prompt. An answer longer than the context allows ends early, by length.

        Raises: Overloaded, PromptTooLong, EngineCrashed, EngineClosed at once; ValueError for
        ids outside the vocabulary.
        """
        worker = self._running()
        # The hidden first token takes a place in the context, not one of the answer's tokens.
        room = worker.context_tokens - len(prompt) - (first is not None)
        if room < 1:
            raise PromptTooLong(
                f"the prompt has {len(prompt)} tokens and the context holds "
                f"{worker.context_tokens}, answer included; send fewer or shorter messages"
            )
        if max_new_tokens < 1:
            raise ValueError("max_new_tokens starts at 1")
        ids = _checked_ids(prompt, first, worker.loaded.runner.vocab_size)
        request = Request(ids, min(max_new_tokens, room), frozenset(stop_ids))
        ticket = _Ticket(request, sampling or Sampling(), first)
        if not worker.gate.enter(ticket):
            eta = worker.eta_s()
            raise Overloaded(f"{len(worker.gate)} requests wait; about {eta:.1f} s", eta)
        generation = Generation(ticket, worker.commands)
        if not worker.submit(ticket):
            raise self._ended(worker)
        return generation

    def stats(self) -> EngineStats:
        worker = self._worker
        if worker is None:
            return EngineStats(state="closed" if self._closed else "new")
        if worker.alive:
            return worker.stats
        state: Literal["crashed", "closed"] = "crashed" if worker.error else "closed"
        return replace(
            worker.stats, state=state, running=0, waiting=0, waiting_tokens=0, kv_usage=0.0
        )

    def _running(self) -> _Worker:
        worker = self._worker
        if worker is None and not self._closed:
            self.start()
            worker = self._worker
        if worker is None or not worker.alive:
            raise self._ended(worker)
        return worker

    def _ended(self, worker: _Worker | None) -> EngineError:
        if worker is None or worker.error is None:
            return EngineClosed("the engine is closed; start() opens it again")
        return EngineCrashed(
            f"the engine's thread died ({type(worker.error).__name__}); start() makes a new one"
        )

    def _forked(self) -> None:
        """In the child: forget the parent's thread, and never run its session's destructor, which
        would wait for threads that only the parent has."""
        if self._worker is not None:
            self._worker.orphan()
            self._worker.loaded.runner.abandon()
        self._worker = None
        self._starting = threading.RLock()


def load_onnx(config: EngineConfig) -> Loaded:
    """Verify the model folder and open it. Raises: ManifestError."""
    manifest = Manifest.load(config.model_dir)
    codec = Codec.load(config.model_dir, manifest)
    context = min(config.context_tokens, manifest.context_tokens)
    runner = OnnxRunner(
        config.model_dir / MODEL,
        manifest.architecture,
        slots=config.max_batch,
        step_tokens=config.step_tokens,
        context_tokens=context,
        threads=config.threads,
    )
    return Loaded(runner, codec.banned_ids, context, manifest, codec)


def _checked_ids(prompt: Sequence[int], first: FirstTokenRule | None, vocab: int) -> list[int]:
    """The prompt as plain integers. One bad id would end the thread, and with it everybody."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError("a prompt is a non-empty sequence of token ids")
    used = np.concatenate((ids, np.asarray(first.ids))) if first else ids
    if used.min() < 0 or used.max() >= vocab:
        raise ValueError(f"a token id lies outside the vocabulary of {vocab}")
    plain: list[int] = ids.tolist()
    return plain


def _self_check(runner: Runner, slots: int) -> None:
    """Batched and in pieces must equal alone. Raises: EngineError.

    8-bit models may round one activation the other way; a broken kernel is off by far more.
    """
    difference = batching_error(runner, slots)
    if not difference < 0.1:
        raise EngineError(
            f"the model failed its self-check: log-probabilities in a batch differ by "
            f"{difference:.3g} from those alone; rebuild it with `manage.py build_model`"
        )


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
