"""``manage.py jobs``: the jobs, newest first, one a line."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandParser

MOST = 200


class Command(BaseCommand):
    help = "List evaluations, looks for drift and retrainings: state, progress, why, errors."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py jobs                 the newest 20\n"
            "  manage.py jobs --open          those that are not over\n"
            "  manage.py jobs --log 12        what job 12 has said"
        )
        parser.add_argument("--open", action="store_true", help="only those that are not over")
        parser.add_argument("--log", type=int, metavar="ID", help="the log of that job")

    def handle(self, *args: Any, **options: Any) -> None:
        from django.core.management.base import CommandError

        from monitoring.models import Job

        if options["log"] is not None:
            job = Job.objects.filter(pk=options["log"]).first()
            if job is None:
                raise CommandError(f"There is no job {options['log']}. `manage.py jobs` lists all.")
            self.stdout.write(job.log or "It has said nothing yet.")
            return
        rows = Job.objects.filter(state__in=Job.OPEN)[:MOST] if options["open"] else (
            Job.objects.all()[:20]
        )  # fmt: skip
        lines = [_line(job) for job in rows]
        self.stdout.write("\n".join([_HEAD, *lines]) if lines else "There are no jobs.")


_HEAD = f"{'id':>6}  {'kind':<9} {'state':<10} {'stage':<10} {'done':>5}  {'opened':<16}  why"


def _line(job: Any) -> str:
    return (
        f"{job.pk:>6}  {job.kind:<9} {job.state:<10} {job.stage[:10]:<10} {job.progress:>5.0%}  "
        f"{job.created_at:%Y-%m-%d %H:%M}  {job.error or job.why}"
    ).rstrip()
