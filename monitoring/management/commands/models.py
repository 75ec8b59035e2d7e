"""``manage.py models``: the registry on one screen; or a folder put into it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant import registry
from assistant.models import ModelVersion, VersionChange
from assistant.registry import RegistryError

_EXAMPLES = """
states: candidate, shadow (answers beside the active one, unseen), canary (answers a share of
conversations), active, retired (was active), rejected (stopped at a gate, or by hand)

examples:
  manage.py models
  manage.py models --json
  manage.py models --register var/runs/second/model --why "with June's corrections"
"""
_GATES = ("golden", "shadow", "canary")
_SAID = {True: "passed", False: "failed", None: "open"}


class Command(BaseCommand):
    help = "List the registered model versions, their gates and their latest moves."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _EXAMPLES
        parser.add_argument("--json", action="store_true", help="for programs")
        parser.add_argument("--register", type=Path, metavar="FOLDER", help="make it a candidate")
        parser.add_argument("--why", default="", help="what the new one is")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["register"] is not None:
            self._register(options["register"], options["why"])
            return
        rows = list(ModelVersion.objects.select_related("parent")[:200])
        if options["json"]:
            self.stdout.write(json.dumps([_as_json(row) for row in rows], indent=2))
            return
        self._list(rows)

    def _register(self, folder: Path, why: str) -> None:
        try:
            version = registry.register(folder, why=why)
        except RegistryError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{version.label} ({version.sha256[:12]}) is {version.state}.")

    def _list(self, rows: list[ModelVersion]) -> None:
        if not any(row.state == ModelVersion.State.ACTIVE for row in rows):
            self.stdout.write("No version is active: the model of ASSISTANT_MODEL_DIR answers.")
        if rows:
            self.stdout.write(_line("version", "state", "sha256", *_GATES, "since"))
        for row in rows:
            self.stdout.write(_row(row))
        changes = VersionChange.objects.select_related("version", "by")[:5]
        if changes:
            self.stdout.write("\nlatest moves")
        for change in changes:
            self.stdout.write(f"  {change.at:%Y-%m-%d %H:%M}  {change} by {_who(change)}")
            self.stdout.write(f"  {'':16}  {change.why}")


def _who(change: VersionChange) -> str:
    who = change.by.get_username() if change.by is not None else "nobody in particular"
    return f"{who}, forced" if change.forced else who


def _row(row: ModelVersion) -> str:
    state = f"{row.state} {row.canary_percent} %" if row.canary_percent else row.state
    gates = (_SAID[row.gates[name].get("passed")] if name in row.gates else "" for name in _GATES)
    return _line(row.label, state, row.sha256[:12], *gates, f"{row.changed_at:%Y-%m-%d %H:%M}")


def _line(label: str, state: str, sha256: str, *rest: str) -> str:
    return f"{label:28} {state:12} {sha256:13} {' '.join(f'{text:8}' for text in rest)}".rstrip()


def _as_json(row: ModelVersion) -> dict[str, Any]:
    return {
        "version": row.label,
        "state": row.state,
        "canary_percent": row.canary_percent,
        "sha256": row.sha256,
        "folder": row.folder,
        "parent": row.parent.label if row.parent is not None else None,
        "gates": row.gates,
        "created_at": row.created_at.isoformat(),
        "changed_at": row.changed_at.isoformat(),
    }
