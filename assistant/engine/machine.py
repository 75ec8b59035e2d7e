"""What this process may use of the machine: cores and memory, as a container sees them, and how its
processor multiplies.

Reads affinity, control groups, physical memory and the processor's flags; knows nothing of models.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
from pathlib import Path
from typing import Any

_GROUPS = Path("/sys/fs/cgroup")
_PROCESSOR = Path("/proc/cpuinfo")
#: ``M_MMAP_THRESHOLD`` of glibc's malloc.h.
_MMAP_THRESHOLD = -3


def cores(groups: Path = _GROUPS) -> int:
    """Cores that this process may run on at once, at least one."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(groups))))


def memory_bytes(groups: Path = _GROUPS) -> int:
    """Memory that this process may fill."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = (_number(groups / name) for name in ("memory.max", "memory/memory.limit_in_bytes"))
    return min(physical, *(int(limit) for limit in limits if limit is not None), physical)


def _quota(groups: Path) -> float:
    """Cores' worth of time that the control group grants; infinite where it sets no bound."""
    try:  # version 2: "200000 100000", or "max 100000"
        share, period = (groups / "cpu.max").read_text().split()
        return math.inf if share == "max" else int(share) / int(period)
    except (OSError, ValueError):
        pass
    share_v1 = _number(groups / "cpu/cpu.cfs_quota_us")
    period_v1 = _number(groups / "cpu/cpu.cfs_period_us")
    if not share_v1 or not period_v1 or share_v1 < 0:  # -1: no bound
        return math.inf
    return share_v1 / period_v1


def _number(path: Path) -> float | None:
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None


def processor_flags(info: Path = _PROCESSOR) -> frozenset[str]:
    """Names of what the processor can do, as Linux calls them; none where nothing tells."""
    try:
        lines = info.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = (line for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(found, "").partition(":")[2].split())


def saturates(info: Path = _PROCESSOR) -> bool:
    """Whether fast products of 8-bit numbers cut off large sums: on x86 without VNNI, and where an
    x86 does not tell."""
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return x86 and processor_flags(info).isdisjoint(("avx512_vnni", "avx_vnni"))


def exact_products(options: Any) -> None:
    """Tell an onnxruntime session to multiply 8-bit numbers exactly where it would not. Only there:
    other processors would take up to twice the time for it."""
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")


def keep_large_blocks_apart() -> None:
    """From here on memory of models is returned to the system when they are closed.

    glibc learns to keep large blocks once some were freed; after a dozen swaps a process held 2.6
    times what one model takes, and with this it peaks at 1.2 times. No other C library needs it.
    """
    try:
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 4 << 20)
    except (AttributeError, OSError, TypeError):  # another C library
        return


def give_back_memory() -> None:
    """Return what was freed in small blocks, too. Takes milliseconds."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
