"""``manage.py explain "text"``: who would answer this, and why nobody before them."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fallback.explain import Rung


class Command(BaseCommand):
    help = "Show every step of the route for a question: its score, and why it answers or not."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            '  manage.py explain "how do I cancel my order?"\n'
            '  manage.py explain "do you ship to Mars?" --json\n\n'
            "Nothing is stored, and a larger model elsewhere is not called."
        )
        parser.add_argument("text", help="the question, as a customer would ask it")
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant import backends
        from assistant.errors import AssistantError
        from fallback.explain import first_question, rungs

        try:
            found = asyncio.run(rungs(first_question(options["text"])))
        except AssistantError as error:
            raise CommandError(error.message) from error
        finally:
            backends.reset()
        if options["json"]:
            self.stdout.write(json.dumps([asdict(rung) for rung in found], indent=2))
            return
        for line in _lines(found):
            self.stdout.write(line)


def _lines(found: list[Rung]) -> list[str]:
    taken = next(at for at, rung in enumerate(found) if rung.answers)
    lines = []
    for at, rung in enumerate(found):
        mark = "answers" if at == taken else "would" if rung.answers else "passes"
        score = "" if rung.score is None else f"{rung.score:.3g}"
        lines.append(f"{rung.step:<10} {mark:<8} {score:>6}  {rung.why}")
        if at == taken and rung.text:
            lines.append(f"{'':26}  {rung.text}")
    return lines
