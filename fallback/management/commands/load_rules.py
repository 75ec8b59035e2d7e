"""Reads rules from a YAML or JSON file into the database, all of them or none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import transaction

from fallback import exchange, rulebook


class Command(BaseCommand):
    help = (
        "Reads rules from a YAML or JSON file; a rule of the same name is overwritten. Example: "
        "manage.py load_rules rules.yaml --dry-run"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path)
        parser.add_argument("--dry-run", action="store_true", help="say what would change")
        parser.add_argument("--replace", action="store_true", help="delete rules not in the file")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            rules = exchange.read(options["file"])
        except exchange.RuleFileError as error:
            raise CommandError(f"Nothing was loaded.\n{error}") from error
        with transaction.atomic():
            changes = exchange.load(rules, replace=options["replace"])
            failing = rulebook.failing(rulebook.current())
            transaction.set_rollback(options["dry_run"])
        self._tell(changes, dry_run=options["dry_run"])
        for failure in failing:
            self.stderr.write(self.style.WARNING(f"fails: {failure}"))

    def _tell(self, changes: exchange.Changes, *, dry_run: bool) -> None:
        for what in ("created", "updated", "deleted", "unchanged"):
            names = getattr(changes, what)
            if names and what != "unchanged":
                self.stdout.write(f"{what}: {', '.join(names)}")
        counts = f"{len(changes.created)} created, {len(changes.updated)} updated, "
        counts += f"{len(changes.deleted)} deleted, {len(changes.unchanged)} unchanged"
        self.stdout.write(f"{counts}{' (dry run: nothing was saved)' if dry_run else ''}.")
