"""The rules in the database as one compiled ``Book``, compiled again only when one has changed.

Every process asks for the stamp of the table (one small query) and keeps its book while that
stands, so a save anywhere is noticed everywhere. Sync: touches the database.
"""

from __future__ import annotations

import threading
from datetime import datetime

from django.conf import settings
from django.db.models import Count, Max, Q

from fallback.matching import Book, Failure, check
from fallback.models import Rule

#: How many rules there are, how many of them active, and the latest change.
_Stamp = tuple[int, int, datetime | None]

_kept: tuple[_Stamp, Book] | None = None
_lock = threading.Lock()


def current() -> Book:
    """All active rules."""
    global _kept
    with _lock:
        stamp = _stamp()
        if _kept is None or _kept[0] != stamp:
            _kept = (stamp, Book([rule.text() for rule in Rule.objects.filter(active=True)]))
        return _kept[1]


def _stamp() -> _Stamp:
    found = Rule.objects.aggregate(
        rules=Count("pk"), active=Count("pk", filter=Q(active=True)), latest=Max("updated_at")
    )
    return found["rules"], found["active"], found["latest"]


def with_change(rule: Rule) -> Book:
    """The active rules as they would be with ``rule`` saved and active."""
    others = Rule.objects.filter(active=True).exclude(pk=rule.pk)
    return Book([rule.text(), *(other.text() for other in others)])


def failing(book: Book, only: str = "") -> list[Failure]:
    """What fails of the tests on the rules (``only``: of that rule), at the score in settings."""
    return check(book, score=settings.ASSISTANT["RULE_SCORE"], only=only)
