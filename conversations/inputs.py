"""What may be sent: bodies and query strings, each field bounded and of its type.

Says what a request may contain; what is done with it is the views' business.
"""

from __future__ import annotations

from typing import Any

from django.db.models import Exists, OuterRef, Q, QuerySet
from rest_framework import serializers

from assistant.errors import InvalidRequest
from conversations import search
from conversations.limits import valid_text
from conversations.models import Conversation, Feedback, Message


class Text(serializers.CharField):
    """A string, and nothing that could be made into one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(trim_whitespace=False, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class Flag(serializers.BooleanField):
    """True or false, and nothing that could be taken for one."""

    def to_internal_value(self, data: Any) -> bool:
        if not isinstance(data, bool):
            self.fail("invalid", input=data)
        return data


class Body(serializers.Serializer[Any]):
    """Refuses fields it does not know: a client that sends ``role`` should hear that it is not."""

    def to_internal_value(self, data: Any) -> Any:
        unknown = set(data) - set(self.fields) if isinstance(data, dict) else ()
        if unknown:
            raise serializers.ValidationError(
                {str(name)[:50]: ["There is no such field."] for name in sorted(unknown)[:10]}
            )
        return super().to_internal_value(data)


class TitleBody(Body):
    title = Text(max_length=200)

    def validate_title(self, title: str) -> str:
        return plain(title, 200)


class NewConversationBody(TitleBody):
    title = Text(max_length=200, required=False)


class QuestionBody(Body):
    text = Text(allow_blank=True)  # judged by ``limits``, like on every other transport
    stream = Flag(required=False, default=False)


class EraseBody(Body):
    PHRASE = "erase my data"

    confirm = Text()

    def validate_confirm(self, said: str) -> str:
        if said != self.PHRASE:
            raise serializers.ValidationError(f'Write "{self.PHRASE}" to erase all your data.')
        return said


class AgainBody(Body):
    stream = Flag(required=False, default=False)


class FeedbackBody(Body):
    value = serializers.ChoiceField(choices=Feedback.Value.choices)
    reason = serializers.ChoiceField(choices=Feedback.Reason.choices, required=False)
    text = Text(max_length=Feedback.MAX_TEXT_CHARS, required=False, allow_blank=True)

    def validate_text(self, text: str) -> str:
        return plain(text, Feedback.MAX_TEXT_CHARS) if text.strip() else ""


def plain(text: str, limit: int) -> str:
    """``text`` without space around it. Raises: ValidationError, with the words of ``limits``."""
    try:
        return valid_text(text, limit=limit).strip()
    except InvalidRequest as error:
        raise serializers.ValidationError(error.message) from None


def valid(body: serializers.Serializer[Any]) -> dict[str, Any]:
    """What was sent. Raises: ValidationError."""
    body.is_valid(raise_exception=True)
    data: dict[str, Any] = body.validated_data
    return data


# --- Query strings -------------------------------------------------------------------------------


class MessageQuery(serializers.Serializer[Any]):
    """Which messages: with these words, of that conversation, of that time. The rest is ignored."""

    search = Text(max_length=search.MAX_QUERY_CHARS, required=False)
    conversation = serializers.UUIDField(required=False)
    role = serializers.ChoiceField(choices=Message.Role.choices, required=False)
    created_after = serializers.DateTimeField(required=False)
    created_before = serializers.DateTimeField(required=False)

    def validate_search(self, text: str) -> str:
        return plain(text, search.MAX_QUERY_CHARS)

    def narrow(self, rows: QuerySet[Message]) -> QuerySet[Message]:
        """Those of ``rows`` that are asked for. Raises: ValidationError."""
        return rows.filter(_condition(valid(self), {"search": "text__fulltext"}))


class ConversationQuery(serializers.Serializer[Any]):
    """Which conversations: by title, time, or words in the title or a message."""

    search = Text(max_length=search.MAX_QUERY_CHARS, required=False)
    title = Text(max_length=200, required=False)
    created_after = serializers.DateTimeField(required=False)
    created_before = serializers.DateTimeField(required=False)
    updated_after = serializers.DateTimeField(required=False)
    updated_before = serializers.DateTimeField(required=False)

    validate_search = MessageQuery.validate_search

    def validate_title(self, text: str) -> str:
        return plain(text, 200)

    def narrow(self, rows: QuerySet[Conversation]) -> QuerySet[Conversation]:
        """Those of ``rows`` that are asked for. Raises: ValidationError."""
        data = dict(valid(self))
        words = data.pop("search", None)
        rows = rows.filter(_condition(data, {"title": "title__icontains"}))
        if words is None:
            return rows
        said = Message.objects.filter(conversation=OuterRef("pk"), text__fulltext=words)
        return rows.filter(Q(title__fulltext=words) | Exists(said))


_BOUNDS = {
    "created_after": "created_at__gt",
    "created_before": "created_at__lt",
    "updated_after": "updated_at__gt",
    "updated_before": "updated_at__lt",
}


def _condition(data: dict[str, Any], lookups: dict[str, str]) -> Q:
    """All of it, each field by its own lookup; no name comes from the request."""
    return Q(**{{**_BOUNDS, **lookups}.get(name, name): value for name, value in data.items()})
