"""``manage.py rollback_model``: the version that was active before answers again."""

from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant import registry
from assistant.registry import RegistryError
from monitoring import promotion

_EXAMPLES = """
Servers change within seconds; answers that are being written end on the version that began them.
Rolled back twice goes back twice.

examples:
  manage.py rollback_model --why "wrong refunds since noon"
  manage.py rollback_model --to support-en@0.2.0
  manage.py rollback_model --canary
"""


class Command(BaseCommand):
    help = "Make the model version active again that was active before; or take back the canary."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _EXAMPLES
        parser.add_argument("--why", default="rollback_model", help="kept in the audit trail")
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--to", metavar="NAME@VERSION", help="a retired version, not the last")
        which.add_argument("--canary", action="store_true", help="reject the canary instead")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            told = self._canary(options) if options["canary"] else self._active(options)
        except RegistryError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(told)

    def _active(self, options: dict[str, Any]) -> str:
        to = registry.find(options["to"]) if options["to"] else None
        return f"{promotion.roll_back(why=options['why'], to=to).label} is active."

    def _canary(self, options: dict[str, Any]) -> str:
        canary = registry.canary()
        if canary is None:
            raise RegistryError("There is no canary. `manage.py models` lists all versions.")
        return f"{promotion.reject(canary, why=options['why']).label} is rejected."
