"""One engine in a process of its own, asked over a pipe, never trusted.

It may crash, hang, or answer rubbish: each becomes one ``SideError`` that says so, within a time
limit, and ends nobody else. Knows the protocol of ``peers.base`` and no engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from assistant.benchmark.peers.base import Task

_ROOT = Path(__file__).resolve().parents[2]
#: First on the path, so that this code runs and no other copy; but last where it lies among other
#: packages, which belong to this interpreter and not to the child's.
_PLACE = "len(sys.path)" if _ROOT.name.endswith("-packages") else "0"
_BOOT = (
    "import runpy, sys; module, root = sys.argv[1:3]; del sys.argv[1:3]; "
    f"sys.path.insert({_PLACE}, root); runpy.run_module(module, run_name='__main__')"
)
_LONGEST_LINE = 2**24

Trouble = Literal["not installed", "crashed", "hung", "garbage", "failed"]


class SideError(RuntimeError):
    """An engine did not answer as it should. ``trouble`` says how, the message the rest."""

    def __init__(self, trouble: Trouble, message: str) -> None:
        super().__init__(message)
        self.trouble: Trouble = trouble


@dataclass(frozen=True, slots=True)
class Side:
    """Whom to start: a row of the table. ``ours`` errors end the benchmark, others' do not."""

    name: str
    engine: str
    command: tuple[str, ...]
    ours: bool = False

    @classmethod
    def of(
        cls, name: str, engine: str, python: str, module: str, task: Task, *, ours: bool = False
    ) -> Side:
        command = (python, "-c", _BOOT, module, str(_ROOT), json.dumps(asdict(task)))
        return cls(name, engine, command, ours)


class Process:
    """A started side. One request at a time."""

    def __init__(
        self,
        side: Side,
        *,
        threads: int,
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.side, self._progress = side, progress
        # A file: a pipe that nobody reads would fill up and hang the child.
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(  # noqa: S603  (our own modules, a user's interpreter)
            side.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(threads),
            start_new_session=True,  # its own children die with it
        )
        self._buffer = b""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Any:
        """The answer. Raises: SideError, after which the process is gone unless it "failed"."""
        assert self._process.stdin is not None
        deadline = time.monotonic() + timeout_s
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                answer = self._parsed(self._line(deadline, timeout_s))
                if "progress" not in answer:
                    return self._judged(answer)
                self._progress(str(answer["progress"]))
        except BrokenPipeError:
            raise self._ended() from None
        except SideError as error:
            if error.trouble != "failed":
                self.close()
            raise

    def close(self) -> None:
        """End it and whatever it started, at once if it does not leave by itself."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._errors.close()

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise SideError("hung", f"no answer within {timeout_s:g} s; it was ended")
                part = os.read(self._process.stdout.fileno(), 2**16)
                if not part:
                    raise self._ended()
                self._buffer += part
                if len(self._buffer) > _LONGEST_LINE:
                    raise SideError("garbage", "it answered without end; it was ended")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {
            "ok",
            "error",
            "missing",
            "progress",
        }:
            raise SideError("garbage", f"it answered {line[:80]!r}, which is no answer")
        return answer

    def _judged(self, answer: dict[str, Any]) -> Any:
        if "missing" in answer:
            raise SideError("not installed", f"the module {answer['missing']} is not installed")
        if "error" in answer:
            raise SideError("failed", " ".join(str(answer["error"]).split())[:400])
        return answer["ok"]

    def _ended(self) -> SideError:
        """Why it is gone."""
        try:
            code = self._process.wait(2)
        except subprocess.TimeoutExpired:
            return SideError("crashed", "it closed its pipe without an answer")
        how = f"exit status {code}"
        if code < 0:
            how = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        last = self._last_words()
        return SideError("crashed", f"it ended by {how}" + (f": {last}" if last else ""))

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def _environment(threads: int) -> dict[str, str]:
    """Same threads for everybody, no network, no chatter."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
    }
