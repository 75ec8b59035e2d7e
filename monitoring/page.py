"""The text of ``/metrics``, of this process or, with ``PROMETHEUS_MULTIPROC_DIR``, of all.

Written at most once in ``KEPT_S``, however many ask: a page costs milliseconds that answers need.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from monitoring import reading

log = logging.getLogger(__name__)

KEPT_S = 1.0
#: A client can name formats that differ in nothing but their name.
MOST_FORMATS = 4

#: A file of figures: its kind (``gauge_livesum``, ``counter``), then its process.
_FILE = re.compile(r"(\w+)_(\d+)\.db")


class Page:
    """The newest page in each format that was asked for; one thread writes at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pages: dict[str, tuple[float, bytes]] = {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type, as the client's ``Accept`` prefers."""
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # a version that is none
            encode, kind = choose_encoder("")
        with self._lock:
            written, page = self._pages.get(kind, (float("-inf"), b""))
            if self._clock() - written >= KEPT_S:
                reading.read()
                page = encode(registry())
                if len(self._pages) >= MOST_FORMATS:
                    self._pages.clear()
                self._pages[kind] = self._clock(), page
        return page, kind

    def forget(self) -> None:
        self._pages.clear()


page = Page()


def registry() -> CollectorRegistry:
    """Every figure: of this process, or of all that share the folder."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if not folder:
        return REGISTRY
    bury_the_dead(Path(folder))
    found = CollectorRegistry()
    found.register(_Together(folder))
    return found


class _Together(Collector):
    """All processes' figures, and of the results those that still hold."""

    def __init__(self, folder: str) -> None:
        self._all = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterator[Metric]:
        families: Iterable[Metric] = self._all.collect()  # type: ignore[no-untyped-call]
        return filter(reading.still_holds, families)


def bury_the_dead(folder: Path) -> None:
    """Take away what only a living process may say, and files it died before filling.

    What the dead have counted stays: a total never falls.
    """
    for path in folder.glob("*.db"):
        named = _FILE.fullmatch(path.name)
        if named is None or _lives(int(named[2])):
            continue
        mark_process_dead(int(named[2]), str(folder))  # type: ignore[no-untyped-call]
        with suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
