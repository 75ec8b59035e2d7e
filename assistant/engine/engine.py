"""The engine: admits requests to one worker thread that serves many generations at once.

Starts, closes and restarts the thread, refuses at once what does not fit, and survives a fork.
Speaks token ids and log-probabilities; knows nothing of texts, messages, users or HTTP.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from assistant.engine.drafts import FILE as DRAFTS
from assistant.engine.drafts import Known
from assistant.engine.embedding import ROWS, Embedding
from assistant.engine.errors import (
    EngineClosed,
    EngineCrashed,
    EngineError,
    NoEmbeddings,
    Overloaded,
    PromptTooLong,
)
from assistant.engine.generation import Generation, Share, Ticket
from assistant.engine.machine import memory_bytes
from assistant.engine.manifest import MODEL, Architecture, Manifest
from assistant.engine.plain import PlainRunner
from assistant.engine.runner import Batch, OnnxRunner, Runner, batching_error, token_bytes
from assistant.engine.sampling import FirstTokenRule, Floats, Sampling
from assistant.engine.scheduler import Rates, Request
from assistant.engine.text import ChatTurn, Codec
from assistant.engine.wide import FILE as WIDE
from assistant.engine.wide import Wide
from assistant.engine.worker import USUAL_DRAFT, EngineConfig, EngineStats, Loaded, Worker


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
                rates = _first_rates(loaded.runner, self.config)
            except BaseException:
                loaded.runner.close()
                raise
            self._worker = worker = Worker(self.config, loaded, rates)
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

    def first_token_rule(self, turns: Sequence[ChatTurn]) -> FirstTokenRule | None:
        """How to read the first token after these turns; None for a model without intents.

        Raises: EngineCrashed, EngineClosed.
        """
        loaded = self._running().loaded
        rule = loaded.manifest.first_token_rule() if loaded.manifest else None
        if rule is None or loaded.wide is None or loaded.manifest is None:
            return rule
        opinion = loaded.wide.opinion(turns, loaded.manifest.topics)
        return replace(rule, prior=tuple(opinion.intents), scope_prior=opinion.scope)

    def submit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Iterable[int] = (),
        first: FirstTokenRule | None = None,
        scope: str = "",
        queues: bool = True,
    ) -> Generation:
        """Queue a prompt. An answer longer than the context allows ends early, by length.

        ``scope`` is the caller: who waits is served fairly over scopes, and what is kept of earlier
        answers is found within one. Nothing is kept for the empty scope. Without ``queues`` it is
        refused unless a slot is free, and another for who comes next.
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
        sampling = sampling or Sampling()
        named = (*(first.ids if first else ()), *sampling.banned)
        ids = _checked_ids(prompt, named, worker.loaded.runner.vocab_size)
        request = Request(ids, min(max_new_tokens, room), frozenset(stop_ids), scope)
        ticket = Ticket(request, sampling, first)
        eta = worker.eta_s(len(ids))
        ticket.asked_s, ticket.promised_s = time.perf_counter(), eta
        if not worker.gate.enter(ticket, None if queues else worker.spare):
            raise Overloaded(f"{len(worker.gate)} requests wait; about {eta:.1f} s", eta)
        ticket.place, ticket.wait_s = worker.last_place, eta
        generation = Generation(ticket, worker.commands)
        if not worker.submit(ticket):
            raise self._ended(worker)
        return generation

    def embed(self, prompts: Sequence[Sequence[int]]) -> Future[Floats]:
        """What the model makes of each prompt: unit vectors (N, width) float32, in order.

        Equal prompts have equal vectors, whatever is read beside them. Answers go first: while any
        is being written, this gets a small part of the time. Cancel the future to stop it.
        Raises: NoEmbeddings, PromptTooLong, Overloaded, EngineCrashed, EngineClosed; ValueError as
        ``submit``. The future: EngineError.
        """
        worker = self._running()
        runner, most = worker.loaded.runner, worker.context_tokens
        if not runner.width:
            raise NoEmbeddings("this model has no embeddings; build it without `--via optimum`")
        checked = [_checked_ids(prompt, (), runner.vocab_size) for prompt in prompts]
        longest = max(map(len, checked), default=0)
        if longest > most:
            raise PromptTooLong(f"a prompt has {longest} tokens; at most {most} are read at once")
        job = Embedding(checked)
        if not checked:
            job.future.set_result(np.empty((0, runner.width), np.float32))
        elif not worker.embeddings.enter(job):
            eta = worker.embedding_eta_s()
            raise Overloaded(f"{worker.embeddings.tokens} tokens wait; about {eta:.1f} s", eta)
        elif not worker.submit(job):
            raise self._ended(worker)
        return job.future

    def share_prefix(self, ids: Sequence[int]) -> None:
        """Compute a fixed beginning, such as a system prompt, once; every prompt that starts with
        it gets a copy. Replaces an earlier one; returns at once.

        Raises: PromptTooLong, EngineCrashed, EngineClosed; ValueError as ``submit``.
        """
        worker = self._running()
        if len(ids) >= worker.context_tokens:
            raise PromptTooLong(f"a shared prefix of {len(ids)} tokens leaves no room for answers")
        worker.commands.put(Share(_checked_ids(ids, (), worker.loaded.runner.vocab_size)))

    def expected_wait_s(self) -> float:
        """What a short question asked now would be promised. Never waits."""
        worker = self._worker
        return worker.eta_s(_SHORT_PROMPT) if worker is not None and worker.alive else 0.0

    def stats(self) -> EngineStats:
        worker = self._worker
        if worker is None:
            return EngineStats(state="closed" if self._closed else "new")
        if worker.alive:
            return worker.stats
        state: Literal["crashed", "closed"] = "crashed" if worker.error else "closed"
        gone: dict[str, Any] = dict.fromkeys(
            ("running", "waiting", "waiting_tokens", "kv_usage", "kv_bytes"), 0
        )
        return replace(worker.stats, state=state, **gone)

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
    wide = Wide.load(config.model_dir, len(manifest.topics)) if WIDE in manifest.files else None
    vocabulary = manifest.architecture.vocab_size
    known = Known.load(config.model_dir, vocabulary) if DRAFTS in manifest.files else None
    plain = manifest.runner == "plain"
    drafted = _draft_tokens(config, known) if not plain else 0
    context = min(config.context_tokens, manifest.context_tokens)
    slots = _slots(config, manifest.architecture, context)
    runner = (PlainRunner if plain else OnnxRunner)(
        config.model_dir / MODEL,
        manifest.architecture,
        slots=slots + 1 + ROWS,  # one more for a shared prefix, some for embeddings
        step_tokens=config.step_tokens,
        context_tokens=context,
        threads=config.threads,
        drafting=drafted > 0,
    )
    return Loaded(runner, codec.banned_ids, context, slots, manifest, codec, wide, known, drafted)


def _draft_tokens(config: EngineConfig, known: Known | None) -> int:
    """How many tokens to guess at once."""
    if config.draft_tokens is None:
        return USUAL_DRAFT if known is not None else 0
    return config.draft_tokens


def _slots(config: EngineConfig, architecture: Architecture, context_tokens: int) -> int:
    """How many full contexts fit the memory, at most ``max_batch``. Raises: EngineError."""
    limit = config.kv_bytes or memory_bytes() // 4
    fitting = limit // (context_tokens * token_bytes(architecture))
    if not fitting:
        raise EngineError(
            f"{limit >> 20} MiB hold no context of {context_tokens} tokens of this model; raise "
            f"kv_bytes or lower context_tokens"
        )
    return min(config.max_batch, fitting)


def _checked_ids(prompt: Sequence[int], named: Sequence[int], vocab: int) -> list[int]:
    """The prompt as plain integers. One bad id would end the thread, and with it everybody."""
    ids = np.asarray(prompt)
    if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
        raise ValueError("a prompt is a non-empty sequence of token ids")
    used = np.concatenate((ids, np.asarray(named))) if named else ids
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


#: A usual question, in tokens.
_SHORT_PROMPT = 64


def _first_rates(runner: Runner, config: EngineConfig) -> Rates:
    """Speeds of a short prompt and of decoding after it, so that the first promises hold too."""
    size = min(_SHORT_PROMPT, config.step_tokens, config.context_tokens // 2)
    prompt = [i % runner.vocab_size for i in range(size)]
    prefill_s = _fastest(runner, Batch.of([0], [0], [True], [prompt]))
    step_s = _fastest(runner, Batch.of([0], [size], [True], [prompt[:1]]))
    return Rates(prefill_s=prefill_s / size, step_s=step_s)


def _fastest(runner: Runner, batch: Batch, times: int = 3) -> float:
    """Seconds of the fastest of some runs: the first ones warm up memory."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        runner.step(batch)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in list(_engines):
        engine._forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
