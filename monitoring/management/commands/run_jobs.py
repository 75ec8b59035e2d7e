"""``manage.py run_jobs``: does what waits as jobs, where no Celery worker runs, or beside one."""

from __future__ import annotations

import argparse
import signal
import time
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db import DatabaseError

#: How often the queue is looked at while nothing waits.
LOOK_EVERY_S = 2.0


class Command(BaseCommand):
    help = "Work off evaluations, looks for drift and retrainings that wait; Ctrl-C ends it."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py run_jobs            until Ctrl-C\n"
            "  manage.py run_jobs --once     what waits now, then end\n\n"
            "A job that is interrupted goes back into the queue. `manage.py jobs` lists them."
        )
        parser.add_argument("--once", action="store_true", help="end when no job waits")

    def handle(self, *args: Any, **options: Any) -> None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        try:
            done = self._until_none_waits()
            while not options["once"]:
                time.sleep(LOOK_EVERY_S)
                done += self._until_none_waits()
        except KeyboardInterrupt:
            self.stdout.write("Stopped; what was begun waits in the queue.")
            return
        self.stdout.write(f"{done} jobs done." if done else "No job waits.")

    def _until_none_waits(self) -> int:
        from monitoring import jobs

        done = 0
        try:
            jobs.revive()
            while (pk := jobs.waiting()) is not None:
                done += self._work_off(pk)
        except DatabaseError as error:
            self.stderr.write(f"The database does not answer ({type(error).__name__}); waiting.")
        return done

    def _work_off(self, pk: int) -> bool:
        from monitoring import jobs
        from monitoring.models import Job

        self._say(f"job {pk}: begins")
        if not jobs.run(pk, lambda line: self._say(f"job {pk}: {line}")):
            return False
        job = Job.objects.get(pk=pk)
        self._say(f"job {pk}: {job.kind} {job.state} {job.error}".rstrip())
        return True

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()
