"""How answers look in the OpenAI dialect: chat completions and responses, whole and in pieces.

Pure mapping, like ``wire``: events in, JSON and server-sent events out. What clients insist on was
tried with the official ones, and those run in the tests.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from assistant.backends.base import Vector
from assistant.errors import AssistantError
from conversations.errors import ERRORS
from conversations.log import Completed, Delta, Failed
from conversations.models import Message
from conversations.openai_request import Asked
from conversations.turn import Source
from conversations.wire import encode


@dataclass(frozen=True, slots=True)
class Part:
    """An event of one of a request's answers, and who writes that answer as far as is known."""

    index: int
    source: Source
    event: Delta | Completed | Failed


class Reply(Protocol):
    """One request's answers on their way out. Whole or in pieces, not both."""

    def whole(self, ends: Sequence[Part]) -> dict[str, Any]:
        """The JSON of answers that are complete, in order."""

    def piece(self, part: Part) -> bytes:
        """The server-sent events that tell of this event."""

    def broken(self, error: AssistantError) -> bytes:
        """The server-sent events that tell of an answer that broke off; nothing follows."""


class ChatReply:
    """``chat.completion`` and ``chat.completion.chunk``."""

    def __init__(self, asked: Asked, identity: str) -> None:
        self._head = {"id": f"chatcmpl-{identity}", "created": _now(), "model": asked.model}
        self._n, self._tells_usage = asked.n, asked.include_usage
        self._begun: set[int] = set()
        self._ended: list[Message] = []

    def whole(self, ends: Sequence[Part]) -> dict[str, Any]:
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(end) for end in ends],
            "usage": _chat_usage([_message_of(end) for end in ends]),
            **_origin(ends[0].source),
        }

    def piece(self, part: Part) -> bytes:
        first = part.index not in self._begun
        self._begun.add(part.index)
        head = self._chunk(part, {"role": "assistant", "content": ""}) if first else b""
        if isinstance(part.event, Delta):
            return head + self._chunk(part, {"content": part.event.text})
        return head + self._end(part, part.event.message)

    def broken(self, error: AssistantError) -> bytes:
        return _data({"error": error_json(error)})

    def _end(self, part: Part, message: Message) -> bytes:
        self._ended.append(message)
        last = self._chunk(part, {}, message.finish_reason)
        if len(self._ended) < self._n:
            return last
        return last + self._usage(part.source) + b"data: [DONE]\n\n"

    def _usage(self, source: Source) -> bytes:
        """The chunk of usage, if asked for; clients insist on its having no choices."""
        if not self._tells_usage:
            return b""
        return _data(self._frame(source, []) | {"usage": _chat_usage(self._ended)})

    def _chunk(self, part: Part, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": part.index, "delta": delta, "logprobs": None}
        frame = self._frame(part.source, [choice | {"finish_reason": finish_reason}])
        return _data(frame | ({"usage": None} if self._tells_usage else {}))

    def _frame(self, source: Source, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return named | _origin(source)

    def _choice(self, end: Part) -> dict[str, Any]:
        message = _message_of(end)
        return {
            "index": end.index,
            "message": {"role": "assistant", "content": message.text, "refusal": None},
            "logprobs": None,
            "finish_reason": message.finish_reason,
            "route": message.route,
            "degraded_reason": message.degraded_reason,
        }


class ResponseReply:
    """``response`` and its events; one message of one text."""

    def __init__(self, asked: Asked, identity: str) -> None:
        self._head = {"id": f"resp_{identity}", "object": "response", "created_at": _now()}
        self._echo = {**_RESPONSE, **asked.echo, "model": asked.model}
        self._item = f"msg_{identity}"
        self._source = Source("", "", "")
        self._sent = 0

    def whole(self, ends: Sequence[Part]) -> dict[str, Any]:
        (end,) = ends
        self._source = end.source
        return self._ended(_message_of(end))

    def piece(self, part: Part) -> bytes:
        self._source = part.source
        head = self._opening() if not self._sent else b""
        if isinstance(part.event, Delta):
            text = part.event.text
            return head + self._tell("output_text.delta", _PLACE, delta=text, logprobs=[])
        return head + self._closing(part.event.message)

    def broken(self, error: AssistantError) -> bytes:
        told = {"code": "server_error", "message": error.message}
        failed = self._tell("failed", response=self._response("failed", error=told))
        # The official client raises only if it finds this member.
        return failed + self._event("error", error=error_json(error), **error_json(error))

    def _opening(self) -> bytes:
        begun = self._response("in_progress")
        return b"".join(
            (
                self._tell("created", response=begun),
                self._tell("in_progress", response=begun),
                self._tell("output_item.added", output_index=0, item=self._message("in_progress")),
                self._tell("content_part.added", _PLACE, part=_text_part("")),
            )
        )

    def _closing(self, message: Message) -> bytes:
        done = self._ended(message)
        return b"".join(
            (
                self._tell("output_text.done", _PLACE, text=message.text, logprobs=[]),
                self._tell("content_part.done", _PLACE, part=_text_part(message.text)),
                self._tell("output_item.done", output_index=0, item=done["output"][0]),
                self._tell(done["status"], response=done),
            )
        )

    def _ended(self, message: Message) -> dict[str, Any]:
        cut = message.finish_reason == "length"
        status = "incomplete" if cut else "completed"
        return self._response(
            status,
            output=[self._message(status, message.text)],
            incomplete_details={"reason": "max_output_tokens"} if cut else None,
            usage=_response_usage(message),
        )

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        named = {**self._head, **self._echo, "status": status, **fields}
        return named | _origin(self._source)

    def _message(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [_text_part(text)]
        named = {"id": self._item, "type": "message", "role": "assistant"}
        return {**named, "status": status, "content": content}

    def _tell(self, name: str, place: dict[str, int] | None = None, **fields: Any) -> bytes:
        where = {} if place is None else {"item_id": self._item, **place}
        return self._event(f"response.{name}", **where, **fields)

    def _event(self, name: str, **fields: Any) -> bytes:
        frame = {**fields, "type": name, "sequence_number": self._sent}
        self._sent += 1
        return f"event: {name}\n".encode() + _data(frame)


_PLACE = {"output_index": 0, "content_index": 0}
#: What the dialect wants said of a response, and is always the same here.
_RESPONSE: dict[str, Any] = {
    "background": False,
    "error": None,
    "incomplete_details": None,
    "output": [],
    "parallel_tool_calls": False,
    "previous_response_id": None,
    "store": False,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "usage": None,
}


def model_json(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": _STARTED, "owned_by": "inhouse"}


def embeddings_json(
    vectors: Sequence[Vector], *, model: str, encoding: str, tokens: int
) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": at, "embedding": _vector_json(vector, encoding)}
            for at, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector_json(vector: Vector, encoding: str) -> Any:
    """Numbers, or the bytes of float32 numbers, the lowest byte first, in base64."""
    if encoding == "base64":
        return base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
    return np.asarray(vector, float).tolist()


def error_json(error: AssistantError) -> dict[str, Any]:
    kind = ERRORS[error.code].type
    return {"message": error.message, "type": kind, "code": error.code, "param": None}


def _message_of(end: Part) -> Message:
    assert not isinstance(end.event, Delta)
    return end.event.message


def _origin(source: Source) -> dict[str, Any]:
    """Where an answer comes from; a fingerprint is the dialect's word for what was running."""
    return {
        "system_fingerprint": source.model or None,
        "route": source.route,
        "degraded_reason": source.reason,
    }


def _chat_usage(messages: Sequence[Message]) -> dict[str, int]:
    """Tokens of the model; the prompt counts once, whatever the number of choices."""
    read = max(message.input_tokens for message in messages)
    written = sum(message.output_tokens for message in messages)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _response_usage(message: Message) -> dict[str, Any]:
    return {
        "input_tokens": message.input_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": message.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": message.input_tokens + message.output_tokens,
    }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _data(frame: dict[str, Any]) -> bytes:
    return f"data: {encode(frame)}\n\n".encode()


def _now() -> int:
    return int(time.time())


_STARTED = _now()
