"""Drives our engine as its callers would: asyncio, on the public face, one reader per answer.

What all workloads share: opening an engine with room for them, asking, a closed loop. Measures what
a reader sees. Newer options of the engine are used where it has them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from assistant.benchmark.figures import Figures, Times
from assistant.benchmark.meter import Meter
from assistant.benchmark.workloads import Load
from assistant.engine import ChatTurn, Engine, EngineConfig, Generation

_CONFIG = {one.name for one in fields(EngineConfig)}
_SUBMIT = set(inspect.signature(Engine.submit).parameters)
PACED = "reading_tokens_per_s" in _CONFIG
REUSES = "scope" in _SUBMIT
#: A model's answers end long before.
_REPLY_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine must hold. ``queue`` 0: all chats may ask at once, as nobody shall be refused
    by accident."""

    chats: int
    tokens: int
    queue: int = 0
    reading_tokens_per_s: float = 0.0
    #: As in EngineConfig.
    draft_tokens: int | None = None


@contextmanager
def opened(model: Path, threads: int, room: Room) -> Iterator[Engine]:
    """A started engine, closed at the end. Raises: ManifestError, EngineError, ValueError."""
    context_tokens = max(1024, room.tokens)
    queue = room.queue or max(room.chats, 128)
    more: dict[str, Any] = {}
    if room.reading_tokens_per_s and PACED:
        more["reading_tokens_per_s"] = room.reading_tokens_per_s
    config = EngineConfig(
        model,
        threads=threads,
        max_batch=room.chats,
        max_queue=queue,
        max_queue_tokens=queue * context_tokens,
        step_tokens=max(256, 2 * room.chats),
        context_tokens=context_tokens,
        draft_tokens=room.draft_tokens,
        **more,
    )
    engine = Engine(config)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def vocabulary(engine: Engine) -> int:
    assert engine.manifest is not None
    return engine.manifest.architecture.vocab_size


def prompts(engine: Engine, count: int, tokens: int, seed: int) -> list[list[int]]:
    return Load(count, tokens, 1, 1, seed).prompts(vocabulary(engine))


def submit(engine: Engine, prompt: Sequence[int], count: int, scope: str = "") -> Generation:
    """An answer of ``count`` tokens: nothing stops it. Raises: EngineError."""
    more: dict[str, Any] = {"scope": scope} if scope and REUSES else {}
    return engine.submit(prompt, max_new_tokens=count, **more)


@dataclass(slots=True)
class Answer:
    """``arrivals``: when each token came. *Units*: seconds of ``perf_counter``."""

    asked: float
    ids: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.asked

    async def read(self, generation: Generation) -> None:
        async for tokens in generation:
            now = time.perf_counter()
            self.ids += [token.id for token in tokens]
            self.arrivals += [now] * len(tokens)

    def into(self, times: Times) -> None:
        """Tokens that came together are one gap and zeros."""
        stamps, counts = np.unique(self.arrivals, return_counts=True)
        before = self.asked
        for at, (stamp, count) in enumerate(zip(stamps.tolist(), counts.tolist(), strict=True)):
            times.saw(stamp - before, count, first=at == 0)
            before = stamp


async def ask(engine: Engine, prompt: Sequence[int], count: int, scope: str = "") -> Answer:
    """One answer, read to its end. Raises: EngineError; ValueError when it was cut short."""
    answer = Answer(time.perf_counter())
    await answer.read(submit(engine, prompt, count, scope))
    if len(answer.ids) < count:
        raise ValueError(
            f"the model's context is too small for {len(prompt)} prompt tokens and {count} new "
            "ones; the answer was cut short"
        )
    return answer


async def reply(engine: Engine, question: str) -> Answer:
    """A whole answer of a model trained here, chosen and ended as the product does it."""
    assert engine.codec is not None and engine.manifest is not None
    answer = Answer(time.perf_counter())
    generation = engine.submit(
        engine.codec.encode_chat([ChatTurn("user", (question,))]),
        max_new_tokens=_REPLY_TOKENS,
        stop_ids=engine.codec.end_ids,
        first=engine.manifest.first_token_rule(),
    )
    await answer.read(generation)
    return answer


async def closed_loop(engine: Engine, load: Load) -> Times:
    """What all readers of ``load`` saw."""
    times = Times()

    async def chat(prompt: Sequence[int]) -> None:
        for _ in range(load.rounds):
            (await ask(engine, prompt, load.new_tokens)).into(times)

    await asyncio.gather(*(chat(prompt) for prompt in load.prompts(vocabulary(engine))))
    return times


def measured(engine: Engine, load: Load) -> Figures:
    """Figures of a closed loop, after an unmeasured round."""
    asyncio.run(closed_loop(engine, load.warm_up()))
    meter = Meter()
    times = asyncio.run(closed_loop(engine, load))
    usage = meter.stop()
    return Figures.of(times, usage)
