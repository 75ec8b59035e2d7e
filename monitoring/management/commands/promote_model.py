"""``manage.py promote_model``: a version goes as far up as its gates let it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant import registry
from assistant.models import ModelVersion
from assistant.registry import RegistryError
from monitoring import promotion

_EXAMPLES = """
candidate -(golden gate)-> shadow -(shadow gate)-> canary -(canary gate)-> active

Each gate is asked in turn. One that has too little to judge by is no failure: run the command again
later. A version that fails at a gate is rejected, and the exit status is 1. `manage.py models`
shows what each gate measured.

examples:
  manage.py promote_model support-en@0.3.0
  manage.py promote_model var/runs/second/model --to shadow
  manage.py promote_model support-en@0.3.0 --to active --force --yes --why "hotfix, see ticket 812"
"""
_TARGETS = ("shadow", "canary", "active")


class Command(BaseCommand):
    help = "Promote a model version, a registered one or a folder, as far as its gates allow."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _EXAMPLES
        parser.add_argument("model", help="NAME@VERSION, the beginning of its sha256, or a folder")
        parser.add_argument("--to", choices=_TARGETS, default="active", help="and no further")
        parser.add_argument("--why", default="promote_model", help="kept in the audit trail")
        parser.add_argument("--force", action="store_true", help="at once, asking no gate")
        parser.add_argument("--yes", action="store_true", help="with --force: do not ask back")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            version = named(options["model"])
            if options["force"] and not options["yes"]:
                _ask_back(version, options["to"])
            step = promotion.promote(
                version, options["to"], why=options["why"], force=options["force"], told=self._tell
            )
        except RegistryError as error:
            raise CommandError(str(error)) from error
        if step.moved[1] == ModelVersion.State.REJECTED:
            raise CommandError(f"{version.label} was rejected.")

    def _tell(self, step: promotion.Step) -> None:
        was, now = step.moved
        what = f"{was} -> {now}" if was != now else f"stays {was}"
        why = "no gate was asked" if step.gate is None else step.gate.why
        self.stdout.write(f"{step.version.label}: {what}. {why}")


def named(text: str) -> ModelVersion:
    """The version called so; a folder is registered first. Raises: RegistryError."""
    if Path(text).expanduser().is_dir():
        return registry.register(Path(text), why="promote_model")
    return registry.find(text)


def _ask_back(version: ModelVersion, to_state: str) -> None:
    """Raises: CommandError unless a person says yes."""
    if not sys.stdin.isatty():
        raise CommandError("--force asks no gate. Add --yes if that is what you want.")
    sys.stdout.write(f"{version.label} becomes {to_state} without asking any gate. Yes? [y/N] ")
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise CommandError("Nothing was changed.")
