"""A model in a few lines of NumPy, an engine factory, and tiny ONNX models with random weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from assistant.engine import Engine, EngineConfig, Generation
from assistant.engine.runner import Batch, Saved
from assistant.engine.sampling import Floats
from assistant.engine.text import Codec
from assistant.engine.worker import Loaded
from assistant.modelkit.build import build_random

PATIENCE_S = 20.0

# The same examples on every machine and none remembered; a slow machine is no failure.
hypothesis.settings.register_profile("engine", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("engine")


class FakeRunner:
    """Its next token depends on every token of the row's context and on nothing else.

    It keeps the contexts itself, slot by slot, so wrong bookkeeping changes its answers. ``pause``
    makes each step wait for ``step_once``; ``fault`` is raised by the next step.
    """

    def __init__(self, vocab_size: int = 64) -> None:
        self.vocab_size = vocab_size
        self.token_bytes = 8
        self.width = 4
        #: Those of ``batches`` that were run for embeddings.
        self.pooled: list[Batch] = []
        self.batches: list[Batch] = []
        #: (source, target, tokens) of each copy between slots.
        self.copies: list[tuple[int, int, int]] = []
        self.fault: BaseException | None = None
        self.poison: int | None = None
        self.closed = False
        self._contexts: dict[int, list[int]] = {}
        self._paused = False
        self._begun = threading.Semaphore(0)
        self._go = threading.Semaphore(0)

    def logprobs(self, context: Sequence[int]) -> Floats:
        mixed = 0
        for token in context:
            mixed = (mixed * 31 + token + 1) % 1_000_003
        ranks = (np.arange(self.vocab_size) * 29 + mixed) % self.vocab_size
        scores = -ranks.astype(np.float64) / 4
        return (scores - np.log(np.exp(scores).sum())).astype(np.float32)

    def greedy(self, prompt: Sequence[int], count: int, banned: Sequence[int] = ()) -> list[int]:
        """What the model writes alone, one token after another."""
        context = list(prompt)
        for _ in range(count):
            row = self.logprobs(context)
            row[list(banned)] = -np.inf
            context.append(int(row.argmax()))
        return context[len(prompt) :]

    def step(self, batch: Batch) -> Floats:
        if self._paused:
            self._begun.release()
            assert self._go.acquire(timeout=PATIENCE_S)
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        self.batches.append(batch)
        rows, first = [], 0
        for slot, start, count, samples in zip(
            batch.slots.tolist(),
            batch.starts.tolist(),
            batch.counts.tolist(),
            batch.samples.tolist(),
            strict=True,
        ):
            context = self._contexts.get(slot, [])
            assert len(context) >= start, "a step skips tokens that were never run"
            context = context[:start] + batch.ids[first : first + count].tolist()
            self._contexts[slot] = context
            first += count
            for end in range(len(context) - samples + 1, len(context) + 1):
                row = self.logprobs(context[:end])
                rows.append(np.full_like(row, np.nan) if self.poison in context[:end] else row)
        return np.array(rows, np.float32).reshape(len(rows), self.vocab_size)

    def pool(self, batch: Batch) -> Floats:
        """Some of the log-probabilities: they depend on the whole prompt."""
        self.pooled.append(batch)
        return self.step(batch)[:, : self.width]

    def copy(self, source: int, target: int, tokens: int) -> None:
        self.copies.append((source, target, tokens))
        self._contexts[target] = self._held(source, tokens)

    def save(self, slot: int, start: int, stop: int) -> Saved:
        return (np.array(self._held(slot, stop)[start:], np.int64),)

    def load(self, slot: int, start: int, saved: Saved, tokens: int) -> None:
        before = self._contexts.get(slot, [])[:start]
        assert len(before) == start and tokens <= len(saved[0])
        self._contexts[slot] = before + saved[0][:tokens].tolist()

    def held(self, slot: int) -> list[int]:
        """The tokens whose keys and values a real slot would hold."""
        return list(self._contexts.get(slot, []))

    def _held(self, slot: int, tokens: int) -> list[int]:
        held = self.held(slot)[:tokens]
        assert len(held) == tokens, "a copy takes tokens that were never run"
        return held

    def pause(self) -> None:
        self._paused = True

    def begun(self) -> None:
        """Wait until a step has begun, holding what it planned."""
        assert self._begun.acquire(timeout=PATIENCE_S), "no step came"

    def finish(self) -> None:
        """Let the step that has begun end."""
        self._go.release()

    def resume(self) -> None:
        self._paused = False
        self._go.release()

    def close(self) -> None:
        self.closed = True

    def abandon(self) -> None:
        self.closed = True


MakeEngine = Callable[..., tuple[Engine, FakeRunner]]


@pytest.fixture
def make_engine() -> Iterator[MakeEngine]:
    """Engines over a FakeRunner, started; closed at the end of the test."""
    engines: list[Engine] = []

    def make(*, banned: tuple[int, ...] = (), vocab: int = 64, **config: Any) -> Any:
        runners: list[FakeRunner] = []

        def load(_: EngineConfig) -> Loaded:
            runners.append(FakeRunner(vocab))
            return Loaded(runners[-1], banned)

        settings = {"max_batch": 4, "step_tokens": 16, "context_tokens": 128, **config}
        engine = Engine(EngineConfig(Path("unused"), **settings), load=load)
        engines.append(engine)
        engine.start()
        runners[0].batches.clear()  # the self-check's
        return engine, runners[0]

    yield make
    for engine in engines:
        if engine._worker is not None:
            runner = engine._worker.loaded.runner
            if isinstance(runner, FakeRunner):
                runner.resume()
        engine.close()


def ids(generation: Generation) -> list[int]:
    """Everything that is still to come, read without an event loop."""
    return [token.id for batch in generation.tokens_sync() for token in batch]


def pairs(generation: Generation) -> list[tuple[int, float]]:
    """As ``ids``, with the log-probabilities."""
    return [(token.id, token.logprob) for batch in generation.tokens_sync() for token in batch]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models with seeded random weights, by quantisation."""
    root = tmp_path_factory.mktemp("models")
    quants = ("fp32", "row8", "static8")
    for quant in quants:
        build_random("tiny", root / quant, quant=quant, seed=0)
    return {quant: root / quant for quant in quants}


@pytest.fixture(scope="session")
def tiny(models: dict[str, Path]) -> Iterator[Engine]:
    """One started engine over the fp32 model, for tests that only read."""
    engine = Engine(EngineConfig(models["fp32"], threads=1, max_batch=8, step_tokens=32))
    engine.start()
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def codec(tiny: Engine) -> Codec:
    assert tiny.codec is not None
    return tiny.codec
