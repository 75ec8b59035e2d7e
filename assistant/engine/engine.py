"""The engine: admits requests to one worker thread that serves many generations at once.

Starts, closes and restarts the thread, refuses at once what does not fit, and survives a fork.
Speaks token ids and log-probabilities; knows nothing of texts, messages, users or HTTP.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from assistant.engine.errors import (
    EngineClosed,
    EngineCrashed,
    EngineError,
    Overloaded,
    PromptTooLong,
)
from assistant.engine.generation import Generation, Ticket
from assistant.engine.manifest import MODEL, Manifest
from assistant.engine.runner import OnnxRunner, Runner, batching_error
from assistant.engine.sampling import FirstTokenRule, Sampling
from assistant.engine.scheduler import Request
from assistant.engine.text import Codec
from assistant.engine.worker import EngineConfig, EngineStats, Loaded, Worker


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
        self._worker: Worker | None = None
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
            self._worker = worker = Worker(self.config, loaded)
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
        ticket = Ticket(request, sampling or Sampling(), first)
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

    def _running(self) -> Worker:
        worker = self._worker
        if worker is None and not self._closed:
            self.start()
            worker = self._worker
        if worker is None or not worker.alive:
            raise self._ended(worker)
        return worker

    def _ended(self, worker: Worker | None) -> EngineError:
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
