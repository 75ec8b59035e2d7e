"""What leaves the house when a person is asked for: a signed webhook, and a mail.

Both say which conversation and where in the admin; what the user wrote only if settings allow it,
and then without personal values. Mails are so many an hour: a crowd of hand-overs must not become a
crowd of mails. Called by ``tasks``, which tries again; nothing here waits long.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from datetime import timedelta
from typing import Any

import httpx2
from django.conf import settings
from django.core.mail import EmailMessage
from django.urls import reverse
from django.utils import timezone

from assistant import facts
from assistant.redaction import redact
from conversations import counting
from conversations.models import HandOver, Message
from conversations.wire import time_json

#: Of the whole request; the receiver is to queue, not to work.
POST_WITHIN_S = 10.0
#: Characters of the question that are told at most.
MAX_QUESTION_CHARS = 500
SIGNATURE = "X-Assistant-Signature"
#: What no mail told of is news for a day; who found no room for one waits so long for others.
NEWS_FOR, TOGETHER_AFTER = timedelta(days=1), timedelta(minutes=5)
#: Under which mails are counted.
_DESK = "hand-over"


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


# --- Mails ---------------------------------------------------------------------------------------


def mail(asked: HandOver) -> None:
    """Send the mail, unless this hour has no room for one about one user; then ``mail_together``
    tells of it. Raises: NotDelivered."""
    if _mails_left() > 1:  # the last place is for those who find none
        _letter([asked])


def mail_together() -> int:
    """Tell in one mail of all that no mail told of, once the first of them is five minutes old;
    how many. Raises: NotDelivered."""
    now = timezone.now()
    open_rows = HandOver.objects.filter(status__in=HandOver.OPEN, mailed_at=None)
    rows = list(open_rows.filter(created_at__gte=now - NEWS_FOR))
    if not rows or rows[0].created_at > now - TOGETHER_AFTER or _mails_left() < 1:
        return 0
    return _letter(rows)


def _letter(rows: list[HandOver]) -> int:
    """Send one mail about all of them that no other worker tells of meanwhile; how many.

    Raises: NotDelivered; then they are as before.
    """
    claimed = HandOver.objects.filter(pk__in=[row.pk for row in rows], mailed_at=None)
    if not (count := claimed.update(mailed_at=timezone.now())):
        return 0
    subject, text = _about(rows)
    counting.spend(_mails(), _DESK, 1)
    try:
        EmailMessage(subject, text, to=settings.ASSISTANT_HAND_OVER_EMAIL).send()
    except OSError as error:  # also every SMTPException
        counting.spend(_mails(), _DESK, -1)
        HandOver.objects.filter(pk__in=[row.pk for row in rows]).update(mailed_at=None)
        raise NotDelivered(type(error).__name__) from None
    return count


def _about(rows: list[HandOver]) -> tuple[str, str]:
    """Subject and text. Of several only how many and since when: the queue shows the rest."""
    told = payload(rows[0])
    if len(rows) > 1:
        lines = [
            f"{len(rows)} users of the assistant asked for a person.",
            f"The first: {told['created_at']}",
            f"Answer them in the admin: {reverse('admin:conversations_handover_changelist')}",
        ]
        return f"{len(rows)} users asked for a person", "\n".join(lines)
    lines = [
        "A user of the assistant asked for a person.",
        f"Since: {told['created_at']}",
        f"Why: {told['reason']}",
        f"Answer it in the admin: {told['admin_path']}",
        *([f"The question: {told['question']}"] if "question" in told else []),
    ]
    return "A person was asked for", "\n".join(lines)


def _mails() -> list[counting.Limit]:
    return [counting.Limit("mails", settings.ASSISTANT_HAND_OVER_MAILS_PER_HOUR, 3600)]


def _mails_left() -> int:
    """How many each address may get yet. All get the same mails, so they are counted once."""
    (standing,) = counting.look(_mails(), _DESK)
    return standing.left


# --- What is told --------------------------------------------------------------------------------


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
    if row is None:
        return ""
    known = facts.known_facts(asked.conversation.user)
    # Cut last: half of a card's number does not look like one.
    return redact([row.text], known).texts[0][:MAX_QUESTION_CHARS]
