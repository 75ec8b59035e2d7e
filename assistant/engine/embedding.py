"""Prompts that are read for their embeddings: what waits, and which piece of it is run next.

Bookkeeping beside the scheduler's, in rows of its own behind those of the answers. Knows no runner
and no clock; when a piece may run is the worker's to say.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from assistant.engine.errors import EngineError
from assistant.engine.runner import Batch
from assistant.engine.sampling import Floats
from assistant.engine.scheduler import chunk

#: Rows that embeddings are computed in: as many short prompts share a piece.
ROWS = 8


@dataclass(slots=True, eq=False)
class Embedding:
    """A command: read these prompts, none of them empty. ``future`` gets a unit vector for each, in
    order: (N, width) float32. Who does not want them any more cancels it."""

    prompts: Sequence[Sequence[int]]
    future: Future[Floats] = field(default_factory=Future)
    #: Tokens of all prompts.
    tokens: int = 0
    #: Places of the prompts that are left, the longest first: taken from the end.
    left: list[int] = field(default_factory=list)
    #: Tokens of the next one that are read already.
    start: int = 0
    found: dict[int, Floats] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tokens = sum(map(len, self.prompts))
        self.left = sorted(range(len(self.prompts)), key=lambda at: -len(self.prompts[at]))

    def fail(self, error: EngineError) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Piece(NamedTuple):
    """One run of the model. ``ends``: places of the prompts whose last token is in it."""

    job: Embedding
    batch: Batch
    ends: list[int]


class Embeddings:
    """What waits for its embeddings, bounded in tokens. ``slot``: the first of ``ROWS``."""

    def __init__(self, slot: int, most_tokens: int) -> None:
        self._slot, self._most_tokens = slot, most_tokens
        self._jobs: list[Embedding] = []
        self._lock = threading.Lock()
        self.tokens = 0

    # Called by any thread.

    def enter(self, job: Embedding) -> bool:
        """Whether there was room; an empty queue takes any. What entered has to be added."""
        with self._lock:
            if self.tokens and self.tokens + job.tokens > self._most_tokens:
                return False
            self.tokens += job.tokens
        return True

    # Called by the worker's own thread.

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def add(self, job: Embedding) -> None:
        self._jobs.append(job)

    def plan(self, tokens: int) -> Piece | None:
        """The next piece, of at most so many tokens, padding included. A prompt that was cut goes
        on in its row; then comes who has the least left."""
        for job in [job for job in self._jobs if job.future.cancelled()]:
            self._leave(job)
        if not self._jobs:
            return None
        return self._piece(min(self._jobs, key=lambda job: (not job.start, len(job.left))), tokens)

    def advance(self, piece: Piece, states: Floats) -> None:
        """Note what ``piece`` gave: the state at the end of each prompt that it ends."""
        job = piece.job
        job.start = 0 if piece.ends else job.start + len(piece.batch.ids)
        for at, state in zip(piece.ends, states, strict=True):
            job.left.pop()
            job.found[at] = state / np.linalg.norm(state)
        if not job.left:
            self._leave(job)
            _finish(job)

    def fail_all(self, error: EngineError) -> None:
        for job in list(self._jobs):
            self._leave(job)
            job.fail(error)

    def _piece(self, job: Embedding, tokens: int) -> Piece:
        at = job.left[-1]
        prompt = job.prompts[at]
        count = chunk(len(prompt) - job.start, tokens)
        if job.start or count < len(prompt):
            part, ends = prompt[job.start : job.start + count], job.start + count == len(prompt)
            batch = Batch.of([self._slot], [job.start], [ends], [part])
            return Piece(job, batch, [at] if ends else [])
        ends_here = _together(job, tokens)
        rows = len(ends_here)
        slots = range(self._slot, self._slot + rows)
        prompts = [job.prompts[place] for place in ends_here]
        return Piece(job, Batch.of(slots, [0] * rows, [True] * rows, prompts), ends_here)

    def _leave(self, job: Embedding) -> None:
        self._jobs.remove(job)
        with self._lock:
            self.tokens -= job.tokens


def _together(job: Embedding, tokens: int) -> list[int]:
    """Places of the next prompts that fit a piece as a rectangle, shortest first."""
    fitting = job.left[-1:]
    for place in job.left[-2 : -ROWS - 1 : -1]:  # each at least as long as the one before
        if (len(fitting) + 1) * len(job.prompts[place]) > tokens:
            break
        fitting.append(place)
    return fitting


def _finish(job: Embedding) -> None:
    vectors = np.stack([job.found[at] for at in range(len(job.prompts))])
    if not np.isfinite(vectors).all():
        job.fail(EngineError("the model's states are not numbers; rebuild the model"))
    elif job.future.set_running_or_notify_cancel():
        job.future.set_result(vectors)
