"""JSON logs: one line is one object, whatever was logged, and nobody's words unless asked for."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import sys
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import Any

import httpx2
import pytest
import structlog
from django.contrib.auth.models import User

from monitoring.logs import MOST_CHARS, json_formatter, log_turn, plain_formatter
from monitoring.request_log import Streamed
from tests.conftest import Server, serving
from tests.conversations.conftest import API
from tests.monitoring.conftest import ask
from tests.monitoring.test_metrics import RECORD, say

pytestmark = pytest.mark.django_db(transaction=True)


def formatted(message: str, *args: object, **more: Any) -> dict[str, Any]:
    made = logging.getLogger("product.part").makeRecord(
        "product.part", logging.WARNING, "file.py", 1, message, args, more.pop("exc_info", None),
        extra=more,
    )  # fmt: skip
    line = json_formatter().format(made)
    assert "\n" not in line and "\r" not in line and line.isascii()
    found: dict[str, Any] = json.loads(line)
    return found


@pytest.mark.parametrize(
    "text",
    ["two\nlines", 'a "quoted" {brace}', "\u2028\u2029\x85\x00\x1b[31m", "half \ud800", "%s %d"],
)
def test_one_line_is_one_object_whatever_was_logged(text):
    line = formatted("%s", text, route=text)
    assert (line["event"], line["route"]) == (text, text)
    assert (line["level"], line["logger"]) == ("warning", "product.part")
    assert line["timestamp"].endswith("Z")


def test_a_trace_is_in_its_line_without_values_of_variables():
    secret = "canaryvalue"
    try:
        int(secret * 0 + "x")
    except ValueError:
        line = formatted("broke", exc_info=sys.exc_info())
    assert "ValueError" in line["exception"] and secret not in json.dumps(line)


def test_long_texts_are_cut_and_unknown_keys_are_left_out():
    line = formatted("x" * (MOST_CHARS * 3), password="secret", model="m@1")
    assert len(line["event"]) == MOST_CHARS + 3
    assert "password" not in line and line["model"] == "m@1"


def said(caplog: Any, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(json_formatter().format(record)) for record in caplog.records]
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def asked(ana: User, token_of: Any, caplog: Any) -> Any:
    def answer(text: str) -> dict[str, Any]:
        caplog.set_level("INFO", logger="monitoring.logs")
        caplog.set_level("INFO", logger="django_structlog")
        reply = ask(ana, token_of(ana), text, **{"x-request-id": "req-7"})
        return dict(json.loads(reply.content))

    return answer


def test_an_answer_is_one_line_of_figures_and_no_words(asked, caplog, ana):
    answer = asked("canaryword me@example.com")
    (line,) = said(caplog, "generation_finished")
    assert line["message_id"] == answer["id"] and line["user_id"] == ana.pk
    assert line["request_id"] == "req-7"
    assert (line["route"], line["model"], line["output_tokens"]) == ("model", "echo", 2)
    assert line["ttft_ms"] <= line["duration_ms"]
    assert "canary" not in caplog.text and "canary" not in json.dumps(line)


def test_words_are_logged_if_settings_say_so_without_personal_values(asked, caplog, settings):
    settings.ASSISTANT_LOG_CONTENT = True
    asked("please write to me@example.com")
    (line,) = said(caplog, "generation_finished")
    assert line["question"].startswith("please write to") and "me@example.com" not in str(line)
    assert line["answer"]


def test_an_answer_has_a_line_when_it_begins(asked, caplog, ana):
    answer = asked("canaryword")
    (line,) = said(caplog, "generation_started")
    assert (line["request_id"], line["user_id"]) == ("req-7", ana.pk)
    assert (line["message_id"], line["transport"], line["attempt"]) == (answer["id"], "rest", 1)


@pytest.mark.parametrize(("reason", "lines"), [("overload", 1), ("caution", 0), ("", 0)])
def test_an_answer_that_another_had_to_give_has_a_line_of_its_own(caplog, reason, lines):
    caplog.set_level("INFO", logger="monitoring.logs")
    log_turn(record=dataclasses.replace(RECORD, route="rules", reason=reason))
    told = said(caplog, "fallback")
    assert [(line["route"], line["reason"]) for line in told] == [("rules", "overload")] * lines
    assert len(said(caplog, "generation_finished")) == 1


# -- requests ------------------------------------------------------------------------------------


def test_a_request_is_two_lines_with_its_id_and_no_words(asked, caplog, ana):
    asked("canaryword")
    (began,), (line,) = said(caplog, "request_started"), said(caplog, "request_finished")
    assert (line["request_id"], line["view"], line["http_status"]) == ("req-7", "messages", 200)
    assert began["request_id"] == "req-7" and began["request"] == line["request"]
    assert line["user_id"] == ana.pk and line["duration_ms"] > 0
    assert "canary" not in str([began, line])


def test_neither_a_query_nor_a_browser_is_logged(client, caplog):
    caplog.set_level("INFO", logger="django_structlog")
    client.get("/livez?search=canaryword", HTTP_USER_AGENT="canaryword/1")
    (line,) = said(caplog, "request_finished")
    assert line["request"] == "GET /livez" and "canary" not in caplog.text


@pytest.mark.parametrize("formatter", [json_formatter, plain_formatter])
def test_what_django_says_of_a_request_holds_no_query(client, caplog, formatter):
    client.get("/nowhere?search=canaryword")
    lines = [formatter().format(record) for record in caplog.records]
    assert any("Not Found: /nowhere" in line for line in lines) and "canary" not in str(lines)


def test_a_request_that_breaks_has_a_line_with_the_trace(client, caplog, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("monitoring.health.checker.look", broken)
    caplog.set_level("INFO", logger="django_structlog")
    client.raise_request_exception = False
    assert client.get("/readyz", HTTP_X_REQUEST_ID="req-8").status_code == 500
    (line,) = said(caplog, "request_failed")
    assert (line["request_id"], line["view"], line["http_status"]) == ("req-8", "readyz", 500)
    assert line["level"] == "error" and "ZeroDivisionError" in line["exception"]
    assert not said(caplog, "request_finished")


def test_a_line_costs_a_signed_in_user_no_query(client, ana, caplog, django_assert_num_queries):
    caplog.set_level("INFO", logger="django_structlog")
    client.force_login(ana)
    with django_assert_num_queries(0):
        client.get("/livez")
    assert len(said(caplog, "request_finished")) == 1


def test_what_is_wrong_with_a_line_does_not_reach_the_user(client, caplog, monkeypatch):
    monkeypatch.setattr("monitoring.request_log.view_of", lambda request: 1 / 0)
    assert client.get("/livez").status_code == 200
    assert "line was not written: ZeroDivisionError" in caplog.text
    assert not structlog.contextvars.get_contextvars(), "the next request's lines are not its"


async def parts(count: int, end: BaseException | None = None) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"part"
    if end is not None:
        raise end


ENDINGS = {
    "streaming_finished": None,
    "streaming_failed": ValueError(),
    "streaming_cancelled": asyncio.CancelledError(),
}


@pytest.mark.parametrize("event", ENDINGS)
async def test_a_streamed_reply_has_a_line_for_its_begin_and_one_for_its_end(caplog, event):
    caplog.set_level("INFO", logger="django_structlog")
    end = ENDINGS[event]
    reply = Streamed(parts(2, end), {"request_id": "req-9"})
    with pytest.raises(type(end)) if end else nullcontext():
        assert [part async for part in reply] == [b"part", b"part"]
    reply.close()  # as Django does
    assert [line["event"] for line in lines_of(caplog)] == ["streaming_started", event]
    assert all(line["request_id"] == "req-9" for line in lines_of(caplog))


async def test_a_client_that_hangs_up_between_two_parts_ends_its_stream(caplog):
    caplog.set_level("INFO", logger="django_structlog")
    reply = Streamed(parts(2), {})
    await anext(reply)
    reply.close()
    assert [line["event"] for line in lines_of(caplog)][1:] == ["streaming_cancelled"]


def lines_of(caplog: Any) -> list[dict[str, Any]]:
    return [
        json.loads(json_formatter().format(record))
        for record in caplog.records
        if record.name.startswith("django_structlog")
    ]


def test_people_see_the_figures_behind_the_words():
    made = logging.getLogger("product.part").makeRecord(
        "product.part", logging.WARNING, "file.py", 1, "circuit_opened", (), None,
        extra={"backend": "model", "password": "secret"},
    )  # fmt: skip
    line = plain_formatter().format(made)
    assert "[warning] circuit_opened [product.part] backend=model" in line
    assert "secret" not in line


def streamed(server: Server, token: str, text: str) -> None:
    headers = {"Authorization": f"Bearer {token}"}
    with httpx2.Client(base_url=server.http, headers=headers, timeout=30) as client:
        opened = client.post(API, json={}).json()
        accept = {"Accept": "text/event-stream"}
        sent = client.post(f"{API}{opened['id']}/messages/", json={"text": text}, headers=accept)
        assert "message.completed" in sent.text


@pytest.mark.slow
def test_every_line_of_a_real_server_is_an_object(ana, token_of, database_file, tmp_path):
    with serving("uvicorn", database_file, tmp_path, ASSISTANT_LOG_FORMAT="json") as server:
        token = token_of(ana)
        say(server, token, "/echo error=1 canaryword\nand more")
        streamed(server, token, "canaryword")
    lines = [line for line in server.log.read_text().splitlines() if line]
    ours = lines[next(at for at, line in enumerate(lines) if line.startswith("{")) :]
    events = [json.loads(line)["event"] for line in ours]
    expected = {"request_started", "request_finished", "generation_started", "generation_finished"}
    assert expected | {"streaming_started", "streaming_finished"} <= set(events)
    assert "canaryword" not in server.log.read_text()
