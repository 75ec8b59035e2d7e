"""The API described: OpenAPI 3.1 for ``/api/schema/``, ``/api/docs/`` and ``docs/openapi.yaml``.

One table says what each operation takes and gives; everything else (paths, verbs, login) is read
from the code. Serializers here only describe: replies are made in ``wire``, and a test holds the
two together. After a change: ``manage.py spectacular --file docs/openapi.yaml``.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from drf_spectacular.extensions import (
    OpenApiAuthenticationExtension,
    OpenApiSerializerFieldExtension,
)
from drf_spectacular.openapi import AutoSchema
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse
from rest_framework import serializers

from conversations import inputs, models, openai_schema
from conversations.errors import ERRORS

ERROR_CODES = [(code, code) for code in sorted(ERRORS)]

# --- What is given -------------------------------------------------------------------------------


class Conversation(serializers.Serializer[Any]):
    id = serializers.UUIDField()
    title = serializers.CharField()
    created_at = serializers.DateTimeField()
    updated_at = serializers.DateTimeField()


class Usage(serializers.Serializer[Any]):
    input_tokens = serializers.IntegerField()
    output_tokens = serializers.IntegerField()


class AnswerError(serializers.Serializer[Any]):
    code = serializers.ChoiceField(choices=ERROR_CODES)
    message = serializers.CharField()


class Feedback(serializers.Serializer[Any]):
    value = serializers.ChoiceField(choices=models.Feedback.Value.choices)
    reason = serializers.ChoiceField(choices=models.Feedback.Reason.choices, allow_null=True)
    text = serializers.CharField()
    created_at = serializers.DateTimeField()


class Button(serializers.Serializer[Any]):
    label = serializers.CharField()  # type: ignore[assignment]
    text = serializers.CharField(help_text="What pressing it asks.")


class HandOver(serializers.Serializer[Any]):
    status = serializers.ChoiceField(choices=models.HandOver.Status.choices)
    by = serializers.CharField(help_text="Who took it; empty while nobody has.")
    created_at = serializers.DateTimeField()
    answered_at = serializers.DateTimeField(allow_null=True)


class Message(serializers.Serializer[Any]):
    id = serializers.UUIDField()
    conversation = serializers.UUIDField()
    seq = serializers.IntegerField(help_text="Order within the conversation; numbers may be left.")
    parent = serializers.UUIDField(  # type: ignore[assignment]
        allow_null=True, help_text="What this follows."
    )
    siblings = serializers.ListField(
        child=serializers.UUIDField(), help_text="All versions, oldest first, if there are several."
    )
    shown = serializers.BooleanField(help_text="False: a newer version is shown instead.")
    role = serializers.ChoiceField(choices=models.Message.Role.choices)
    text = serializers.CharField()
    html = serializers.CharField(help_text="The text as safe HTML, once it is complete.")
    status = serializers.ChoiceField(choices=models.Message.Status.choices)
    route = serializers.CharField(help_text="Who answered: reviewed, model, rules, human, ...")
    degraded_reason = serializers.CharField(help_text="Why it was not the model's best.")
    confidence = serializers.FloatField(allow_null=True, help_text="0..1, calibrated.")
    intent = serializers.CharField()
    model = serializers.CharField()
    usage = Usage()
    ttft_ms = serializers.FloatField(allow_null=True, help_text="Time to the first token.")
    finish_reason = serializers.CharField()
    error = AnswerError(allow_null=True)
    feedback = Feedback(allow_null=True)
    buttons = Button(many=True, help_text="Quick replies to show below it.")
    author = serializers.CharField(
        allow_null=True, help_text="The person of the staff who wrote it, if one did."
    )
    hand_over = HandOver(
        allow_null=True, help_text="How far the person is whom this answer asked for, if it did."
    )
    created_at = serializers.DateTimeField()


class _Page(serializers.Serializer[Any]):
    next = serializers.URLField(allow_null=True)
    previous = serializers.URLField(allow_null=True)


class ConversationPage(_Page):
    results = Conversation(many=True)


class MessagePage(_Page):
    results = Message(many=True)


class ConversationExport(Conversation):
    messages = Message(many=True)


class Person(serializers.Serializer[Any]):
    id = serializers.IntegerField()
    username = serializers.CharField()
    email = serializers.CharField()
    joined_at = serializers.DateTimeField()


class KnownToken(serializers.Serializer[Any]):
    name = serializers.CharField()
    starts_with = serializers.CharField()
    created_at = serializers.DateTimeField()
    expires_at = serializers.DateTimeField(allow_null=True)


class OwnExport(serializers.Serializer[Any]):
    exported_at = serializers.DateTimeField()
    user = Person(allow_null=True)
    tokens = KnownToken(many=True)
    conversations = ConversationExport(many=True)


class ErasedCounts(serializers.Serializer[Any]):
    conversations = serializers.IntegerField()
    messages = serializers.IntegerField()
    feedback = serializers.IntegerField()
    tokens = serializers.IntegerField()


class Erased(serializers.Serializer[Any]):
    erased = ErasedCounts()


class ProblemPart(serializers.Serializer[Any]):
    detail = serializers.CharField()
    attr = serializers.CharField(allow_null=True, help_text="The field it is about.")
    code = serializers.CharField()


class ProblemError(serializers.Serializer[Any]):
    message = serializers.CharField()
    type = serializers.CharField()
    code = serializers.ChoiceField(choices=ERROR_CODES)
    param = serializers.CharField(allow_null=True)


class Problem(serializers.Serializer[Any]):
    """Every error of the API: RFC 9457, with the member that OpenAI's clients read."""

    type = serializers.CharField()
    title = serializers.CharField()
    status = serializers.IntegerField()
    detail = serializers.CharField()
    instance = serializers.CharField()
    request_id = serializers.CharField(help_text="The same as the header X-Request-ID.")
    errors = ProblemPart(many=True)  # type: ignore[assignment]
    error = ProblemError()


# --- The table of operations ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Operation:
    """What an operation takes and gives, and ``also`` in other media types than JSON.

    Serializers, or JSON Schema. ``asks``: an answer is written, so more can go wrong;
    ``counted``: how often is limited.
    """

    summary: str
    gives: Any
    takes: type[serializers.Serializer[Any]] | openai_schema.Schema | None = None
    query: tuple[Any, ...] = ()
    asks: bool = False
    counted: bool = False
    also: tuple[str, ...] = ()
    status: int = 200


def _choice(name: str, *values: str, help: str = "") -> OpenApiParameter:
    return OpenApiParameter(name, str, enum=values, description=help)


_PAGED = (
    OpenApiParameter("cursor", str, description="From `next` or `previous` of a page."),
    OpenApiParameter("page_size", int, description="At most 200."),
)
_EVENTS = ("text/event-stream",)
_ALSO: dict[str, Any] = {"text/event-stream": openai_schema.EVENT, "text/markdown": str}
_LAST_EVENT = OpenApiParameter(
    "Last-Event-ID",
    int,
    OpenApiParameter.HEADER,
    description="The last event that you have seen.",
)
_ONCE = OpenApiParameter(
    "Idempotency-Key",
    {"type": "string", "pattern": "^[ -~]*[!-~][ -~]*$", "minLength": 1, "maxLength": 255},
    OpenApiParameter.HEADER,
    description="A name for this request, for a day: sent again, it is not carried out again; its "
    "answer is sent with `Idempotent-Replayed: true`.",
)
_ORDERS = tuple(sign + name for name in ("updated_at", "created_at", "title") for sign in ("", "-"))

#: By view and verb; a test asserts that no operation is missing.
OPERATIONS: dict[tuple[str, str], Operation] = {
    ("Conversations", "GET"): Operation(
        "Your conversations, searched, filtered and ordered",
        ConversationPage,
        query=(inputs.ConversationQuery, _choice("ordering", *_ORDERS), *_PAGED),
    ),
    ("Conversations", "POST"): Operation(
        "A new conversation", Conversation, inputs.NewConversationBody, status=201, counted=True
    ),
    ("ConversationDetail", "GET"): Operation("One conversation", Conversation),
    ("ConversationDetail", "PATCH"): Operation("Another title", Conversation, inputs.TitleBody),
    ("ConversationDetail", "DELETE"): Operation("Delete it with its messages", None, status=204),
    ("ConversationExport", "GET"): Operation(
        "A conversation as a file",
        ConversationExport,
        query=(_choice("format", "json", "md"),),
        also=("text/markdown",),
    ),
    ("Messages", "GET"): Operation(
        "The messages of a conversation, oldest first",
        MessagePage,
        query=(_choice("siblings", "1", help="Replaced versions as well."), *_PAGED),
    ),
    ("Messages", "POST"): Operation(
        "Ask; the answer as JSON or as events",
        Message,
        inputs.QuestionBody,
        query=(_ONCE,),
        asks=True,
        also=_EVENTS,
    ),
    ("OwnMessages", "GET"): Operation(
        "Your messages of all conversations, newest first",
        MessagePage,
        query=(inputs.MessageQuery, _choice("ordering", "created_at", "-created_at"), *_PAGED),
    ),
    ("MessageCancel", "POST"): Operation("Stop an answer that is being written", Message),
    ("MessageHurry", "POST"): Operation("Wait no longer: have what is known answer now", Message),
    ("MessageEvents", "GET"): Operation(
        "An answer's events, from the start or from where you were",
        None,
        query=(_LAST_EVENT,),
        also=_EVENTS,
        status=204,
    ),
    ("MessageRegenerate", "POST"): Operation(
        "Another answer to the same question",
        Message,
        inputs.AgainBody,
        query=(_ONCE,),
        asks=True,
        also=_EVENTS,
    ),
    ("MessageEdit", "POST"): Operation(
        "Put a question differently and have it answered",
        Message,
        inputs.QuestionBody,
        query=(_ONCE,),
        asks=True,
        also=_EVENTS,
    ),
    ("MessageFeedback", "POST"): Operation(
        "Say what you think of an answer", Message, inputs.FeedbackBody
    ),
    ("MessageFeedback", "DELETE"): Operation("Take it back", None, status=204),
    ("OwnExport", "GET"): Operation("Everything that is kept of you", OwnExport),
    ("OwnData", "DELETE"): Operation("Erase it", Erased, inputs.EraseBody),
    ("ChatCompletions", "POST"): Operation(
        "An answer to a conversation that you bring along",
        openai_schema.COMPLETION,
        openai_schema.CHAT,
        asks=True,
        also=_EVENTS,
    ),
    ("Responses", "POST"): Operation(
        "The same, in the words of the newer dialect",
        openai_schema.RESPONSE_GIVEN,
        openai_schema.RESPONSE,
        asks=True,
        also=_EVENTS,
    ),
    ("Embeddings", "POST"): Operation(
        "What the model makes of texts, as vectors",
        openai_schema.EMBEDDINGS,
        openai_schema.EMBEDDABLE,
        asks=True,
    ),
    ("Models", "GET"): Operation("The routes that a request may name", openai_schema.MODELS),
    ("Model", "GET"): Operation("One of them", openai_schema.MODEL),
}


class TableSchema(AutoSchema):
    """Reads the table where drf-spectacular would guess."""

    @property
    def _operation(self) -> Operation | None:
        return OPERATIONS.get((type(self.view).__name__, self.method))

    def get_description(self) -> str:  # type: ignore[override]
        return inspect.getdoc(getattr(self.view, self.method.lower())) or ""

    def get_summary(self) -> str | None:
        return self._operation.summary if self._operation else None

    def get_operation_id(self) -> str:
        words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self.view).__name__).lower()
        return f"{words}_{self.method.lower()}"

    def get_tags(self) -> list[str]:
        return ["openai" if self.path.startswith("/v1/") else self.path.split("/")[3]]

    def get_override_parameters(self) -> list[Any]:
        return list(self._operation.query) if self._operation else []

    def get_request_serializer(self) -> Any:
        return self._operation.takes if self._operation else None

    def _get_request_body(self, direction: Literal["request", "response"] = "request") -> Any:
        """drf-spectacular knows no body of DELETE, and in one of PATCH no field that has to be
        there."""
        takes = self.get_request_serializer()
        if isinstance(takes, dict):
            schema: Any = takes
        elif self.method not in {"DELETE", "PATCH"} or takes is None:
            return super()._get_request_body(direction)  # type: ignore[no-untyped-call]
        else:
            schema = self.resolve_serializer(takes, direction).ref
        return {"content": {"application/json": {"schema": schema}}, "required": True}

    def get_response_serializers(self) -> Any:
        operation = self._operation
        if operation is None:
            return None
        good: Any = operation.gives or OpenApiResponse(description="Done.")
        kinds: dict[Any, Any] = {operation.status: good}
        if operation.gives is not None:
            kinds = {(operation.status, "application/json"): good}
        for media_type in operation.also:
            kinds[200, media_type] = _ALSO[media_type]
        if self.method == "GET" and getattr(self.view, "polled", False):
            kinds[304] = OpenApiResponse(description="Nothing new since the ETag you sent.")
        for status in self._errors(operation):
            told = OpenApiResponse(Problem, description=HTTPStatus(status).phrase)
            kinds[status, "application/problem+json"] = told
        return kinds

    def _errors(self, operation: Operation) -> list[int]:
        body = [400, 413, 415] if operation.takes else []
        query = [400] if operation.query else []
        absent = [404] if self._names_something else []
        more = [429, 503] if operation.asks else [429] if operation.counted else []
        busy = [409] if operation.asks and not self.path.startswith("/v1/") else []
        other = [422] if _ONCE in operation.query else []
        return sorted({401, 403, *body, *query, *absent, *more, *busy, *other})

    @property
    def _names_something(self) -> bool:
        """What may not be there: a row by its address, a model by its name, a page's cursor."""
        operation = self._operation
        paged = operation is not None and set(_PAGED) <= set(operation.query)
        dialect = self.path.startswith("/v1/") and self.method == "POST"
        return "{" in self.path or dialect or paged


class TextFields(OpenApiSerializerFieldExtension):  # type: ignore[no-untyped-call]
    """What ``limits.valid_text`` says of a text."""

    target_class = "conversations.inputs.Text"

    def map_serializer_field(self, auto_schema: Any, direction: str) -> dict[str, Any]:
        field: Any = self.target
        schema = openai_schema.PLAIN if field.allow_blank else openai_schema.TEXT
        return schema | ({"maxLength": field.max_length} if field.max_length else {})


def strict_bodies(result: dict[str, Any], **_: Any) -> dict[str, Any]:
    """A body refuses fields that it does not know."""
    for name, schema in result["components"]["schemas"].items():
        if name.endswith("Body"):
            schema["additionalProperties"] = False
    # A blank question passes its field, to be refused in the words of every other transport.
    question = result["components"]["schemas"]["QuestionBody"]["properties"]
    question["text"] = openai_schema.TEXT
    return result


class BearerScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "conversations.access.TokenAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        return {"type": "http", "scheme": "bearer", "description": "Made at /accounts/tokens/."}


class SessionScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    target_class = "conversations.access.VisitorAuthentication"
    name = "session"

    def get_security_definition(self, auto_schema: Any) -> dict[str, str]:
        told = "The web page's login; unsafe methods also need the header X-CSRFToken."
        return {"type": "apiKey", "in": "cookie", "name": "sessionid", "description": told}


def only_ours(endpoints: list[Any]) -> list[Any]:
    """The API of this product and its OpenAI dialect, without the page that says "not here"."""
    return [
        endpoint
        for endpoint in endpoints
        if endpoint[0].startswith(("/api/v1/", "/v1/")) and endpoint[3].cls.__name__ != "Elsewhere"
    ]
