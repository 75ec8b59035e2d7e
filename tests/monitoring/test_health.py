"""Ready, degraded or unavailable: what a balancer is told, and what only insiders are."""

from __future__ import annotations

import asyncio
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.dispatch import Signal
from django.test import Client

from assistant import backends
from assistant.engine.worker import EngineConfig, EngineStats
from fallback import answers
from monitoring import health
from monitoring.draining import Drain, drain
from monitoring.health import Checker
from tests.conftest import serving
from tests.monitoring.conftest import TOKEN

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, settings: Any) -> Iterator[None]:
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    monkeypatch.setattr("monitoring.views.checker", Checker())
    monkeypatch.setattr(health, "KEPT_S", 0.0)
    yield


def ask(path: str = "/readyz", *, insider: bool = True) -> tuple[int, dict[str, Any]]:
    reply = Client().get(path, headers={"Authorization": f"Bearer {TOKEN}"} if insider else {})
    return reply.status_code, reply.json()


def settled(status: int = 200) -> dict[str, Any]:
    """What is told once the model is loaded, or was found not to load."""
    deadline = time.monotonic() + 20
    while True:
        found, told = ask()
        if found == status and "being loaded" not in str(told):
            return told
        assert time.monotonic() < deadline, told
        time.sleep(0.02)


class Engine:
    """An engine as far as health looks at one."""

    def __init__(self, folder: Any) -> None:
        self.config = EngineConfig(folder, max_queue=8)
        self.now = EngineStats(state="running")

    def stats(self) -> EngineStats:
        return self.now


# --- Alive, ready --------------------------------------------------------------------------------


def test_alive_says_ok_and_asks_nothing(django_assert_num_queries):
    with django_assert_num_queries(0):
        reply = Client().get("/livez")
    assert (reply.status_code, reply.content) == (200, b"ok")


def test_whoever_is_ready_has_rules_that_have_learned(monkeypatch):
    answers.forget()
    settled()
    monkeypatch.setattr(answers, "_load", lambda: pytest.fail("read at the first question"))
    assert answers.known().policy is None


def test_rules_that_cannot_be_read_yet_keep_nobody_away(monkeypatch, caplog):
    def away() -> None:
        raise OperationalError("away")

    monkeypatch.setattr(answers, "known", away)
    settled()
    assert "have not learned yet: OperationalError" in caplog.text


@pytest.mark.parametrize("path", ["/readyz", "/healthz", "/health"])
def test_ready_under_each_of_its_names(path):
    settled()
    assert ask(path) == (200, {"status": "ready"})
    assert Client().head(path).status_code == 200
    assert "no-store" in Client().get(path)["Cache-Control"]


def test_while_the_model_is_loaded_nobody_is_sent_here_and_asking_starts_it(monkeypatch):
    echo = backends.get("echo")
    monkeypatch.setattr(type(echo), "check", lambda self: time.sleep(0.3))
    began = time.monotonic()
    status, told = ask()
    assert (status, told["problems"]) == (503, {"model": "The model is being loaded."})
    assert time.monotonic() - began < 0.25  # nobody waits for it
    assert settled() == {"status": "ready"}


def test_a_crashed_engine_is_started_again_and_not_ready_meanwhile(monkeypatch, tmp_path):
    settled()
    echo, engine = backends.get("echo"), Engine(tmp_path)
    monkeypatch.setattr(type(echo), "loaded", lambda self: engine)
    engine.now = replace(engine.now, state="crashed")
    monkeypatch.setattr(
        type(echo), "check", lambda self: setattr(engine, "now", EngineStats(state="running"))
    )
    assert ask()[0] == 503
    assert settled() == {"status": "ready"}


def test_a_model_that_a_question_has_loaded_is_ready_at_the_first_look(monkeypatch, tmp_path):
    engine = Engine(tmp_path)
    monkeypatch.setattr(type(backends.get("echo")), "loaded", lambda self: engine)
    assert ask() == (200, {"status": "ready"})


# --- Degraded ------------------------------------------------------------------------------------


def test_without_its_model_it_is_ready_and_says_that_rules_answer(settings, tmp_path):
    model = settings.ASSISTANT["BACKENDS"]["model"]
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BACKENDS": {"model": {**model, "OPTIONS": {"model_dir": str(tmp_path / "gone")}}},
        "ROUTE": ["model", "rules"],
    }
    told = settled()
    assert told["status"] == "degraded"
    assert "gone" in told["problems"]["model"]
    assert told["problems"]["model"].endswith("Rules answer meanwhile.")
    assert ask(insider=False) == (200, {"status": "degraded"})


def test_a_model_that_does_not_load_is_not_tried_for_every_probe(monkeypatch):
    from assistant.errors import ModelUnavailable

    tries: list[int] = []

    def broken(self: Any) -> None:
        tries.append(1)
        raise ModelUnavailable("A file is altered.")

    monkeypatch.setattr(type(backends.get("echo")), "check", broken)
    now = [0.0]
    checker = Checker(lambda: now[0])
    monkeypatch.setattr("monitoring.views.checker", checker)
    settled()
    for _ in range(5):
        now[0] += 1
        ask()
    assert len(tries) == 1
    now[0] += health.RETRY_S
    settled()
    deadline = time.monotonic() + 5
    while len(tries) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(tries) == 2


# --- Unavailable ---------------------------------------------------------------------------------


def test_without_a_database_it_is_unavailable(monkeypatch):
    settled()

    def away(*_: Any) -> None:
        raise OperationalError("secret connection string")

    monkeypatch.setattr(type(connection._connections[connection._alias]), "cursor", away)
    status, told = ask()
    assert status == 503
    assert told["problems"] == {"database": "The database does not answer (OperationalError)."}
    assert ask(insider=False) == (503, {"status": "unavailable"})


def test_with_a_full_queue_it_is_unavailable(monkeypatch, tmp_path):
    settled()
    engine = Engine(tmp_path)
    monkeypatch.setattr(type(backends.get("echo")), "loaded", lambda self: engine)
    engine.now = replace(engine.now, waiting=7)
    assert ask()[0] == 200
    engine.now = replace(engine.now, waiting=8)
    status, told = ask()
    assert status == 503 and "8 questions wait" in told["problems"]["queue"]


def test_while_draining_it_is_unavailable(monkeypatch):
    settled()
    monkeypatch.setattr(drain, "begun", True)
    reply = Client().get("/readyz")
    assert (reply.status_code, reply["Retry-After"]) == (503, "1")
    assert reply.json() == {"status": "unavailable"}
    assert "about to stop" in ask()[1]["problems"]["draining"]


def test_reasons_are_for_insiders(monkeypatch, sam, ana):
    settled()
    monkeypatch.setattr(drain, "begun", True)
    for user, sees in ((ana, False), (sam, True)):
        client = Client()
        client.force_login(user)
        assert ("problems" in client.get("/readyz").json()) is sees


def test_many_probes_cost_one_query(monkeypatch, django_assert_num_queries):
    settled()
    monkeypatch.setattr(health, "KEPT_S", 60.0)
    ask()
    with django_assert_num_queries(0):
        for _ in range(20):
            assert ask()[0] == 200


async def test_several_first_requests_at_once_leave_one_handler_that_ends_the_server(
    monkeypatch, settings
):
    settings.ASSISTANT_DRAIN_SECONDS = 0.0
    monkeypatch.setattr("monitoring.draining.request_started", Signal())
    ended: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: ended.append(number))
    try:
        armed = Drain()
        await asyncio.gather(armed.arm(), armed.arm())
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert armed.begun and ended == [signal.SIGTERM]


# --- A real server -------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_says_so_before_it_closes(database_file, tmp_path):
    def status() -> int:
        try:
            with urllib.request.urlopen(f"{server.http}/readyz", timeout=5) as reply:
                return reply.status
        except urllib.error.HTTPError as refused:
            return refused.code

    with serving("uvicorn", database_file, tmp_path, ASSISTANT_DRAIN_SECONDS="1.5") as server:
        deadline = time.monotonic() + 20
        while status() != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        assert status() == 503  # still served, and nobody new is sent here
        assert server.process.wait(10) is not None
        assert "drain_started" in server.log.read_text()
