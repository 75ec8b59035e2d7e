"""News for open sockets: messages that changed outside a turn, told to every process at once.

Only ids travel; each socket reads the rows itself, as the caller it belongs to. One group holds all
processes, since news are as rare as what people write by hand: nothing is sent or subscribed per
socket. Without Redis they reach this process alone, and a page also looks now and then. Nobody
waits for a Redis that is away.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

GROUP = "conversations.news"
#: Who tells waits no longer than that; the news are stored in any case.
TELL_WITHIN_S = 2.0
#: Between two tries to listen while Redis is away.
AGAIN_S = 5.0
#: A layer may forget who listens after a day; we say so again well before.
JOIN_EVERY_S = 3600.0

#: Called on the loop of the socket, with the ids of the messages that changed.
Ear = Callable[[tuple[uuid.UUID, ...]], None]


def tell(conversation_id: uuid.UUID, message_ids: Sequence[uuid.UUID]) -> None:
    """Tell all sockets of that conversation, in every process. Sync; never raises."""
    news = {
        "type": "news",
        "conversation": str(conversation_id),
        "messages": [str(one) for one in message_ids],
    }
    try:
        async_to_sync(_send)(news)
    except Exception as error:  # Redis is away: pages find it when they look
        log.warning("news of a conversation were not told: %s", type(error).__name__)


async def _send(news: dict[str, Any]) -> None:
    async with asyncio.timeout(TELL_WITHIN_S):
        await get_channel_layer().group_send(GROUP, news)


class Ears:
    """The sockets of one event loop, and the task that listens for them while there are any."""

    def __init__(self) -> None:
        self._ears: dict[uuid.UUID, set[Ear]] = defaultdict(set)
        self._task: asyncio.Task[None] | None = None

    def add(self, conversation_id: uuid.UUID, ear: Ear) -> None:
        self._ears[conversation_id].add(ear)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._listen())

    def remove(self, conversation_id: uuid.UUID, ear: Ear) -> None:
        held = self._ears.get(conversation_id, set())
        held.discard(ear)
        if not held:
            self._ears.pop(conversation_id, None)
        if not self._ears and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _listen(self) -> None:
        away = False
        while True:
            try:
                await self._hear()
            except Exception as error:
                if not away:
                    log.warning("news cannot be heard: %s", type(error).__name__)
                away = True
            await asyncio.sleep(AGAIN_S)

    async def _hear(self) -> None:
        layer = get_channel_layer()
        channel: str = await layer.new_channel()
        try:
            while True:
                await layer.group_add(GROUP, channel)
                with suppress(TimeoutError):
                    async with asyncio.timeout(JOIN_EVERY_S):
                        while True:
                            self._pass_on(await layer.receive(channel))
        finally:
            with suppress(Exception):
                async with asyncio.timeout(TELL_WITHIN_S):
                    await layer.group_discard(GROUP, channel)

    def _pass_on(self, news: dict[str, Any]) -> None:
        messages = tuple(uuid.UUID(one) for one in news["messages"])
        for ear in tuple(self._ears.get(uuid.UUID(news["conversation"]), ())):
            ear(messages)


_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Ears] = WeakKeyDictionary()


def ears() -> Ears:
    """Those of the running loop."""
    return _by_loop.setdefault(asyncio.get_running_loop(), Ears())
