"""What this process has used: processor time and memory; and how much others took meanwhile.

Runs inside other engines' processes too, so it needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from pathlib import Path

from assistant.benchmark.figures import Usage

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STAT = Path("/proc/stat")


class Meter:
    """Started when made; ``stop()`` reads it."""

    def __init__(self) -> None:
        forget_peak()
        self._all = _busy_s()
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self) -> Usage:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        # The kernel counts in hundredths, so short measurements may come out a little below 0.
        others = max(0.0, (_busy_s() - self._all - cpu) / wall)
        return Usage(wall, cpu, memory_mb("VmHWM"), others)


def _busy_s() -> float:
    """Processor time of everybody since boot, what a hypervisor took away included. 0: unknown."""
    if not _STAT.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(int, _STAT.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def forget_peak() -> None:
    """Let the peak start anew where the kernel allows it, so that each job has its own."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def memory_mb(name: str = "VmRSS") -> float:
    """Resident memory now (``VmRSS``) or at its peak (``VmHWM``)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 1024)
