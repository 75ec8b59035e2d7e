"""Verdicts as OpenTelemetry events: of readers and of evaluations, and of no word of theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.test import Client

from conversations.models import Conversation, Feedback, Message
from monitoring import verdicts
from monitoring.models import EvaluationRun
from tests.conftest import free_port
from tests.monitoring.test_tracing import collector  # noqa: F401

pytest.importorskip("opentelemetry.sdk._logs", reason="the extra observability is missing")
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter


@pytest.fixture
def told() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The attributes of each event."""
    kept = InMemoryLogRecordExporter()
    verdicts.verdicts.send_to(kept)
    verdicts.connect()
    yield lambda: [_checked(found.log_record) for found in kept.get_finished_logs()]
    verdicts.disconnect()
    verdicts.verdicts.end()


def _checked(record: Any) -> dict[str, Any]:
    assert record.event_name == "gen_ai.evaluation.result" and record.body is None
    return dict(record.attributes)


@pytest.fixture
def answer(ana: Any) -> Message:
    talk = Conversation.objects.create(user=ana)
    return Message.objects.create(conversation=talk, seq=2, role="assistant", text="An answer.")


@pytest.mark.django_db
def test_a_thumb_is_an_event_and_so_is_its_change(told: Any, answer: Message, ana: Any) -> None:
    client = Client()
    client.force_login(ana)
    for given in (
        {"value": "down", "reason": "wrong", "text": "my order 48213377!"},
        {"value": "up"},
    ):
        reply = client.post(
            f"/api/v1/messages/{answer.pk}/feedback/", given, content_type="application/json"
        )
        assert reply.status_code in {200, 201}, reply.content
    down, up = told()
    assert down == {
        "gen_ai.evaluation.name": "feedback",
        "gen_ai.evaluation.score.value": 0.0,
        "gen_ai.evaluation.score.label": "down",
        "gen_ai.response.id": str(answer.pk),
        "assistant.feedback.reason": "wrong",
    }
    assert (up["gen_ai.evaluation.score.value"], up["gen_ai.evaluation.score.label"]) == (1.0, "up")
    assert "48213377" not in str(told())


@pytest.mark.django_db
def test_an_evaluation_is_an_event_for_each_figure(told: Any) -> None:
    figures = {"intent_accuracy": 0.98, "coverage": 1, "ece": None, "groups": {}, "rows": 295}
    run = EvaluationRun.objects.create(
        suite="golden", model="m@1", trigger="schedule", rows=295, seconds=1.0, figures=figures
    )
    run.save()
    assert [(e["gen_ai.evaluation.name"], e["gen_ai.evaluation.score.value"]) for e in told()] == [
        ("golden.intent_accuracy", 0.98),
        ("golden.coverage", 1.0),
    ]
    assert {event["gen_ai.request.model"] for event in told()} == {"m@1"}


@pytest.mark.django_db
def test_a_collector_that_breaks_harms_no_thumb(
    told: Any, answer: Message, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verdicts.verdicts, "provider", lambda: 1 / 0)
    assert Feedback.objects.create(message=answer, value="up").pk
    assert "was not sent: ZeroDivisionError" in caplog.text


@pytest.mark.django_db
def test_events_arrive_at_a_collector_over_http(
    collector: list[tuple[str, bytes]],  # noqa: F811
    answer: Message,
) -> None:
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

    verdicts.tell_feedback(instance=Feedback(message=answer, value="down"))
    verdicts.verdicts.end()
    ((path, body),) = collector
    assert path == "/v1/logs"
    (found,) = ExportLogsServiceRequest.FromString(body).resource_logs
    (event,) = found.scope_logs[0].log_records
    assert event.event_name == verdicts.EVENT


@pytest.mark.django_db
def test_a_collector_that_is_away_keeps_no_thumb_waiting(answer: Message, settings: Any) -> None:
    settings.OTEL_EXPORTER_OTLP_ENDPOINT = f"http://127.0.0.1:{free_port()}"
    for _ in range(100):
        verdicts.tell_feedback(instance=Feedback(message=answer, value="down"))
    verdicts.verdicts.end()
