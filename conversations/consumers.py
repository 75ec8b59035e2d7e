"""The WebSocket: frames in, events out. Everything slow happens in tasks of its own.

channels hands over one frame at a time and waits for the handler, so the handler only puts it in a
bounded inbox. One task works the inbox off, one writes, one follows a turn's log: "stop" is seen
while an answer streams, and a client that vanishes or does not read costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import Counter
from contextlib import suppress
from typing import Any

from channels.db import DatabaseSyncToAsync  # type: ignore[import-untyped]
from channels.generic.websocket import AsyncWebsocketConsumer  # type: ignore[import-untyped]
from django.conf import settings

from assistant.errors import AssistantError, NotFound
from conversations import wire
from conversations.access import caller_of_socket
from conversations.limits import Caller
from conversations.log import Reader
from conversations.models import Conversation, Message
from conversations.running import running, stop
from conversations.turn import Turn
from conversations.wire import Frame

log = logging.getLogger(__name__)

#: Frames waiting to be worked off; a person sends one at a time.
INBOX_FRAMES = 8
#: Frames a socket may send in that many seconds, understood or not; people send a handful.
MAX_FRAMES, FRAMES_WINDOW_S = 100, 10.0
#: Bytes waiting to be sent; an answer is a tenth of this.
OUTBOX_BYTES = 262_144
#: A socket that takes nothing for so long is given up.
SEND_TIMEOUT_S = 10.0
#: How long leaving waits for an unfinished answer to be stored: a stopping server waits for us.
SETTLE_S = 3.0
#: How often the row is looked at while another process writes the answer.
ELSEWHERE_S = 1.0

_sockets: Counter[str] = Counter()


class SignedOut(Exception):
    """The login behind this socket has ended."""


class ChatConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket on one conversation."""

    # No layer: tokens never travel through it, and a Redis that is away must not refuse sockets.
    channel_layer_alias = "none"

    async def connect(self) -> None:
        self._conversation_id: uuid.UUID = self.scope["url_route"]["kwargs"]["conversation_id"]
        self._caller: Caller | None = None
        self._turn: Turn | None = None
        self._reader: Reader | None = None
        self._follower: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[str | None] = asyncio.Queue(INBOX_FRAMES)
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._outbox_bytes = 0
        self._room = asyncio.Event()
        self._frames, self._window_ends = 0, 0.0
        self._ended = False
        self._tasks: list[asyncio.Task[None]] = []
        self._ending: asyncio.Task[None] | None = None
        await self.accept()
        self._tasks = [asyncio.create_task(self._serve()), asyncio.create_task(self._write())]

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        if self._ended:
            return
        if self._inbox.full() or self._too_many():
            await self._end(wire.CLOSE_LIMITED)
        else:
            self._inbox.put_nowait(text_data)

    def _too_many(self) -> bool:
        now = asyncio.get_running_loop().time()
        if now >= self._window_ends:
            self._window_ends, self._frames = now + FRAMES_WINDOW_S, 0
        self._frames += 1
        return self._frames > MAX_FRAMES

    async def disconnect(self, code: int) -> None:
        turn = self._turn
        await self._end(None)
        if turn is not None:
            await turn.settled(SETTLE_S)

    # -- the inbox

    async def _serve(self) -> None:
        code = await self._enter()
        if code is not None:
            await self._end(code)
            return
        while True:
            data = await self._inbox.get()
            ref: str | None = None
            try:
                frame = wire.parse_frame(data)
                ref = frame.ref
                await self._handle(frame)
            except SignedOut:
                await self._end(wire.CLOSE_UNAUTHENTICATED)
                return
            except wire.BadFrame as error:
                self._say_error(error, error.ref)
            except AssistantError as error:
                self._say_error(error, ref)
            except Exception:
                log.exception("a frame could not be handled")
                self._say_error(AssistantError("Something broke here. Please try again."), ref)

    async def _enter(self) -> int | None:
        """Take the caller in; or the code to close with."""
        try:
            caller, found = await _in_thread(self._arrive)
        except Exception as error:
            log.error("a socket could not be opened: %s", type(error).__name__)
            return 1011
        if caller is None:
            return wire.CLOSE_UNAUTHENTICATED
        if not found:
            return wire.CLOSE_NOT_FOUND
        if _sockets[caller.key] >= settings.ASSISTANT_MAX_SOCKETS_PER_CALLER:
            return wire.CLOSE_LIMITED
        if not self._ended:  # the client may have left meanwhile
            self._caller = caller
            _sockets[caller.key] += 1
        return None

    def _arrive(self) -> tuple[Caller | None, bool]:
        caller = caller_of_socket(self.scope)
        return caller, caller is not None and self._visible(caller) is not None

    def _visible(self, caller: Caller) -> Conversation | None:
        mine = Conversation.objects.visible_to(caller)
        return mine.filter(pk=self._conversation_id).first()

    async def _handle(self, frame: Frame) -> None:
        match frame.type:
            case "ping":
                self._say({"type": "pong"})
            case "message.cancel":
                await self._stop()
            case "message.resume":
                await self._resume(frame)
            case _:
                turn = await self._opened(frame)
                self._follow(turn, 0, frame.ref)

    async def _opened(self, frame: Frame) -> Turn:
        """The turn; if the client leaves while it is being opened, it ends at once."""
        opening = asyncio.ensure_future(_in_thread(self._open, frame))
        try:
            turn: Turn = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unread)
            raise
        return turn

    def _open(self, frame: Frame) -> Turn:
        """A new turn for a caller who is still who they were. Sync."""
        caller = caller_of_socket(self.scope)
        if caller is None:
            raise SignedOut
        conversation = self._visible(caller)
        if conversation is None:
            raise NotFound("This conversation does not exist any more.")
        if frame.id is None:
            return Turn.open(caller, conversation, frame.text, transport="ws")
        if not conversation.messages.filter(pk=frame.id).exists():
            raise NotFound("There is no such answer in this conversation.")
        return Turn.retry(caller, frame.id, transport="ws")

    async def _stop(self) -> None:
        """Stop what runs here; nothing running is no error, two clicks on "stop" are normal."""
        turn = running.get(self._conversation_id)
        if turn is not None:
            turn.close("stopped")
            return
        message = await _in_thread(self._last_answer)
        if message is not None and message.status == Message.Status.STREAMING:
            await _in_thread(stop, message)

    async def _resume(self, frame: Frame) -> None:
        turn = running.get(self._conversation_id)
        if turn is not None:
            self._follow(turn, frame.after_seq, frame.ref)
        else:
            self._leave()
            self._follower = asyncio.create_task(self._await_elsewhere(frame.ref))

    def _last_answer(self) -> Message | None:
        answers = Message.objects.filter(
            conversation_id=self._conversation_id, role=Message.Role.ASSISTANT
        )
        answers.reap()
        return answers.order_by("-seq").first()

    # -- following a turn

    def _follow(self, turn: Turn, after_seq: int, ref: str | None) -> None:
        """Read that turn's log from now on, and no other."""
        self._leave()
        self._turn, self._reader = turn, turn.read(after_seq)
        self._follower = asyncio.create_task(self._pump(self._reader, ref))

    def _leave(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
        if self._reader is not None:
            self._reader.close()
        self._turn = self._reader = self._follower = None

    async def _pump(self, reader: Reader, ref: str | None) -> None:
        """Events as frames, no faster than the socket takes them."""
        async for event in reader:
            frame = wire.event_json(event)
            if frame["type"] == "message.created":
                frame["ref"] = ref
            while self._outbox_bytes > OUTBOX_BYTES // 2:
                self._room.clear()
                await self._room.wait()
            self._say(frame)

    async def _await_elsewhere(self, ref: str | None) -> None:
        """Tell how the last answer ended; another process may still be writing it."""
        while True:
            message = await _in_thread(self._last_answer)
            if message is None:
                self._say_error(NotFound("There is no answer here yet."), ref)
                return
            if message.status != Message.Status.STREAMING:
                self._say(wire.ended_json(message))
                return
            await asyncio.sleep(ELSEWHERE_S)

    # -- the outbox

    def _say_error(self, error: AssistantError, ref: str | None) -> None:
        self._say({"type": "error", "error": wire.error_json(error), "ref": ref})

    def _say(self, frame: dict[str, Any]) -> None:
        text = wire.encode(frame)
        self._outbox_bytes += len(text.encode())
        self._outbox.put_nowait(text)
        if self._outbox_bytes > OUTBOX_BYTES and self._ending is None:
            self._ending = asyncio.create_task(self._end(wire.CLOSE_LIMITED))

    async def _write(self) -> None:
        """Send what is to be sent. A socket that takes nothing for 10 s is given up."""
        while True:
            text = await self._outbox.get()
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self.send(text_data=text)
            except Exception as error:  # TimeoutError, or whatever the server says of a dead peer
                log.info("a socket was given up: %s", type(error).__name__)
                await self._end(wire.CLOSE_LIMITED)
                return
            self._outbox_bytes -= len(text.encode())
            self._room.set()

    # -- the end

    async def _end(self, code: int | None) -> None:
        """Let everything go, and tell the peer why if it is still there. Any number of times."""
        if self._ended:
            return
        self._ended = True
        self._leave()
        if self._caller is not None:
            _sockets[self._caller.key] -= 1
            if not _sockets[self._caller.key]:
                del _sockets[self._caller.key]
        if code is not None:
            with suppress(Exception):
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self.close(code)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()


def _close_unread(opening: asyncio.Future[Turn]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close("interrupted")


async def _in_thread(function: Any, *args: Any) -> Any:
    return await DatabaseSyncToAsync(function, thread_sensitive=False)(*args)
