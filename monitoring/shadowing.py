"""Asks the candidate in shadow what a share of live users asked, while nobody else needs the time.

One thread and one small engine a process, both started by the first sampled turn and gone when no
candidate is left. Questions wait in a short queue whose oldest are dropped; an answer is broken off
as soon as a live one is asked for. Observes only: whatever goes wrong is counted and logged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, cast

from django.conf import settings
from django.db import connections

from assistant import backends, facts, registry
from assistant.backends.base import Backend
from assistant.errors import AssistantError, GenerationFailed, ModelUnavailable
from assistant.models import ModelVersion
from assistant.types import Delta, Finished, Message, Params, Started
from conversations import history, models, opening
from conversations.turn import TurnRecord, turn_finished
from monitoring import metrics, shadow

log = logging.getLogger(__name__)

#: How long a process believes what it last read of the candidate.
KNOWN_FOR_S = 5.0
#: How often is looked whether a live answer needs the time: before, and while one is written.
REST_S, LOOK_EVERY_S = 0.05, 0.005
#: A thread that heard nothing for so long ends, and its engine with it.
LINGER_S = 60.0
#: Of the thread and its engine.
LEAST_PRIORITY = 19
#: How often one question is begun again after a live one came between.
MOST_TRIES = 3
#: A candidate that cannot be loaded is tried again after this.
LOAD_PAUSE_S = 60.0


class Disturbed(Exception):
    """A live question came, so the candidate's answer was broken off."""


def is_busy() -> bool:
    """Whether an engine of this process has a live question, waiting or running."""
    for backend in backends.built().values():
        for engine in backend.engines():
            stats = engine.stats()
            if stats.waiting or stats.running:
                return True
    return False


def is_sampled(message_id: uuid.UUID, share: float) -> bool:
    """The same in every process; ``share``: 0..1 of all ids."""
    return message_id.int % 100_000 < share * 100_000


def is_comparable(record: TurnRecord) -> bool:
    """Whether a model here has just written that answer to its end, for the first time, and it is
    kept: only then would a candidate have had the same question in the same place."""
    whole = record.status == "complete" and record.finish_reason in ("stop", "length")
    return record.stored and record.route == "model" and whole and bool(record.model)


@dataclass(slots=True)
class _Waiting:
    record: TurnRecord
    tries: int = 0


class Shadow:
    """The queue of sampled turns and the thread that works it off."""

    def __init__(self) -> None:
        self._forked()

    def _forked(self) -> None:
        """Also in a child: threads and engines are the parent's."""
        self._changed = threading.Condition()
        self._queue: deque[_Waiting] = deque()
        self._thread: threading.Thread | None = None
        self._ending = False
        self._known: tuple[float, ModelVersion | None] = (float("-inf"), None)
        self._candidate: _Candidate | None = None
        self._left: list[_Candidate] = []

    # -- hearing: in the thread that has stored the turn, after its reader has the answer

    def hear(self, *, record: TurnRecord, **_: Any) -> None:
        """A turn's end. Never raises."""
        try:
            if is_comparable(record) and self._wants(record):
                self._add(_Waiting(record))
        except Exception as error:
            _failed("error", error)

    def _wants(self, record: TurnRecord) -> bool:
        if not is_sampled(record.message_id, settings.ASSISTANT["SHADOW"]["SHARE"]):
            return False
        version = self._version()
        return version is not None and version.label != record.model

    def _version(self) -> ModelVersion | None:
        """The candidate, as it was at most ``KNOWN_FOR_S`` ago."""
        read_at, version = self._known
        if time.monotonic() - read_at > KNOWN_FOR_S:
            version = registry.shadow()
            self._known = time.monotonic(), version
        return version

    def _add(self, waiting: _Waiting) -> None:
        with self._changed:
            self._queue.append(waiting)
            while len(self._queue) > settings.ASSISTANT["SHADOW"]["QUEUE"]:
                self._queue.popleft()
                metrics.SHADOWED.labels("dropped").inc()
            if self._thread is None:
                self._ending = False
                self._thread = threading.Thread(target=self._live, name="shadow", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def forget(self) -> None:
        """The next turn reads the candidate anew."""
        self._known = (float("-inf"), None)

    def stop(self, within_s: float = 10.0) -> None:
        """End the thread and free its engine; what waits is forgotten."""
        with self._changed:
            self._queue.clear()
            self._ending, thread = True, self._thread
            self._changed.notify_all()
        if thread is not None:
            thread.join(within_s)
        self.forget()

    # -- the thread

    def _live(self) -> None:
        _be_modest()
        try:
            with asyncio.Runner() as runner:
                while (waiting := self._next()) is not None:
                    self._work(runner, waiting)
        except Exception as error:
            _failed("error", error)
            self._gone()
        finally:
            with self._changed:
                left, self._left = self._left, []
            for candidate in left:
                candidate.close()

    def _next(self) -> _Waiting | None:
        """The oldest sampled turn, once nobody needs the time; None: it is time to go."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._ending, LINGER_S)
                if self._ending or not self._queue:
                    self._leave()
                    return None
            if not is_busy():
                with self._changed:
                    if self._queue:
                        return self._queue.popleft()
            else:
                time.sleep(REST_S)

    def _gone(self) -> None:
        with self._changed:
            self._queue.clear()
            self._leave()

    def _leave(self) -> None:
        """From here on the next thread begins with an engine of its own; this one's is closed."""
        self._thread = None
        if self._candidate is not None:
            self._left.append(self._candidate)
            self._candidate = None

    def _work(self, runner: asyncio.Runner, waiting: _Waiting) -> None:
        """One turn, whatever comes."""
        try:
            result = self._pair(runner, waiting.record)
            metrics.SHADOWED.labels(result).inc()
        except Disturbed:
            self._again(waiting)
        except Exception as error:
            _failed("error", error)
        finally:
            connections.close_all()

    def _again(self, waiting: _Waiting) -> None:
        waiting.tries += 1
        metrics.SHADOWED.labels("disturbed").inc()
        with self._changed:
            if waiting.tries < MOST_TRIES and not self._ending:
                self._queue.appendleft(waiting)

    def _pair(self, runner: asyncio.Runner, record: TurnRecord) -> str:
        """What became of it: "pair", or "skipped" if there is nothing to compare any more.

        Raises: Disturbed.
        """
        version, answer = self._version(), _answer_of(record)
        if version is None or answer is None:
            return "skipped"
        candidate = self._candidate_of(version)
        live = shadow.said_live(answer, record.queue_ms)
        said = candidate.say(runner, answer)
        return "pair" if shadow.keep(version, answer, live, said) is not None else "skipped"

    def _candidate_of(self, version: ModelVersion) -> _Candidate:
        if self._candidate is not None and self._candidate.version.pk != version.pk:
            self._candidate.close()
            self._candidate = None
        self._candidate = self._candidate or _Candidate(version)
        return self._candidate


def _be_modest() -> None:
    """Let everybody else have the processor first: this thread, and the engine's that it starts.

    On Linux each thread has a priority of its own, and hands it down.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


def _failed(result: str, error: Exception) -> None:
    metrics.SHADOWED.labels(result).inc()
    log.warning("shadow: %s", type(error).__name__, exc_info=error)


def _answer_of(record: TurnRecord) -> models.Message | None:
    """The stored answer, unless it is gone, was replaced or is itself another version of one."""
    rows = models.Message.objects.select_related("conversation__user", "parent")
    answer = rows.filter(pk=record.message_id, attempt=record.attempt, shown=True).first()
    if answer is None or answer.parent is None:
        return None
    # Another answer to one question is varied on purpose, so it says nothing of its model.
    again = models.Message.objects.filter(parent=answer.parent_id, role="assistant", author="")
    return answer if again.count() == 1 else None


# --- The candidate -------------------------------------------------------------------------------


class _Candidate:
    """The version in shadow with its own engine: one thread, one answer at a time."""

    def __init__(self, version: ModelVersion) -> None:
        from assistant.backends.onnx import OnnxBackend, Options  # loads the runtime

        self.version = version
        options = Options(
            version.folder,
            threads=settings.ASSISTANT["SHADOW"]["THREADS"],
            max_batch=1,
            max_queue=1,
            context_tokens=_context_tokens(),
            prefix_mb=0,
        )
        self._backend: Backend = OnnxBackend("shadow", options)
        self._broken: tuple[float, AssistantError] | None = None

    def close(self) -> None:
        self._backend.close()

    def say(self, runner: asyncio.Runner, answer: models.Message) -> shadow.Said:
        """What it would have said in place of that answer. Raises: Disturbed."""
        try:
            self._load()
            messages, params = self._asked(answer)
            return runner.run(_undisturbed(self._backend, messages, params))
        except AssistantError as error:
            log.warning("the candidate %s failed: %s", self.version, error.code)
            return shadow.Said("", None, "", "", 0, None, failed=True)

    def _load(self) -> None:
        """Raises: AssistantError, for a while without trying again."""
        if self._broken is not None and time.monotonic() - self._broken[0] < LOAD_PAUSE_S:
            raise self._broken[1]
        try:
            self._backend.check()
            self._broken = None
        except AssistantError as error:
            self._broken = time.monotonic(), error
            raise

    def _asked(self, answer: models.Message) -> tuple[list[Message], Params]:
        """The chat as its turn saw it, as much as this model reads. Raises: ContextTooLong."""
        said = opening.said_before(answer)
        user = answer.conversation.user if settings.ASSISTANT.get("FACT_FUNCTIONS") else None
        most = settings.ASSISTANT["MAX_NEW_TOKENS"]
        params = Params(max_new_tokens=most, facts=facts.known_facts(user))
        messages = history.fit(
            said.earlier,
            said.question,
            budget_tokens=self._backend.context_tokens() - most,
            count=self._backend.count_tokens,
        )
        return messages, params


def _context_tokens() -> int:
    """As much as the live model may read."""
    entry = settings.ASSISTANT["BACKENDS"].get("model", {})
    return int(entry.get("OPTIONS", {}).get("context_tokens", 1024))


async def _undisturbed(
    backend: Backend, messages: Sequence[Message], params: Params
) -> shadow.Said:
    """The answer. Raises: Disturbed as soon as a live question comes; AssistantError."""
    limit = time.monotonic() + settings.ASSISTANT["REQUEST_TIMEOUT_S"]
    writing = asyncio.ensure_future(_written(backend, messages, params))
    try:
        while not writing.done():
            await asyncio.wait({writing}, timeout=LOOK_EVERY_S)
            if is_busy():
                raise Disturbed
            if time.monotonic() > limit:
                raise GenerationFailed("The candidate took too long.")
        return writing.result()
    finally:
        writing.cancel()
        await asyncio.wait({writing})


async def _written(backend: Backend, messages: Sequence[Message], params: Params) -> shadow.Said:
    began = time.perf_counter()
    started: Started | None = None
    finished: Finished | None = None
    parts: list[str] = []
    async with aclosing(cast(Any, backend.stream(messages, params))) as events:
        async for event in events:
            if isinstance(event, Started):
                started = event
            elif isinstance(event, Delta):
                parts.append(event.text)
            else:
                finished = event
    if started is None or finished is None:
        raise ModelUnavailable("The candidate ended without an answer.")
    return shadow.Said(
        intent=started.intent or "",
        confidence=started.confidence,
        fate=shadow.fate(started.band),
        text="".join(parts),
        tokens=finished.usage.output_tokens,
        ms=(time.perf_counter() - began) * 1000,
        failed=not parts,
    )


shadowing = Shadow()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shadowing._forked)


def connect() -> None:
    """Listen, from now on; any number of times."""
    turn_finished.connect(shadowing.hear, dispatch_uid="shadow-hear")
