"""``manage.py drift``: looks for drift now, or makes the reference anew."""

from __future__ import annotations

import argparse
import json
from datetime import timedelta
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    help = "Compare the newest questions and answers to the reference, or make a new reference."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py drift\n"
            "  manage.py drift --reference            the newest turns are the measure now\n"
            "  manage.py drift --reference --days 30  those of the last 30 days"
        )
        parser.add_argument("--reference", action="store_true", help="make a new reference")
        parser.add_argument("--days", type=int, metavar="N", help="of the last N days (all)")
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")

    def handle(self, *args: Any, **options: Any) -> None:
        from monitoring import references

        try:
            report = _made(options["days"]) if options["reference"] else _looked()
        except references.DriftError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _lines(report))


def _made(days: int | None) -> dict[str, Any]:
    """Raises: DriftError, CommandError."""
    from django.utils import timezone

    from monitoring import references

    if days is not None and not 1 <= days <= 3650:
        raise CommandError("--days is a number from 1 to 3650.")
    since = timezone.now() - timedelta(days=days) if days else None
    made = references.reference(since, None)
    return {
        "reference": made.pk,
        "turns": made.turns,
        "from": made.from_at.isoformat(),
        "to": made.to_at.isoformat(),
        "features": sorted(made.data["limits"]),
    }


def _looked() -> dict[str, Any]:
    """Raises: DriftError, CommandError."""
    from monitoring import drift, references

    report = drift.look()
    if report is None:
        reference = references.current()
        if reference is None:
            raise CommandError(
                f"There is no reference ({references.collecting()}). `manage.py drift "
                f"--reference` makes one now, of at least {references.LEAST} turns."
            )
        raise CommandError(
            f"Fewer than {drift.LEAST_WINDOW} turns count since the reference ends "
            f"({reference.to_at:%Y-%m-%d %H:%M} UTC). Look again later."
        )
    return {
        "report": report.pk,
        "turns": report.turns,
        "from": report.from_at.isoformat(),
        "to": report.to_at.isoformat(),
        "breached": report.breached,
        "features": report.features,
    }


def _lines(report: dict[str, Any]) -> str:
    head = f"{report['turns']} turns, {report['from'][:16]} to {report['to'][:16]}"
    if "reference" in report:
        return f"New reference: {head}. Features: {', '.join(report['features'])}."
    lines = [f"{head}: {'drift' if report['breached'] else 'no drift'}", ""]
    lines.append(f"{'feature':14}{'score':>10}{'limit':>10}{'now':>9}{'before':>9}")
    for name, found in report["features"].items():
        mark = "  drifts" if found["breached"] else ""
        shares = "".join(_share(found.get(key)) for key in ("now", "before"))
        lines.append(f"{name:14}{found['score']:>10.4f}{found['threshold']:>10.4f}{shares}{mark}")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return f"{value:>9.1%}" if value is not None else " " * 9
