"""A process that was told to stop says so first, so that no new users are sent to it.

On SIGTERM ``/readyz`` turns 503 at once; ``ASSISTANT_DRAIN_SECONDS`` later the server's own handler
runs, which closes the door and lets running answers end. A second SIGTERM does not wait.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from types import FrameType
from typing import Any

from django.conf import settings
from django.core.signals import request_started

log = logging.getLogger(__name__)


class Drain:
    """Whether this process is about to stop, and what happens when it is told to."""

    def __init__(self) -> None:
        self.begun = False
        self._before: Any = None

    async def arm(self, **_: Any) -> None:
        """Stand before the server's own handler; a receiver of the first request, or of several
        that come at once.

        Only a server has both, a loop in the main thread and a handler of its own.
        """
        request_started.disconnect(dispatch_uid="drain-arm")
        if threading.current_thread() is not threading.main_thread() or self._before is not None:
            return
        before = signal.getsignal(signal.SIGTERM)
        if callable(before):
            self._before, self._loop = before, asyncio.get_running_loop()
            signal.signal(signal.SIGTERM, self._told)

    def _told(self, number: int, frame: FrameType | None) -> None:
        if self.begun:
            self._before(number, frame)
            return
        self.begun = True
        log.warning("drain_started")
        wait_s = settings.ASSISTANT_DRAIN_SECONDS
        self._loop.call_soon_threadsafe(self._loop.call_later, wait_s, self._before, number, None)


drain = Drain()


def obey() -> None:
    """Drain from now on, if this process serves."""
    request_started.connect(drain.arm, dispatch_uid="drain-arm", weak=False)
