"""Reviewed corrections as rows that ``train_model --data`` reads: masked, checked, shared out.

Which answers were corrected is ``ReviewItem``'s; what a row may hold is ``corrections``'. Knows no
jobs and trains nothing.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import QuerySet

from assistant import facts
from assistant.modelkit import labels
from assistant.modelkit.corpus import CorpusError
from assistant.modelkit.corrections import MOST_CHARS, MOST_ROWS, Case, read_corrections, redacted
from assistant.redaction import redact
from conversations.models import Message
from monitoring.models import ReviewItem

#: Messages before the question that was corrected, so that a follow-up is understood.
_BEFORE = 4
_NUMBERED = re.compile(r"\{\{([A-Z][A-Za-z ]*?)(?: [A-Z]{1,2})?\}\}")


class NothingToLearn(Exception):
    """No row is left. The message says why and what to do."""


def unused() -> QuerySet[ReviewItem]:
    """Corrections that no retraining has used; without an intent there is nothing to learn."""
    return ReviewItem.objects.filter(as_example=True, used_in=None).exclude(intent="")


@dataclass(frozen=True, slots=True)
class Exported:
    """Corrections as they were written, and how many were left for another time, by reason."""

    rows: int
    left_out: dict[str, int]


def export(path: Path) -> Exported:
    """Writes unused corrections, masked; whole or not at all, newest first.

    Left out: what ``train_model`` would refuse, contradictions, and what is over a user's share.
    Raises: NothingToLearn where nothing is left.
    """
    seen: dict[tuple[str, ...], Case] = {}
    kept: list[tuple[str, str]] = []
    left = {"unreadable": 0, "said already": 0, "over one user's share": 0}
    for item in _candidates():
        line = json.dumps(_row(item), ensure_ascii=False)
        case = _readable(line)
        if case is None:
            left["unreadable"] += 1
        elif seen.setdefault(case.key, case) is not case:
            left["said already"] += 1
        else:
            kept.append((_whose(item), line))
    lines = _shared_out(kept)
    left["over one user's share"] = len(kept) - len(lines)
    if not lines:
        raise NothingToLearn(
            "No correction can be learned: " + ", ".join(f"{n} {why}" for why, n in left.items())
            + ". Review more answers and tick “as an example”."
        )  # fmt: skip
    write_whole(path, "".join(f"{line}\n" for line in lines))
    return Exported(len(lines), {why: count for why, count in left.items() if count})


def _candidates() -> Iterable[ReviewItem]:
    rows = unused().select_related("message__parent", "message__conversation")
    return rows.order_by("-created_at")[: 2 * MOST_ROWS]


def _row(item: ReviewItem) -> dict[str, Any]:
    """As ``train_model --data`` reads it; all values of the conversation are placeholders."""
    turns = _turns(item.message)
    texts = _masked([*(turn.text for turn in turns), item.correction])
    row: dict[str, Any] = {"id": str(item.message_id), "intent": item.intent}
    if len(turns) > 1:
        said = zip(turns, texts, strict=False)
        row["turns"] = [{"role": turn.role, "text": text} for turn, text in said]
    else:
        row["query"] = texts[0] if turns else ""
    return {**row, "answer": texts[-1]} if item.correction.strip() else row


def _turns(answer: Message) -> list[Message]:
    """The question of ``answer`` and what was said before it, in turns of user and assistant."""
    found: list[Message] = []
    at = answer.parent
    while at is not None and len(found) <= _BEFORE:
        wanted = Message.Role.ASSISTANT if len(found) % 2 else Message.Role.USER
        if at.role != wanted or not at.text.strip() or len(at.text) > MOST_CHARS:
            break
        found.append(at)
        at = at.parent
    if len(found) % 2 == 0:  # an answer cannot come first
        found = found[:-1]
    return found[::-1]


def _masked(texts: Sequence[str]) -> list[str]:
    """Without personal values; a model learns kinds of values, not which of two it was."""
    return [_NUMBERED.sub(_known_placeholder, text) for text in redact(texts).texts]


def _known_placeholder(match: re.Match[str]) -> str:
    for name in (match[0][2:-2], match[1]):
        if name in labels.PLACEHOLDERS:
            return "{{" + name + "}}"
    return f"my {match[1].lower()}"


def _readable(line: str) -> Case | None:
    """The row as training would read it; None where it would be refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.jsonl"
        path.write_text(line + "\n", encoding="utf-8", errors="replace")
        try:
            return read_corrections(path, redacted(facts.mask))[0]
        except CorpusError:
            return None


def _whose(item: ReviewItem) -> str:
    talk = item.message.conversation
    return f"user {talk.user_id}" if talk.user_id else f"visitor {talk.session_key or talk.pk}"


def _shared_out(rows: Sequence[tuple[str, str]]) -> list[str]:
    """At most the share of the settings from any one user, but one from each."""
    share = settings.ASSISTANT["RETRAIN"]["MOST_OF_ONE_USER"]

    def taken(each: int) -> list[str]:
        count: dict[str, int] = {}
        found = []
        for user, line in rows:
            count[user] = count.get(user, 0) + 1
            if count[user] <= each:
                found.append(line)
        return found[:MOST_ROWS]

    each = 1
    while each < len(rows) and each + 1 <= share * len(taken(each + 1)):
        each += 1
    return taken(each)


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing, whatever ends this process."""
    part = path.with_suffix(".part")
    with part.open("w", encoding="utf-8", errors="replace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
