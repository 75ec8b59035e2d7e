"""The process that trains: a group of its own, watched, bounded in time, never two at once.

A lock in the run's folder goes along with it, so that whoever comes after a killed worker finds
what it left running, and ends it. Knows a command and a folder; knows nothing of models.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from django.conf import settings

from monitoring import jobs

#: What trains; ``train`` adds ``--from``, ``--data``, ``--out``, ``--model-version``, ``--resume``.
COMMAND: list[str] = [sys.executable, str(Path(settings.BASE_DIR) / "manage.py"), "train_model"]
LOCK = "trainer.lock"
#: How long a trainer may take to keep a checkpoint when it is told to stop.
_STOP_S = 10.0
_LAST_LINES, _MOST_LINE_BYTES = 20, 4_000
#: How far it is: in percent, or in corrections that are learned for sure.
_PERCENT = re.compile(r"\s*(\d{1,3})%\s")
_LEARNED = re.compile(r"corrections \d+ of (\d+) right, (\d+) surely")

Progress = Callable[[float], None]


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[int]:
    """The lock of that run's folder, held; a trainer that a killed worker left behind is ended.

    Raises: JobError where something else of that run goes on.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(lock)
        yield lock
    finally:
        os.close(lock)


def _take(lock: int) -> None:
    deadline = time.monotonic() + _STOP_S
    while not _taken(lock):
        _end_orphan(lock)
        if time.monotonic() > deadline:
            raise jobs.JobError("An earlier run of this job is still at work. Run it again later.")
        time.sleep(0.05)
    _note(lock, 0)


def _taken(lock: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _end_orphan(lock: int) -> None:
    """The group noted in the lock: it is alive, or nobody would hold the lock."""
    noted = os.pread(lock, 20, 0).strip()
    if noted.isdigit() and int(noted) > 1:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(int(noted), signal.SIGKILL)


def _note(lock: int, group: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"%d" % group, 0)


def train(
    work: jobs.Work,
    lock: int,
    *,
    base: Path,
    data: Path,
    out: Path,
    version: str,
    progress: Progress,
) -> None:
    """Runs the trainer to its end, its lines in the job's log.

    Raises: JobError with its last words, Lost.
    """
    command = [*COMMAND, "--from", str(base), "--data", str(data), "--out", str(out),
               "--model-version", version, "--resume"]  # fmt: skip
    # The lock goes along: as long as it is held, something of this run is alive.
    process = subprocess.Popen(  # noqa: S603 - our own command and paths
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=settings.BASE_DIR, start_new_session=True, pass_fds=[lock],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    _note(lock, process.pid)
    try:
        with _bounded(process) as overtime, work.stopped_by(lambda: _stop(process)):
            last = _followed(work, process.stdout, progress)
            status = process.wait()
    finally:
        _stop(process)
        process.stdout.close()
        _note(lock, 0)
    work.check()
    if status:
        raise jobs.JobError(_last_words(last, status, overtime.is_set())[:500])


@contextlib.contextmanager
def _bounded(process: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """Ends ``process`` when its time is over, and sets the event."""
    overtime = threading.Event()

    def end() -> None:
        overtime.set()
        _stop(process)

    timer = threading.Timer(settings.ASSISTANT["RETRAIN"]["MOST_S"], end)
    timer.daemon = True
    timer.start()
    try:
        yield overtime
    finally:
        timer.cancel()


def _followed(work: jobs.Work, output: IO[bytes], progress: Progress) -> list[str]:
    """Copies the trainer's lines into the log until it ends; the last of them."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    while line := output.readline(_MOST_LINE_BYTES):
        text = line.decode("utf-8", "replace").strip()
        if text:
            last.append(text)
            work.say(text)
        if (share := how_far(text)) is not None:
            with contextlib.suppress(jobs.Lost):  # the trainer is being stopped; read it to its end
                progress(share)
    return list(last)


def how_far(line: str) -> float | None:
    """0..1, if the line tells."""
    if match := _PERCENT.match(f"{line} "):
        return min(1.0, int(match[1]) / 100)
    if match := _LEARNED.search(line):
        return int(match[2]) / max(1, int(match[1]))
    return None


def _last_words(last: Sequence[str], status: int, overtime: bool) -> str:
    if overtime:
        return (
            f"Training took longer than {settings.ASSISTANT['RETRAIN']['MOST_S'] / 60:.0f} minutes "
            "and was ended. Run it again: it goes on from its last checkpoint."
        )
    said = next((line for line in reversed(last) if "Error: " in line), last[-1] if last else "")
    said = re.sub(r"^(?:\w+\.)*\w*Error: ", "", said)
    if status < 0:
        return f"Training was ended by signal {-status}. Run it again. {said}".strip()
    return f"Training failed: {said or f'exit status {status}, without a word.'}"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends its whole group, after a moment to keep a checkpoint."""
    for number, patience_s in ((signal.SIGINT, _STOP_S), (signal.SIGKILL, _STOP_S)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
