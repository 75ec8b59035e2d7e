"""The product's figures through its own front door: a real server, a real socket, a real model.

    python -m tests.load.figures [--json] [--turns 200]

First token over WebSocket on the bundled model (first turn of a chat, and its eighth, whose history
is read again), idle CPU, memory, how fast "stop" acts, how soon a vanished client's slot is free.
The two last need answers that last: a seeded random model of SmolLM2-135M's shape, built once into
the data folder. A slot is freed after ``ASSISTANT_ABANDON_GRACE_S`` (0.25 s by default).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant.benchmark import stack
from assistant.benchmark.stack import ROOT, Visitor

QUESTIONS = (
    "how do I cancel my order?",
    "where is my parcel 48213377",
    "I forgot my password",
    "which cards do you take",
    "can I talk to a person please, this is taking far too long for my taste",
)


@dataclass(frozen=True, slots=True)
class Report:
    """*Units* stand in the names. Percentiles over ``turns`` first turns, one by one, warm."""

    turns: int
    ttft_ms_p50: float
    ttft_ms_p99: float
    answer_ms_p50: float
    eighth_turn_ttft_ms_p50: float
    idle_cpu_percent: float
    rss_mb: float
    stop_ms_p50: float
    stop_ms_max: float
    slot_free_ms_p50: float
    slot_free_ms_max: float


class Server(stack.Server):
    """The benchmark's, with what its process uses."""

    def cpu_s(self) -> float:
        """Processor time used so far by the server process."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_mb(self) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return round(int(line.split()[1]) / 1024, 1)
        return 0.0


async def say(opened: Any, text: str) -> None:
    await opened.send(json.dumps({"type": "message.create", "text": text}))


async def until(opened: Any, *kinds: str) -> dict[str, Any]:
    """The next frame of one of these types. Raises: RuntimeError on an error frame."""
    while True:
        frame: dict[str, Any] = json.loads(await asyncio.wait_for(opened.recv(), 30))
        if frame["type"] in kinds:
            return frame
        if frame["type"] == "error":
            raise RuntimeError(str(frame))


async def turn(opened: Any, text: str) -> tuple[float, float]:
    """Milliseconds to the first delta and to the end of one answer."""
    began = time.perf_counter()
    await say(opened, text)
    await until(opened, "message.delta")
    first = time.perf_counter()
    await until(opened, "message.completed")
    return (first - began) * 1000, (time.perf_counter() - began) * 1000


async def first_turns(server: Server, turns: int) -> list[tuple[float, float]]:
    """Each in a chat of its own, one after another, after ten unmeasured ones."""
    visitor = Visitor(server)
    found = []
    for at in range(turns + 10):
        async with visitor.socket(visitor.conversation()) as opened:
            found.append(await turn(opened, QUESTIONS[at % len(QUESTIONS)]))
    return found[10:]


async def eighth_turns(server: Server, times: int) -> list[float]:
    """Milliseconds to the first delta of the eighth turn of a chat."""
    visitor = Visitor(server)
    found = []
    for _ in range(times):
        async with visitor.socket(visitor.conversation()) as opened:
            for at in range(8):
                ttft, _ = await turn(opened, QUESTIONS[at % len(QUESTIONS)])
            found.append(ttft)
    return found


async def stops(server: Server, times: int) -> list[float]:
    """Milliseconds from "stop" to the frame that says it is stored as stopped."""
    visitor = Visitor(server)
    found = []
    for _ in range(times):
        async with visitor.socket(visitor.conversation()) as opened:
            await say(opened, QUESTIONS[0])
            await until(opened, "message.delta")
            began = time.perf_counter()
            await opened.send(json.dumps({"type": "message.cancel"}))
            frame = await until(opened, "message.completed")
            assert frame["message"]["status"] == "stopped", frame
            found.append((time.perf_counter() - began) * 1000)
    return found


async def vanishings(server: Server, times: int) -> list[float]:
    """Milliseconds from an abrupt hang-up to the first token of who waited for that only slot."""
    found = []
    for _ in range(times):
        leaver, waiter = Visitor(server), Visitor(server)
        async with waiter.socket(waiter.conversation()) as waiting:
            async with leaver.socket(leaver.conversation()) as leaving:
                await say(leaving, QUESTIONS[0])
                await until(leaving, "message.delta")
                await say(waiting, QUESTIONS[1])
                await until(waiting, "message.created")
                began = time.perf_counter()
                leaving.transport.abort()
            await until(waiting, "message.delta")
            found.append((time.perf_counter() - began) * 1000)
            await waiting.send(json.dumps({"type": "message.cancel"}))
            await until(waiting, "message.completed")
    return found


def measure(turns: int, idle_s: float, times: int, model: Path | None = None) -> Report:
    """``model``: a folder of a model whose answers last; built if None."""
    with tempfile.TemporaryDirectory(prefix="inhouse-load-") as name:
        folder = Path(name)
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        with Server(folder / "a") as server:
            firsts = asyncio.run(first_turns(server, turns))
            eighths = asyncio.run(eighth_turns(server, times))
            before = server.cpu_s()
            time.sleep(idle_s)
            idle = (server.cpu_s() - before) / idle_s * 100
            rss = server.rss_mb()
        slow = {"ASSISTANT_MODEL_DIR": str(model or _long_winded()), "ASSISTANT_MAX_BATCH": "1"}
        with Server(folder / "b", **slow) as server:
            stopped = asyncio.run(stops(server, times))
            vanished = asyncio.run(vanishings(server, times))
    return Report(
        turns=turns,
        ttft_ms_p50=_percentile([ttft for ttft, _ in firsts], 50),
        ttft_ms_p99=_percentile([ttft for ttft, _ in firsts], 99),
        answer_ms_p50=_percentile([whole for _, whole in firsts], 50),
        eighth_turn_ttft_ms_p50=_percentile(eighths, 50),
        idle_cpu_percent=round(idle, 2),
        rss_mb=rss,
        stop_ms_p50=_percentile(stopped, 50),
        stop_ms_max=_percentile(stopped, 100),
        slot_free_ms_p50=_percentile(vanished, 50),
        slot_free_ms_max=_percentile(vanished, 100),
    )


def _long_winded() -> Path:
    """A model whose answers take long, built once a version of the graph."""
    folder = ROOT / "var" / "models" / "smollm2-135m-random"
    built, graph = folder / "model.json", ROOT / "assistant" / "modelkit" / "graph.py"
    if not built.exists() or built.stat().st_mtime < graph.stat().st_mtime:
        command = [sys.executable, "manage.py", "build_model", "--random", "smollm2-135m"]
        subprocess.run([*command, str(folder)], cwd=ROOT, check=True)
    return folder


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 1)


def _lines(report: Report) -> Iterator[str]:
    for name, value in asdict(report).items():
        yield f"{name.replace('_', ' '):24} {value}"
    yield f"{platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--idle-s", type=float, default=20)
    parser.add_argument("--times", type=int, default=10)
    options = parser.parse_args()
    report = measure(options.turns, options.idle_s, options.times)
    print(json.dumps(asdict(report), indent=2) if options.json else "\n".join(_lines(report)))


if __name__ == "__main__":
    main()
