"""What evaluations and readers say of answers, as events for OpenTelemetry's collector.

Each figure of an evaluation run and each thumb is one ``gen_ai.evaluation.result``, a log record
that names the answer it is about, if it is about one. No word of anybody is in it. On with tracing;
sent like spans, from a thread with a bounded queue.

Source: OpenTelemetry's semantic conventions for generative AI, events (2026).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from django.db.models.signals import post_save

from conversations.models import Feedback
from monitoring.models import EvaluationRun
from monitoring.tracing import MOST_WAITING, SEND_TIMEOUT_S, Outlet, endpoint, resource

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import LogRecordExporter

log = logging.getLogger(__name__)

EVENT = "gen_ai.evaluation.result"
#: Figures of an evaluation run that are shares, or areas: 0 to 1. Of ``ece`` less is better.
SCORES = (
    *("intent_accuracy", "scope_auroc", "ece", "placeholder_ok", "well_ended", "coverage"),
    "answer_similarity",
)


def _collector() -> LogRecordExporter:
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter

    return OTLPLogExporter(endpoint=endpoint("logs"), timeout=SEND_TIMEOUT_S)


def _build(exporter: LogRecordExporter, wait: bool) -> LoggerProvider:
    from opentelemetry.sdk._logs import LoggerProvider
    from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, SimpleLogRecordProcessor

    provider = LoggerProvider(resource=resource(), shutdown_on_exit=False)
    provider.add_log_record_processor(
        BatchLogRecordProcessor(exporter, max_queue_size=MOST_WAITING)
        if wait
        else SimpleLogRecordProcessor(exporter)
    )
    return provider


verdicts: Outlet[LoggerProvider, LogRecordExporter] = Outlet(_collector, _build)


def tell_feedback(*, instance: Feedback, raw: bool = False, **_: Any) -> None:
    """A receiver of ``post_save``: what a reader thinks, and again if it changes."""
    if not raw:
        _tell([_of_feedback(instance)])


def tell_run(*, instance: EvaluationRun, created: bool, raw: bool = False, **_: Any) -> None:
    if created and not raw:
        _tell(_of_run(instance))


def _of_feedback(given: Feedback) -> dict[str, Any]:
    up = given.value == Feedback.Value.UP
    told = {
        "gen_ai.evaluation.name": "feedback",
        "gen_ai.evaluation.score.value": 1.0 if up else 0.0,
        "gen_ai.evaluation.score.label": str(given.value),
        "gen_ai.response.id": str(given.message_id),
        "assistant.feedback.reason": str(given.reason),
    }
    return {name: value for name, value in told.items() if value != ""}


def _of_run(run: EvaluationRun) -> Iterator[dict[str, Any]]:
    for name in SCORES:
        value = run.figures.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield {
                "gen_ai.evaluation.name": f"{run.suite}.{name}",
                "gen_ai.evaluation.score.value": float(value),
                "gen_ai.request.model": run.model,
                "assistant.evaluation.rows": run.rows,
                "assistant.evaluation.trigger": run.trigger,
            }


def _tell(events: Iterable[Mapping[str, Any]]) -> None:
    """A user waits while this is called, and Django's signal is not robust."""
    try:
        _emit(events)
    except Exception as error:
        log.error("a verdict was not sent: %s", type(error).__name__)


def _emit(events: Iterable[Mapping[str, Any]]) -> None:
    from opentelemetry._logs import LogRecord, SeverityNumber

    logger, now = verdicts.provider().get_logger("inhouse"), time.time_ns()
    for attributes in events:
        logger.emit(
            LogRecord(
                timestamp=now, event_name=EVENT, severity_number=SeverityNumber.INFO,
                attributes=attributes,
            )
        )  # fmt: skip


def connect() -> None:
    """Tell of every verdict from now on; any number of times."""
    post_save.connect(tell_feedback, sender=Feedback, dispatch_uid="verdicts-feedback")
    post_save.connect(tell_run, sender=EvaluationRun, dispatch_uid="verdicts-run")


def disconnect() -> None:
    post_save.disconnect(sender=Feedback, dispatch_uid="verdicts-feedback")
    post_save.disconnect(sender=EvaluationRun, dispatch_uid="verdicts-run")
