"""What ``admit()`` costs, with a Redis of its own in every state and without one.

    python -m tests.load.admit [--json] [--calls 5000]

All limits are on: questions, tokens a minute, tokens a day; "defaults" has neither Redis nor limits
of tokens. Each state is measured in a process of its own, as settings are read once; callers change
every ten calls, as they would. "full" is a Redis at its ``maxmemory`` that evicts nothing; in "two
processes" a second one asks the same Redis all the time. A busy machine makes calls wait for the
processor: percentiles are of the middle one of ten rounds, ``cpu_ms`` is a call's own work.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import django

ROOT = Path(__file__).resolve().parent.parent.parent
STATES = ("defaults", "no redis", "redis", "two processes", "refused", "hung", "full")
TOKENS = {"ASSISTANT_TOKENS_PER_MINUTE": "100000", "ASSISTANT_TOKENS_PER_DAY": "1000000"}


@dataclass(frozen=True, slots=True)
class Report:
    """*Units*: milliseconds a call."""

    state: str
    calls: int
    p50_ms: float
    p99_ms: float
    worst_ms: float
    cpu_ms: float


def measured(state: str, calls: int, spoil: Callable[[], None]) -> Report:
    """In a process whose settings are loaded."""
    from conversations.limits import Caller, admit

    for n in range(200):
        admit(Caller(n), "warm")
    spoil()
    took: list[float] = []
    cpu = time.thread_time()
    for n in range(calls):
        caller = Caller(1_000 + n // 10)
        began = time.perf_counter()
        admit(caller, "How do I cancel my order?")
        took.append((time.perf_counter() - began) * 1000)
    cpu = (time.thread_time() - cpu) * 1000 / calls
    size = max(1, calls // 10)
    rounds = [sorted(took[at : at + size]) for at in range(0, calls, size)]
    p50 = statistics.median(each[len(each) // 2] for each in rounds)
    p99 = statistics.median(each[int(len(each) * 0.99)] for each in rounds)
    return Report(state, calls, round(p50, 4), round(p99, 4), round(max(took), 3), round(cpu, 4))


def one(state: str, calls: int, server: str) -> None:
    """One state, in this process; ``server`` is Redis' process and port, or empty."""
    pid, _, port = server.partition(":")

    def spoil() -> None:
        if state == "refused":
            os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.2)
        elif state == "hung":
            os.kill(int(pid), signal.SIGSTOP)
        elif state == "full":
            import redis

            client = redis.Redis(port=int(port))
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1mb")
            client.close()

    print(json.dumps(asdict(measured(state, calls, spoil))))


def reports(calls: int) -> list[Report]:
    from tests.conftest import free_port
    from tests.services.conftest import Redis

    found = []
    for state in STATES:
        with tempfile.TemporaryDirectory() as folder:
            redis = (
                None
                if state in {"defaults", "no redis"}
                else Redis.start(Path(folder), free_port())
            )
            try:
                found.append(_report(state, calls, Path(folder), redis))
            finally:
                if redis is not None:
                    redis.kill()
    return found


def _report(state: str, calls: int, folder: Path, redis: Any) -> Report:
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "ASSISTANT_DATA_DIR": str(folder),
        "ASSISTANT_RATE": "200/m",
        **({} if state == "defaults" else TOKENS),
        "REDIS_URL": redis.url if redis else "",
    }
    server = f"{redis.process.pid}:{redis.port}" if redis else ""
    base = [sys.executable, "-m", "tests.load.admit", "--server", server]
    command = [*base, "--state", state, "--calls", str(calls)]
    other = None
    if state == "two processes":
        endless = [*base, "--state", state, "--calls", "1000000"]
        other = subprocess.Popen(endless, cwd=ROOT, env=environment)
        time.sleep(3)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()
    done.check_returncode()
    return Report(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--calls", type=int, default=5_000)
    parser.add_argument("--state", choices=STATES, help=argparse.SUPPRESS)
    parser.add_argument("--server", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    django.setup()
    if asked.state:
        one(asked.state, asked.calls, asked.server)
        return
    found = reports(asked.calls)
    if asked.json:
        print(json.dumps([asdict(report) for report in found]))
        return
    for report in found:
        print(
            f"{report.state:14} p50 {report.p50_ms:7.3f} ms   p99 {report.p99_ms:7.3f} ms"
            f"   worst {report.worst_ms:8.2f} ms   cpu {report.cpu_ms:6.3f} ms"
        )


if __name__ == "__main__":
    main()
