"""The WebSocket: frames in, events out. Everything slow happens in tasks of its own.

channels hands over one frame at a time and waits for the handler, so the handler only puts it in a
bounded inbox. One task works the inbox off, one writes, one follows a turn's log: "stop" is seen
while an answer streams, and a client that vanishes or does not read costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress
from typing import Any

from channels.generic.websocket import AsyncWebsocketConsumer  # type: ignore[import-untyped]

from assistant.errors import AssistantError, InvalidRequest, NotFound, Overloaded
from assistant.threads import crowded, in_thread, room
from conversations import wire
from conversations.access import (
    Credential,
    address_of_socket,
    caller_of_socket,
    credential_of_socket,
    identified,
)
from conversations.idempotency import Once, run_once
from conversations.limits import Caller, Seat, TooMany, refused
from conversations.log import Reader
from conversations.logins import Watch, watched
from conversations.models import Conversation, Message, note_siblings
from conversations.news import ears
from conversations.resume import ELSEWHERE_S, Stored, reader_of
from conversations.running import hurry, running, stop
from conversations.turn import Turn
from conversations.wire import Frame
from fallback import breaker

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
#: A socket that came without a login has so long to say a token.
AUTH_WITHIN_S = 5.0
#: Headers of the handshake that name it.
_IDENTIFIED_BY = (b"x-request-id", b"traceparent")


class SignedOut(Exception):
    """The login behind this socket has ended."""


class ChatConsumer(AsyncWebsocketConsumer):  # type: ignore[misc]
    """One socket on one conversation."""

    # No layer: tokens never travel through it, and a Redis that is away must not refuse sockets.
    channel_layer_alias = "none"

    async def connect(self) -> None:
        self._conversation_id: uuid.UUID = self.scope["url_route"]["kwargs"]["conversation_id"]
        self._shown: Credential | None = credential_of_socket(self.scope)
        self._caller_key = ""
        self._user_id: int | None = None
        self._watch: Watch | None = None
        self._seat: Seat | None = None
        self._turn: Turn | None = None
        self._left: Turn | None = None
        self._reader: Reader | Stored | None = None
        self._follower: asyncio.Task[None] | None = None
        self._inbox: asyncio.Queue[str | None] = asyncio.Queue(INBOX_FRAMES)
        self._outbox: asyncio.Queue[str] = asyncio.Queue()
        self._outbox_bytes = 0
        self._room = asyncio.Event()
        self._frames, self._window_ends = 0, 0.0
        self._ended = False
        self._tasks: list[asyncio.Task[None]] = []
        self._telling: set[asyncio.Task[None]] = set()
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
        await self._end(None)
        if self._left is not None:
            await self._left.settled(SETTLE_S)

    # -- the inbox

    async def _serve(self) -> None:
        told = dict(self.scope["headers"])
        identified(*(told.get(key, b"").decode("latin-1") for key in _IDENTIFIED_BY))
        code = await self._enter()
        if code is not None:
            await self._end(code)
            return
        self._look_after()
        if not self._ended:  # the client may have left meanwhile
            ears().add(self._conversation_id, self._hear)
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
            self._seat = Seat(address_of_socket(self.scope))
            if self._shown is None:
                self._shown = await self._say_who()
            caller, found = await self._in_place()
        except Overloaded as error:
            return await self._turned_away(error)
        except SignedOut:
            return wire.CLOSE_UNAUTHENTICATED
        except TooMany:
            return wire.CLOSE_LIMITED
        except Exception as error:
            log.error("a socket could not be opened: %s", type(error).__name__)
            return 1011
        if caller is None:
            return wire.CLOSE_UNAUTHENTICATED
        if not found:
            return wire.CLOSE_NOT_FOUND
        try:
            if not self._ended:  # the client may have left meanwhile
                self._seat.belongs_to(caller)
        except TooMany:
            return wire.CLOSE_LIMITED
        self._caller_key, self._user_id = caller.key, caller.user_id
        return None

    async def _in_place(self) -> tuple[Caller | None, bool]:
        """Who it is, found out in one of the places that requests share. Raises: Overloaded."""
        if not await room.take():
            raise crowded()
        try:
            return await in_thread(self._arrive)
        finally:
            room.leave()

    async def _turned_away(self, error: Overloaded) -> int:
        """Say so before the close, which a queue of frames would not outlive; the code of it."""
        refused.send_robust(sender=Overloaded, scope="requests")
        frame = {"type": "error", "error": wire.error_json(error), "ref": None}
        with suppress(Exception):  # a peer that is gone
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self.send(text_data=wire.encode(frame))
        return wire.CLOSE_OVERLOADED

    async def _say_who(self) -> Credential:
        """The token of the first frame. Raises: SignedOut for anything else, or nothing.

        Nothing is read from the address: what stands there lands in logs.
        """
        if self.scope.get("query_string"):
            raise SignedOut
        try:
            async with asyncio.timeout(AUTH_WITHIN_S):
                frame = wire.parse_frame(await self._inbox.get())
        except (TimeoutError, wire.BadFrame):
            raise SignedOut from None
        if frame.type != "auth" or not frame.token or not frame.token.isascii():
            raise SignedOut
        return Credential(authorization=f"Bearer {frame.token}")

    def _arrive(self) -> tuple[Caller | None, bool]:
        caller = self._who()
        return caller, caller is not None and self._visible(caller) is not None

    def _who(self) -> Caller | None:
        return None if self._shown is None else caller_of_socket(self.scope, self._shown)

    def _still(self) -> bool:
        """Whether the one who came in is still who they were. Sync."""
        caller = self._who()
        return caller is not None and caller.key == self._caller_key

    def _look_after(self) -> None:
        """From now on the login is looked at, also while the socket says nothing."""
        if self._ended or self._shown is None:
            return
        watch = Watch(self._shown, self._user_id, self._still, self._sign_out)
        self._watch = watched().add(watch)

    def _sign_out(self) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(wire.CLOSE_UNAUTHENTICATED))

    def _visible(self, caller: Caller) -> Conversation | None:
        return Conversation.objects.own(caller, self._conversation_id)

    async def _handle(self, frame: Frame) -> None:
        match frame.type:
            case "ping":
                told = await in_thread(breaker.notice)
                self._say({"type": "pong", **({"notice": told} if told else {})})
            case "auth":
                raise InvalidRequest("This socket is signed in. Open another one for another user.")
            case "message.hurry":
                await self._hurry(await in_thread(self._named, frame))
            case "message.cancel":
                await self._stop(await in_thread(self._named, frame))
            case "message.resume":
                await self._resume(frame, await in_thread(self._named, frame))
            case _:
                self._begin(frame, await self._opened(frame))

    def _here(self) -> tuple[Caller, Conversation]:
        """Caller and conversation as of now. Sync. Raises: SignedOut, NotFound."""
        caller = self._who()
        if caller is None or caller.key != self._caller_key:
            raise SignedOut
        conversation = self._visible(caller)
        if conversation is None:
            raise NotFound("This conversation does not exist any more.")
        return caller, conversation

    def _named(self, frame: Frame) -> Message | None:
        """The answer a frame names, if it does. Sync. Raises: SignedOut, NotFound."""
        _, conversation = self._here()
        if frame.id is None:
            return None
        rows = conversation.messages.select_related("conversation", "parent", *Message.BESIDE)
        message = rows.filter(pk=frame.id, role=Message.Role.ASSISTANT).first()
        if message is None:
            raise NotFound("There is no such answer in this conversation.")
        return message

    # -- asking

    async def _opened(self, frame: Frame) -> Turn | Message:
        """The turn; if the client leaves while it is being opened, it ends at once."""
        opening = asyncio.ensure_future(in_thread(self._open, frame))
        try:
            begun: Turn | Message = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unread)
            raise
        return begun

    def _open(self, frame: Frame) -> Turn | Message:
        """A new turn for a caller who is still who they were; or what it began before. Sync."""
        caller, conversation = self._here()
        once = Once.of(frame.idempotency_key, frame.type, frame.id, frame.text)
        return run_once(
            conversation.pk, once, lambda: self._new_turn(frame, caller, conversation, once)
        )

    def _new_turn(
        self, frame: Frame, caller: Caller, conversation: Conversation, once: Once | None
    ) -> Turn:
        if frame.id is None:
            return Turn.open(caller, conversation, frame.text, transport="ws", once=once)
        if not conversation.messages.filter(pk=frame.id).exists():
            raise NotFound("There is no such message in this conversation.")
        match frame.type:
            case "message.regenerate":
                return Turn.regenerate(caller, frame.id, transport="ws", once=once)
            case "message.edit":
                return Turn.edit(caller, frame.id, frame.text, transport="ws", once=once)
        return Turn.retry(caller, frame.id, transport="ws")

    def _begin(self, frame: Frame, begun: Turn | Message) -> None:
        if isinstance(begun, Turn):
            self._follow(begun.read(), frame.ref, begun)
        else:
            self._follow(_again(begun), frame.ref, running.get(self._conversation_id), again=True)

    async def _hurry(self, named: Message | None) -> None:
        """Have what waits here answered by what is known; nothing waiting is no error."""
        message = named or await in_thread(self._last_answer)
        if message is not None:
            await in_thread(hurry, message)

    async def _stop(self, named: Message | None) -> None:
        """Stop what runs here; nothing running is no error, two clicks on "stop" are normal."""
        turn = running.get(self._conversation_id)
        if turn is not None:
            if named is None or named.pk == turn.message.pk:
                turn.close("stopped")
            return
        message = named or await in_thread(self._last_answer)
        if message is not None and message.status == Message.Status.STREAMING:
            await in_thread(stop, message)

    async def _resume(self, frame: Frame, named: Message | None) -> None:
        """That answer's events, or those of the one being written, or how the last one ended."""
        turn = running.get(self._conversation_id)
        if named is not None:
            found = reader_of(named, frame.after_seq) or Stored(named, frame.after_seq)
            self._follow(found, frame.ref, turn)
        elif turn is not None:
            self._follow(turn.read(frame.after_seq), frame.ref, turn)
        else:
            self._leave()
            self._follower = asyncio.create_task(self._await_elsewhere(frame.ref))

    def _last_answer(self) -> Message | None:
        answers = Message.objects.filter(
            conversation_id=self._conversation_id, role=Message.Role.ASSISTANT, author=""
        )
        answers.reap()
        return answers.order_by("-seq").first()

    # -- following a turn

    def _follow(
        self, reader: Reader | Stored, ref: str | None, turn: Turn | None, *, again: bool = False
    ) -> None:
        """Read that from now on, and nothing else. ``turn``: to be waited for when we leave."""
        self._leave()
        self._turn, self._reader = turn, reader
        self._follower = asyncio.create_task(self._pump(reader, ref, again))

    def _leave(self) -> None:
        if self._follower is not None:
            self._follower.cancel()
        if self._reader is not None:
            self._reader.close()
        self._turn = self._reader = self._follower = None

    async def _pump(self, reader: Reader | Stored, ref: str | None, again: bool) -> None:
        """Events as frames, no faster than the socket takes them."""
        async for event in reader:
            frame = wire.event_json(event)
            if frame["type"] == "message.created":
                frame["ref"] = ref
                if again:
                    frame["replayed"] = True
            while self._outbox_bytes > OUTBOX_BYTES // 2:
                self._room.clear()
                await self._room.wait()
            self._say(frame)

    async def _await_elsewhere(self, ref: str | None) -> None:
        """Tell how the last answer ended; another process may still be writing it."""
        while True:
            message = await in_thread(self._last_answer)
            if message is None:
                self._say_error(NotFound("There is no answer here yet."), ref)
                return
            if message.status != Message.Status.STREAMING:
                self._say(wire.ended_json(message))
                return
            await asyncio.sleep(ELSEWHERE_S)

    # -- what happens outside a turn

    def _hear(self, message_ids: tuple[uuid.UUID, ...]) -> None:
        """Some of this conversation's messages changed: a person answered, or was asked for."""
        if not self._ended:
            task = asyncio.create_task(self._tell(message_ids))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, message_ids: tuple[uuid.UUID, ...]) -> None:
        try:
            for message in await in_thread(self._changed, message_ids):
                self._say(wire.ended_json(message))
        except (SignedOut, AssistantError):
            return  # whatever they do next tells them
        except Exception as error:
            log.warning("news did not reach a socket: %s", type(error).__name__)

    def _changed(self, message_ids: tuple[uuid.UUID, ...]) -> list[Message]:
        """Those that are shown and ended, in order. Sync. Raises: SignedOut, NotFound."""
        _, conversation = self._here()
        rows = conversation.messages.on_the_page().filter(pk__in=message_ids)
        ended = rows.exclude(status=Message.Status.STREAMING).select_related(*Message.BESIDE)
        found = list(ended.order_by("seq"))
        note_siblings(found)
        return found

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
        self._left = self._turn  # a send that failed may end us before ``disconnect`` comes
        self._leave()
        if self._seat is not None:
            self._seat.leave()
        if self._watch is not None:
            watched().remove(self._watch)
        ears().remove(self._conversation_id, self._hear)
        if code is not None:
            with suppress(Exception):
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self.close(code)
        current = asyncio.current_task()
        for task in self._tasks:
            if task is not current:
                task.cancel()


def _again(message: Message) -> Reader | Stored:
    """All events of an answer that was asked for before."""
    return reader_of(message, 0) or Stored(message, 0)


def _close_unread(opening: asyncio.Future[Turn | Message]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        begun = opening.result()
        if isinstance(begun, Turn):
            begun.close("interrupted")
