"""An answer's events once more: from its log while this process has it, else from its row.

Knows which of the two there is; what an event looks like on a wire is not known here.
"""

from __future__ import annotations

import asyncio
from collections import deque

from assistant.errors import AssistantError, GenerationFailed, InvalidRequest, NotFound
from assistant.threads import in_thread
from conversations.log import Completed, Created, Delta, Failed, Reader, TurnEvent
from conversations.models import Message, note_siblings
from conversations.running import running

#: No answer has more events: each is a character at least, and those are bounded. Whoever saw that
#: one saw the end: of an answer without a log nobody knows which number its end had.
MAX_SEQ = 100_000
#: How often the row is looked at while another process writes the answer.
ELSEWHERE_S = 1.0


def reader_of(message: Message, after_seq: int) -> Reader | Stored | None:
    """A reader of that answer's events after that one; None if there are no more to come. Sync.

    Raises: InvalidRequest for a number that its log has not reached.
    """
    if after_seq == MAX_SEQ and message.status != Message.Status.STREAMING:
        return None
    log = running.log_of(message)
    if log is None:
        return Stored(message, after_seq)
    if after_seq > log.length:
        raise InvalidRequest(f"This answer has no event {after_seq:,}; the last is {log.length:,}.")
    return None if log.ended and after_seq == log.length else log.read(after_seq)


class Stored:
    """A reader of a row. From the start it tells everything; later on only how the answer ended,
    whose text is whole: how much of it a number stood for is not known any more.
    """

    def __init__(self, message: Message, after_seq: int) -> None:
        self._message = message
        self._seq, self._whole = after_seq, after_seq == 0
        self._shown = 0
        self._events: deque[TurnEvent] = deque()
        self._ended = False

    def __aiter__(self) -> Stored:
        return self

    async def __anext__(self) -> TurnEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            await self._look()
        return self._events.popleft()

    async def _look(self) -> None:
        fresh = await in_thread(self._fetch)
        if self._whole and not self._seq:
            self._events.append(await in_thread(self._created))
        if self._whole and len(fresh.text) > self._shown:
            text = fresh.text[self._shown :]
            self._shown = len(fresh.text)
            self._events.append(Delta(self._next(), fresh.pk, text))
        if fresh.status != Message.Status.STREAMING:
            self._events.append(self._end(fresh))
            self._ended = True
        elif not self._events:
            await asyncio.sleep(ELSEWHERE_S)

    def _fetch(self) -> Message:
        """The row as it is now. Bounded: one whose process is gone is reaped."""
        rows = Message.objects.filter(pk=self._message.pk)
        rows.reap()
        fresh = rows.select_related("conversation", *Message.BESIDE).first()
        if fresh is None:
            gone = self._message
            gone.status, gone.error_code = Message.Status.FAILED, NotFound.code
            gone.error_message = "This answer does not exist any more."
            return gone
        note_siblings([fresh])
        return fresh

    def _created(self) -> Created:
        """As it was then: nothing was written yet."""
        parent = self._message.parent  # what a person wrote follows an answer, not a question
        asked = parent if parent is not None and parent.role == Message.Role.USER else None
        blank = Message(
            id=self._message.pk,
            conversation=self._message.conversation,
            seq=self._message.seq,
            parent=parent,
            role="assistant",
            status=Message.Status.STREAMING,
            created_at=self._message.created_at,
        )
        return Created(self._next(), blank, asked, self._message.conversation)

    def _end(self, message: Message) -> TurnEvent:
        if message.status != Message.Status.FAILED:
            return Completed(self._next(), message)
        error: AssistantError = GenerationFailed(message.error_message)
        error.code = message.error_code  # type: ignore[misc]
        return Failed(self._next(), message, error)

    def _next(self) -> int:
        self._seq += 1
        return self._seq

    def close(self) -> None:
        """Nobody reads any more: nothing runs on here between two reads."""
        self._ended = True
        self._events.clear()
