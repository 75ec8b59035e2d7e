"""Traces of answers: their spans, whose trace they continue, and a collector that is not there."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from django.contrib.auth.models import User

from conversations.turn import TurnRecord, turn_finished
from monitoring import tracing, verdicts
from monitoring.tracing import trace_turn
from tests.conftest import free_port
from tests.monitoring.conftest import ask

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="the extra observability is missing")
from opentelemetry.sdk.trace.export.in_memory_span_exporter import (  # noqa: E402
    InMemorySpanExporter,
)
from opentelemetry.trace import SpanKind  # noqa: E402

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = f"00-{TRACE}-{PARENT}-01"
ASKED_AT = 1_790_000_000.0


def record(**changes: Any) -> TurnRecord:
    told: dict[str, Any] = {
        **{"conversation_id": uuid.UUID(int=1), "message_id": uuid.UUID(int=2), "user_id": 1},
        **{"transport": "ws", "status": "complete", "route": "model", "reason": ""},
        **{"model": "support-en@1", "intent": "track_order", "confidence": 0.9, "scope": 0.9},
        **{"input_tokens": 12, "output_tokens": 30, "ttft_ms": 40.0, "duration_ms": 100.0},
        **{"finish_reason": "stop", "error_code": "", "attempt": 1, "stored": False},
        **{"queue_ms": 10.0, "prefill_ms": 20.0, "asked_at": ASKED_AT, "admit_ms": 5.0},
        **{"persist_ms": 3.0, "trace": ""},
    }
    return TurnRecord(**{**told, **changes})


@pytest.fixture
def spans() -> Iterator[Callable[[], dict[str, Any]]]:
    """What was traced, by name."""
    kept = InMemorySpanExporter()
    tracing.tracing.send_to(kept)
    yield lambda: {span.name: span for span in kept.get_finished_spans()}
    tracing.tracing.end()


def ms(span: Any) -> tuple[int, int]:
    """Begin and end, in ms after the question."""
    return tuple(round(at / 1e6 - ASKED_AT * 1e3) for at in (span.start_time, span.end_time))


def test_an_answer_is_a_span_with_one_for_each_part_of_its_time(spans: Any) -> None:
    trace_turn(record=record())
    found = spans()
    whole = found.pop("chat support-en@1")
    assert {name: ms(span) for name, span in found.items()} == {
        "admission": (0, 5),
        "queue": (15, 25),
        "prefill": (25, 45),
        "decode": (45, 105),
        "persist": (105, 108),
    }
    assert ms(whole) == (0, 108)
    assert {span.parent.span_id for span in found.values()} == {whole.context.span_id}
    assert (whole.kind, whole.parent) == (SpanKind.INTERNAL, None)
    assert whole.resource.attributes["service.name"] == "inhouse"


def test_a_span_tells_figures_under_their_standard_names_and_no_word(spans: Any) -> None:
    trace_turn(record=record())
    assert dict(spans()["chat support-en@1"].attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "inhouse",
        "gen_ai.request.model": "support-en@1",
        "gen_ai.response.model": "support-en@1",
        "gen_ai.conversation.id": str(uuid.UUID(int=1)),
        "gen_ai.response.id": str(uuid.UUID(int=2)),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 30,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": 0.04,
        "assistant.route": "model",
        "assistant.transport": "ws",
        "assistant.status": "complete",
        "assistant.intent": "track_order",
        "assistant.confidence": 0.9,
    }


def test_another_server_is_a_client_span_without_our_engines_parts(spans: Any) -> None:
    trace_turn(record=record(route="upstream", model="gpt", queue_ms=None, prefill_ms=None))
    assert set(spans()) == {"chat gpt", "admission", "decode", "persist"}
    assert spans()["chat gpt"].kind is SpanKind.CLIENT


def test_a_failure_is_marked_and_has_no_parts_it_never_reached(spans: Any) -> None:
    trace_turn(record=record(status="failed", error_code="overloaded", model="", ttft_ms=None))
    assert set(spans()) == {"chat", "admission", "persist"}
    assert not spans()["chat"].status.is_ok
    assert spans()["chat"].attributes["error.type"] == "overloaded"


@pytest.mark.parametrize("header", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
def test_a_header_that_is_none_begins_a_trace_of_its_own(spans: Any, header: str) -> None:
    trace_turn(record=record(trace=header))
    assert spans()["chat support-en@1"].parent is None


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("content", [False, True])
def test_a_question_over_http_continues_its_callers_trace(
    spans: Any, ana: User, token_of: Callable[[User], str], settings: Any, content: bool
) -> None:
    settings.ASSISTANT_LOG_CONTENT = content
    turn_finished.connect(trace_turn)
    try:
        ask(ana, token_of(ana), "Where is order 48213377?", traceparent=HEADER)
    finally:
        turn_finished.disconnect(trace_turn)
    (whole,) = (span for name, span in spans().items() if name.startswith("chat"))
    assert f"{whole.context.trace_id:032x}" == TRACE
    assert f"{whole.parent.span_id:016x}" == PARENT
    assert {"admission", "decode", "persist"} <= set(spans())
    assert abs(whole.start_time / 1e9 - time.time()) < 30
    told = str(dict(whole.attributes))
    assert ("Where is order {{Order Number}}?" in told) is content
    assert "48213377" not in told


# --- A collector ---------------------------------------------------------------------------------


@pytest.fixture
def collector(settings: Any) -> Iterator[list[tuple[str, bytes]]]:
    """Path and body of each request, as a real collector's port gets them."""
    got: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        settings.OTEL_EXPORTER_OTLP_ENDPOINT = f"http://127.0.0.1:{server.server_port}/"
        yield got
        server.shutdown()
        thread.join()


def test_spans_arrive_at_a_collector_over_http(collector: list[tuple[str, bytes]]) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    trace_turn(record=record(trace=HEADER))
    tracing.tracing.end()
    ((path, body),) = collector
    assert path == "/v1/traces"
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    names = {span.name for scope in resource.scope_spans for span in scope.spans}
    assert names == {"chat support-en@1", "admission", "queue", "prefill", "decode", "persist"}


def test_a_collector_that_is_away_costs_an_answer_nothing_and_a_stop_little(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "LAST_SEND_S", 0.5)
    settings.OTEL_EXPORTER_OTLP_ENDPOINT = f"http://127.0.0.1:{free_port()}"
    trace_turn(record=record())  # builds the provider
    begun = time.perf_counter()
    for _ in range(1_000):  # three times what may wait
        trace_turn(record=record())
    told = time.perf_counter()
    assert (told - begun) / 1_000 < 0.01
    tracing.tracing.end()
    assert time.perf_counter() - told < tracing.LAST_SEND_S + 2


def test_nothing_is_traced_unless_settings_say_where_to(settings: Any) -> None:
    def listens() -> bool:
        return any(key[0] == "tracing-trace_turn" for key, *_ in turn_finished.receivers)

    tracing.connect()
    assert not listens()
    settings.OTEL_EXPORTER_OTLP_ENDPOINT = "http://127.0.0.1:4318"
    tracing.connect()
    try:
        assert listens()
    finally:
        turn_finished.disconnect(dispatch_uid="tracing-trace_turn")
        verdicts.disconnect()
