"""Rules and reviewed answers as the router needs them, read once and kept for a moment.

Loaded before an answer streams, never during; a change by staff is live within ``TTL_S`` in every
process and at once in the one that saved it. Reviewed answers are found by their exact words, or
near them (``fallback.near``).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from django.db.models.signals import post_delete, post_save

from fallback import near, rulebook
from fallback.models import PolicyChange, ReviewedAnswer, Rule
from fallback.policy import Policy
from fallback.rules import RuleText, normalise
from fallback.words import signs

TTL_S = 5.0


@dataclass(frozen=True, slots=True)
class Reviewed:
    answer: str
    intent: str
    #: As it was written: a normalised one has lost its currency. Empty: not known.
    question: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """Everything written by staff; ``reviewed`` by normalised question."""

    rules: Sequence[RuleText]
    reviewed: dict[str, Reviewed]
    shelf: near.Shelf = field(default_factory=near.Shelf, compare=False)
    #: What staff changed of the settings; None: nothing.
    policy: Policy | None = None

    def reviewed_for(self, question: str) -> Reviewed | None:
        """The answer reviewed for exactly these words."""
        found = self.reviewed.get(normalise(question))
        if found and found.question and signs(found.question) != signs(question):
            return None
        return found

    async def near_for(self, question: str, read: near.Reader = near.read_by_model) -> near.Verdict:
        """The answer reviewed for other words that mean the same; touches no database."""
        return await near.find(question, self.shelf, read)


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
    rows = list(ReviewedAnswer.objects.filter(active=True))
    change = PolicyChange.objects.filter(active=True).first()
    return Known(
        rulebook.current(),
        {row.normalised: Reviewed(row.answer, row.intent, row.question) for row in rows},
        near.Shelf(near.Entry(row.question, row.answer, row.intent) for row in rows),
        change.policy() if change else None,
    )


for _model in (Rule, ReviewedAnswer, PolicyChange):
    post_save.connect(forget, sender=_model, dispatch_uid=f"forget-{_model.__name__}-save")
    post_delete.connect(forget, sender=_model, dispatch_uid=f"forget-{_model.__name__}-delete")
