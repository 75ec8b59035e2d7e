"""Keeps a question from the model that has crashed it twice: rules answer it instead.

Before a model in this process is asked, the question's mark stands in a file of this process, and
goes when it was answered. A process that dies (a fault in native code) leaves the marks of what it
was answering; whoever starts next finds them. Marks are keyed hashes: no text lies on the disk.
Knows nothing of engines and routes; a disk that is full costs the memory of it, not the answer.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

from django.conf import settings
from django.utils.crypto import salted_hmac

from assistant.backends.base import Backend
from assistant.engine import EngineCrashed
from assistant.errors import GenerationFailed
from assistant.types import Delta, Event, Message, Waiting

log = logging.getLogger(__name__)

#: Crashes that a question was in before it is kept away, and for how long.
STRIKES, KEPT_S = 2, 3_600.0
#: So many crashes in so long: until the oldest is past, no model is asked at all. Processes that
#: die together, as those of a server do, are one.
DEATHS, DEATHS_WITHIN_S, TOGETHER_S = 3, 600.0, 5.0
#: How often what other processes noted is looked at.
LOOK_EVERY_S = 1.0
#: A first word that was not waited for in a queue takes no longer, unless the model is stuck.
_QUEUED_FROM_S = 1.0
#: A time-out is noticed here a moment before or after it ends.
_NEARLY = 0.98
_MARK_BYTES = 16
_MOST_MARKS = 1_000


class Quarantined(GenerationFailed):
    """The model is not asked: this question, or this machine, crashed too often."""


class Quarantine:
    """Of one folder, shared by all processes of a machine."""

    def __init__(self, folder: Path, process: int) -> None:
        self.process = process
        self._folder = folder
        self._lock = threading.Lock()
        self._path = folder / f"{process}-{time.time_ns()}.asked"
        self._journal: IO[bytes] | None = None
        self._slots: list[int] = []
        self._most = 0
        self._strikes: dict[str, list[float]] = {}
        self._deaths: list[float] = []
        self._looked_at, self._seen = -LOOK_EVERY_S, 0
        with _harmless():
            folder.mkdir(parents=True, exist_ok=True)
            self._bury()
            self._journal = _locked(self._path)

    # -- asking

    def check(self, mark: str) -> None:
        """Raises: Quarantined."""
        self._look()
        now = time.time()
        if sum(now - at < KEPT_S for at in self._strikes.get(mark, ())) >= STRIKES:
            raise Quarantined("The model broke over this question before. It is not asked again.")
        if sum(now - at < DEATHS_WITHIN_S for at in self._deaths) >= DEATHS:
            raise Quarantined("The model broke too often lately. It is given a rest.")

    @contextmanager
    def asked(self, mark: str) -> Iterator[None]:
        """While the model is at it, its mark outlives this process."""
        slot = self._write(mark)
        try:
            yield
        finally:
            self._free(slot)

    def _write(self, mark: str) -> int:
        with self._lock:
            if not self._slots:
                self._slots.append(self._most)
                self._most += 1
            slot = self._slots.pop()
        self._put(slot, bytes.fromhex(mark))
        return slot

    def _free(self, slot: int) -> None:
        self._put(slot, bytes(_MARK_BYTES))
        with self._lock:
            self._slots.append(slot)

    def _put(self, slot: int, mark: bytes) -> None:
        """Not synced: what was written outlives a process, and this is not about power cuts."""
        if self._journal is not None:
            with suppress(OSError):
                os.pwrite(self._journal.fileno(), mark, slot * _MARK_BYTES)

    # -- noting

    def strike(self, marks: Iterable[str], *, crashed: bool) -> None:
        """These were being answered when the model broke, or would not begin."""
        now = time.time()
        with _harmless(), _locked(self._folder / "lock", wait=True):
            self._read()
            for mark in marks:
                self._strikes.setdefault(mark, []).append(now)
                log.warning("the model broke over question %s", mark[:8])
            if crashed and now - max(self._deaths, default=0) > TOGETHER_S:
                self._deaths.append(now)
            self._keep(now)

    def _keep(self, now: float) -> None:
        fresh = {
            mark: recent
            for mark, times in self._strikes.items()
            if (recent := [at for at in times if now - at < KEPT_S])
        }
        newest = sorted(fresh, key=lambda mark: fresh[mark][-1])[-_MOST_MARKS:]
        self._strikes = {mark: fresh[mark] for mark in newest}
        self._deaths = [at for at in self._deaths if now - at < DEATHS_WITHIN_S]
        told = json.dumps({"strikes": self._strikes, "deaths": self._deaths})
        new = self._folder / "strikes.new"
        new.write_text(told)
        new.replace(self._folder / "strikes.json")

    # -- learning

    def _look(self) -> None:
        if (now := time.monotonic()) - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        with suppress(FileNotFoundError), _harmless():
            seen = (self._folder / "strikes.json").stat().st_mtime_ns
            if seen != self._seen:
                self._seen = seen
                self._read()

    def _read(self) -> None:
        with suppress(FileNotFoundError):
            told = json.loads((self._folder / "strikes.json").read_text())
            self._strikes, self._deaths = told["strikes"], told["deaths"]

    def _bury(self) -> None:
        """Note what dead processes were answering: nobody holds the locks of their files."""
        for left in self._folder.glob("*.asked"):
            with suppress(BlockingIOError, FileNotFoundError), _locked(left) as journal:
                raw = journal.read()
                left.unlink()
                ends = range(0, len(raw) - _MARK_BYTES + 1, _MARK_BYTES)
                marks = {raw[at : at + _MARK_BYTES] for at in ends}
                if found := [mark.hex() for mark in marks if any(mark)]:
                    self.strike(found, crashed=True)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._path.unlink(missing_ok=True)


@contextmanager
def _harmless() -> Iterator[None]:
    """A folder that cannot be written or read is told, and nobody's answer is lost for it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the quarantine is not kept: %s", type(error).__name__)


def _locked(path: Path, *, wait: bool = False) -> IO[bytes]:
    """Open for reading and writing, and nobody else's. Raises: BlockingIOError."""
    # Not for appending: then Linux appends whatever place is named.
    opened = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        opened.close()
        raise
    return opened


# --- Of this process -----------------------------------------------------------------------------

_own: Quarantine | None = None
_making = threading.Lock()


def own() -> Quarantine:
    """This process's; a forked child makes its own."""
    global _own
    with _making:
        if _own is None or _own.process != os.getpid():
            _own = Quarantine(Path(settings.DATA_DIR) / "quarantine", os.getpid())
        return _own


def forget() -> None:
    """Of this process: begin anew at the next question."""
    global _own
    with _making:
        if _own is not None and _own.process == os.getpid():
            _own.close()
        _own = None


def mark_of(messages: Sequence[Message]) -> str:
    """The same for the same words after the same history."""
    said = json.dumps([[message.role, message.text] for message in messages])
    return salted_hmac("fallback.quarantine", said, algorithm="sha256").digest()[:_MARK_BYTES].hex()


async def watched(
    backend: Backend, messages: Sequence[Message], events: AsyncIterator[Event]
) -> AsyncIterator[Event]:
    """The events, unless the question is in quarantine. Raises: Quarantined."""
    kept, mark = own(), mark_of(messages)
    began = moved = time.monotonic()
    queued = backend.expected_wait_s() > _QUEUED_FROM_S
    kept.check(mark)
    heard = False
    with kept.asked(mark):
        try:
            async with aclosing(cast(Any, events)) as stream:
                async for event in stream:
                    moved = time.monotonic()
                    heard = heard or isinstance(event, Delta)
                    queued = queued or isinstance(event, Waiting)
                    yield event
        except (asyncio.CancelledError, GeneratorExit):
            now = time.monotonic()
            silent = heard and now - moved > backend.idle_s * _NEARLY
            if silent or (not (heard or queued) and now - began > _patience_s()):
                kept.strike([mark], crashed=False)
            raise
        except Exception as error:
            if isinstance(error.__cause__, EngineCrashed):
                kept.strike([mark], crashed=True)
            raise


def _patience_s() -> float:
    """Who gave up after that long did so because no first word came."""
    return float(settings.ASSISTANT["FIRST_TOKEN_TIMEOUT_S"]) * _NEARLY
