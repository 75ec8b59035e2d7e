"""A trace of each answer for OpenTelemetry: when it was let in, waited, was read, written, stored.

On with ``OTEL_EXPORTER_OTLP_ENDPOINT`` and the extra ``observability``. Spans are made from a
``TurnRecord`` when the answer has been sent, and leave from a thread with a bounded queue: a
collector that is slow or down costs an answer nothing, and what does not fit is dropped. Without
``ASSISTANT_LOG_CONTENT`` a span holds no word of what was said.

Source: OpenTelemetry's semantic conventions for generative AI, spans (2026).
"""

from __future__ import annotations

import atexit
import json
import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from django.conf import settings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

    from conversations.turn import TurnRecord

log = logging.getLogger(__name__)

#: Spans that wait to be sent, how long one try to send may take, and how long all of them have
#: when the process ends.
MOST_WAITING, SEND_TIMEOUT_S, LAST_SEND_S = 2_048, 5, 2.0
#: Who writes: the model in this process, or a server that speaks OpenAI's protocol.
_OWN, _ELSEWHERE = "inhouse", "openai"

#: Name, begin and end; in seconds from the question's arrival.
Part = tuple[str, float, float]


class Shuts(Protocol):
    def shutdown(self) -> Any: ...


Provider = TypeVar("Provider", bound=Shuts)
Exporter = TypeVar("Exporter", bound=Shuts)


class Outlet(Generic[Provider, Exporter]):
    """What a process sends to its collector; the provider is built with the first of it, for it
    owns a thread."""

    def __init__(
        self, collector: Callable[[], Exporter], build: Callable[[Exporter, bool], Provider]
    ) -> None:
        self._collector, self._build = collector, build
        self._provider: Provider | None = None
        self._exporter: Exporter | None = None
        self._lock = threading.Lock()

    def provider(self) -> Provider:
        """Built once; what it makes goes to the collector that settings name."""
        with self._lock:
            if self._provider is None:
                self._exporter = self._collector()
                self._provider = self._build(self._exporter, True)
                atexit.register(self.end)
            return self._provider

    def send_to(self, exporter: Exporter) -> None:
        """Have all of it go there instead, each at once: for a look at it."""
        with self._lock:
            self._exporter, self._provider = exporter, self._build(exporter, False)

    def end(self) -> None:
        """Send what waits, for at most ``LAST_SEND_S``, and forget the provider."""
        with self._lock:
            provider, exporter = self._provider, self._exporter
            self._provider = self._exporter = None
        if provider is None or exporter is None:
            return
        enough = threading.Timer(LAST_SEND_S, exporter.shutdown)  # ends a pause between tries
        enough.daemon = True
        enough.start()
        provider.shutdown()
        enough.cancel()


def endpoint(kind: str) -> str:
    return f"{settings.OTEL_EXPORTER_OTLP_ENDPOINT.rstrip('/')}/v1/{kind}"


def resource() -> Any:
    from opentelemetry.sdk.resources import Resource

    return Resource.create({"service.name": settings.OTEL_SERVICE_NAME})


def _collector() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint("traces"), timeout=SEND_TIMEOUT_S)


def _build(exporter: SpanExporter, wait: bool) -> TracerProvider:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    provider = TracerProvider(resource=resource(), shutdown_on_exit=False)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, max_queue_size=MOST_WAITING)
        if wait
        else SimpleSpanProcessor(exporter)
    )
    return provider


tracing: Outlet[TracerProvider, SpanExporter] = Outlet(_collector, _build)


def trace_turn(*, record: TurnRecord, **_: Any) -> None:
    """A receiver of ``turn_finished``, which is sent when the reader has the answer."""
    from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = tracing.provider().get_tracer("inhouse")
    parts = list(_parts(record))
    whole = tracer.start_span(
        f"chat {record.model}".strip(),
        TraceContextTextMapPropagator().extract({"traceparent": record.trace}),
        kind=SpanKind.CLIENT if record.route == "upstream" else SpanKind.INTERNAL,
        attributes={**_attributes(record), **_content(record)},
        start_time=_ns(record, 0.0),
    )
    if record.status == "failed":
        whole.set_status(Status(StatusCode.ERROR))
    inside = set_span_in_context(whole)
    for name, begin, end in parts:
        child = tracer.start_span(name, inside, start_time=_ns(record, begin))
        child.end(_ns(record, end))
    whole.end(_ns(record, max(end for _, _, end in parts)))


def _ns(record: TurnRecord, after_s: float) -> int:
    return int((record.asked_at + after_s) * 1e9)


def _parts(record: TurnRecord) -> Iterator[Part]:
    """What an answer's time went to; the queue and the reading only of an engine in this process.

    The record's latencies count from the end of admission.
    """
    admitted = record.admit_ms / 1000
    written = admitted + record.duration_ms / 1000
    yield "admission", 0.0, admitted
    if record.ttft_ms is not None:
        first = admitted + record.ttft_ms / 1000
        read = max(admitted, first - (record.prefill_ms or 0.0) / 1000)
        if record.queue_ms is not None:
            yield "queue", max(admitted, read - record.queue_ms / 1000), read
        if record.prefill_ms is not None:
            yield "prefill", read, first
        yield "decode", first, max(first, written)
    yield "persist", written, written + record.persist_ms / 1000


def _attributes(record: TurnRecord) -> dict[str, Any]:
    """Figures and names from closed sets; ids, but of nobody."""
    told: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": _ELSEWHERE if record.route == "upstream" else _OWN,
        "gen_ai.request.model": record.model,
        "gen_ai.response.model": record.model,
        "gen_ai.conversation.id": str(record.conversation_id),
        "gen_ai.response.id": str(record.message_id),
        "gen_ai.usage.input_tokens": record.input_tokens,
        "gen_ai.usage.output_tokens": record.output_tokens,
        "gen_ai.response.finish_reasons": [record.finish_reason] if record.finish_reason else None,
        "gen_ai.response.time_to_first_chunk": _seconds(record.ttft_ms),
        "error.type": record.error_code,
        "assistant.route": record.route,
        "assistant.degraded_reason": record.reason,
        "assistant.transport": record.transport,
        "assistant.status": record.status,
        "assistant.intent": record.intent,
        "assistant.confidence": record.confidence,
    }
    return {name: value for name, value in told.items() if value not in (None, "")}


def _seconds(ms: float | None) -> float | None:
    return None if ms is None else ms / 1000


def _content(record: TurnRecord) -> dict[str, str]:
    """What was said, personal values masked, if settings ask for it. Sync: a query."""
    from monitoring.logs import said

    told = said(record)
    if not told:
        return {}
    return {
        "gen_ai.input.messages": _message("user", told["question"]),
        "gen_ai.output.messages": _message("assistant", told["answer"]),
    }


def _message(role: str, text: str) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]}])


def connect() -> None:
    """Trace every answer from now on, if settings say where to; any number of times."""
    if not settings.OTEL_EXPORTER_OTLP_ENDPOINT:
        return
    try:
        import opentelemetry.exporter.otlp.proto.http
        import opentelemetry.sdk.trace  # noqa: F401
    except ImportError:
        log.warning(
            "OTEL_EXPORTER_OTLP_ENDPOINT is set, but no trace can be sent: "
            "pip install 'inhouse[observability]'."
        )
        return
    from conversations.turn import turn_finished
    from monitoring import verdicts

    turn_finished.connect(trace_turn, dispatch_uid="tracing-trace_turn")
    verdicts.connect()
