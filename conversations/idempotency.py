"""A request that arrives twice is carried out once: the client names it, the first of a name wins.

The name (header ``Idempotency-Key``, or the frame's ``idempotency_key``) is stored on the first row
that the request makes, unique in its conversation, which has one owner. Knows rows, no transport
and no turn. The header: draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar, TypeVar

from django.utils import timezone

from assistant.errors import AssistantError, Conflict, InvalidRequest
from conversations.models import Message
from conversations.running import running

T = TypeVar("T")

#: After that a name is free again: no client repeats a request for longer.
KEPT = timedelta(hours=24)
_KEY = re.compile(r"[\x20-\x7e]{1,255}")


class IdempotencyConflict(Conflict):
    """The first request of that name is being answered where this one cannot read along."""

    code: ClassVar[str] = "idempotency_conflict"


class IdempotencyMismatch(InvalidRequest):
    """The name belongs to a request that said something else."""

    code: ClassVar[str] = "idempotency_mismatch"


@dataclass(frozen=True, slots=True)
class Once:
    """A request's name, and a digest of what it asks for: how it is delivered is not part of it."""

    key: str
    body: str

    @classmethod
    def of(cls, key: str | None, *said: object) -> Once | None:
        """None without a name. Raises: InvalidRequest."""
        if key is None:
            return None
        if not _KEY.fullmatch(key) or not key.strip():
            raise InvalidRequest("An idempotency key has 1 to 255 printable ASCII characters.")
        body = json.dumps([None if part is None else str(part) for part in said])
        return cls(key, hashlib.sha256(body.encode()).hexdigest())


def run_once(conversation_id: uuid.UUID, once: Once | None, begin: Callable[[], T]) -> T | Message:
    """What ``begin`` gives; or the answer of the request that had the same name before. Sync.

    Raises: IdempotencyMismatch, IdempotencyConflict, and what ``begin`` raises.
    """
    if once is None:
        return begin()
    found = _answer(conversation_id, once)
    if found is not None:
        return found
    try:
        return begin()
    except AssistantError:
        found = _answer(conversation_id, once)  # its twin was faster
        if found is None:
            raise
        return found


def claim(row: Message, once: Once | None) -> None:
    """Name that row, which is about to be stored, in the transaction that stores it."""
    if once is None:
        return
    over = Message.objects.filter(created_at__lt=timezone.now() - KEPT)
    over.filter(conversation=row.conversation_id, idempotency_key=once.key).update(
        idempotency_key=""
    )
    row.idempotency_key, row.idempotency_body = once.key, once.body


def _answer(conversation_id: uuid.UUID, once: Once) -> Message | None:
    """The answer to the request of that name, if it has ended or is being written here."""
    rows = Message.objects.filter(conversation=conversation_id)
    kept = rows.filter(created_at__gte=timezone.now() - KEPT)
    named = kept.filter(idempotency_key=once.key).first()
    if named is None:
        return None
    if named.idempotency_body != once.body:
        raise IdempotencyMismatch(
            "This idempotency key was used for another request. Send a new key with a new request."
        )
    rows.reap()
    first = rows.filter(pk=named.pk) if named.role == "assistant" else rows.filter(parent=named)
    answer = first.select_related("conversation", *Message.BESIDE).order_by("seq").first()
    if answer is not None and _out_of_reach(answer):
        raise IdempotencyConflict(
            "The answer to this very request is being written. Ask again for it in a second.",
            retry_after_s=1,
        )
    return answer


def _out_of_reach(answer: Message) -> bool:
    return answer.status == Message.Status.STREAMING and running.log_of(answer) is None
