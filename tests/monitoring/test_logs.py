"""JSON logs: one line is one object, whatever was logged, and nobody's words unless asked for."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import pytest
from django.contrib.auth.models import User

from monitoring.logs import MOST_CHARS, json_formatter
from tests.conftest import serving
from tests.monitoring.conftest import ask
from tests.monitoring.test_metrics import say

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
    found = [record for record in caplog.records if record.getMessage() == event]
    return [json.loads(json_formatter().format(record)) for record in found]


@pytest.fixture
def asked(ana: User, token_of: Any, caplog: Any) -> Any:
    def answer(text: str) -> dict[str, Any]:
        caplog.set_level("INFO", logger="monitoring.logs")
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


def test_a_request_is_one_line_with_its_id(asked, caplog):
    asked("hello")
    (line,) = said(caplog, "request_finished")
    assert (line["request_id"], line["view"], line["http_status"]) == ("req-7", "messages", 200)


@pytest.mark.slow
def test_every_line_of_a_real_server_is_an_object(ana, token_of, database_file, tmp_path):
    with serving("uvicorn", database_file, tmp_path, ASSISTANT_LOG_FORMAT="json") as server:
        say(server, token_of(ana), "/echo error=1 canaryword\nand more")
    lines = [line for line in server.log.read_text().splitlines() if line]
    ours = lines[next(at for at, line in enumerate(lines) if line.startswith("{")) :]
    events = [json.loads(line)["event"] for line in ours]
    assert "generation_finished" in events and "request_finished" in events
    assert "canaryword" not in server.log.read_text()
