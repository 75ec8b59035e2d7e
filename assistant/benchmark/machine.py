"""The machine and the versions behind a report: figures mean nothing without them."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from assistant.engine.machine import processor_flags

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
_PACKAGES = ("onnxruntime", "numpy", "llama-cpp-python", "onnxruntime-genai", "optimum-onnx",
             "transformers", "torch")  # fmt: skip


def cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe() -> str:
    """Processor, cores, the vector instructions that matter here."""
    lines = _cpu_info()
    name = next((line for line in lines if line.startswith("model name")), "")
    name = name.partition(":")[2].strip() or platform.processor() or platform.machine()
    flags = processor_flags()
    useful = [flag for flag in _FLAGS if flag in flags]
    return f"{name}, {cores()} cores, {' '.join(useful) or 'no vector flags seen'}"


def busy() -> float:
    """Load average of the last minute over the cores: above 0 before a run, neighbours are busy."""
    return round(os.getloadavg()[0] / cores(), 2) if hasattr(os, "getloadavg") else 0.0


def versions() -> dict[str, str]:
    """Of this interpreter's packages; engines in other ones tell their own."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.exists() else []
