"""Conversations and their messages: what is kept. How answers come about is not known here.

``visible_to(caller)`` is the only way a view fetches rows. The database itself holds the two rules
that every process must agree on: one order of messages, and one running answer a conversation.
"""

from __future__ import annotations

import uuid
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils import timezone

from conversations.compiled import Compiled
from conversations.limits import Caller

#: A running answer writes a sign of life every 2 s; after four missed ones its process is gone.
ALIVE_EVERY_S = 2.0
STALE_AFTER = timedelta(seconds=8)
#: "Last used" is true to the minute; more would be a write a request.
NOTE_USE_EVERY = timedelta(minutes=1)


class ConversationQuerySet(models.QuerySet["Conversation"]):
    def visible_to(self, caller: Caller) -> ConversationQuerySet:
        """The caller's own conversations; nobody else's, staff or not."""
        if caller.user_id is not None:
            return self.filter(user_id=caller.user_id)
        if caller.session_key:
            return self.filter(user=None, session_key=caller.session_key)
        return self.none()

    def own(self, caller: Caller, pk: uuid.UUID) -> Conversation | None:
        """The caller's conversation of that id."""
        if caller.user_id is None:
            return self.visible_to(caller).filter(pk=pk).first()
        return next(iter(_own(caller.user_id, pk)), None)


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


_own = Compiled(
    lambda user_id, pk: Conversation.objects.visible_to(Caller(user_id)).filter(pk=pk),
    Conversation._meta.get_field("user"),
    Conversation._meta.get_field("id"),
)


class MessageQuerySet(models.QuerySet["Message"]):
    def visible_to(self, caller: Caller) -> MessageQuerySet:
        mine = Conversation.objects.visible_to(caller)
        return self.filter(conversation__in=mine)

    def on_the_page(self) -> MessageQuerySet:
        """The branch that is shown: of every message the newest version."""
        return self.filter(shown=True)

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
    #: What this follows: an answer its question, a question the answer before it. Several with one
    #: parent are versions of each other; the newest is shown, and what followed the older is not.
    #: DO_NOTHING: it is in the same conversation and goes with it, in one statement.
    parent = models.ForeignKey(
        "self", on_delete=models.DO_NOTHING, null=True, blank=True, related_name="versions"
    )
    shown = models.BooleanField(default=True)
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
    #: What the client called the request that made this row, and a digest of what it said. The
    #: database knows the defaults too, for code that does not know the columns yet.
    idempotency_key = models.CharField(max_length=255, blank=True, default="", db_default="")
    idempotency_body = models.CharField(max_length=64, blank=True, default="", db_default="")
    #: Who wrote it, as its reader is told, if a person of the staff did; never set by a turn.
    author = models.CharField(max_length=150, blank=True, default="", db_default="")
    #: Quick replies below it: ``{"label", "text"}``.
    buttons = models.JSONField(blank=True, default=list, db_default=[])

    #: The ids of all versions of this message, if there are several and ``note_siblings`` looked.
    siblings: tuple[str, ...] = ()

    #: Rows beside it that are shown with it, to be fetched in one statement.
    BESIDE = ("feedback", "hand_over__taken_by")

    objects = MessageQuerySet.as_manager()

    class Meta:
        ordering = ["conversation_id", "seq"]
        constraints = [
            models.UniqueConstraint(fields=["conversation", "seq"], name="message_order"),
            models.UniqueConstraint(
                fields=["conversation"], condition=Q(status="streaming"), name="one_running_answer"
            ),
            models.UniqueConstraint(
                fields=["conversation", "idempotency_key"],
                condition=~Q(idempotency_key=""),
                name="message_once",
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


def note_siblings(messages: Sequence[Message]) -> None:
    """Tell each of these its versions, oldest first; one statement for all.

    A group has versions if one of it is not shown; rows that never had a parent are no group.
    """
    near = Q(parent__in={m.parent_id for m in messages if m.parent_id}) | Q(parent=None)
    rows = Message.objects.filter(near, conversation__in={m.conversation_id for m in messages})
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    replaced = set()
    columns = ("conversation_id", "parent_id", "role", "pk", "shown")
    for *key, pk, shown in rows.order_by("seq").values_list(*columns):
        groups[tuple(key)].append(str(pk))
        if not shown:
            replaced.add(tuple(key))
    for message in messages:
        found = (message.conversation_id, message.parent_id, message.role)
        message.siblings = tuple(groups[found]) if found in replaced else ()


class HandOver(models.Model):
    """A person was asked for: from the answer that promised one to the answer of that person."""

    class Status(models.TextChoices):
        WAITING = "waiting"
        TAKEN = "taken"
        ANSWERED = "answered"
        CLOSED = "closed"

    OPEN = (Status.WAITING, Status.TAKEN)

    conversation = models.ForeignKey(
        Conversation, on_delete=models.CASCADE, related_name="hand_overs"
    )
    message = models.OneToOneField(Message, on_delete=models.CASCADE, related_name="hand_over")
    #: Why the answer was not the model's best; empty: a rule asks for a person.
    reason = models.CharField(max_length=30, blank=True, default="")
    status = models.CharField(max_length=10, choices=Status, default=Status.WAITING)
    taken_by = models.ForeignKey(
        settings.AUTH_USER_MODEL,
        on_delete=models.SET_NULL,
        null=True,
        blank=True,
        related_name="+",
    )
    created_at = models.DateTimeField(default=timezone.now, editable=False)
    answered_at = models.DateTimeField(null=True, blank=True)
    #: When a worker was told to call staff; until then somebody has to try again.
    announced_at = models.DateTimeField(null=True, blank=True)
    #: When the webhook was taken, or refused for good.
    posted_at = models.DateTimeField(null=True, blank=True)
    #: When a mail told of it, alone or with others.
    mailed_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["created_at"]
        constraints = [
            models.UniqueConstraint(
                fields=["conversation"],
                condition=Q(status__in=["waiting", "taken"]),
                name="one_open_hand_over",
            )
        ]
        indexes = [models.Index(fields=["status", "created_at"], name="hand_over_queue")]

    def __str__(self) -> str:
        return f"hand-over of {self.created_at:%Y-%m-%d %H:%M} UTC"

    @property
    def is_open(self) -> bool:
        return self.status in self.OPEN

    @property
    def by(self) -> str:
        """Who took it, as the user is told; nothing while nobody has."""
        return known_as(self.taken_by) if self.taken_by is not None else ""


def known_as(staff: Any) -> str:
    """A member of the staff, as users are told: the first name, if there is one."""
    return str(getattr(staff, "first_name", "")).strip() or "our team"


class Feedback(models.Model):
    """What the reader of an answer thinks of it. Only the owner of a conversation reads it, so one
    a message is one a user and message."""

    class Value(models.TextChoices):
        UP = "up"
        DOWN = "down"

    class Reason(models.TextChoices):
        WRONG = "wrong"
        INCOMPLETE = "incomplete"
        OFF_TOPIC = "off_topic"
        UNCLEAR = "unclear"
        UNSAFE = "unsafe"
        OTHER = "other"

    MAX_TEXT_CHARS = 1_000

    message = models.OneToOneField(
        Message, on_delete=models.CASCADE, primary_key=True, related_name="feedback"
    )
    value = models.CharField(max_length=4, choices=Value)
    reason = models.CharField(max_length=12, choices=Reason, blank=True, default="")
    text = models.CharField(max_length=MAX_TEXT_CHARS, blank=True, default="")
    created_at = models.DateTimeField(default=timezone.now, editable=False)

    class Meta:
        verbose_name_plural = "feedback"
        ordering = ["-created_at"]
        indexes = [models.Index(fields=["value", "-created_at"], name="feedback_value")]

    def __str__(self) -> str:
        return str(self.value)


class ApiTokenManager(models.Manager["ApiToken"]):
    def use(self, token: Any) -> frozenset[str]:
        """What that token of Knox may do, and a note that it was used now.

        A token without a row here was made by other means, with all that its user may do.
        """
        noted = self.to_be_noted(token)
        grant = getattr(token, "grant", None) or self.get_or_create(token=token)[0]
        if noted:
            self.filter(pk=grant.pk).update(last_used_at=timezone.now())
        held = set(grant.scopes)
        return frozenset(held if token.user.is_staff else held - {ApiToken.Scope.ADMIN})

    def to_be_noted(self, token: Any) -> bool:
        """Whether the last use that was noted of it is a while ago, or there is none."""
        used: datetime | None = getattr(getattr(token, "grant", None), "last_used_at", None)
        return used is None or used < timezone.now() - NOTE_USE_EVERY


def _usual_scopes() -> list[str]:
    return ["read", "chat"]


class ApiToken(models.Model):
    """What Knox does not know of its tokens: name, scopes, last use."""

    class Scope(models.TextChoices):
        READ = "read", "read: see conversations and messages, export them"
        CHAT = "chat", "chat: ask, change and delete"
        ADMIN = "admin", "admin: what only staff may"

    token = models.OneToOneField(
        "knox.AuthToken", on_delete=models.CASCADE, primary_key=True, related_name="grant"
    )
    name = models.CharField(max_length=60, default="made without a name")
    scopes = models.JSONField(default=_usual_scopes)
    last_used_at = models.DateTimeField(null=True, blank=True)

    objects = ApiTokenManager()

    def __str__(self) -> str:
        return self.name
