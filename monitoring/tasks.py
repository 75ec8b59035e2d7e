"""What the timetable calls. Each is safe to run twice, and none harms another: what is missing is
said in the log, and what breaks ends its own task only.
"""

from __future__ import annotations

import logging
from typing import Any

from celery import shared_task
from django.utils import timezone
from django.utils.module_loading import import_string

from monitoring import jobs
from monitoring.models import Job

log = logging.getLogger(__name__)


@shared_task  # type: ignore[untyped-decorator]
def run_job(pk: int) -> None:
    """Have this worker do what waits, beside its tasks: a job takes minutes, a task must not."""
    jobs.background.start()


@shared_task  # type: ignore[untyped-decorator]
def revive() -> int:
    """Jobs whose worker is gone, and those that no worker was told of; the number of the first."""
    revived = jobs.revive()
    if jobs.waiting() is not None:
        jobs.background.start()
    return revived


@shared_task  # type: ignore[untyped-decorator]
def evaluate() -> None:
    """Each night: the active model on the golden set. One job a day, however often it is asked."""
    jobs.forget_old()
    key = f"{Job.Kind.EVALUATE}:golden:{timezone.now():%Y-%m-%d}"
    jobs.open_job(Job.Kind.EVALUATE, key, why="nightly", params={"trigger": "schedule"})


@shared_task  # type: ignore[untyped-decorator]
def look_for_drift() -> None:
    key = f"{Job.Kind.DRIFT}:{timezone.now():%Y-%m-%dT%H}"
    jobs.open_job(Job.Kind.DRIFT, key, why="hourly")


@shared_task  # type: ignore[untyped-decorator]
def consider_retraining() -> None:
    _call("monitoring.retraining.consider")


@shared_task  # type: ignore[untyped-decorator]
def watch_canary() -> None:
    _call("monitoring.canary.watch")


@shared_task  # type: ignore[untyped-decorator]
def follow_retrained() -> None:
    _call("monitoring.promotion.follow")


@shared_task  # type: ignore[untyped-decorator]
def roll_up() -> None:
    _call("monitoring.rollups.roll_up")


def _call(path: str) -> Any:
    """What that function returns. Nothing where it is not there; else Celery tells how it broke."""
    try:
        function = import_string(path)
    except ImportError as error:
        log.error("%s cannot be called: %s", path, error)
        return None
    return function()
