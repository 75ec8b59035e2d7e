"""Conversations and their messages: what is kept. How answers come about is not known here.

``visible_to(caller)`` is the only way a view fetches rows. The database itself holds the two rules
that every process must agree on: one order of messages, and one running answer a conversation.
"""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from conversations.limits import Caller

#: A running answer writes a sign of life every 2 s; after four missed ones its process is gone.
ALIVE_EVERY_S = 2.0
STALE_AFTER = timedelta(seconds=8)


class ConversationQuerySet(models.QuerySet["Conversation"]):
    def visible_to(self, caller: Caller) -> ConversationQuerySet:
        """The caller's own conversations; nobody else's, staff or not."""
        if caller.user_id is not None:
            return self.filter(user_id=caller.user_id)
        if caller.session_key:
            return self.filter(user=None, session_key=caller.session_key)
        return self.none()


class Conversation(models.Model):
    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="conversations",
    )
    session_key = models.CharField(
        max_length=40,
        blank=True,
        default="",
        help_text="Whose it is when nobody is signed in: an id kept inside the session. "
        "Never the session cookie's own value, which would be a key to the session.",
    )
    title = models.CharField(max_length=200, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = ConversationQuerySet.as_manager()

    class Meta:
        ordering = ["-updated_at", "-id"]
        indexes = [
            models.Index(fields=["user", "-updated_at"], name="conversation_user"),
            models.Index(fields=["session_key", "-updated_at"], name="conversation_visitor"),
            models.Index(fields=["-updated_at", "-id"], name="conversation_recent"),
        ]

    def __str__(self) -> str:
        return self.title or str(self.pk)


class MessageQuerySet(models.QuerySet["Message"]):
    def visible_to(self, caller: Caller) -> MessageQuerySet:
        mine = Conversation.objects.visible_to(caller)
        return self.filter(conversation__in=mine)

    def reap(self, now: datetime | None = None) -> int:
        """Mark answers whose process died as interrupted, with the text that was saved."""
        now = now or timezone.now()
        return self.filter(status=Message.Status.STREAMING, alive_at__lt=now - STALE_AFTER).update(
            status=Message.Status.INTERRUPTED, error_code="interrupted"
        )


class Message(models.Model):
    class Role(models.TextChoices):
        USER = "user"
        ASSISTANT = "assistant"

    class Status(models.TextChoices):
        STREAMING = "streaming"
        COMPLETE = "complete"
        STOPPED = "stopped"
        INTERRUPTED = "interrupted"
        FAILED = "failed"

    class Route(models.TextChoices):
        REVIEWED = "reviewed"
        CACHE = "cache"
        MODEL = "model"
        UPSTREAM = "upstream"
        RULES = "rules"
        HUMAN = "human"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    conversation = models.ForeignKey(
        Conversation, on_delete=models.CASCADE, related_name="messages"
    )
    seq = models.PositiveIntegerField()
    role = models.CharField(max_length=10, choices=Role)
    text = models.TextField(blank=True, default="")
    html = models.TextField(blank=True, default="")
    status = models.CharField(max_length=12, choices=Status, default=Status.COMPLETE)
    route = models.CharField(max_length=10, choices=Route, blank=True, default="")
    degraded_reason = models.CharField(max_length=30, blank=True, default="")
    intent = models.CharField(max_length=60, blank=True, default="")
    confidence = models.FloatField(null=True, blank=True)
    scope = models.FloatField(null=True, blank=True)
    model = models.CharField(max_length=100, blank=True, default="")
    input_tokens = models.PositiveIntegerField(default=0)
    output_tokens = models.PositiveIntegerField(default=0)
    ttft_ms = models.FloatField(null=True, blank=True)
    duration_ms = models.FloatField(null=True, blank=True)
    finish_reason = models.CharField(max_length=12, blank=True, default="")
    error_code = models.CharField(max_length=30, blank=True, default="")
    error_message = models.CharField(max_length=300, blank=True, default="")
    #: Counts retries, so that a run that was given up cannot write over the one that followed.
    attempt = models.PositiveSmallIntegerField(default=1)
    alive_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = MessageQuerySet.as_manager()

    class Meta:
        ordering = ["conversation_id", "seq"]
        constraints = [
            models.UniqueConstraint(fields=["conversation", "seq"], name="message_order"),
            models.UniqueConstraint(
                fields=["conversation"], condition=Q(status="streaming"), name="one_running_answer"
            ),
        ]
        indexes = [
            models.Index(
                fields=["alive_at"], condition=Q(status="streaming"), name="message_running"
            ),
            models.Index(fields=["-created_at", "-id"], name="message_recent"),
            models.Index(fields=["route", "-created_at"], name="message_route"),
            models.Index(fields=["status", "-created_at"], name="message_status"),
        ]

    def __str__(self) -> str:
        return f"{self.role} {self.seq}"
