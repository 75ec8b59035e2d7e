"""The review desk: which answers staff should look at, and what becomes of their judgement.

A correction is kept without personal values. Ticked, it is an example for the next retraining
(``examples`` writes it out) or a reviewed answer that the next who asks is given. Knows rows, not
pages (see ``admin_review``).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import QuerySet
from django.utils import timezone

from assistant import facts
from assistant.modelkit import labels
from assistant.redaction import redact
from conversations.models import Feedback, Message
from fallback.models import ReviewedAnswer
from fallback.rules import normalise
from monitoring.models import ReviewItem

#: Answers shown in each queue, and the newest that the last two are chosen among.
MOST_SHOWN, MOST_LOOKED_AT = 25, 2_000
#: Older answers are not worth a look: the model that gave them is gone.
WITHIN = timedelta(days=30)
#: Messages of the same conversation shown before an answer.
SHOWN_BEFORE = 10
MOST_CORRECTION_CHARS = 2_000
#: Values the shop itself may name in any answer, unless the user brought them.
_SHOP_MAY_SAY = frozenset({"Amount", "Date"})
_PLACEHOLDER = re.compile(r"\{\{([A-Z][A-Za-z ]*?)(?: [A-Z]{1,2})?\}\}")

Queue = Literal["down", "unsure", "random"]
QUEUES: dict[Queue, str] = {
    "down": "Thumbs down",
    "unsure": "Least sure",
    "random": "A random sample",
}


# --- What to look at -----------------------------------------------------------------------------


def queue(kind: Queue, now: datetime | None = None) -> list[Message]:
    """Answers nobody has judged yet, in the order they are worth a look, with their questions."""
    now = now or timezone.now()
    found = _CHOICES[kind](now)
    rows = _unjudged(now).filter(pk__in=found).select_related("parent", "feedback")
    by_key = {row.pk: row for row in rows}
    return [by_key[pk] for pk in found if pk in by_key]


def following(after: Message) -> Message | None:
    """The next to look at: of the first queue that has any."""
    for kind in QUEUES:
        if rows := [row for row in queue(kind) if row.pk != after.pk]:
            return rows[0]
    return None


def _unjudged(now: datetime) -> QuerySet[Message]:
    """Ended answers of machines, of the last weeks, that are shown and have a question."""
    answers = Message.objects.filter(
        role=Message.Role.ASSISTANT, author="", status=Message.Status.COMPLETE, shown=True
    )
    return answers.filter(created_at__gte=now - WITHIN, parent__isnull=False, review=None)


def _disliked(now: datetime) -> list[Any]:
    rows = Feedback.objects.filter(value=Feedback.Value.DOWN, message__in=_unjudged(now))
    return list(rows.order_by("-created_at").values_list("pk", flat=True)[:MOST_SHOWN])


def _unsure(now: datetime) -> list[Any]:
    rows = _unjudged(now).filter(confidence__isnull=False).order_by("-created_at")
    newest = rows.values_list("confidence", "pk")[:MOST_LOOKED_AT]
    return [pk for _, pk in sorted(newest, key=lambda row: row[0] or 0.0)[:MOST_SHOWN]]


def _sampled(now: datetime) -> list[Any]:
    """The same all day, so that a page can be left and found again."""
    rows = _unjudged(now).order_by("-created_at").values_list("pk", flat=True)
    newest = sorted(rows[:MOST_LOOKED_AT])
    dice = random.Random(now.toordinal())  # noqa: S311  a sample, not a secret
    return dice.sample(newest, min(MOST_SHOWN, len(newest)))


_CHOICES: dict[Queue, Callable[[datetime], list[Any]]] = {
    "down": _disliked,
    "unsure": _unsure,
    "random": _sampled,
}


def context(answer: Message) -> list[Message]:
    """The messages that led to ``answer``, oldest first, itself last."""
    found = [answer]
    while len(found) <= SHOWN_BEFORE and (before := found[-1].parent) is not None:
        found.append(before)
    return found[::-1]


# --- What is said of it --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judgement:
    """``wording``: the question a reviewed answer is found by; empty: as it was asked."""

    verdict: str
    intent: str = ""
    correction: str = ""
    as_example: bool = False
    as_reviewed: bool = False
    wording: str = ""


def judge(answer: Message, said: Judgement, by: Any) -> ReviewItem:
    """Store what ``by`` says of ``answer``; a second judgement replaces the first.

    Raises: ValidationError by field, and then nothing is stored.
    """
    texts = [message.text for message in context(answer)]
    correction = masked(said.correction.strip(), texts)
    _check(said, correction)
    with transaction.atomic():
        before = ReviewItem.objects.filter(pk=answer.pk).first()
        if said.as_reviewed:
            mine = before is not None and before.as_reviewed
            _publish(answer, said, correction or masked(answer.text, texts), mine=mine)
        item, _ = ReviewItem.objects.update_or_create(
            message=answer,
            defaults={
                "verdict": said.verdict,
                "intent": said.intent,
                "correction": correction,
                "as_example": said.as_example,
                "as_reviewed": said.as_reviewed,
                "by": by,
            },
        )
    return item


def _check(said: Judgement, correction: str) -> None:
    """Raises: ValidationError where the ticks ask for what is not there."""
    faults: dict[str, str] = {}
    if said.verdict not in ReviewItem.Verdict.values:
        faults["verdict"] = "Say whether the answer is good or bad."
    if said.intent and said.intent not in labels.INTENTS:
        faults["intent"] = f"No intent is called {said.intent[:60]!r}. Choose one of the list."
    if len(correction) > MOST_CORRECTION_CHARS:
        faults["correction"] = f"Write at most {MOST_CORRECTION_CHARS:,} characters."
    elif strange := strangers(correction):
        faults["correction"] = (
            f"It holds a personal value ({', '.join(strange)}) that no answer may tell. "
            "Write it without."
        )
    if said.as_example and not said.intent:
        faults["intent"] = (
            "Choose what the question is about: an example without it teaches nothing."
        )
    if said.as_reviewed and said.verdict == ReviewItem.Verdict.BAD and not correction:
        faults["correction"] = "Write what should have been said: a bad answer is not given again."
    if faults:
        raise ValidationError(faults)


def _publish(answer: Message, said: Judgement, text: str, *, mine: bool) -> None:
    """Make it a reviewed answer. Raises: ValidationError.

    ``mine``: this very review made it before, so it may be changed from here.
    """
    asked = answer.parent.text if answer.parent is not None else ""
    question = said.wording.strip() or asked.strip()
    if values := personal(question):
        why = f"The question holds a personal value ({', '.join(values)}), and everybody is given "
        raise ValidationError({"wording": why + "a reviewed answer. Word it without."})
    if strange := strangers(text):
        why = f"The answer holds a personal value ({', '.join(strange)}). Write it anew."
        raise ValidationError({"correction": why})
    found = ReviewedAnswer.objects.filter(normalised=normalise(question)[:500]).first()
    row = found if mine and found is not None else ReviewedAnswer(question=question)
    row.answer, row.intent, row.active = text, said.intent, True
    try:
        row.full_clean(exclude=["normalised"])
    except ValidationError as error:
        told = " ".join(error.messages)
        raise ValidationError({"wording": f"It cannot be a reviewed answer: {told}"}) from error
    row.save()


# --- Personal values -----------------------------------------------------------------------------


def masked(text: str, said: Sequence[str] = ()) -> str:
    """``text`` with placeholders for values of a person; the shop's own values get their own.

    ``said``: the conversation. Amounts and dates are the shop's unless they stand there. A value of
    a kind that no answer can fill keeps a placeholder of its own: see ``strangers``.
    """
    for name, value in facts.known_facts().items():
        if value and name in facts.PLAIN_WORDS:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "{{" + name + "}}", text)
    found = redact([*said, text])
    told = "\n".join(said).casefold()

    def plain(match: re.Match[str]) -> str:
        kind, value = match[1], found.values.get(match[0][2:-2])
        if value is not None and kind in _SHOP_MAY_SAY and value.casefold() not in told:
            return value
        return match[0] if match[0][2:-2] in labels.PLACEHOLDERS else "{{" + kind + "}}"

    return _PLACEHOLDER.sub(plain, found.texts[-1])


def personal(text: str) -> list[str]:
    """Kinds of personal values in a question; amounts and dates may be anybody's."""
    kinds = {_kind(name) for name in redact([text]).values}
    return sorted(kinds - _SHOP_MAY_SAY | set(_kinds_written(text)))


def strangers(text: str) -> list[str]:
    """Placeholders in ``text`` that no answer can fill, by kind."""
    return sorted(set(_kinds_written(text)) - set(labels.PLACEHOLDERS))


def _kinds_written(text: str) -> list[str]:
    return [
        whole if (whole := match[0][2:-2]) in labels.PLACEHOLDERS else match[1]
        for match in _PLACEHOLDER.finditer(text)
    ]


def _kind(name: str) -> str:
    found = _PLACEHOLDER.fullmatch("{{" + name + "}}")
    return name if found is None or name in labels.PLACEHOLDERS else found[1]
