"""Writes the rules as YAML or JSON, for a file under version control or another installation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from fallback import exchange
from fallback.models import Rule


class Command(BaseCommand):
    help = (
        "Writes all rules as YAML or JSON. Examples: manage.py dump_rules > rules.yaml; "
        "manage.py dump_rules --out rules.json"
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--format", choices=("yaml", "json"), help="default: the file's, yaml")
        parser.add_argument("--out", type=Path, metavar="FILE", help="instead of the terminal")
        parser.add_argument("--active", action="store_true", help="only rules that are active")

    def handle(self, *args: Any, **options: Any) -> None:
        out: Path | None = options["out"]
        form = options["format"] or ("json" if out and out.suffix == ".json" else "yaml")
        rules = Rule.objects.filter(active=True) if options["active"] else Rule.objects.all()
        text = exchange.dump(rules, form)
        if out is None:
            self.stdout.write(text, ending="")
            return
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise CommandError(f"{out} cannot be written: {error.strerror}.") from error
        self.stderr.write(f"{rules.count()} rules written to {out}.")
