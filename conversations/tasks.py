"""Background work on conversations; each task is safe to run twice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from celery import Task, shared_task
from django.conf import settings
from django.utils import timezone

from conversations import hooks, signing_in
from conversations.models import HandOver, Message

log = logging.getLogger(__name__)

#: Pauses between tries of a hook, in seconds: a receiver that restarts, and one that is down a
#: while. After the last the queue in the admin is all that tells.
HOOK_PAUSES_S = (5, 30, 120, 600, 1800)
#: What a turn did not announce is announced later, unless it is a day old or there are very many.
ITS_TURN_NEEDS, MOST_ANNOUNCED = timedelta(seconds=30), 100
#: A webhook that was queued so long ago and never arrived was lost with its queue or its worker, or
#: had been given up: longer than all its tries take.
LOST_AFTER = timedelta(seconds=sum(HOOK_PAUSES_S)) + timedelta(minutes=15)


@shared_task  # type: ignore[untyped-decorator]
def reap_stale_turns() -> int:
    """Mark answers whose process died; the number of them."""
    return Message.objects.reap()


@shared_task  # type: ignore[untyped-decorator]
def forget_failed_tries() -> int:
    """Addresses from which nobody has failed to sign in lately; the number of rows."""
    return signing_in.forget_failed_tries()


def announce(asked: HandOver) -> None:
    """Have workers call staff, by whatever settings name; noted if all of that could be queued."""
    hooked = (
        (settings.ASSISTANT_HAND_OVER_WEBHOOK, post_hand_over),
        (settings.ASSISTANT_HAND_OVER_EMAIL, mail_hand_over),
    )
    queued = [_queued(task, asked.pk) for named, task in hooked if named]
    if all(queued):
        HandOver.objects.filter(pk=asked.pk).update(announced_at=timezone.now())


@shared_task  # type: ignore[untyped-decorator]
def announce_hand_overs() -> int:
    """What its turn could not announce, because the broker was away or the server ended, and
    webhooks whose task was lost; how many."""
    now = timezone.now()
    since = now - hooks.NEWS_FOR
    rows = HandOver.objects.filter(status__in=HandOver.OPEN, created_at__gte=since)
    missed = rows.filter(created_at__lte=now - ITS_TURN_NEEDS, announced_at=None)
    found = list(missed[:MOST_ANNOUNCED])
    if settings.ASSISTANT_HAND_OVER_WEBHOOK:
        found += rows.filter(announced_at__lt=now - LOST_AFTER, posted_at=None)[:MOST_ANNOUNCED]
    for asked in found:
        announce(asked)
    return len(found)


@shared_task(bind=True, max_retries=len(HOOK_PAUSES_S))  # type: ignore[untyped-decorator]
def post_hand_over(self: Task, pk: int) -> None:
    """Send the webhook of that hand-over."""
    if _deliver(self, pk, hooks.post):
        HandOver.objects.filter(pk=pk).update(posted_at=timezone.now())


@shared_task(bind=True, max_retries=len(HOOK_PAUSES_S))  # type: ignore[untyped-decorator]
def mail_hand_over(self: Task, pk: int) -> None:
    """Send the mail of that hand-over."""
    _deliver(self, pk, hooks.mail)


@shared_task  # type: ignore[untyped-decorator]
def mail_hand_overs_together() -> int:
    """One mail about those that found no room for one of their own, or no server; how many."""
    if not settings.ASSISTANT_HAND_OVER_EMAIL:
        return 0
    try:
        return hooks.mail_together()
    except hooks.NotDelivered as error:
        log.warning("the mail about several hand-overs did not arrive: %s", error)
        return 0


def _deliver(task: Task, pk: int, send: Callable[[HandOver], None]) -> bool:
    """Once, unless nobody needs to come any more; later again if the other side was not there.
    Whether that is settled."""
    asked = HandOver.objects.filter(pk=pk, status__in=HandOver.OPEN).first()
    if asked is None:
        return False
    try:
        send(asked)
    except hooks.Refused as error:
        log.error("%s of hand-over %s was refused: %s", send.__name__, pk, error)
    except hooks.NotDelivered as error:
        tries = task.request.retries
        if tries >= len(HOOK_PAUSES_S):
            log.error("%s of hand-over %s was given up: %s", send.__name__, pk, error)
            return False
        log.warning("%s of hand-over %s did not arrive: %s", send.__name__, pk, error)
        raise task.retry(countdown=HOOK_PAUSES_S[tries]) from error
    return True


def _queued(task: Any, *args: Any) -> bool:
    """Whether a worker will run it; False if the broker is away."""
    try:
        task.apply_async(args, retry=False)
    except Exception as error:  # kombu's, or of the broker's own client
        log.error("%s was not queued: %s", task.name, type(error).__name__)
        return False
    return True
