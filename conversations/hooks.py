"""What leaves the house when a person is asked for: a signed webhook, and a mail.

Both say which conversation and where in the admin; what the user wrote only if settings allow it,
and then without personal values. Called by ``tasks``, which tries again; nothing here waits long.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from typing import Any

import httpx2
from django.conf import settings
from django.core.mail import EmailMessage
from django.urls import reverse

from assistant.redaction import redact
from conversations.models import HandOver, Message
from conversations.wire import time_json

#: Of the whole request; the receiver is to queue, not to work.
POST_WITHIN_S = 10.0
#: Characters of the question that are told at most.
MAX_QUESTION_CHARS = 500
SIGNATURE = "X-Assistant-Signature"


class NotDelivered(Exception):
    """The other side was not reached or did not take it; trying again may help."""


class Refused(Exception):
    """The other side does not want it, whenever it comes."""


def signature(secret: str, body: bytes, at: int) -> str:
    """``t=<Unix seconds>,v1=<hex>``: HMAC-SHA256 of ``<t>.<body>``, so that neither can be changed
    and a copy grows old."""
    signed = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256)
    return f"t={at},v1={signed.hexdigest()}"


def post(asked: HandOver, *, transport: httpx2.BaseTransport | None = None) -> None:
    """Send the webhook. Raises: NotDelivered, Refused."""
    body = json.dumps(payload(asked)).encode()
    headers = {
        "Content-Type": "application/json",
        SIGNATURE: signature(settings.ASSISTANT_HAND_OVER_WEBHOOK_SECRET, body, int(time.time())),
    }
    url = settings.ASSISTANT_HAND_OVER_WEBHOOK
    try:
        with (
            httpx2.Client(timeout=POST_WITHIN_S, transport=transport) as client,
            client.stream("POST", url, content=body, headers=headers) as reply,
        ):
            status = reply.status_code  # its body is not read
    except httpx2.HTTPError as error:
        raise NotDelivered(type(error).__name__) from None
    if status in {408, 425, 429} or status >= 500:
        raise NotDelivered(f"status {status}")
    if not 200 <= status < 300:
        raise Refused(f"status {status}")


def mail(asked: HandOver) -> None:
    """Send the mail. Raises: NotDelivered."""
    told = payload(asked)
    lines = [
        "A user of the assistant asked for a person.",
        f"Since: {told['created_at']}",
        f"Why: {told['reason']}",
        f"Answer it in the admin: {told['admin_path']}",
        *([f"The question: {told['question']}"] if "question" in told else []),
    ]
    letter = EmailMessage(
        "A person was asked for", "\n".join(lines), to=settings.ASSISTANT_HAND_OVER_EMAIL
    )
    try:
        letter.send()
    except OSError as error:  # also every SMTPException
        raise NotDelivered(type(error).__name__) from None


def payload(asked: HandOver) -> dict[str, Any]:
    """What both tell. ``id`` is the same at every try, so that a receiver knows a copy."""
    told = {
        "event": "hand_over.opened",
        "id": f"{asked.pk}-{int(asked.created_at.timestamp())}",
        "conversation": str(asked.conversation_id),
        "reason": asked.reason or "asked",
        "created_at": time_json(asked.created_at),
        "admin_path": reverse("admin:conversations_handover_change", args=[asked.pk]),
    }
    return told | ({"question": question(asked)} if settings.ASSISTANT_HAND_OVER_TEXT else {})


def question(asked: HandOver) -> str:
    """What the answer that asked was an answer to, without personal values."""
    row = Message.objects.filter(versions=asked.message_id).first()
    text = row.text[:MAX_QUESTION_CHARS] if row is not None else ""
    return redact([text]).texts[0]
