"""Background work on conversations; each task is safe to run twice."""

from __future__ import annotations

from celery import shared_task

from conversations.models import Message


@shared_task  # type: ignore[untyped-decorator]
def reap_stale_turns() -> int:
    """Mark answers whose process died; the number of them."""
    return Message.objects.reap()
