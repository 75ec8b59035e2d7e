"""The larger model as a process of its own that is killed, or that hangs, and comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from assistant import backends
from assistant.backends.openai import Options
from assistant.types import Delta, Message, Params
from fallback import breaker
from fallback.answers import Known
from fallback.router import Ask, Routed, route
from fallback.upstream import UpstreamBackend
from tests.conftest import ROOT, free_port

pytestmark = pytest.mark.chaos

SERVES = """
import sys, django, uvicorn
django.setup()
from tests.fallback.stand_in_upstream import StandIn
port = int(sys.argv[1])
uvicorn.run(StandIn(port), port=port, lifespan="off", log_level="critical")
"""
#: First words are waited for this long; reliability's F4 says 5 s, and a tenth says the same.
FIRST_BYTE_S = 0.5
#: F3 and F4: how long a degraded answer takes, how late the loop may be, and how soon it is back.
DEGRADED_S, LAG_S, BACK_WITHIN_S = 0.5, 0.05, 10.0


@dataclass
class Service:
    port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-c", SERVES, str(self.port)]
        environment = {**os.environ, "DJANGO_SETTINGS_MODULE": "config.settings"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment)
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.05)
        self.kill()
        raise AssertionError("the service did not start")

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)


@pytest.fixture
def service() -> Iterator[Service]:
    made = Service(free_port())
    made.start()
    yield made
    made.kill()


@pytest.fixture(autouse=True)
def upstream(service: Service, settings: Any, monkeypatch: Any) -> None:
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "UPSTREAM": {"CALLS_PER_DAY": 1_000, "CALLS_PER_USER_DAY": 1_000, "CONSENT": "all"},
        "BREAKER": {"open_s": 2.0, "slow_s": 0.4, "lost_s": 0.4},
    }
    url = f"http://127.0.0.1:{service.port}/good/v1"
    options = Options(base_url=url, model="big", api_key="key", first_byte_s=FIRST_BYTE_S)
    monkeypatch.setitem(backends._built, "upstream", UpstreamBackend("upstream", options))
    breaker.reset()


async def asked() -> tuple[str, str, float]:
    """Route and reason of an answer, which there always is, and how long it took."""
    began = time.monotonic()
    ask = Ask((Message("user", "hello"),), Params(), Known({}, ()), ("upstream", "rules"))
    events = [event async for event in route(ask)]
    (routed,) = [event for event in events if isinstance(event, Routed)]
    assert any(isinstance(event, Delta) for event in events)
    return routed.route, routed.reason, time.monotonic() - began


async def back() -> None:
    """Wait until the model is asked again, as users who go on asking do."""
    began = time.monotonic()
    while time.monotonic() - began < BACK_WITHIN_S:
        if (await asked())[0] == "upstream":
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the model came back and was not asked again in time")


@contextlib.asynccontextmanager
async def lags() -> AsyncIterator[list[float]]:
    """How late this loop was, looked at every 5 ms."""
    late: list[float] = []

    async def look() -> None:
        while True:
            due = time.monotonic() + 0.005
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - due)

    looking = asyncio.create_task(look())
    try:
        yield late
    finally:
        looking.cancel()


async def test_a_killed_service_costs_plainer_answers_and_is_used_again(service: Service) -> None:
    assert (await asked())[:2] == ("upstream", "")
    service.kill()
    found = [await asked() for _ in range(8)]
    reasons = [reason for _, reason, _ in found]
    assert {name for name, _, _ in found} == {"human"}
    assert reasons[-1] == "breaker_open" and reasons.count("error") <= 5
    assert sorted(seconds for _, _, seconds in found)[-1] <= DEGRADED_S
    service.start()
    await back()


async def test_a_service_that_hangs_is_waited_for_once_and_is_used_again(service: Service) -> None:
    assert (await asked())[:2] == ("upstream", "")
    service.send(signal.SIGSTOP)
    async with lags() as late:
        found = [await asked() for _ in range(8)]
        await asyncio.sleep(0.5)
    service.send(signal.SIGCONT)
    assert {name for name, _, _ in found} == {"human"}
    assert found[-1][1] == "breaker_open"
    waits = [seconds for _, reason, seconds in found if reason != "breaker_open"]
    assert len(waits) == 1 and waits[0] >= FIRST_BYTE_S, found
    others = [seconds for _, reason, seconds in found if reason == "breaker_open"]
    assert max(others) <= DEGRADED_S
    assert sorted(late)[int(len(late) * 0.99)] <= LAG_S
    await back()
