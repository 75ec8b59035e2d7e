"""The Celery application and its timetable; what the tasks do is not known here.

``celery -A config worker -B -P solo`` is worker and timetable in one process (use -B only once).
"""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("inhouse")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
app.conf.beat_schedule = {
    # An answer whose process died is marked within a minute, even if nobody opens it.
    "reap-stale-turns": {"task": "conversations.tasks.reap_stale_turns", "schedule": 30.0},
    # Staff are called for a hand-over even if the broker was away when it was opened.
    "announce-hand-overs": {"task": "conversations.tasks.announce_hand_overs", "schedule": 60.0},
}
