"""The child's end of the pipe: one JSON line in, one out, for as long as the parent asks.

What an engine's process has in common, whichever engine it is. Imports no engine and no Django:
the interpreter may be another one.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TextIO

from assistant.benchmark.workloads import Job


@dataclass(frozen=True, slots=True)
class Task:
    """What a process is started for. ``source``: a checkpoint folder, or a built model for ours.
    ``folder``: where this engine may keep what it builds."""

    variant: str
    source: str
    folder: str
    threads: int


class Engine(ABC):
    """One way to run one engine. Made once per process; imports what it needs when made."""

    #: Tells the parent how a long job gets on; set by ``serve``.
    progress: Callable[[str], None] = staticmethod(lambda line: None)

    @abstractmethod
    def prepare(self) -> dict[str, str]:
        """Build what is missing and open the model; versions and fixed settings."""

    @abstractmethod
    def run(self, job: Job) -> dict[str, Any]:
        """A ``Measured`` on the wire. Raises: anything; the parent hears of it."""

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """The ``count`` likeliest next tokens of each prompt, one after another."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to compare ids with")


def serve(make: Callable[[Task], Engine]) -> None:
    """Answer requests until the pipe closes.

    Native libraries print to standard output when they like, so answers go to a copy of it and
    everything else to standard error.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task = Task(**json.loads(sys.argv[1]))
    engine: Engine | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            engine = engine or make(task)
            engine.progress = lambda line: _say(out, {"progress": line})
            _say(out, {"ok": _answer(engine, request)})
        except ModuleNotFoundError as error:
            _say(out, {"missing": error.name or str(error)})
        except Exception as error:  # the parent decides what becomes of it
            _say(out, {"error": str(error) or type(error).__name__, "kind": type(error).__name__})


def _answer(engine: Engine, request: dict[str, Any]) -> Any:
    if request["do"] == "prepare":
        return engine.prepare()
    if request["do"] == "run":
        return engine.run(Job.from_wire(request["job"]))
    return engine.greedy(request["prompts"], request["count"])


def _say(out: TextIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()
