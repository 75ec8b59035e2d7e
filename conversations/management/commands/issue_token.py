"""``manage.py issue_token USER``: prints a new API token, alone, on standard output."""

from __future__ import annotations

import argparse
from datetime import timedelta
from typing import Any

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand, CommandError, CommandParser

from conversations.tokens import issue


class Command(BaseCommand):
    help = "Print a new API token for USER. It is stored as a digest and cannot be shown again."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n  manage.py issue_token ana\n  TOKEN=$(manage.py issue_token ana --days 30)"
        )
        parser.add_argument("user", metavar="USER", help="name of an active user")
        parser.add_argument("--days", type=int, help="life of the token (ASSISTANT_TOKEN_DAYS)")

    def handle(self, *args: Any, **options: Any) -> None:
        users = get_user_model()
        name = options["user"]
        user = users._default_manager.filter(**{users.USERNAME_FIELD: name}).first()
        if user is None or not user.is_active:
            raise CommandError(f"There is no active user {name!r}. See them at /admin/auth/user/.")
        if options["days"] is not None and options["days"] < 1:
            raise CommandError("--days must be at least 1.")
        life = {"expiry": timedelta(days=options["days"])} if options["days"] else {}
        key = issue(user, "made by issue_token", ["read", "chat"], **life)
        self.stdout.write(key)
