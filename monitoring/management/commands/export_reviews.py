"""Writes reviewed corrections as rows that ``train_model --data`` learns from."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from monitoring import examples


class Command(BaseCommand):
    help = "Write reviewed corrections that no retraining has used, without personal values."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py export_reviews --out corrections.jsonl\n"
            "  manage.py train_model --from active --data corrections.jsonl --out var/runs/next"
        )
        parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".jsonl")
        parser.add_argument("--force", action="store_true", help="write over a file that is there")

    def handle(self, *, out: Path, force: bool, **_: Any) -> None:
        _check(out, force)
        try:
            done = examples.export(out)
        except examples.NothingToLearn as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(f"{out} cannot be written: {error.strerror}.") from error
        left = "".join(f"; {count} left out: {why}" for why, count in done.left_out.items())
        self.stdout.write(f"{done.rows} corrections in {out}{left}")


def _check(out: Path, force: bool) -> None:
    """Raises: CommandError."""
    if out.suffix != ".jsonl":
        raise CommandError(f"{out} should be named .jsonl, which is what train_model reads.")
    if out.exists() and not force:
        raise CommandError(f"{out} is there already. Choose another name, or add --force.")
