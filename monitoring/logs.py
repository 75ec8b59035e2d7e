"""One JSON object per line, whatever was logged, and lines for each answer's begin and end.

Lines hold ids, figures and names from closed sets. What was asked and answered is added only with
``ASSISTANT_LOG_CONTENT``, personal values masked. Settings name the formatters before Django is
ready, so nothing of ours is imported above.
"""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Any

import structlog
from django.conf import settings
from structlog.stdlib import ExtraAdder, ProcessorFormatter

if TYPE_CHECKING:
    from uuid import UUID

    from conversations.turn import TurnRecord

log = logging.getLogger(__name__)

#: What a line may say besides when, how bad, who and what.
KEYS = (
    *("request_id", "user_id", "conversation_id", "message_id", "transport", "status", "route"),
    *("reason", "model", "intent", "confidence", "ttft_ms", "queue_ms", "prefill_ms"),
    *("duration_ms", "input_tokens", "output_tokens", "finish_reason", "error", "attempt"),
    *("view", "http_status", "question", "answer", "backend"),
    *("task", "task_id", "parent_task_id", "child_task_id", "child_task_name"),
)
#: A longer text of one key is cut: a line has to fit what collects it.
MOST_CHARS = 8_000
_OF_A_FALLBACK = ("request_id", "user_id", "conversation_id", "message_id", "route", "reason")

_COMMON: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def json_formatter() -> logging.Formatter:
    """For ``LOGGING``: every record as JSON in ASCII, so that no text can end its line."""
    rendered = structlog.processors.format_exc_info, _cut, structlog.processors.JSONRenderer()
    return _formatter(*rendered)


def plain_formatter() -> logging.Formatter:
    """For ``LOGGING``: for people, with the same figures behind each line."""
    shown = structlog.dev.ConsoleRenderer(
        colors=False,
        pad_event_to=0,
        pad_level=False,
        sort_keys=False,
        exception_formatter=structlog.dev.plain_traceback,
    )
    return _formatter(shown)


def _formatter(*processors: Any) -> logging.Formatter:
    return ProcessorFormatter(
        foreign_pre_chain=[*_COMMON, ExtraAdder(allow=KEYS)],
        processors=[ProcessorFormatter.remove_processors_meta, *processors],
    )


def use_structlog() -> None:
    """Have what is logged by structlog itself, as by django-structlog, go the same way.

    A product that has configured it already is left alone.
    """
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_COMMON,
            _known_only,
            ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _known_only(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    kept = {*KEYS, "request", "event", "level", "logger", "timestamp", "exc_info"}
    known = {key: value for key, value in event.items() if key in kept}
    if known.get("exc_info") is True:  # now, wherever it is rendered
        known["exc_info"] = sys.exc_info()
    return known


def _cut(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MOST_CHARS:
            event[key] = value[:MOST_CHARS] + "..."
    return event


# --- What is logged of an answer -----------------------------------------------------------------


def log_opened(*, conversation_id: UUID, message_id: UUID, **more: Any) -> None:
    ids = {"conversation_id": str(conversation_id), "message_id": str(message_id)}
    names = ("request_id", "user_id", "transport", "attempt")
    log.info("generation_started", extra=ids | {name: more[name] for name in names})


def log_turn(*, record: TurnRecord, **_: Any) -> None:
    from monitoring.metrics import FALLBACK_REASONS

    figures = _figures(record)
    if record.reason in FALLBACK_REASONS:
        log.info("fallback", extra={name: figures[name] for name in _OF_A_FALLBACK})
    level = logging.ERROR if record.status == "failed" else logging.INFO
    log.log(level, "generation_finished", extra=figures | said(record))


def _figures(record: TurnRecord) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "user_id": record.user_id,
        "conversation_id": str(record.conversation_id),
        "message_id": str(record.message_id),
        "transport": record.transport,
        "status": record.status,
        "route": record.route,
        "reason": record.reason,
        "model": record.model,
        "intent": record.intent,
        "confidence": _short(record.confidence),
        "ttft_ms": _short(record.ttft_ms),
        "queue_ms": _short(record.queue_ms),
        "prefill_ms": _short(record.prefill_ms),
        "duration_ms": _short(record.duration_ms),
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "finish_reason": record.finish_reason,
        "error": record.error_code,
        "attempt": record.attempt,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def said(record: TurnRecord) -> dict[str, Any]:
    """Question and answer without personal values, if settings ask for them. Sync: a query."""
    if not (settings.ASSISTANT_LOG_CONTENT and record.stored):
        return {}
    from assistant.redaction import redact
    from conversations.models import Message

    answer = Message.objects.select_related("parent").filter(pk=record.message_id).first()
    if answer is None:  # erased since
        return {}
    asked = answer.parent.text if answer.parent else ""
    question, text = redact([asked, answer.text]).texts
    return {"question": question, "answer": text}


def connect() -> None:
    """Log every answer from now on; any number of times."""
    from conversations.turn import turn_finished, turn_opened

    turn_opened.connect(log_opened, dispatch_uid="logs-log_opened")
    turn_finished.connect(log_turn, dispatch_uid="logs-log_turn")
