"""Clients that misbehave cost a server little; ``python -m tests.load.memory`` tells figures."""

from __future__ import annotations

import pytest

from tests.conftest import COMMANDS
from tests.load.memory import FLAGS, FLOODS, run

pytestmark = pytest.mark.load

#: MiB that a case may add, at its worst moment.
MOST_MB = {"streams": 40, "sockets": 64, "flood": FLOODS, "bodies": 16}


def test_the_server_is_started_as_the_readme_says() -> None:
    assert COMMANDS["uvicorn"][-len(FLAGS) :] == list(FLAGS)


@pytest.mark.parametrize("case", MOST_MB)
async def test_clients_that_misbehave_cost_little_memory(case: str) -> None:
    (report,) = await run([case])
    print(report)
    assert report.done >= 0.99 * report.clients
    assert report.rss_peak_mb - report.rss_before_mb <= MOST_MB[case]


async def test_a_crowd_is_let_in_within_half_a_minute() -> None:
    (report,) = await run(["crowd"])
    print(report)
    assert report.done >= 0.99 * report.clients
