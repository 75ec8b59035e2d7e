"""From "a person was asked for" to that person's answer in the same conversation. Sync.

One hand-over is open in a conversation at a time, which the database holds true for all processes.
Knows rows and who is to be told of a change; not the pages where staff work (see ``admin``), nor
how news travel (``news``, ``hooks``).
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from assistant.errors import Conflict, NotFound
from conversations import limits, markdown, news
from conversations.models import Conversation, HandOver, Message, known_as

#: A page of text; longer than anybody types into a box.
MAX_REPLY_CHARS = 8_000

# --- The turn asks -------------------------------------------------------------------------------


def opened(message: Message) -> HandOver | None:
    """The hand-over this answer opens, if none is open; in the transaction that stores the answer.

    ``message`` shows it from now on. One whose own answer was replaced moves to this one.
    """
    if not settings.ASSISTANT_HAND_OVER:
        return None
    again = HandOver.objects.filter(message=message.pk).first()
    if again is not None:
        return _reopened(again, message)
    found, created = HandOver.objects.select_related("message", "taken_by").get_or_create(
        conversation_id=message.conversation_id,
        status__in=HandOver.OPEN,
        defaults={"message": message, "reason": message.degraded_reason},
    )
    if not created and not found.message.shown:
        found.message = message
        found.save(update_fields=["message"])
    if found.message_id == message.pk:
        message.hand_over = found
    return found if created else None


def _reopened(before: HandOver, message: Message) -> HandOver | None:
    """The answer was written again and asks again; what it asked for before may have ended."""
    message.hand_over = before
    elsewhere = HandOver.objects.filter(
        conversation=message.conversation_id, status__in=HandOver.OPEN
    )
    if elsewhere.exists():
        return None
    before.status, before.taken_by = HandOver.Status.WAITING, None
    before.answered_at = before.announced_at = before.posted_at = before.mailed_at = None
    before.reason, before.created_at = message.degraded_reason, timezone.now()
    before.save()
    return before


# --- Staff answer --------------------------------------------------------------------------------


def take(pk: int, staff: Any) -> bool:
    """Say who sees to it; False if somebody does already, or it has ended."""
    waiting = HandOver.objects.filter(pk=pk, status=HandOver.Status.WAITING)
    if not waiting.update(status=HandOver.Status.TAKEN, taken_by=staff):
        return False
    _tell(pk)
    return True


def close(pk: int) -> bool:
    """End it without another word; False if it was closed before."""
    rows = HandOver.objects.filter(pk=pk).exclude(status=HandOver.Status.CLOSED)
    if not rows.update(status=HandOver.Status.CLOSED):
        return False
    _tell(pk)
    return True


def reply(pk: int, staff: Any, text: str, *, seen: int) -> Message:
    """The stored answer of that person, last in the branch that is shown.

    ``seen``: the newest message they knew of. An answer that is being written meanwhile goes on
    above it. Raises: InvalidRequest, NotFound; Conflict if a colleague was faster.
    """
    limits.valid_text(text, limit=MAX_REPLY_CHARS)
    with transaction.atomic():
        held, asked = _held(pk)
        if asked.status == HandOver.Status.CLOSED:
            raise Conflict("This hand-over was closed meanwhile, so nothing was sent.")
        if held.messages.filter(seq__gt=seen).exclude(author="").exists():
            raise Conflict("A colleague answered meanwhile, so nothing was sent. Read it first.")
        message = _stored(held, staff, text)
        asked.status, asked.taken_by = HandOver.Status.ANSWERED, staff
        asked.answered_at = message.created_at
        asked.save(update_fields=["status", "taken_by", "answered_at"])
        Conversation.objects.filter(pk=held.pk).update(updated_at=message.created_at)
        _tell(pk, message.pk)
    return message


def _held(pk: int) -> tuple[Conversation, HandOver]:
    """Both rows, locked in the order in which a turn takes them. Raises: NotFound."""
    held = Conversation.objects.select_for_update().filter(hand_overs=pk).first()
    asked = HandOver.objects.select_for_update().filter(pk=pk).first()
    if held is None or asked is None:
        raise NotFound("This conversation was deleted, so nothing was sent.")
    return held, asked


def _stored(held: Conversation, staff: Any, text: str) -> Message:
    last = held.messages.order_by("-seq").values_list("seq", flat=True).first() or 0
    return Message.objects.create(
        conversation=held,
        seq=last + 1,
        parent=held.messages.on_the_page().order_by("-seq").first(),
        role=Message.Role.ASSISTANT,
        text=text,
        html=markdown.render(text),
        route=Message.Route.HUMAN,
        finish_reason="stop",
        author=known_as(staff),
    )


def _tell(pk: int, *more: uuid.UUID) -> None:
    """What changed, to whoever has the conversation open: the answer that asked, and ``more``."""
    found = HandOver.objects.filter(pk=pk).values_list("conversation_id", "message_id").first()
    if found is not None:
        conversation_id, message_id = found
        transaction.on_commit(partial(news.tell, conversation_id, [*more, message_id]))
