"""Rules and reviewed answers as the router needs them, read once and kept for a moment.

Loaded before an answer streams, never during; a change by staff is live within ``TTL_S`` in every
process and at once in the one that saved it. Reviewed answers are found by their exact words.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from django.db.models.signals import post_delete, post_save

from fallback.models import ReviewedAnswer, Rule
from fallback.rules import RuleText, normalise, worded

TTL_S = 5.0


@dataclass(frozen=True, slots=True)
class Reviewed:
    answer: str
    intent: str


@dataclass(frozen=True, slots=True)
class Known:
    """Everything written by staff; ``reviewed`` by normalised question."""

    rules: tuple[RuleText, ...]
    reviewed: dict[str, Reviewed]

    def reviewed_for(self, question: str) -> Reviewed | None:
        return self.reviewed.get(normalise(question))


_kept: tuple[float, Known] | None = None
_lock = threading.Lock()


def known() -> Known:
    """What staff wrote, at most ``TTL_S`` old. Sync: touches the database."""
    global _kept
    with _lock:
        if _kept is None or time.monotonic() - _kept[0] > TTL_S:
            _kept = (time.monotonic(), _load())
        return _kept[1]


def forget(**_: Any) -> None:
    """The next ``known`` reads the database again."""
    global _kept
    with _lock:
        _kept = None


def _load() -> Known:
    rules = tuple(
        RuleText(
            rule.name,
            tuple(worded(phrase) for phrase in rule.patterns),
            rule.answer,
            rule.intent,
            rule.priority,
        )
        for rule in Rule.objects.filter(active=True)
    )
    rows = ReviewedAnswer.objects.filter(active=True)
    return Known(rules, {row.normalised: Reviewed(row.answer, row.intent) for row in rows})


for _model in (Rule, ReviewedAnswer):
    post_save.connect(forget, sender=_model, dispatch_uid=f"forget-{_model.__name__}-save")
    post_delete.connect(forget, sender=_model, dispatch_uid=f"forget-{_model.__name__}-delete")
