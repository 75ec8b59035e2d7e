"""Measures the engine: closed-loop chats with prompts of random ids and answers of a forced length.

Knows the engine's public face only; what to measure comes in, figures go out.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from assistant.engine import Engine, EngineConfig


@dataclass(frozen=True, slots=True)
class Workload:
    """``rounds``: answers each chat asks for, one after the other."""

    concurrency: int
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 4

    def __post_init__(self) -> None:
        if min(self.concurrency, self.prompt_tokens, self.new_tokens, self.rounds) < 1:
            raise ValueError("chats, prompt tokens, new tokens and rounds all start at 1")


@dataclass(frozen=True, slots=True)
class Figures:
    """One row of ``bench --json``. *Units* stand in the names; ITL is the gap between tokens."""

    concurrency: int
    ttft_ms_p50: float
    ttft_ms_p99: float
    itl_ms_p50: float
    itl_ms_p99: float
    output_tokens_per_s: float
    cpu_s_per_1k_tokens: float
    peak_rss_mb: float


@dataclass(slots=True)
class _Times:
    """Seconds. A batch of several tokens counts as one gap and zeros, as a reader sees it."""

    ttft: list[float]
    gaps: list[float]
    tokens: int = 0


def measure(engine: Engine, workload: Workload) -> Figures:
    """Figures of one workload on a started engine, after one unmeasured round.

    Raises: EngineError; ValueError where the model's context is too small for the workload.
    """
    warm_up = replace(workload, rounds=1, new_tokens=min(workload.new_tokens, 64))
    asyncio.run(_run(engine, warm_up, seed=1))
    cpu, began = time.process_time(), time.perf_counter()
    times = asyncio.run(_run(engine, workload, seed=0))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    if times.tokens < workload.concurrency * workload.rounds * workload.new_tokens:
        raise ValueError(
            f"the model's context is too small for {workload.prompt_tokens} prompt tokens and "
            f"{workload.new_tokens} new ones; its answers were cut short"
        )
    return Figures(
        concurrency=workload.concurrency,
        ttft_ms_p50=_percentile_ms(times.ttft, 50),
        ttft_ms_p99=_percentile_ms(times.ttft, 99),
        itl_ms_p50=_percentile_ms(times.gaps, 50),
        itl_ms_p99=_percentile_ms(times.gaps, 99),
        output_tokens_per_s=round(times.tokens / wall, 1),
        cpu_s_per_1k_tokens=round(cpu / times.tokens * 1000, 3),
        peak_rss_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    )


async def _run(engine: Engine, workload: Workload, seed: int) -> _Times:
    times = _Times([], [])
    rng = np.random.default_rng(seed)
    assert engine.manifest is not None
    first, last = (
        engine.manifest.architecture.vocab_size // 2,
        engine.manifest.architecture.vocab_size,
    )
    prompts = rng.integers(first, last, (workload.concurrency, workload.prompt_tokens))
    chats = (_chat(engine, workload, prompt.tolist(), times) for prompt in prompts)
    await asyncio.gather(*chats)
    return times


async def _chat(engine: Engine, workload: Workload, prompt: Sequence[int], times: _Times) -> None:
    for _ in range(workload.rounds):
        before = time.perf_counter()
        generation = engine.submit(prompt, max_new_tokens=workload.new_tokens)
        first = True
        async for tokens in generation:
            now = time.perf_counter()
            (times.ttft if first else times.gaps).append(now - before)
            times.gaps += [0.0] * (len(tokens) - 1)
            times.tokens += len(tokens)
            first, before = False, now


def _percentile_ms(seconds: Sequence[float], percent: float) -> float:
    return round(float(np.percentile(seconds, percent)) * 1000, 2) if seconds else 0.0


def open_engine(model_dir: Path, workload: Workload, threads: int = 0) -> Engine:
    """A started engine with room for ``workload``. Raises: ManifestError, EngineError, ValueError.

    All chats ask at once, so the queue holds all of them; in production it would refuse some.
    """
    context_tokens = max(1024, workload.prompt_tokens + workload.new_tokens)
    engine = Engine(
        EngineConfig(
            model_dir,
            threads=threads,
            max_batch=workload.concurrency,
            max_queue=workload.concurrency,
            max_queue_tokens=workload.concurrency * context_tokens,
            step_tokens=max(256, 2 * workload.concurrency),
            context_tokens=context_tokens,
        )
    )
    engine.start()
    return engine


def machine() -> str:
    """The hardware line of a report."""
    name = platform.processor() or platform.machine()
    for line in _cpu_info():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    flags = next((line for line in _cpu_info() if line.startswith("flags")), "").split()
    useful = [flag for flag in ("avx2", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{name}, {os.cpu_count()} cores, {' '.join(useful) or 'no vector flags seen'}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(errors="replace").splitlines() if path.exists() else []
