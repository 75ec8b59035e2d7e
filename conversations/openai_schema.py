"""The OpenAI dialect described: bodies and replies as JSON Schema, for the table in ``schema``.

Written from the tables that ``openai_request`` reads by, so that what is described is what is
taken; beside that, only what JSON Schema cannot say is said in words. ``null`` means absent.
"""

from __future__ import annotations

from typing import Any

from conversations import openai_request as asked

Schema = dict[str, Any]

#: Texts of the whole API are judged alike, by ``limits.valid_text``.
_CONTROLS = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
PLAIN: Schema = {"type": "string", "pattern": rf"^[^{_CONTROLS}]*$"}
#: A text that can be read: plain, and not blank.
TEXT: Schema = {
    "type": "string",
    "minLength": 1,
    "pattern": rf"^[^{_CONTROLS}]*[^\s{_CONTROLS}][^{_CONTROLS}]*$",
}


def _or_null(schema: Schema) -> Schema:
    """The schema, or nothing at all."""
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        schema = {**schema, "type": [*kinds, "null"]}
    if "enum" in schema:
        schema = {**schema, "enum": [*schema["enum"], None]}
    return schema if "type" in schema else {"anyOf": [schema, {"type": "null"}]}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _body(obeyed: set[str], required: tuple[str, ...], **properties: Schema) -> Schema:
    """A body: what is obeyed, what is harmless, and the values of all else that ask for nothing."""
    assert obeyed == set(properties), obeyed ^ set(properties)
    told = {
        name: schema if name in required else _or_null(schema)
        for name, schema in properties.items()
    }
    neutral = {
        name: {"enum": [*values, None], "description": "Not supported here."}
        for name, values in sorted(asked.NEUTRAL.items())
        if name not in obeyed
    }
    ignored = {
        name: {"description": "Taken, and changes nothing."}
        for name in sorted(asked.IGNORED - obeyed)
    }
    return {
        "type": "object",
        "required": list(required),
        "additionalProperties": False,
        "properties": {**told, **ignored, **neutral},
    }


def _numbers(kind: str, least: float, most: float) -> Schema:
    return {"type": kind, "minimum": least, "maximum": most}


_MODEL: Schema = {
    "type": "string",
    "default": asked.DEFAULT_MODEL,
    "description": "A route: see `GET /v1/models`.",
}
_FLAG: Schema = {"type": "boolean", "default": False}


def _parts(text: Schema) -> Schema:
    return _object(("type", "text"), type={"enum": sorted(asked.TEXT_PARTS)}, text=text)


_PARTS: Schema = {"type": "array", "items": _parts(PLAIN)}
_READABLE = {"anyOf": [TEXT, {**_PARTS, "contains": _parts(TEXT)}]}
_ANY: Schema = {"anyOf": [PLAIN, _PARTS]}
_KIND: Schema = {"const": "message"}
_MESSAGE: Schema = {
    "anyOf": [
        _object(("role", "content"), role={"const": "user"}, content=_READABLE, type=_KIND),
        _object(
            ("role", "content"),
            role={"enum": sorted(asked.ROLES.keys() - {"user", "assistant"})},
            content=_ANY,
            type=_KIND,
        ),
        _object(("role",), role={"const": "assistant"}, content=_or_null(_ANY), type=_KIND),
    ]
}
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": _MESSAGE,
    "description": "The history and the question: the last message is the user's.",
}
_SAMPLING: dict[str, Schema] = {
    "temperature": _numbers("number", 0, 2),
    "top_p": _numbers("number", 0, 1),
}
_STOP: Schema = {"type": "string", "minLength": 1, "maxLength": asked.MAX_STOP_CHARS}
_TIER: Schema = {
    "type": "string",
    "enum": list(asked.TIERS),
    "description": "`flex`: batch work, which a model answers while nobody is kept waiting by it.",
}
_LENGTH = _numbers("integer", 1, 2**31 - 1)

CHAT = _body(
    asked.CHAT,
    ("messages",),
    model=_MODEL,
    messages=_MESSAGES,
    stream=_FLAG,
    stream_options=_object(include_usage=_or_null(_FLAG)),
    stop={"anyOf": [_STOP, {"type": "array", "maxItems": asked.MAX_STOPS, "items": _STOP}]},
    n=_numbers("integer", 1, asked.MAX_CHOICES),
    seed=_numbers("integer", -(2**63), 2**63 - 1),
    max_tokens=_LENGTH,
    max_completion_tokens=_LENGTH,
    service_tier=_TIER,
    **_SAMPLING,
)
RESPONSE = _body(
    asked.RESPONSES,
    ("input",),
    model=_MODEL,
    input={"anyOf": [TEXT, _MESSAGES]},
    instructions={"type": "string"},
    stream=_FLAG,
    stream_options={"type": "object"},
    service_tier=_TIER,
    max_output_tokens=_LENGTH,
    truncation={"type": "string", "enum": list(asked.TRUNCATIONS)},
    metadata={"type": "object"},
    **_SAMPLING,
)
_IDS: Schema = {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}}
_TEXTS: Schema = {"type": "array", "minItems": 1, "maxItems": asked.MAX_INPUTS, "items": TEXT}
EMBEDDABLE = _body(
    asked.EMBEDDINGS,
    ("input",),
    model=_MODEL,
    input={
        "anyOf": [TEXT, _TEXTS, _IDS, {"type": "array", "minItems": 1, "items": _IDS}],
        "description": "A text or several; or token ids, of the model's own vocabulary.",
    },
    encoding_format={"type": "string", "enum": list(asked.ENCODINGS)},
    dimensions={**_LENGTH, "description": "Only the model's own width."},
)

#: One server-sent event, as a stream of them is described.
EVENT = _object(event={"type": "string"}, id={"type": "string"}, data={"type": "string"})

# --- What is given -------------------------------------------------------------------------------

_WORD: Schema = {"type": "string"}
_WHOLE: Schema = {"type": "integer"}
_ORIGIN: dict[str, Schema] = {"route": _WORD, "degraded_reason": _WORD}


def _given(kind: str, **properties: Schema) -> Schema:
    """An object with all of these, and its kind."""
    properties = {"object": {"const": kind}, **properties}
    return {**_object(tuple(properties), **properties)}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


MODEL = _given("model", id=_WORD, created=_WHOLE, owned_by=_WORD)
MODELS = _given("list", data=_list(MODEL))
_CHOICE = _object(
    ("index", "message", "finish_reason"),
    index=_WHOLE,
    message=_object(("role", "content"), role={"const": "assistant"}, content=_WORD),
    finish_reason=_WORD,
    **_ORIGIN,
)
COMPLETION = _given(
    "chat.completion",
    id=_WORD,
    created=_WHOLE,
    model=_WORD,
    choices=_list(_CHOICE),
    usage=_object(
        ("prompt_tokens", "completion_tokens", "total_tokens"),
        prompt_tokens=_WHOLE,
        completion_tokens=_WHOLE,
        total_tokens=_WHOLE,
    ),
    **_ORIGIN,
)
RESPONSE_GIVEN = _given(
    "response",
    id=_WORD,
    created_at=_WHOLE,
    model=_WORD,
    status={"enum": ["completed", "incomplete"]},
    output=_list({"type": "object"}),
    usage={"type": "object"},
    **_ORIGIN,
)
_EMBEDDING = _given(
    "embedding",
    index=_WHOLE,
    embedding={
        "anyOf": [_list({"type": "number"}), _WORD],
        "description": "Of unit length; as base64, float32 with the lowest byte first.",
    },
)
EMBEDDINGS = _given(
    "list",
    data=_list(_EMBEDDING),
    model=_WORD,
    usage=_object(("prompt_tokens", "total_tokens"), prompt_tokens=_WHOLE, total_tokens=_WHOLE),
)
