"""A broker that hangs: who asks for a job is told soon that no worker heard, and the job waits."""

from __future__ import annotations

from tests.services.conftest import Redis, manage

ASK = """
import time
from monitoring.jobs import call_worker
from conversations.tasks import _queued, announce_hand_overs
begun = time.monotonic()
print(call_worker(1), _queued(announce_hand_overs), time.monotonic() - begun)
{then}
begun = time.monotonic()
print(call_worker(1), _queued(announce_hand_overs), time.monotonic() - begun)
"""


def asked(redis: Redis, then: str = "") -> list[tuple[str, str, float]]:
    """Whether both were heard, and after how long; before and after ``then``."""
    done = manage(
        "manage.py", "shell", "--no-imports", "-c", ASK.format(then=then),
        CELERY_BROKER_URL=redis.url,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return [(job, task, float(took)) for job, task, took in rows]


def test_a_broker_that_hangs_keeps_nobody_waiting_for_ever(redis: Redis) -> None:
    stop = f"import os, signal; os.kill({redis.process.pid}, signal.SIGSTOP)"
    (job, task, _), (no_job, no_task, took) = asked(redis, stop)
    assert (job, task, no_job, no_task) == ("True", "True", "False", "False")
    assert took < 30, "without an end it would hang"


def test_a_broker_that_hung_before_anybody_asked(redis: Redis) -> None:
    redis.hang()
    assert [row[:2] for row in asked(redis)] == [("False", "False")] * 2
