"""THE pipeline: one question, one answer, from admission to the stored message.

``Turn.open`` is sync, touches the database and raises our errors before the first byte. The first
reader starts the task: route -> log -> persist -> signal. The last two are in ``finally`` and
shielded, so a message ends complete, stopped, interrupted or failed; never as nothing. A turn of
``Turn.passing`` is the same without the storing.
Knows no transport (each reads the log, see ``log``) and no other turn (see ``running``).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar, cast

from django.conf import settings
from django.db import connection, transaction
from django.dispatch import Signal
from django.utils import timezone

from assistant import types
from assistant.errors import AssistantError, GenerationFailed, Overloaded, RateLimited
from assistant.threads import in_thread
from conversations import handover, limits, markdown, opening, tasks
from conversations.idempotency import Once
from conversations.limits import Caller
from conversations.log import Created, Delta, Log, Queued, Reader
from conversations.models import ALIVE_EVERY_S, Conversation, HandOver, Message
from conversations.running import hurried, running
from fallback.router import Routed, route
from fallback.rules import Button

log = logging.getLogger(__name__)

T = TypeVar("T")
Ending = Literal["complete", "stopped", "interrupted", "failed"]

#: An answer is bounded by its tokens; this bounds the log even if a backend forgets.
MAX_ANSWER_CHARS = 64_000
#: Beyond the longest time of an answer, for what is known to end it.
LAST_WORDS_S = 5.0
#: How long a process that ends waits for the last save.
LAST_SAVE_S = 5.0
#: A save is tried again after these pauses; a database restart fits in between.
SAVE_PAUSES_S = (0.2, 1.0, 5.0, 20.0)

#: A person is asked even if the reader left meanwhile; not if they said "stop".
_HANDED_OVER: tuple[Ending, ...] = ("complete", "interrupted")

#: Sent once per turn that found room, with its ids, ``transport`` and ``attempt``.
turn_opened = Signal()
#: Sent once per turn, after it is stored, with ``record: TurnRecord``. Receivers only observe.
turn_finished = Signal()
#: Sent for each question that found no room, with ``transport`` and the error's ``code``.
turn_refused = Signal()

#: Endings being stored: a task nobody holds may be collected.
_finishing: set[asyncio.Future[None]] = set()


# --- What observers see --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """What monitoring may know of a turn: figures and names from closed sets, never a text."""

    conversation_id: uuid.UUID
    message_id: uuid.UUID
    user_id: int | None
    transport: str
    status: Ending
    route: str
    reason: str
    model: str
    intent: str
    confidence: float | None
    scope: float | None
    input_tokens: int
    output_tokens: int
    ttft_ms: float | None
    duration_ms: float
    finish_reason: str
    error_code: str
    attempt: int
    #: False: there is no row of that id, and never was.
    stored: bool = True
    #: Of an engine here: in its queue, and from there to its first token.
    queue_ms: float | None = None
    prefill_ms: float | None = None
    #: When it was asked (Unix time, s), how long it took until it was let in, and to be stored.
    asked_at: float = 0.0
    admit_ms: float = 0.0
    persist_ms: float = 0.0
    #: Mean log-probability of the answer's tokens, in nats, where the model tells it.
    logprob: float | None = None
    #: The caller's ``traceparent``, if one was sent.
    trace: str = ""
    #: Of the request or the socket that asked.
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """Who writes an answer, as far as is known; settled once its first delta is shown."""

    route: str
    reason: str
    model: str


@dataclass(slots=True)
class _Progress:
    """What the running task has learnt so far; becomes the row and the record."""

    parts: list[str] = field(default_factory=list)
    chars: int = 0
    route: str = ""
    reason: str = ""
    buttons: tuple[Button, ...] = ()
    hand_over: bool = False
    started: types.Started | None = None
    usage: types.Usage = field(default_factory=types.Usage)
    finish_reason: str = ""
    logprob: float | None = None
    ttft_ms: float | None = None

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True, slots=True)
class _Asked:
    """When a question came, on both clocks, and from which trace and request."""

    at: float = field(default_factory=time.time)
    monotonic: float = field(default_factory=time.monotonic)
    trace: str = field(default_factory=limits.traceparent.get)
    request_id: str = field(default_factory=limits.request_id.get)


@contextmanager
def _refusals_told(transport: str) -> Iterator[_Asked]:
    try:
        yield _Asked()
    except (RateLimited, Overloaded) as error:
        turn_refused.send_robust(sender=Turn, transport=transport, code=error.code)
        raise


# --- The turn ------------------------------------------------------------------------------------


class Turn:
    """One running answer. ``open`` or ``retry`` makes it, reading runs it, ``close`` stops it."""

    def __init__(
        self,
        opened: opening.Opened,
        caller: Caller,
        transport: str,
        asked: _Asked | None = None,
    ) -> None:
        self.conversation_id = opened.conversation.pk
        self.message = opened.answer
        self.caller = caller
        self.transport = transport
        self.opened_at = time.monotonic()
        self._came = asked or _Asked()
        self._persist_s = 0.0
        self._ask = opened.ask
        self._stored = opened.stored
        self._progress = _Progress()
        self._log = Log(
            Created(1, opened.answer, opened.question, opened.conversation),
            start=self.start,
            abandon=lambda: self.close("interrupted"),
        )
        self._ending: Ending | None = None  # set by close(), before the task hears of it
        self._asked: HandOver | None = None  # a person, by this very answer
        self._begun = False
        self._task: asyncio.Task[None] | None = None
        self._lock = threading.Lock()

    @property
    def started(self) -> bool:
        return self._task is not None

    @property
    def done(self) -> bool:
        return self._log.ended

    @property
    def source(self) -> Source:
        progress = self._progress
        model = progress.started.model if progress.started is not None else ""
        return Source(progress.route, progress.reason, model)

    # -- opening: sync, database, our errors

    @classmethod
    def open(
        cls,
        caller: Caller,
        conversation: Conversation | None,
        text: str,
        params: types.Params | None = None,
        *,
        transport: str = "rest",
        once: Once | None = None,
    ) -> Turn:
        """A turn whose question is stored. Raises: AssistantError, and then nothing is stored."""
        with _refusals_told(transport) as asked:
            question = limits.admit(caller, text)
            with running.room_for(caller):
                opened = opening.first_run(caller, conversation, question, params, once)
                return cls._opened(opened, caller, transport, asked)

    @classmethod
    def retry(cls, caller: Caller, message_id: uuid.UUID, *, transport: str = "rest") -> Turn:
        """A turn that writes a broken answer again, in place. Raises: AssistantError."""
        with _refusals_told(transport) as asked, running.room_for(caller):
            opened = opening.another_run(caller, message_id)
            return cls._opened(opened, caller, transport, asked)

    @classmethod
    def passing(
        cls,
        caller: Caller,
        said: opening.Said,
        params: types.Params,
        *,
        steps: tuple[str, ...] = (),
        transport: str,
    ) -> Turn:
        """A turn on a conversation the caller brings; nothing of it is ever stored.

        ``steps``: who may answer, instead of the whole route. Raises: AssistantError.
        """
        with _refusals_told(transport) as asked:
            limits.admit(caller, said.question)
            with running.room_for(caller):
                opened = opening.passing_run(caller, said, params, steps)
                return cls._opened(opened, caller, transport, asked)

    @classmethod
    def regenerate(
        cls,
        caller: Caller,
        message_id: uuid.UUID,
        *,
        transport: str = "rest",
        once: Once | None = None,
    ) -> Turn:
        """A turn that writes another answer beside that one. Raises: AssistantError."""
        with _refusals_told(transport) as asked, running.room_for(caller):
            opened = opening.new_version(caller, message_id, None, once)
            return cls._opened(opened, caller, transport, asked)

    @classmethod
    def edit(
        cls,
        caller: Caller,
        message_id: uuid.UUID,
        text: str,
        *,
        transport: str = "rest",
        once: Once | None = None,
    ) -> Turn:
        """A turn that answers that question put differently. Raises: AssistantError."""
        limits.valid_text(text, limit=settings.ASSISTANT_MAX_TEXT_CHARS)
        with _refusals_told(transport) as asked, running.room_for(caller):
            opened = opening.new_version(caller, message_id, text, once)
            return cls._opened(opened, caller, transport, asked)

    @classmethod
    def _opened(cls, opened: opening.Opened, caller: Caller, transport: str, asked: _Asked) -> Turn:
        """The turn in its place among those that run; observers hear of it."""
        turn = running.add(cls(opened, caller, transport, asked))
        turn_opened.send_robust(
            sender=Turn,
            request_id=asked.request_id,
            user_id=caller.user_id,
            conversation_id=turn.conversation_id,
            message_id=turn.message.pk,
            transport=transport,
            attempt=turn.message.attempt,
        )
        return turn

    # -- reading

    @property
    def log(self) -> Log:
        return self._log

    def read(self, after_seq: int = 0) -> Reader:
        """A reader of the log from there on; any number may read, at different places."""
        return self._log.read(after_seq)

    def __aiter__(self) -> Reader:
        return self.read()

    async def result(self) -> Message:
        """The stored answer. Cancelling this counts as a reader who left."""
        message, reader = self.message, self.read()
        try:
            async for event in reader:
                if not isinstance(event, Queued | Delta):
                    message = event.message
        finally:
            reader.close()
        return message

    async def settled(self, within_s: float) -> None:
        """Wait until the answer is stored, if this was its last reader."""
        await asyncio.sleep(0)  # the reader's leaving is on its way to this loop
        if not self._log.has_readers and self._task is not None:
            await asyncio.wait({self._task}, timeout=within_s)

    # -- the task

    def start(self) -> None:
        """Start the task on the running loop, unless it runs already."""
        with self._lock:
            if self._task is not None or self.done:
                return
            self._log.begin()
            # An empty context: the task outlives the request that opened it, and must not hold on
            # to that request's threads.
            self._task = asyncio.create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        self._begun = True
        ending: Ending = self._ending or "complete"
        error: AssistantError | None = None
        alive = asyncio.create_task(self._stay_alive())
        try:
            if self._ending is None:
                await self._write()
        except asyncio.CancelledError:
            ending = self._ending or "interrupted"  # not by close(): the server is going down
        except Exception as caught:
            ending, error = "failed", _ours(caught)
        finally:
            alive.cancel()
            finishing = asyncio.ensure_future(self._finish(ending, error))
            _finishing.add(finishing)
            finishing.add_done_callback(lambda done: self._finished(done, ending))
            await asyncio.shield(finishing)

    async def _write(self) -> None:
        most = settings.ASSISTANT["REQUEST_TIMEOUT_S"] + LAST_WORDS_S
        async with asyncio.timeout(most):
            async with aclosing(cast(Any, route(self._ask))) as events:
                async for event in events:
                    self._take(event)

    def _take(self, event: Routed | types.Event) -> None:
        progress = self._progress
        match event:
            case Routed():
                progress.route, progress.reason = event.route, event.reason
                progress.buttons, progress.hand_over = event.buttons, event.hand_over
            case types.Waiting():
                self._log.queued(event.place, event.seconds)
            case types.Started():
                progress.started = event
            case types.Delta():
                self._show(event.text)
            case types.Finished():
                progress.usage, progress.finish_reason = event.usage, event.reason
                progress.logprob = event.logprob

    def _show(self, text: str) -> None:
        progress = self._progress
        if progress.ttft_ms is None:
            progress.ttft_ms = (time.monotonic() - self.opened_at) * 1000
        progress.parts.append(text)
        progress.chars += len(text)
        self._log.write(text)
        if progress.chars > MAX_ANSWER_CHARS:
            raise GenerationFailed("The answer grew too long and was cut off.")

    async def _stay_alive(self) -> None:
        """Every 2 s, off the token loop: a sign of life and the text so far, for the worst case."""
        while self._stored:
            await asyncio.sleep(ALIVE_EVERY_S)
            if not self._progress.parts and await in_thread(hurried, self.message):
                self._ask.patience.end()  # said where another process listened
            try:
                found = await in_thread(self._checkpoint)
            except Exception as error:  # the database is away: the answer goes on
                log.warning("checkpoint failed: %s", type(error).__name__)
                continue
            if found is not None:
                self.close(found)  # somebody ended this row in another process

    def _checkpoint(self) -> Ending | None:
        """Save the text so far; the row's ending if another process has given it one."""
        row = Message.objects.filter(pk=self.message.pk, attempt=self.message.attempt)
        if row.filter(status=Message.Status.STREAMING).update(
            text=self._progress.text, alive_at=timezone.now()
        ):
            return None
        status = row.values_list("status", flat=True).first()
        return "stopped" if status == Message.Status.STOPPED else "interrupted"

    # -- the end

    async def _finish(self, ending: Ending, error: AssistantError | None) -> None:
        """Store, make room, tell the readers, tell the observers: in this order."""
        self._log.flush()
        waits = self._stored or limits.counts_tokens()  # for the database, or the cache
        if waits and await self._saved(ending, error):
            return
        message = self._filled(ending, error)  # not saved, its reader gets it; the reaper marks it
        self._ended(message, error)
        await in_thread(self._tell, message, ending)

    async def _saved(self, ending: Ending, error: AssistantError | None) -> bool:
        """Whether it is stored, and everybody told."""
        for pause in (*SAVE_PAUSES_S, None):
            try:
                await in_thread(self._settle, ending, error, asyncio.get_running_loop())
                return True
            except Exception as problem:
                log.error("answer %s not saved: %s", self.message.pk, type(problem).__name__)
                if pause is None:
                    break
                await asyncio.sleep(pause)
        return False

    def _settle(
        self, ending: Ending, error: AssistantError | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        """All of the end in one thread; readers are told on their loop meanwhile."""
        begun = time.monotonic()
        message = self._save(ending, error)
        self._persist_s = time.monotonic() - begun
        loop.call_soon_threadsafe(self._ended, message, error)
        if self._asked is not None:
            _announce(self._asked)
        self._tell(message, ending)

    def _ended(self, message: Message, error: AssistantError | None) -> None:
        """Make room and tell the readers."""
        if self._stored:
            running.keep(message.pk, self._log)
        running.remove(self)
        self._log.end(message, error)

    def _finished(self, finishing: asyncio.Future[None], ending: Ending) -> None:
        """If the loop is ending and has cancelled even the saving, store the row without it."""
        _finishing.discard(finishing)
        if not finishing.cancelled():
            return

        def save() -> None:
            try:
                self._save(ending, None)
            finally:
                connection.close()

        thread = threading.Thread(target=save)
        thread.start()
        thread.join(LAST_SAVE_S)

    def _save(self, ending: Ending, error: AssistantError | None) -> Message:
        """The row as it ends; what it took is counted before its reader can ask again."""
        message = self._store(ending, error)
        limits.spend(self.caller, self._tokens())
        return message

    def _tokens(self) -> int:
        """What the answer took. One cut short was never counted: about four characters a token."""
        usage = self._progress.usage
        told = usage.input_tokens + usage.output_tokens
        if told or self._progress.started is None:
            return told
        read = sum(len(message.text) for message in self._ask.messages)
        return (read + self._progress.chars) // 4

    def _store(self, ending: Ending, error: AssistantError | None) -> Message:
        """The row as it ends, if it is still ours to end."""
        message = self._filled(ending, error)
        if not self._stored:
            return message
        values = {name: getattr(message, name) for name in opening.RESULT_FIELDS}
        with transaction.atomic():
            row = Message.objects.filter(pk=message.pk, attempt=message.attempt)
            if row.update(**values):
                Conversation.objects.filter(pk=self.conversation_id).update(
                    updated_at=timezone.now()
                )
                if self._progress.hand_over and ending in _HANDED_OVER:
                    self._asked = handover.opened(message) or self._asked
        return message

    def _filled(self, ending: Ending, error: AssistantError | None) -> Message:
        progress, started = self._progress, self._progress.started
        message = _snapshot(self.message)
        message.text = progress.text
        rendered = self._stored and progress.parts
        message.html = markdown.render(progress.text) if rendered else ""
        message.status = ending
        message.route, message.degraded_reason = progress.route, progress.reason
        message.buttons = [asdict(button) for button in progress.buttons]
        if started is not None:
            message.intent = started.intent or ""
            message.confidence, message.scope = started.confidence, started.scope
            message.model = started.model
        message.input_tokens = progress.usage.input_tokens
        message.output_tokens = progress.usage.output_tokens
        message.finish_reason = "error" if error else progress.finish_reason
        message.ttft_ms = progress.ttft_ms
        message.duration_ms = (time.monotonic() - self.opened_at) * 1000
        message.error_code = error.code if error else ""
        message.error_message = error.message[:300] if error else ""
        return message

    def _tell(self, message: Message, ending: Ending) -> None:
        started = self._progress.started
        record = TurnRecord(
            conversation_id=self.conversation_id,
            message_id=message.pk,
            user_id=self.caller.user_id,
            transport=self.transport,
            status=ending,
            route=message.route,
            reason=message.degraded_reason,
            model=message.model,
            intent=message.intent,
            confidence=message.confidence,
            scope=message.scope,
            input_tokens=message.input_tokens,
            output_tokens=message.output_tokens,
            ttft_ms=message.ttft_ms,
            duration_ms=message.duration_ms or 0.0,
            finish_reason=message.finish_reason,
            error_code=message.error_code,
            attempt=message.attempt,
            stored=self._stored,
            queue_ms=_ms(started.queue_s if started else None),
            prefill_ms=_ms(started.prefill_s if started else None),
            asked_at=self._came.at,
            admit_ms=(self.opened_at - self._came.monotonic) * 1000,
            persist_ms=self._persist_s * 1000,
            logprob=self._progress.logprob,
            trace=self._came.trace,
            request_id=self._came.request_id,
        )
        for receiver, answer in turn_finished.send_robust(sender=Turn, record=record):
            if isinstance(answer, Exception):
                log.error("observer %r broke: %s", receiver, type(answer).__name__)

    # -- hurrying and stopping early (from any thread)

    def hurry(self) -> bool:
        """Have it answered by what is known, instead of waiting on; False once words are shown, or
        it has ended. From any thread, any number of times."""
        if self._progress.parts or self._ending is not None or self.done:
            return False
        with self._lock:
            task = self._task
            if task is None:
                self._ask.patience.end()
        with suppress(RuntimeError):  # the loop has closed, and the task with it
            if task is not None:
                task.get_loop().call_soon_threadsafe(self._ask.patience.end)
        return True

    def close(self, ending: Ending = "stopped") -> None:
        """Stop writing and keep what there is. From any thread, any number of times."""
        with self._lock:
            self._ending = self._ending or ending
            task = self._task
        if task is None:
            self._end_unread()
            return
        with suppress(RuntimeError):  # the loop has closed, and the task with it
            task.get_loop().call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        """Cancel the writing, once; never the saving."""
        if self._progress.finish_reason or self.done:
            return  # it has been written to its end
        self._progress.finish_reason = "cancelled"
        if self._begun and self._task is not None:  # a task cancelled before it began never saves
            self._task.cancel()

    def _end_unread(self) -> None:
        """Nobody ever read, so there is no task: store the end from here, once."""
        self._progress.finish_reason = "cancelled"
        try:
            asyncio.get_running_loop()
        except RuntimeError:  # the usual case: a worker thread closes the response
            with self._lock:
                if self.done:
                    return
                self._log.close()
            running.remove(self)
            ending = self._ending or "stopped"
            self._tell(self._save(ending, None), ending)
        else:
            self.start()


def _announce(asked: HandOver) -> None:
    try:
        tasks.announce(asked)
    except Exception as error:  # who missed it is found by the task that looks for such
        log.error("a hand-over was not announced: %s", type(error).__name__)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _snapshot(message: Message) -> Message:
    """A copy of the row, so that events already in the log stay as they were."""
    values = {f.attname: getattr(message, f.attname) for f in Message._meta.concrete_fields}
    copy = Message.from_db(None, list(values), list(values.values()))
    copy.siblings = message.siblings
    return copy


def _ours(error: Exception) -> AssistantError:
    """What the reader is told; surprises are logged with their trace and hidden."""
    if isinstance(error, AssistantError):
        return error
    if isinstance(error, TimeoutError):
        return GenerationFailed("The answer took too long and was cut off. Please try again.")
    log.error("a turn broke", exc_info=error)
    return GenerationFailed("The answer broke off. Please try again.")
