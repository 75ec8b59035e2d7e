"""What others are reproached with, held against our engine.

*Sources*: onnxruntime #11118 (memory grows with shapes), onnxruntime-genai #714 (throughput does
not grow with users), llama.cpp #22360 (speed decays over hours), onnxruntime-genai #406 and
onnxruntime #18430 (quantised slower than fp32). Processor time where that tells:
busy neighbours do not change it.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from assistant.benchmark.drive import Room, ask, measured, opened, prompts
from assistant.benchmark.meter import memory_mb
from assistant.benchmark.workloads import Load
from assistant.engine import Engine
from assistant.modelkit.build import build_random
from tests.conftest import ROOT

pytestmark = pytest.mark.load

BUNDLED = ROOT / "assistant" / "bundled" / "support-en"


def test_an_idle_engine_leaves_the_processor_alone() -> None:
    """In a process of its own: other tests' threads are nobody's idle engine."""
    command = [sys.executable, "manage.py", "bench", "--model", str(BUNDLED), "--workloads", "idle"]
    told = subprocess.run(
        [*command, "--quick", "--idle-s", "3", "--no-check", "--json"],
        cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=120,
    ).stdout  # fmt: skip
    (row,) = json.loads(told)["rows"]
    assert 0 <= row["figures"]["idle_cpu_percent"]["median"] < 1


def test_requests_of_all_lengths_do_not_make_memory_grow(tmp_path: Path) -> None:
    build_random("tiny", tmp_path / "tiny", "row8")
    with opened(tmp_path / "tiny", 1, Room(8, 264, queue=256)) as engine:
        asyncio.run(all_lengths(engine, 2))
        before = memory_mb()
        asyncio.run(all_lengths(engine, 4))
        assert memory_mb() - before <= 16


async def all_lengths(engine: Engine, times: int) -> None:
    """Without a caller's name: what is kept of chats is bounded by itself."""
    (longest,) = prompts(engine, 1, 256, seed=1)
    for _ in range(times):
        lengths = range(1, len(longest) + 1)
        await asyncio.gather(*(ask(engine, longest[:length], 2) for length in lengths))


def test_many_users_get_more_out_of_it_than_one() -> None:
    with opened(BUNDLED, 2, Room(16, 64)) as engine:
        one = measured(engine, Load(1, 16, 32, 6))
        many = measured(engine, Load(16, 16, 32, 3))
    assert many.output_tokens_per_s > 2 * one.output_tokens_per_s


def test_a_token_costs_in_the_end_what_it_cost_in_the_beginning() -> None:
    with opened(BUNDLED, 1, Room(4, 64)) as engine:
        costs = [measured(engine, Load(4, 16, 16, 4)).cpu_s_per_1k_tokens for _ in range(9)]
    assert min(costs[-3:]) < 1.25 * min(costs[:3])


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in every scheme."""
    root = tmp_path_factory.mktemp("builds")
    for quant in ("fp32", "static8", "row8", "int4"):
        build_random("15m", root / quant, quant)
    return root


@pytest.mark.parametrize("quant", ["static8", "row8", "int4"])
def test_fewer_bits_are_not_slower_than_full_precision(builds: Path, quant: str) -> None:
    """By turns, because the machine's speed drifts; the best of each."""
    costs: dict[str, list[float]] = {quant: [], "fp32": []}
    for name, found in [*costs.items()] * 3:
        with opened(builds / name, 1, Room(8, 64)) as engine:
            found.append(measured(engine, Load(8, 16, 24, 2)).cpu_s_per_1k_tokens)
    assert min(costs[quant]) < min(costs["fp32"])
