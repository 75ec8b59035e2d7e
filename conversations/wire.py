"""How things look on the wire: events as WebSocket frames and SSE, rows as JSON, errors as
problems. Pure mapping; nothing here reads the database or decides anything.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http import HTTPStatus
from typing import Any, Protocol, cast

from django.core.exceptions import RequestDataTooBig, SuspiciousOperation
from drf_standardized_errors.formatter import ExceptionFormatter
from drf_standardized_errors.handler import ExceptionHandler
from rest_framework import exceptions
from rest_framework.response import Response

from assistant.errors import AssistantError, InvalidRequest
from conversations.access import BodyTooLarge, loads
from conversations.counting import Standing
from conversations.errors import ERRORS
from conversations.log import Completed, Created, Delta, Failed, Queued, TurnEvent
from conversations.models import Conversation, Feedback, HandOver, Message

# --- Errors --------------------------------------------------------------------------------------

#: Why the server closes a socket.
CLOSE_UNAUTHENTICATED, CLOSE_NOT_FOUND, CLOSE_LIMITED = 4401, 4404, 4429
#: "Try again later", in IANA's registry of close codes; clients take it as any broken line.
CLOSE_OVERLOADED = 1013

_DRF_CODES: tuple[tuple[type[exceptions.APIException], str], ...] = (
    (exceptions.NotAuthenticated, "unauthenticated"),
    (exceptions.AuthenticationFailed, "unauthenticated"),
    (exceptions.PermissionDenied, "permission_denied"),
    (exceptions.NotFound, "not_found"),
    (exceptions.Throttled, "rate_limited"),
)


def error_json(error: AssistantError) -> dict[str, Any]:
    return {
        "code": error.code,
        "message": error.message,
        "retry_after_s": error.retry_after_s,
    }


#: A path may be as long as a server lets it; it is told back only so far.
_MAX_INSTANCE_CHARS = 500


def problem(
    code: str, status: int, detail: str, request: Any, errors: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The body of application/problem+json (RFC 9457) with the member OpenAI's clients read."""
    row = ERRORS.get(code, ERRORS["internal"])
    errors = errors or [{"detail": detail, "attr": None, "code": code}]
    return {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": getattr(request, "path", "")[:_MAX_INSTANCE_CHARS],
        "request_id": getattr(request, "request_id", ""),
        "errors": errors,
        "error": {
            "message": detail,
            "type": row.type,
            "code": code,
            "param": errors[0]["attr"],
        },
    }


#: Nobody should hold a request open to try again later than that.
MAX_RETRY_S = 60


class Told(exceptions.APIException):
    """One of our errors on its way through DRF."""

    def __init__(self, error: AssistantError) -> None:
        super().__init__(error.message, error.code)
        self.status_code = ERRORS[error.code].status
        self.our_code = error.code
        self.wait = error.retry_after_s
        self.permanent = error.permanent
        self.standings: Sequence[Standing] = getattr(error, "standings", ())
        self.param: str | None = getattr(error, "param", None)


class ProblemHandler(ExceptionHandler):
    """drf-standardized-errors, taught our exceptions and our media type."""

    def convert_known_exceptions(self, exc: Exception) -> Exception:
        if isinstance(exc, AssistantError):
            return Told(exc)
        if isinstance(exc, RequestDataTooBig):
            return BodyTooLarge()
        if isinstance(exc, SuspiciousOperation):
            return exceptions.ParseError("The request is malformed.")
        return super().convert_known_exceptions(exc)

    def get_response(self, exc: exceptions.APIException, data: dict[str, Any]) -> Response:
        return Response(
            data,
            status=exc.status_code,
            headers=self.get_headers(exc),
            content_type="application/problem+json",
        )

    def report_exception(self, exc: exceptions.APIException, response: Response) -> None:
        """Nothing for one of ours: it is no crash, and Django logs a line for its status."""
        if not isinstance(exc, Told):
            super().report_exception(exc, response)

    def get_headers(self, exc: exceptions.APIException) -> dict[str, str]:
        headers = cast(dict[str, str], super().get_headers(exc))
        if getattr(exc, "wait", None):
            headers["Retry-After"] = str(max(1, round(cast(Any, exc).wait)))
        if isinstance(exc, Told) and (exc.status_code >= 500 or exc.status_code in {409, 429}):
            # OpenAI's clients would try all of these again, soon, whatever they mean.
            again = not exc.permanent and (exc.wait or 0) <= MAX_RETRY_S
            headers["X-Should-Retry"] = "true" if again else "false"
        if isinstance(exc, Told):
            headers |= limit_headers(exc.standings, getattr(self.context["request"], "path", ""))
        return headers


def limit_headers(standings: Sequence[Standing], path: str) -> dict[str, str]:
    """How much the caller may still ask: of the limit that refused, or else of their requests.

    As in the IETF's draft (draft-ietf-httpapi-ratelimit-headers-10); below ``/v1/`` also as
    OpenAI's clients read it.
    """
    refused = [standing for standing in standings if standing.refused]
    headers: dict[str, str] = {}
    for at in (refused or [each for each in standings if each.limit.name == "chat"])[:1]:
        name = at.limit.name
        headers["RateLimit-Policy"] = f'"{name}";q={at.quota};w={at.limit.window_s}'
        headers["RateLimit"] = f'"{name}";r={at.left};t={at.reset_s}'
    if path.startswith("/v1/"):
        for at in reversed(standings):  # of several token limits the shortest stays
            kind = "requests" if at.limit.name == "chat" else "tokens"
            headers[f"x-ratelimit-limit-{kind}"] = str(at.quota)
            headers[f"x-ratelimit-remaining-{kind}"] = str(at.left)
            headers[f"x-ratelimit-reset-{kind}"] = f"{at.reset_s}s"
    return headers


class ProblemFormatter(ExceptionFormatter):
    """Any error of the API as a problem."""

    def run(self) -> dict[str, Any]:
        code = _code(self.exc)
        named = getattr(self.exc, "param", None)
        errors = [
            {
                "detail": found.detail,
                "attr": None if found.attr == "non_field_errors" else found.attr or named,
                "code": code if found.attr is None else found.code,
            }
            for found in self.get_errors()
        ]
        first = errors[0] if errors else {"detail": "", "attr": None}
        detail = f"{first['attr']}: {first['detail']}" if first["attr"] else str(first["detail"])
        request = getattr(self.context.get("request"), "_request", None)
        return problem(code, self.exc.status_code, detail, request, errors)


def _code(exc: exceptions.APIException) -> str:
    if isinstance(exc, Told):
        return exc.our_code
    for cls, code in _DRF_CODES:
        if isinstance(exc, cls):
            return code
    return "internal" if exc.status_code >= 500 else "invalid_request"


# --- Rows ----------------------------------------------------------------------------------------


def conversation_json(conversation: Conversation) -> dict[str, Any]:
    return {
        "id": str(conversation.pk),
        "title": conversation.title,
        "created_at": time_json(conversation.created_at),
        "updated_at": time_json(conversation.updated_at),
    }


def message_json(message: Message) -> dict[str, Any]:
    error = {"code": message.error_code, "message": message.error_message}
    return {
        "id": str(message.pk),
        "conversation": str(message.conversation_id),
        "seq": message.seq,
        "parent": str(message.parent_id) if message.parent_id else None,
        "siblings": list(message.siblings),
        "shown": message.shown,
        "role": str(message.role),
        "text": message.text,
        "html": message.html,
        "status": str(message.status),
        "route": message.route,
        "degraded_reason": message.degraded_reason,
        "confidence": message.confidence,
        "intent": message.intent,
        "model": message.model,
        "usage": {"input_tokens": message.input_tokens, "output_tokens": message.output_tokens},
        "ttft_ms": message.ttft_ms,
        "finish_reason": message.finish_reason,
        "error": error if message.error_code else None,
        "feedback": feedback_json(message),
        "buttons": message.buttons,
        "author": message.author or None,
        "hand_over": hand_over_json(message),
        "created_at": time_json(message.created_at),
    }


def hand_over_json(message: Message) -> dict[str, Any] | None:
    """How far the person is whom this answer asked for, if that was fetched with the row."""
    asked: HandOver | None = message._state.fields_cache.get("hand_over")
    if asked is None:
        return None
    return {
        "status": str(asked.status),
        "by": asked.by,
        "created_at": time_json(asked.created_at),
        "answered_at": time_json(asked.answered_at) if asked.answered_at else None,
    }


def feedback_json(message: Message) -> dict[str, Any] | None:
    """The reader's verdict, if it was fetched with the row; an answer that is new has none."""
    given: Feedback | None = message._state.fields_cache.get("feedback")
    if given is None:
        return None
    return {
        "value": given.value,
        "reason": given.reason or None,
        "text": given.text,
        "created_at": time_json(given.created_at),
    }


def time_json(moment: datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


# --- Events --------------------------------------------------------------------------------------


def event_json(event: TurnEvent) -> dict[str, Any]:
    """The same object on every transport."""
    match event:
        case Created():
            asked = event.user_message
            return {
                "type": "message.created",
                "seq": event.seq,
                "message": message_json(event.message),
                "user_message": message_json(asked) if asked is not None else None,
                "conversation": conversation_json(event.conversation),
            }
        case Queued():
            return {
                "type": "status",
                "seq": event.seq,
                "id": str(event.message_id),
                "state": "queued",
                "position": event.position,
                "eta_ms": round(event.seconds * 1000),
            }
        case Delta():
            return {
                "type": "message.delta",
                "seq": event.seq,
                "id": str(event.message_id),
                "text": event.text,
            }
        case Completed():
            return {
                "type": "message.completed",
                "seq": event.seq,
                "message": message_json(event.message),
            }
        case Failed():
            return {
                "type": "message.failed",
                "seq": event.seq,
                "message": message_json(event.message),
                "error": error_json(event.error),
            }


def ended_json(message: Message) -> dict[str, Any]:
    """An answer that ended before this reader came; seq 0: its log is gone."""
    if message.status == Message.Status.FAILED:
        error = {
            "code": message.error_code,
            "message": message.error_message,
            "retry_after_s": None,
        }
        return {"type": "message.failed", "seq": 0, "message": message_json(message)} | {
            "error": error
        }
    return {"type": "message.completed", "seq": 0, "message": message_json(message)}


def encode(frame: dict[str, Any]) -> str:
    """JSON that any peer can read: what is not Unicode after all is replaced, not a crash."""
    return json.dumps(frame, ensure_ascii=False).encode("utf-8", "replace").decode("utf-8")


# --- Server-sent events --------------------------------------------------------------------------

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
KEEP_ALIVE_S = 15.0


def sse(event: TurnEvent, known_as: int | None = None) -> bytes:
    """One event; JSON has no raw line breaks, so no text can forge another.

    ``known_as``: what a client names that saw it last, if not its number.
    """
    frame, named = event_json(event), known_as or event.seq
    return f"event: {frame['type']}\nid: {named}\ndata: {encode(frame)}\n\n".encode()


def sse_error(error: AssistantError) -> bytes:
    """The last event of a stream that ends before its answer does; it has no number."""
    frame = {"type": "error", "error": error_json(error)}
    return f"event: error\ndata: {encode(frame)}\n\n".encode()


class Readable(Protocol):
    """A ``Reader``, or several in one."""

    async def __anext__(self) -> Any: ...

    def close(self) -> None: ...


class EventStream:
    """A turn's log as server-sent events, with a comment when nothing happens for 15 s.

    An error of the reader is an event too. Django calls ``close`` when the client hangs up, from a
    worker thread.
    """

    def __init__(
        self,
        reader: Readable,
        write: Callable[[Any], bytes] = sse,
        broken: Callable[[AssistantError], bytes] = sse_error,
    ) -> None:
        self._reader, self._write, self._broken = reader, write, broken

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> bytes:
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):
                return self._write(await anext(self._reader))
        except TimeoutError:
            return b": keep-alive\n\n"
        except AssistantError as error:
            return self._broken(error)

    def close(self) -> None:
        self._reader.close()


# --- Frames from the client ----------------------------------------------------------------------

MAX_FRAME_BYTES = 16_384
MAX_REF_CHARS = 100
#: Those that begin an answer, and whether they name the message they are about.
ASKING = {
    "message.create": False,
    "message.retry": True,
    "message.regenerate": True,
    "message.edit": True,
}
FRAME_TYPES = (*ASKING, "message.hurry", "message.cancel", "message.resume", "ping", "auth")


@dataclass(frozen=True, slots=True)
class Frame:
    type: str
    text: str = ""
    id: uuid.UUID | None = None
    after_seq: int = 0
    ref: str | None = None
    idempotency_key: str | None = None
    token: str = field(default="", repr=False)


class BadFrame(InvalidRequest):
    """A frame that cannot be understood; ``ref`` if that much could."""

    def __init__(self, message: str, ref: str | None = None) -> None:
        super().__init__(message)
        self.ref = ref


def parse_frame(data: str | None) -> Frame:
    """The client's frame. Raises: BadFrame for anything else that may arrive on a socket."""
    if data is None:
        raise BadFrame("Binary frames are not understood. Send JSON as text.")
    if len(data) > MAX_FRAME_BYTES or len(data.encode("utf-8", "replace")) > MAX_FRAME_BYTES:
        raise BadFrame(f"The frame is larger than {MAX_FRAME_BYTES:,} bytes.")
    try:
        found = loads(data)
    except ValueError:
        raise BadFrame("The frame is not valid JSON.") from None
    if not isinstance(found, dict):
        raise BadFrame("The frame is not a JSON object.")
    ref = found.get("ref")
    if ref is not None and not (isinstance(ref, str) and len(ref) <= MAX_REF_CHARS):
        raise BadFrame(f"ref must be a string of at most {MAX_REF_CHARS} characters.")
    return _frame(found, ref)


def _frame(found: dict[str, Any], ref: str | None) -> Frame:
    kind = found.get("type")
    if not isinstance(kind, str) or kind not in FRAME_TYPES:
        raise BadFrame(f"type must be one of {', '.join(FRAME_TYPES)}.", ref)
    texts = {name: found.get(name, "") for name in ("text", "token")}
    for name, value in texts.items():
        if not isinstance(value, str):
            raise BadFrame(f"{name} must be a string.", ref)
    key = found.get("idempotency_key")
    if key is not None and not isinstance(key, str):
        raise BadFrame("idempotency_key must be a string.", ref)
    if key is not None and kind not in ASKING.keys() - {"message.retry"}:
        raise BadFrame(f"{kind} takes no idempotency_key: done twice, it is the same.", ref)
    after_seq = found.get("after_seq", 0)
    if not isinstance(after_seq, int) or isinstance(after_seq, bool) or after_seq < 0:
        raise BadFrame("after_seq must be a whole number of at least 0.", ref)
    named = _named(kind, found.get("id"), ref)
    return Frame(kind, texts["text"], named, after_seq, ref, key, texts["token"])


def _named(kind: str, given: object, ref: str | None) -> uuid.UUID | None:
    """The message a frame is about: some must say, a new question has none."""
    if kind == "message.create" or (given is None and not ASKING.get(kind)):
        return None
    try:
        return uuid.UUID(str(given))
    except ValueError:
        raise BadFrame("id must be the id of a message.", ref) from None
