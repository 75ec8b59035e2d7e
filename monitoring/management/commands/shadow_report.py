"""``manage.py shadow_report``: how a candidate does beside the live model."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    help = "Show how a candidate in shadow compares to the live model: counts, intents, examples."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py shadow_report\n"
            "  manage.py shadow_report support-en@0.3.0 --json"
        )
        parser.add_argument("version", nargs="?", help="name@version (default: what is in shadow)")
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        parser.add_argument("--examples", type=int, default=10, help="how many (default: 10)")

    def handle(self, *args: Any, **options: Any) -> None:
        report = _report(_version(options["version"]), max(0, min(options["examples"], 200)))
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _lines(report))


def _version(label: str | None) -> Any:
    """Raises: CommandError."""
    from assistant import registry

    if label is None:
        found = registry.shadow()
        if found is None:
            raise CommandError(
                "No version is in shadow. `manage.py models` lists them, and `manage.py "
                "promote_model NAME` puts one there."
            )
        return found
    try:
        return registry.find(label)
    except registry.RegistryError as error:
        raise CommandError(str(error)) from error


def _report(version: Any, examples: int) -> dict[str, Any]:
    from monitoring import shadow

    gate = shadow.gate(version)
    return {
        "version": version.label,
        "passed": gate.passed,
        "why": gate.why,
        "figures": gate.figures,
        "by_intent": shadow.by_intent(version),
        "examples": [asdict(example) for example in shadow.examples(version, examples)],
    }


def _lines(report: dict[str, Any]) -> str:
    words = {None: "waits", True: "passes", False: "is stopped"}
    lines = [f"{report['version']} {words[report['passed']]}: {report['why']}", ""]
    lines += [f"{name:12}{value}" for name, value in report["figures"].items()]
    lines += ["", f"{'intent':32}{'pairs':>7}{'agreed':>8}"]
    for row in report["by_intent"]:
        lines.append(f"{row['intent'] or '(none)':32}{row['pairs']:>7}{row['agreed']:>8}")
    for example in report["examples"]:
        lines += ["", f"{example['differs']}: {example['question']}"]
        lines.append(f"  live       {example['live_intent']}: {example['live_text'][:200]}")
        lines.append(f"  candidate  {example['intent']}: {example['text'][:200]}")
    return "\n".join(lines)
