"""An engine that behaves as badly as its variant says, to prove that a benchmark survives it.

Run by the benchmark as a process of its own, as real ones are.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from assistant.benchmark.figures import Figures, Measured, Times, Usage
from assistant.benchmark.peers import base
from assistant.benchmark.workloads import Job


class StandIn(base.Engine):
    def __init__(self, task: base.Task) -> None:
        self._variant = task.variant
        if self._variant == "missing":
            raise ModuleNotFoundError("No module named 'rival'", name="rival")

    def prepare(self) -> dict[str, str]:
        print("native libraries print here when they like", flush=True)
        return {"version": "stand-in 1"}

    def run(self, job: Job) -> dict[str, Any]:
        assert job.load is not None
        if self._variant == "crashes":
            print("tile configuration failed", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._variant == "hangs":
            time.sleep(600)
        if self._variant == "rubbish":
            return {"figures": {"speed": "great"}}
        if self._variant == "fails":
            raise RuntimeError("no room\nfor so many chats")
        self.progress("getting on")
        return Measured(_figures(job), settings="its own").wire()

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        return [[1] * count for _ in prompts]


def _figures(job: Job) -> Figures:
    """Of a stand-in that writes a token every 10 ms to each chat."""
    assert job.load is not None
    load, times = job.load, Times()
    for _ in range(load.chats * load.rounds):
        for at in range(load.new_tokens):
            times.saw(0.01, 1, first=at == 0)
    wall = load.rounds * load.new_tokens * 0.01
    return Figures.of(times, Usage(wall, cpu_s=wall, peak_rss_mb=100))


if __name__ == "__main__":
    base.serve(StandIn)
