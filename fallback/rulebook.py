"""The rules in the database as one compiled ``Book``, compiled again only when one has changed.

Every process asks for the stamp of the table (one small query) and keeps its book while that
stands, so a save anywhere is noticed everywhere. Sync: touches the database.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from datetime import datetime

from django.core.exceptions import ValidationError
from django.db.models import Count, Max, Q

from fallback.matching import Book, Failure, check
from fallback.models import PolicyChange, Rule
from fallback.rules import RuleText

log = logging.getLogger(__name__)

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
            _kept = (stamp, Book(list(_texts(Rule.objects.filter(active=True)))))
        return _kept[1]


def _texts(rules: Iterable[Rule]) -> Iterator[RuleText]:
    """Those that can be read: one bad row, of a fixture say, silences no other rule."""
    for rule in rules:
        try:
            yield rule.text()
        except (TypeError, KeyError, AttributeError) as error:
            log.error("rule %s cannot be read: %s", rule.pk, type(error).__name__)


def faulty() -> Iterator[str]:
    """What is wrong with active rules that came past the admin's checks; a line each."""
    for rule in Rule.objects.filter(active=True):
        try:
            rule.full_clean(validate_unique=False, validate_constraints=False)
        except ValidationError as error:
            for name, told in error.message_dict.items():
                yield f"{rule.name}: {name}: {' '.join(told)}"


def _stamp() -> _Stamp:
    found = Rule.objects.aggregate(
        rules=Count("pk"), active=Count("pk", filter=Q(active=True)), latest=Max("updated_at")
    )
    return found["rules"], found["active"], found["latest"]


def with_change(rule: Rule) -> Book:
    """The active rules as they would be with ``rule`` saved and active."""
    others = Rule.objects.filter(active=True).exclude(pk=rule.pk)
    return Book([rule.text(), *_texts(others)])


def failing(book: Book, only: str = "") -> list[Failure]:
    """What fails of the tests on the rules (``only``: of that rule), at the score in force."""
    return check(book, score=PolicyChange.in_force().rule_score, only=only)
