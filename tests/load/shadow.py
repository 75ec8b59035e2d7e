"""What a candidate in shadow costs live users: the same server, the same users, with and without.

    python -m tests.load.shadow [--json] [--rounds 6] [--seconds 20] [--users 2] [--share 0.1]

A real server on the bundled model, which is its own candidate. Users ask in chats of their own and
think for a moment after each answer. Blocks with and without the candidate take turns, so that
whatever else the machine does is in both; each begins with seconds that are not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sqlite3
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant.benchmark import stack
from assistant.benchmark.stack import ROOT, Visitor
from tests.load.figures import turn

MODEL = ROOT / "assistant" / "bundled" / "support-en"
#: A process notices within this that a version moved.
NOTICED_S = 8.0
LABEL = "shadow@0"


@dataclass(frozen=True, slots=True)
class Report:
    """*Units* stand in the names; ``cost_percent``: of the 95th percentile of whole answers."""

    users: int
    share: float
    turns_without: int
    turns_with: int
    pairs: int
    ttft_ms_p95_without: float
    ttft_ms_p95_with: float
    answer_ms_p50_without: float
    answer_ms_p50_with: float
    answer_ms_p95_without: float
    answer_ms_p95_with: float
    cost_percent: float


Times = list[tuple[float, float]]


def measure(rounds: int, seconds: float, users: int, share: float, think_s: float) -> Report:
    with tempfile.TemporaryDirectory(prefix="inhouse-shadow-") as name:
        folder = Path(name)
        with stack.Server(folder, ASSISTANT_SHADOW_SHARE=str(share)) as server:
            database = folder / "db.sqlite3"
            _register(database)
            without, beside = asyncio.run(
                _blocks(server, database, rounds, seconds, users, think_s)
            )
            pairs = _pairs(database)
    p95_without, p95_with = (_percentile([all_ for _, all_ in t], 95) for t in (without, beside))
    return Report(
        users=users,
        share=share,
        turns_without=len(without),
        turns_with=len(beside),
        pairs=pairs,
        ttft_ms_p95_without=_percentile([first for first, _ in without], 95),
        ttft_ms_p95_with=_percentile([first for first, _ in beside], 95),
        answer_ms_p50_without=_percentile([all_ for _, all_ in without], 50),
        answer_ms_p50_with=_percentile([all_ for _, all_ in beside], 50),
        answer_ms_p95_without=p95_without,
        answer_ms_p95_with=p95_with,
        cost_percent=round((p95_with / p95_without - 1) * 100, 1),
    )


async def _blocks(
    server: Any, database: Path, rounds: int, seconds: float, users: int, think_s: float
) -> tuple[Times, Times]:
    without: Times = []
    beside: Times = []
    visitors = [Visitor(server) for _ in range(users)]
    for at in range(2 * rounds):
        shadowed = (at + at // 2) % 2 == 1  # off on, on off, off on: no side is always the second
        _move(database, "shadow" if shadowed else "candidate")
        await _load(visitors, NOTICED_S, think_s)
        (beside if shadowed else without).extend(await _load(visitors, seconds, think_s))
    return without, beside


async def _load(visitors: list[Visitor], seconds: float, think_s: float) -> Times:
    until = time.monotonic() + seconds
    found = await asyncio.gather(*(_chat(visitor, until, think_s) for visitor in visitors))
    return [one for some in found for one in some]


async def _chat(visitor: Visitor, until: float, think_s: float) -> Times:
    found: Times = []
    while time.monotonic() < until:
        conversation = await asyncio.to_thread(visitor.conversation)
        async with visitor.socket(conversation) as opened:
            for question in random.sample(stack.QUESTIONS, 3):
                found.append(await turn(opened, question))
                await asyncio.sleep(random.expovariate(1 / think_s))
    return found


def _register(database: Path) -> None:
    name, version = LABEL.split("@")
    with sqlite3.connect(database, timeout=20) as opened:
        opened.execute(
            "INSERT INTO assistant_modelversion (name, version, sha256, folder, state, "
            "canary_percent, data_sha256, gates, created_at, changed_at) "
            "VALUES (?, ?, 'x', ?, 'candidate', 0, '', '{}', datetime(), datetime())",
            (name, version, str(MODEL)),
        )


def _move(database: Path, state: str) -> None:
    with sqlite3.connect(database, timeout=20) as opened:
        opened.execute("UPDATE assistant_modelversion SET state = ?", (state,))


def _pairs(database: Path) -> int:
    with sqlite3.connect(database, timeout=20) as opened:
        return int(opened.execute("SELECT count(*) FROM monitoring_shadowpair").fetchone()[0])


def _percentile(values: list[float], percent: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--think-s", type=float, default=0.5)
    told = parser.parse_args()
    report = asdict(measure(told.rounds, told.seconds, told.users, told.share, told.think_s))
    lines = (f"{name.replace('_', ' '):24} {value}" for name, value in report.items())
    print(json.dumps(report, indent=2) if told.json else "\n".join(lines))


if __name__ == "__main__":
    main()
