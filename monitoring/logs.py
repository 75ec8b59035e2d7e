"""One JSON object per line, whatever was logged, and one line for each answer and request.

Lines hold ids, figures and names from closed sets. What was asked and answered is added only with
``ASSISTANT_LOG_CONTENT``, personal values masked. Settings name ``json_formatter`` before Django is
ready, so nothing of ours is imported above.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import structlog
from django.conf import settings
from structlog.stdlib import ExtraAdder, ProcessorFormatter

if TYPE_CHECKING:
    from conversations.turn import TurnRecord

log = logging.getLogger(__name__)

#: What a line may say besides when, how bad, who and what.
KEYS = (
    *("request_id", "user_id", "conversation_id", "message_id", "transport", "status", "route"),
    *("reason", "model", "intent", "confidence", "ttft_ms", "queue_ms", "prefill_ms"),
    *("duration_ms", "input_tokens", "output_tokens", "finish_reason", "error", "attempt"),
    *("view", "method", "http_status", "question", "answer"),
)
#: A longer text of one key is cut: a line has to fit what collects it.
MOST_CHARS = 8_000


def json_formatter() -> logging.Formatter:
    """For ``LOGGING``: every record as JSON in ASCII, so that no text can end its line."""
    return ProcessorFormatter(
        foreign_pre_chain=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            ExtraAdder(allow=KEYS),
        ],
        processors=[
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            _cut,
            structlog.processors.JSONRenderer(),
        ],
    )


def _cut(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    for key, value in event.items():
        if isinstance(value, str) and len(value) > MOST_CHARS:
            event[key] = value[:MOST_CHARS] + "..."
    return event


# --- What is logged of an answer -----------------------------------------------------------------


def log_turn(*, record: TurnRecord, **_: Any) -> None:
    level = logging.ERROR if record.status == "failed" else logging.INFO
    log.log(level, "generation_finished", extra=_figures(record) | said(record))


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


def log_request(**figures: Any) -> None:
    """One line for a reply whose head is sent; an answer that streams has a line of its own."""
    log.info("request_finished", extra=figures)


def connect() -> None:
    """Log every answer from now on; any number of times."""
    from conversations.turn import turn_finished

    turn_finished.connect(log_turn, dispatch_uid="logs-log_turn")
