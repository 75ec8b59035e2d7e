"""WebSockets of uvicorn that take apart no more than their application reads, and do leave.

uvicorn stops reading once a message waits, but makes messages of all that one read brought: 10,000
small frames sent in one go took 2.3 MiB a socket, and nobody else was served meanwhile. And it
closes a connection when all was sent: a peer that reads nothing, and answers no ping, kept it. For
``uvicorn --ws config.sockets:BoundedSockets``.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

#: Bytes that are taken apart before anybody else's turn: 170 of the smallest frames.
PIECE_BYTES = 1_024
#: How long a peer that is hung up on may take to read what was sent before.
GONE_WITHIN_S = 5.0


class _Hasty:
    """A transport whose end waits for nobody."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        self._transport.close()
        asyncio.get_running_loop().call_later(GONE_WITHIN_S, self._transport.abort)


class BoundedSockets(WebSocketsSansIOProtocol):
    """What was read and not taken apart yet is kept as bytes, and nothing more is read meanwhile.

    Who is told to go and has more to say than a farewell is not listened to any more."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unread, self._deaf = b"", False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.transport = _Hasty(transport)  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if not self._deaf:
            self._unread += data
            self._take_apart()

    def _take_apart(self) -> None:
        """One piece, and the next when others had their turn; none while a message waits."""
        if not self._unread or self.read_paused or self.transport.is_closing():
            return
        if self.close_sent and len(self._unread) > PIECE_BYTES:
            self._unread, self._deaf = b"", True
        piece, self._unread = self._unread[:PIECE_BYTES], self._unread[PIECE_BYTES:]
        if piece:
            super().data_received(piece)
        if self.read_paused or self.transport.is_closing():
            return
        if self._unread:
            self.transport.pause_reading()
            self.loop.call_soon(self._take_apart)
        else:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        message = await super().receive()
        self._take_apart()
        return message
