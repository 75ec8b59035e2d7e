"""The engine's thread: drain commands, plan, run, choose, publish; then again, or wait.

One ``Worker`` is one life of the thread, from start to close or crash; whatever ends it, nobody is
left waiting. Knows tickets, the scheduler and a runner; admits nothing by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Literal

import numpy as np

from assistant.engine.drafts import Guess, Known, Lookup
from assistant.engine.embedding import Embedding, Embeddings
from assistant.engine.errors import EngineClosed, EngineCrashed, EngineError
from assistant.engine.generation import Command, Share, Ticket, Waiter
from assistant.engine.manifest import Manifest
from assistant.engine.prefix import Kept, PrefixCache
from assistant.engine.runner import Batch, Runner
from assistant.engine.sampling import Floats, Sampler, judge
from assistant.engine.scheduler import (
    LEAST_STEP,
    Chunk,
    FinishReason,
    Rates,
    Request,
    Scheduler,
    Step,
    chunk,
)
from assistant.engine.text import Codec
from assistant.engine.wide import Wide

#: A cache shorter than this is read again faster than it is found.
_LEAST_KEPT_TOKENS = 8
#: While answers are written, one part in so many of the time is for embeddings; and no piece of
#: them takes longer than such a part of the longest step.
_EMBEDDING_SHARE = 5
_LEAST_PIECE = 16
#: Guessed tokens that a run checks behind an answer's next one: where a model ships answers, and at
#: most.
USUAL_DRAFT, MOST_DRAFT = 15, 31
#: Who waits is counted this often at most; the count is for people to read.
_COUNT_LINE_S = 0.2


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """``threads=0``: one per core this process may use. The queue counts waiting requests only."""

    model_dir: Path
    threads: int = 0
    max_batch: int = 32
    max_queue: int = 128
    max_queue_tokens: int = 32768
    #: Tokens that wait to be read for their embeddings.
    max_embedding_tokens: int = 65536
    #: Prompt tokens of one step at most, where nobody waits for the next token of an answer.
    step_tokens: int = 256
    #: Where somebody does: a step takes no longer than this, as far as measured rates tell.
    most_step_s: float = 0.08
    context_tokens: int = 1024
    #: Memory of running answers' keys and values; it may lower ``max_batch``. 0: a quarter of what
    #: the process may use.
    kv_bytes: int = 0
    #: Memory of finished answers', kept for their chats' next turns. 0: keep none.
    prefix_bytes: int = 64 << 20
    #: Guessed tokens that one run checks behind an answer's next one, at most; 0: none. They come
    #: from the answers a model ships, else from the prompt. None: USUAL_DRAFT for the former only.
    draft_tokens: int | None = None
    #: Pace of an answer after its first words, for many readers at once. 0: as fast as possible.
    reading_tokens_per_s: float = 0.0
    #: A reader is woken for more tokens at most this often, and at the end. 0: at every step.
    wake_every_s: float = 0.0

    def __post_init__(self) -> None:
        queues = (self.max_queue, self.max_queue_tokens, self.max_embedding_tokens)
        if min(self.max_batch, *queues) < 1 or self.threads < 0:
            raise ValueError(
                "max_batch, max_queue, max_queue_tokens and max_embedding_tokens start at 1, "
                "threads at 0"
            )
        if self.step_tokens < LEAST_STEP or self.context_tokens < 8:
            raise ValueError(f"step_tokens starts at {LEAST_STEP}, context_tokens at 8")
        if not 0 <= (self.draft_tokens or 0) <= MOST_DRAFT:
            raise ValueError(f"draft_tokens lies between 0 and {MOST_DRAFT}")
        bounds = (self.kv_bytes, self.prefix_bytes, self.reading_tokens_per_s, self.wake_every_s)
        if not all(bound >= 0 for bound in bounds):  # not a number either
            raise ValueError(
                "kv_bytes, prefix_bytes, reading_tokens_per_s and wake_every_s are not negative"
            )
        if not self.most_step_s > 0:
            raise ValueError("most_step_s must be above 0")


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One moment of the engine. *Units*: ``kv_usage`` 0..1, ``*_s`` seconds, ``*_per_s`` tokens per
    second, ``*_bytes`` bytes, the rest counts."""

    state: Literal["new", "running", "crashed", "closed"] = "new"
    #: Answers that may run at once.
    slots: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    kv_usage: float = 0.0
    kv_bytes: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    #: Prompt tokens that were not computed because their chat's cache was kept.
    reused_tokens: int = 0
    generated_tokens: int = 0
    #: Guesses that were checked, and those of them that were right.
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    #: Tokens that were read for their embeddings.
    embedded_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    step_s: float = 0.0
    busy_s: float = 0.0
    prefill_per_s: float = 0.0
    kept_chats: int = 0
    kept_bytes: int = 0
    #: Mean distance of promised from real waits over the mean wait, lately.
    eta_error: float = 0.0
    #: Steps by how many answers ran in them: none, one, two, ...
    batches: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model ready to step. ``codec`` and ``manifest`` are for the caller, not for the loop."""

    runner: Runner
    banned: tuple[int, ...] = ()
    context_tokens: int | None = None
    #: Rows that the runner has room for; None: as many as asked, and one more.
    slots: int | None = None
    manifest: Manifest | None = None
    codec: Codec | None = None
    wide: Wide | None = None
    #: Answers it knows, and how many tokens of them to guess at once; 0: the runner checks none.
    known: Known | None = None
    draft_tokens: int = 0


class _Gate:
    """Bounds what waits, in requests and prompt tokens; shared by callers and the worker."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self.inside: set[Ticket] = set()
        self._lock = threading.Lock()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self.inside)

    def enter(self, ticket: Ticket, most: int | None = None) -> bool:
        """Whether there was room: for ``most`` requests, or as many as may wait. An empty queue
        takes any prompt that fits the context."""
        size = len(ticket.request.prompt)
        most = self._config.max_queue if most is None else most
        with self._lock:
            full = len(self.inside) >= most
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
    batches: list[int]
    steps: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    embedded_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    busy_s: float = 0.0


class Worker:
    """One life of the engine's thread, from start to close or crash."""

    def __init__(self, config: EngineConfig, loaded: Loaded, rates: Rates | None = None) -> None:
        self.loaded = loaded
        self.context_tokens = min(
            config.context_tokens, loaded.context_tokens or config.context_tokens
        )
        self.gate = _Gate(config)
        self.rates = rates or Rates()
        self.error: BaseException | None = None
        self._config = config
        self._runner = loaded.runner
        self.slots = loaded.slots or config.max_batch
        self._scheduler = Scheduler(
            slots=self.slots,
            step_tokens=config.step_tokens,
            reading_tokens_per_s=config.reading_tokens_per_s,
        )
        self._sampler = Sampler(self.slots, self._runner.vocab_size, loaded.banned)
        self._prefixes = PrefixCache(config.prefix_bytes)
        # Behind the answers' rows and the one that prefixes are computed in.
        self.embeddings = Embeddings(self.slots + 1, config.max_embedding_tokens)
        #: When the next piece may run beside answers.
        self._embed_from_s = 0.0
        #: How long to wait for commands where no answer is due yet.
        self._rest_s = 0.0
        self._period_s = 1 / config.reading_tokens_per_s if config.reading_tokens_per_s else 0.0
        #: When who waits is to be counted again.
        self._line_from_s = 0.0
        self._counters = _Counters([0] * (self.slots + 1))
        self._tickets: dict[Request, Ticket] = {}
        self._wakes: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, asyncio.Future[None]]]]
        self._wakes = {}
        #: A ticket means "start", or "stop" when it is closed; None ends the thread.
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self._ended = False
        self._intake = threading.Lock()
        self._thread = threading.Thread(target=self._live, name="assistant-engine", daemon=True)
        self._thread.start()

    # Called by any thread.

    @property
    def alive(self) -> bool:
        return not self._ended

    def submit(self, command: Ticket | Embedding) -> bool:
        """Whether the worker took it: False once the thread is ending."""
        with self._intake:
            if not self._ended:
                self.commands.put(command)
            return not self._ended

    def stop(self) -> None:
        self.commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @property
    def stats(self) -> EngineStats:
        """This moment's figures, read beside the running thread: each is right, all together may
        be a step apart."""
        counters, rates = self._counters, self.rates
        cached = self._scheduler.cached_tokens()
        return EngineStats(
            state="running",
            slots=self.slots,
            running=len(self._scheduler.running),
            waiting=len(self.gate),
            waiting_tokens=self.gate.tokens,
            kv_usage=cached / (self.slots * self.context_tokens),
            kv_bytes=cached * self._runner.token_bytes,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            reused_tokens=counters.reused_tokens,
            generated_tokens=counters.generated_tokens,
            drafted_tokens=counters.drafted_tokens,
            accepted_tokens=counters.accepted_tokens,
            embedded_tokens=counters.embedded_tokens,
            finished=counters.finished,
            cancelled=counters.cancelled,
            step_s=rates.step_s,
            busy_s=counters.busy_s,
            prefill_per_s=1 / rates.prefill_s,
            kept_chats=len(self._prefixes),
            kept_bytes=self._prefixes.bytes,
            eta_error=rates.missed_s / rates.waited_s if rates.waited_s else 0.0,
            batches=tuple(counters.batches),
        )

    def eta_s(self, prompt_tokens: int = 0) -> float:
        """What a newcomer with that many tokens would wait for its first one."""
        running, ahead = tuple(self._scheduler.running), len(self.gate)
        return self.rates.eta_s(
            prompt_tokens=self.gate.tokens + prompt_tokens,
            ahead=max(0, ahead - (self.slots - len(running))),
            slots=self.slots,
            free=len(running) + ahead < self.slots,
            left=self.rates.left(running),
            period_s=self._period_s,
        )

    @property
    def last_place(self) -> int:
        """The number in the queue of whoever came last; 0: a slot is free for them."""
        return max(0, len(self.gate) - (self.slots - len(self._scheduler.running)))

    @property
    def spare(self) -> int:
        """How many may come that join no queue and leave a slot for who comes next."""
        return max(1, self.slots - 1) - len(self._scheduler.running)

    def embedding_eta_s(self) -> float:
        """What waits for its embeddings takes so long, if answers are written all the while."""
        return self.embeddings.tokens * self.rates.prefill_s * _EMBEDDING_SHARE

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
                if self.embeddings:
                    self._embed()
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
        wait = (idle or self._rest_s > 0) and not self.embeddings
        with contextlib.suppress(Empty):
            while True:
                command = self.commands.get(block=wait, timeout=None if idle else self._rest_s)
                idle = wait = False
                if command is None:
                    return False
                self._handle(command)
        return True

    def _handle(self, command: Ticket | Share | Embedding) -> None:
        if isinstance(command, Share):
            self._share(command.ids)
        elif isinstance(command, Embedding):
            self.embeddings.add(command)
        elif command.closed:
            self._end(command, "cancelled")
        else:
            self._tickets[command.request] = command
            self._scheduler.add(command.request)

    def _share(self, ids: Sequence[int]) -> None:
        """Compute the prefix in the row behind the last slot, which no answer uses."""
        done = 0
        while done < len(ids):
            count = chunk(len(ids) - done, self._config.step_tokens)
            part = ids[done : done + count]
            self._runner.step(Batch.of([self.slots], [done], [False], [part]))
            done += count
        saved = self._runner.save(self.slots, 0, len(ids))
        self._prefixes.share(Kept(np.array(ids, np.int64), 0, saved))

    def _step(self) -> None:
        for request in self._scheduler.admit():
            self._open(request)
        self._count_line()
        if (move := self._scheduler.tidy()) is not None:
            self._runner.copy(*move)
            self._sampler.move(move.source, move.target)
        began = time.perf_counter()
        budget = self.rates.prompt_budget(self._config.most_step_s) if self._answering else None
        step = self._scheduler.plan(began, budget)
        if step.chunks:
            logprobs = self._runner.step(_batch(step))
            self._scheduler.advance(step)
            before = self._counters.generated_tokens
            self._choose(step, logprobs)
            gained = self._counters.generated_tokens - before
            self._count(step, time.perf_counter() - began, gained)
        self._rest_s = step.wait_s
        self._publish()

    def _count_line(self) -> None:
        """Tell who waits their places and about how long it takes from there, now and then."""
        now = time.perf_counter()
        if not self._scheduler.waiting or now < self._line_from_s:
            return
        self._line_from_s = now + _COUNT_LINE_S
        left, prompts = self.rates.left(self._scheduler.running), 0
        for ahead, request in enumerate(self._scheduler.line()):
            ticket, prompts = self._tickets[request], prompts + len(request.prompt)
            ticket.place = ahead + 1
            ticket.wait_s = self.rates.eta_s(
                prompt_tokens=prompts,
                ahead=ahead,
                slots=self.slots,
                free=False,
                left=left,
                period_s=self._period_s,
            )

    def _embed(self) -> None:
        """One piece of what is read for embeddings, if answers leave time for it."""
        began = time.perf_counter()
        resting = not self._scheduler.busy or self._rest_s > 0
        if not resting and began < self._embed_from_s:
            return
        most = int(self._config.most_step_s / _EMBEDDING_SHARE / self.rates.prefill_s)
        piece = self.embeddings.plan(min(self._config.step_tokens, max(_LEAST_PIECE, most)))
        if piece is None:
            return
        self.embeddings.advance(piece, self._runner.pool(piece.batch))
        took = time.perf_counter() - began
        self._embed_from_s = began + took * _EMBEDDING_SHARE
        self._counters.embedded_tokens += len(piece.batch.ids)
        self._counters.busy_s += took

    @property
    def _answering(self) -> bool:
        """Whether somebody would notice a long step."""
        return any(not request.missing for request in self._scheduler.running)

    def _open(self, request: Request) -> None:
        """Prepare the slot that ``request`` was just given, with what is kept of its chat."""
        ticket = self._tickets[request]
        self.gate.leave(ticket)
        ticket.place = 0
        if ticket.asked_s is not None:
            ticket.queue_s = time.perf_counter() - ticket.asked_s
        self._sampler.open(request.slot, ticket.sampling, request.prompt)
        request.guess = self._guess(ticket)
        hit = self._prefixes.find(request.scope, request.prompt)
        shared, start = self._prefixes.shared, 0
        if shared is not None and self._prefixes.starts_shared(request.prompt):
            start = len(shared.ids)
            if hit.tokens:
                self._runner.load(request.slot, 0, shared.saved, min(start, hit.tokens))
        if hit.kept is not None:
            begin = hit.kept.start
            self._runner.load(request.slot, begin, hit.kept.saved, hit.tokens - begin)
        request.cached = hit.tokens
        self._counters.reused_tokens += hit.tokens

    def _guess(self, ticket: Ticket) -> Guess | None:
        """None where each choice depends on the one before: those are made one at a time."""
        most = self.loaded.draft_tokens
        if not most or not ticket.sampling.plain:
            return None
        known = self.loaded.known
        return Lookup(ticket.request.prompt, most) if known is None else Guess(known, most)

    def _keep(self, request: Request) -> None:
        """Keep the cache of an answer that ends, for its chat's next turn."""
        if not request.scope or request.cached < _LEAST_KEPT_TOKENS:
            return
        ids = [*request.prompt, *request.fed][: request.cached]
        start = self._prefixes.starts_shared(ids)
        if request.cached - start >= _LEAST_KEPT_TOKENS:
            saved = self._runner.save(request.slot, start, request.cached)
            self._prefixes.keep(request.scope, Kept(np.array(ids, np.int64), start, saved))

    def _choose(self, step: Step, logprobs: Floats) -> None:
        asking = [chunk for chunk in step.chunks if chunk.samples]
        firsts = list(itertools.accumulate((one.samples for one in asking[:-1]), initial=0))
        judging = [at for at, one in enumerate(asking) if self._tickets[one.request].unjudged]
        if judging:
            for at in judging:
                self._judge(self._tickets[asking[at].request], logprobs[firsts[at]])
            logprobs = np.delete(logprobs, [firsts[at] for at in judging], axis=0)
            asking = [one for at, one in enumerate(asking) if at not in judging]
        if asking:
            slots = [one.request.slot for one in asking for _ in range(one.samples)]
            ids, chosen = self._sampler.choose(logprobs, slots)
            choices = zip(ids.tolist(), chosen.tolist(), strict=True)
            for one in asking:
                self._take(one, list(itertools.islice(choices, one.samples)))

    def _take(self, chunk: Chunk, choices: Sequence[tuple[int, float]]) -> None:
        """The model's choice behind each token that ran, as long as what ran was its own choice."""
        ticket = self._tickets[chunk.request]
        right = 0
        for (token, logprob), guess in itertools.zip_longest(choices, chunk.draft):
            self._accept(ticket, token, logprob)
            if ticket.done or token != guess:
                break
            self._scheduler.confirm(chunk.request)
            right += 1
        if chunk.draft and chunk.request.guess is not None:
            chunk.request.guess.held(right, len(chunk.draft))
            self._counters.drafted_tokens += len(chunk.draft)
            self._counters.accepted_tokens += right

    def _judge(self, ticket: Ticket, logprobs: Floats) -> None:
        assert ticket.first is not None
        self._answered(ticket)
        ticket.verdict = judge(logprobs, ticket.first)
        self._scheduler.feed(ticket.request, ticket.verdict.token_id)

    def _accept(self, ticket: Ticket, token: int, logprob: float) -> None:
        if logprob != logprob:  # NaN
            error = EngineError("the model's probabilities are not numbers; rebuild the model")
            return self._end(ticket, None, error)
        self._answered(ticket)
        now = time.perf_counter()
        reason = self._scheduler.accept(ticket.request, token, now)
        if reason != "stop":
            self._counters.generated_tokens += 1
            self._wake(ticket, ticket.push(token, logprob, now, self._config.wake_every_s))
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
        if ticket.request.slot >= 0 and error is None:
            self._keep(ticket.request)
        self._scheduler.remove(ticket.request)
        self._tickets.pop(ticket.request, None)
        self.gate.leave(ticket)
        self._wake(ticket, ticket.end(reason, error))

    def _answered(self, ticket: Ticket) -> None:
        """Note, once a ticket, how long its first token took and what was promised."""
        if ticket.asked_s is not None:
            waited_s = time.perf_counter() - ticket.asked_s
            ticket.prefill_s = waited_s - (ticket.queue_s or 0.0)
            self.rates.waited(ticket.promised_s, waited_s)
            ticket.asked_s = None

    def _wake(self, ticket: Ticket, waiter: Waiter | None) -> None:
        if isinstance(waiter, threading.Event):
            waiter.set()
        elif waiter is not None:
            loop, future = waiter
            self._wakes.setdefault(loop, []).append((ticket, future))

    def _publish(self) -> None:
        """One call per event loop wakes all its readers."""
        while self._wakes:
            loop, readers = self._wakes.popitem()
            try:
                loop.call_soon_threadsafe(_resolve, [future for _, future in readers])
            except Exception:  # the loop was closed: its readers are gone, whatever it raises
                for ticket, _ in readers:
                    self._end(ticket, "cancelled")

    def _count(self, step: Step, seconds: float, gained: int) -> None:
        prefill = sum(chunk.count for chunk in step.chunks if not chunk.decodes)
        rows = sum(chunk.samples > 0 for chunk in step.chunks)
        self.rates.ran(
            prefill_tokens=prefill, seconds=seconds, gained=max(1.0, gained / rows) if rows else 1.0
        )
        self._counters.steps += 1
        self._counters.batches[len(step.chunks)] += 1
        self._counters.prompt_tokens += prefill
        self._counters.busy_s += seconds

    def _fail_all(self, error: EngineError) -> None:
        """Nobody may wait for a thread that has ended, not even who comes this moment."""
        with self._intake:
            self._ended = True
        left = list(self._tickets.values())
        with contextlib.suppress(Empty):
            while True:
                command = self.commands.get_nowait()
                if isinstance(command, Ticket):
                    left.append(command)
                elif isinstance(command, Embedding):
                    command.fail(error)
        self.embeddings.fail_all(error)
        for ticket in left:
            # Bookkeeping may be what broke: only what a reader sees is touched.
            self.gate.leave(ticket)
            ended = ("cancelled", None) if ticket.closed else (None, error)
            self._wake(ticket, ticket.end(*ended))
        for loop, readers in self._wakes.items():
            with contextlib.suppress(Exception):
                loop.call_soon_threadsafe(_resolve, [future for _, future in readers])
        self._prefixes = PrefixCache(0)
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
        sum(chunk.decodes for chunk in chunks),
    )
