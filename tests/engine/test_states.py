"""Whatever is asked, cancelled, shared and dropped, in whatever order: the books stay true.

The engine with its worker, scheduler and kept chats, over the model in NumPy; one thread, and a
clock that the test moves, so that a failure is found again.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from assistant.engine import Engine, EngineConfig, Generation, Overloaded
from assistant.engine.drafts import Guess, Known
from assistant.engine.generation import Ticket
from assistant.engine.prefix import Kept
from assistant.engine.runner import Batch
from assistant.engine.sampling import Floats
from assistant.engine.worker import Loaded, Worker
from tests.engine.conftest import FakeRunner

VOCAB, CONTEXT, SLOTS = 16, 64, 8
STOP = 3
tokens = st.integers(0, VOCAB - 1)


@dataclass(frozen=True)
class Ask:
    """What a caller wants next. ``goes_on``: which of its last chats it continues, 0 for none."""

    scope: str
    new: list[int]
    count: int
    stops: bool
    goes_on: int
    begins_shared: bool


asks = st.builds(
    Ask,
    scope=st.sampled_from(["ana", "ben", ""]),
    new=st.lists(tokens, min_size=1, max_size=12),
    count=st.integers(1, 12),
    stops=st.booleans(),
    goes_on=st.sampled_from([0, 1, 1, 2, 3]),
    begins_shared=st.sampled_from([True, True, True, False]),
)


class HandDriven(Worker):
    """Its thread ends at once: the test takes the steps. Its guesses are right but for some."""

    wrong = 0.0

    def _live(self) -> None:
        """Nothing."""

    def _guess(self, ticket: Ticket) -> Guess | None:
        if not self.loaded.draft_tokens:
            return None
        rng = random.Random(str(ticket.request.prompt))
        runner = cast(FakeRunner, self.loaded.runner)
        alone = runner.greedy(ticket.request.prompt, ticket.request.max_new_tokens + 3)
        noisy = [rng.randrange(VOCAB) if rng.random() < self.wrong else one for one in alone]
        return Guess(Known([noisy]), self.loaded.draft_tokens)


class Clock:
    """Stands in for the module ``time``; every look costs a moment."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def perf_counter(self) -> float:
        self.now_s += 1e-4
        return self.now_s


class Slow(FakeRunner):
    """A step takes as long as the test wants."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(VOCAB)
        self.clock = clock
        self.step_s = 0.001

    def step(self, batch: Batch) -> Floats:
        self.clock.now_s += self.step_s
        return super().step(batch)


@dataclass(eq=False)
class Asked:
    """One request and what its reader has seen of it."""

    scope: str
    prompt: list[int]
    #: What the model writes alone, up to the stop token or the length.
    expected: list[int]
    generation: Generation
    shown: list[int] = field(default_factory=list)
    closed: bool = False

    @property
    def ticket(self) -> Ticket:
        return self.generation._ticket

    def read(self) -> None:
        """Take what has come, without waiting."""
        while isinstance(got := self.ticket.take(threading.Event), list):
            self.shown += [token.id for token in got]
        assert self.shown == self.expected[: len(self.shown)]
        if self.ticket.done and not self.closed:
            assert self.ticket.error is None
            assert self.shown == self.expected


class Books(RuleBasedStateMachine):
    config = EngineConfig(
        Path("unused"),
        max_batch=SLOTS,
        max_queue=6,
        max_queue_tokens=120,
        step_tokens=24,
        context_tokens=CONTEXT,
        most_step_s=0.02,
    )

    @initialize(
        pace=st.sampled_from([0.0, 30.0]),
        prefix_bytes=st.sampled_from([700, 2000, 8000]),
        draft_tokens=st.sampled_from([0, 1, 3, 15]),
        wrong=st.sampled_from([0.0, 0.2, 0.9]),
    )
    def start(self, pace: float, prefix_bytes: int, draft_tokens: int, wrong: float) -> None:
        config = replace(self.config, reading_tokens_per_s=pace, prefix_bytes=prefix_bytes)
        self.clock = Clock()
        self.patches = [
            mock.patch(f"assistant.engine.{name}.time", self.clock) for name in ("engine", "worker")
        ]
        for patch in self.patches:
            patch.start()
        self.runner = Slow(self.clock)
        self.worker = HandDriven(config, Loaded(self.runner, draft_tokens=draft_tokens))
        self.worker.wrong = wrong
        self.engine = Engine(config)
        self.engine._worker = self.worker
        self.asked: list[Asked] = []
        self.shared: list[int] = []
        self.shares = 0
        self.handled = True

    def teardown(self) -> None:
        if hasattr(self, "worker"):
            self.finish()
            self.everybody_left()
            for patch in self.patches:
                patch.stop()

    # What may happen.

    @rule(asks=st.lists(asks, min_size=1, max_size=6))
    def submit(self, asks: list[Ask]) -> None:
        for ask in asks:
            self._submit(ask, self._prompt(ask))
        self.handled = False

    def _prompt(self, ask: Ask) -> list[int]:
        """The next turn of one of the caller's last chats, or the first of a new one."""
        chats = [one for one in self.asked if one.scope == ask.scope][-3:]
        if ask.goes_on and chats:
            last = chats[-min(ask.goes_on, len(chats))]
            prompt = [*last.prompt, *last.shown, *ask.new]
        else:
            prompt = [*(self.shared if ask.begins_shared else ()), *ask.new]
        return prompt if len(prompt) < CONTEXT else ask.new

    def _submit(self, ask: Ask, prompt: list[int]) -> None:
        stop_ids = [STOP] if ask.stops else []
        try:
            generation = self.engine.submit(
                prompt, max_new_tokens=ask.count, stop_ids=stop_ids, scope=ask.scope
            )
        except Overloaded:
            gate = self.worker.gate
            full = len(gate) == self.config.max_queue
            assert full or gate.tokens + len(prompt) > self.config.max_queue_tokens
            return
        alone = self.runner.greedy(prompt, min(ask.count, CONTEXT - len(prompt)))
        expected = alone[: alone.index(STOP)] if ask.stops and STOP in alone else alone
        self.asked.append(Asked(ask.scope, prompt, expected, generation))

    @precondition(lambda self: any(not one.ticket.done for one in self.asked))
    @rule(which=st.integers(0, 1000), again=st.booleans())
    def close(self, which: int, again: bool) -> None:
        """Somebody who runs, waits or was not even seen; doing it twice is harmless."""
        here = [one for one in self.asked if not one.ticket.done]
        one = here[which % len(here)]
        for _ in range(1 + again):
            one.generation.close()
        one.closed = True
        self.handled = False

    @rule(count=st.integers(1, 8), step_s=st.sampled_from([0.001, 0.005, 0.2]))
    def step(self, count: int, step_s: float) -> None:
        self.runner.step_s = step_s
        for _ in range(count):
            self._advance()

    @precondition(lambda self: len(self.asked) > 8)
    @rule()
    def finish(self) -> None:
        for _ in range(2000):
            if not self._advance():
                return
        raise AssertionError("somebody is never served")

    @precondition(lambda self: len(self.asked) >= 12 * self.shares)
    @rule(ids=st.lists(tokens, min_size=2, max_size=14))
    def share(self, ids: list[int]) -> None:
        self.engine.share_prefix(ids)
        self.shared = ids
        self.shares += 1
        self.handled = False

    @precondition(lambda self: len(self.worker._prefixes) > 2)
    @rule(count=st.integers(1, 300))
    def evict(self, count: int) -> None:
        """A stranger's chat, large or small, takes its room among those kept."""
        ids = np.zeros(count, np.int64)
        self.worker._prefixes.keep("stranger", Kept(ids, 0, (ids.copy(),)))

    def _advance(self) -> bool:
        """One turn of the worker's loop, with the rest it takes; whether there was any work."""
        worker = self.worker
        if not worker._scheduler.busy and worker.commands.empty():
            return False
        self.clock.now_s += worker._rest_s
        worker._rest_s = 0.0
        assert worker._drain()
        worker._step()
        self.handled = True
        for one in self.asked:
            one.read()
        self._figures()
        return True

    # What must hold.

    def _figures(self) -> None:
        stats, running = self.engine.stats(), self.worker._scheduler.running
        cached = sum(one.cached for one in running)
        assert stats.kv_bytes == cached * self.runner.token_bytes
        assert stats.kv_usage == cached / (SLOTS * CONTEXT) <= 1
        assert (stats.running, stats.waiting) == (len(running), len(self.worker.gate))
        assert stats.kept_bytes == self.worker._prefixes.bytes
        done = [one for one in self.asked if one.ticket.done]
        assert stats.finished + stats.cancelled == len(done)
        assert stats.generated_tokens >= sum(len(one.shown) for one in self.asked)
        assert stats.accepted_tokens <= stats.drafted_tokens

    @invariant()
    def every_slot_is_free_or_one_request_s(self) -> None:
        books = self.worker._scheduler
        used = [one.slot for one in books.running]
        assert sorted([*used, *books._free]) == list(range(SLOTS))
        assert all(one.slot == -1 for one in books.waiting)

    @invariant()
    def a_slot_holds_what_the_books_say(self) -> None:
        for one in self.worker._scheduler.running:
            held = [*one.prompt, *one.fed][: one.cached]
            assert self.runner.held(one.slot)[: one.cached] == held
            assert len(held) == one.cached <= CONTEXT

    @invariant()
    def the_gate_counts_who_waits(self) -> None:
        gate = self.worker.gate
        assert gate.tokens == sum(len(one.request.prompt) for one in gate.inside)
        assert len(gate) <= self.config.max_queue
        if self.handled:
            tickets = self.worker._tickets
            assert gate.inside == {tickets[one] for one in self.worker._scheduler.waiting}

    @invariant()
    def nobody_is_lost(self) -> None:
        if self.handled:
            books = self.worker._scheduler
            known = [*books.running, *books.waiting]
            assert len(set(known)) == len(known)
            assert set(known) == self.worker._tickets.keys()
            open_ones = {one.ticket for one in self.asked if not one.ticket.done}
            assert open_ones == set(self.worker._tickets.values())

    @invariant()
    def what_is_kept_is_bounded_and_true(self) -> None:
        cache = self.worker._prefixes
        entries = list(cache._kept.values())
        assert cache.bytes == sum(kept.bytes for _, kept in entries) <= cache._most_bytes
        assert sum(map(len, cache._scopes.values())) == len(entries) == len(cache)
        for scope, kept in entries:
            ids = kept.ids.tolist()
            assert kept.saved[0].tolist() == ids[kept.start :]
            assert scope and (scope == "stranger" or self._asked_by(scope, ids))
            assert kept.start in (0, cache.starts_shared(ids))
            assert kept.start < len(ids)

    def _asked_by(self, scope: str, ids: list[int]) -> bool:
        mine = ([*one.prompt, *one.expected] for one in self.asked if one.scope == scope)
        return any(whole[: len(ids)] == ids for whole in mine)

    def everybody_left(self) -> None:
        assert all(one.ticket.done for one in self.asked)
        assert sorted(self.worker._scheduler._free) == list(range(SLOTS))
        gate = self.worker.gate
        assert (len(gate), gate.tokens, self.worker._tickets) == (0, 0, {})
        stats = self.engine.stats()
        assert (stats.running, stats.waiting, stats.kv_bytes) == (0, 0, 0)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=40, stateful_step_count=50)
