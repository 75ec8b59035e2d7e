"""The Celery application and its timetable; what the tasks do is not known here.

``celery -A config worker -B -P solo`` is worker and timetable in one process (use -B only once).
"""

from __future__ import annotations

import logging.config
import os
from typing import Any

from celery import Celery
from celery.schedules import crontab
from celery.signals import setup_logging
from django.conf import settings
from django_structlog.celery.steps import DjangoStructLogInitStep

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("inhouse")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.steps["worker"].add(DjangoStructLogInitStep)  # lines of a task hold its id and its request's


@setup_logging.connect  # type: ignore[untyped-decorator]
def log_as_settings_say(**_: Any) -> None:
    """Instead of Celery's own format, so that a worker's lines are objects where a server's are."""
    logging.config.dictConfig(settings.LOGGING)


def _every(task: str, seconds: float) -> dict[str, Any]:
    """Not kept for a worker that is away: the next one does as well."""
    return {"task": task, "schedule": seconds, "options": {"expires": seconds}}


app.conf.beat_schedule = {
    # An answer whose process died is marked within a minute, even if nobody opens it.
    "reap-stale-turns": {"task": "conversations.tasks.reap_stale_turns", "schedule": 30.0},
    # Staff are called for a hand-over even if the broker was away when it was opened.
    "announce-hand-overs": {"task": "conversations.tasks.announce_hand_overs", "schedule": 60.0},
    "mail-hand-overs": _every("conversations.tasks.mail_hand_overs_together", 60.0),
    # An address is not kept for longer than it is needed, even if nobody signs in any more.
    "forget-failed-tries": _every("conversations.tasks.forget_failed_tries", 300.0),
    # A job whose worker died is noticed after 30 s, and one that no worker was told of.
    "revive-jobs": _every("monitoring.tasks.revive", 30.0),
    "watch-canary": _every("monitoring.tasks.watch_canary", 60.0),
    "follow-retrained": _every("monitoring.tasks.follow_retrained", 60.0),
    "roll-up": _every("monitoring.tasks.roll_up", 300.0),
    # At night, when few ask; odd minutes, because everybody else's jobs run at even ones.
    "evaluate": {"task": "monitoring.tasks.evaluate", "schedule": crontab(hour="3", minute="17")},
    "look-for-drift": {
        "task": "monitoring.tasks.look_for_drift",
        "schedule": crontab(minute="7"),
        "options": {"expires": 3600},
    },
    "consider-retraining": {
        "task": "monitoring.tasks.consider_retraining",
        "schedule": crontab(minute="37"),
        "options": {"expires": 3600},
    },
}
