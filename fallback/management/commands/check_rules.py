"""Runs the tests that rules carry: which sentences each must answer, and which it must not.

Names also what is wrong with rules that came past the admin's checks, with a fixture say.
"""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from fallback import rulebook


class Command(BaseCommand):
    help = (
        "Runs the tests stored on the active rules, and finds rules that cannot work; ends with "
        "status 1 if there is one."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        book = rulebook.current()
        tests = sum(len(rule.must_match) + len(rule.must_not_match) for rule in book)
        failing = rulebook.failing(book)
        faults = list(rulebook.faulty())
        for line in (*faults, *failing):
            self.stdout.write(str(line))
        if faults:
            raise CommandError(f"{len(faults)} faults of rules. Correct them in the admin.")
        if failing:
            raise CommandError(
                f"{len(failing)} of {tests} tests fail. Give the rule a pattern or an example, or "
                "correct the test."
            )
        self.stdout.write(f"{tests} tests of {len(book)} rules pass.")
