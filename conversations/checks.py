"""What ``manage.py check --deploy`` refuses beyond Django's own list."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error


def production(**_: Any) -> list[CheckMessage]:
    """Errors for settings that are fine on a laptop and dangerous on the internet."""
    if settings.DEBUG:
        return []  # Django's own W018 says it
    found: list[CheckMessage] = []
    if "*" in settings.ALLOWED_HOSTS:
        found.append(
            Error(
                "ALLOWED_HOSTS contains '*': any page on the internet could open a socket here.",
                hint="Name your hosts, for example ALLOWED_HOSTS=chat.example.com",
                id="conversations.E001",
            )
        )
    if settings.SECRET_KEY_IS_KEPT:
        found.append(
            Error(
                "SECRET_KEY is not set: every host would make its own, and sessions would not "
                "be shared.",
                hint="Set SECRET_KEY to at least 50 random characters.",
                id="conversations.E002",
            )
        )
    return found
