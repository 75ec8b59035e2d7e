"""A page of metrics as numbers, and a real Prometheus that watches a loaded server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpResponse
from django.test import AsyncClient
from prometheus_client import REGISTRY

from conversations.models import Conversation
from conversations.turn import turn_finished
from tests.conftest import ROOT, Server, free_port, serving
from tests.services.conftest import needed, prepare, wait_until

TOKEN = "a token that opens the metrics"


class Counted:
    """What a series has grown by since the test began."""

    def __init__(self) -> None:
        self._began = {(s.name, *sorted(s.labels.items())): s.value for s in _samples()}

    def __call__(self, name: str, **labels: str) -> float:
        now = REGISTRY.get_sample_value(name, labels)
        return (now or 0.0) - self._began.get((name, *sorted(labels.items())), 0.0)


def _samples() -> list:
    return [sample for family in REGISTRY.collect() for sample in family.samples]


def ask(user: User, token: str, text: str, **headers: str) -> HttpResponse:
    """The reply to a question of that user in a new conversation.

    Asked from a loop that goes on, as a server's does: observers hear of a turn after its reader.
    """
    conversation = Conversation.objects.create(user=user)
    return asyncio.run(_asked(conversation, token, text, headers))


async def _asked(
    conversation: Conversation, token: str, text: str, headers: dict[str, str]
) -> HttpResponse:
    heard = asyncio.Event()
    loop = asyncio.get_running_loop()

    def last(**_: Any) -> None:
        loop.call_soon_threadsafe(heard.set)

    turn_finished.connect(last)  # behind all observers of the product
    try:
        reply = await AsyncClient().post(
            f"/api/v1/conversations/{conversation.pk}/messages/",
            {"text": text},
            content_type="application/json",
            headers={"authorization": f"Bearer {token}", **headers},
        )
        if reply.status_code == 200:
            await asyncio.wait_for(heard.wait(), 10)
    finally:
        turn_finished.disconnect(last)
    return reply


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def fresh_page() -> Iterator[None]:
    from monitoring.page import page

    page.forget()
    yield
    page.forget()


# --- A server under load, watched by a real Prometheus -------------------------------------------


@dataclass
class Watch:
    """Prometheus, scraping one loaded server every second."""

    http: str
    server: Server

    def ask(self, path: str, **query: str) -> Any:
        address = f"{self.http}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(address, timeout=10) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[Any]:
        found: list[Any] = self.ask("query", query=expression)["result"]
        return found


class Load(threading.Thread):
    """Three users who ask one question after the other until they are told to stop."""

    QUESTIONS = (
        "how do I cancel my order?",
        "where is my refund",
        "I forgot my password",
        "how do I cancel my order?",
        "qwertz asdf what is the colour of the moon",
    )

    def __init__(self, server: Server, token: str) -> None:
        super().__init__(daemon=True)
        self._server, self._token = server, token
        self.done = threading.Event()
        self.answers: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while not self.done.is_set():
                self._chat()
        except Exception as error:
            self.error = error

    def _chat(self) -> None:
        opened = self._call("/api/v1/conversations/", {})
        for question in self.QUESTIONS:
            answer = self._call(f"/api/v1/conversations/{opened['id']}/messages/",
                                {"text": question})  # fmt: skip
            self.answers.append(answer)
            self.done.wait(0.05)
        value = "up" if len(self.answers) % 2 else "down"
        self._call(f"/api/v1/messages/{answer['id']}/feedback/", {"value": value})

    def _call(self, path: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(
            self._server.http + path, json.dumps(body).encode(), headers
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)


@pytest.fixture(scope="session")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    """The bundled model, asked all the time, with our own Prometheus configuration."""
    program = needed("prometheus", "prometheus")
    folder = tmp_path_factory.mktemp("watched")
    variables = {
        "SECRET_KEY": "one key for every process of a test, long enough to be one",
        "DATABASE_URL": f"sqlite:///{folder / 'db.sqlite3'}",
        "ASSISTANT_DATA_DIR": str(folder),
        "ASSISTANT_METRICS_TOKEN": TOKEN,
        "ASSISTANT_BACKEND": "model",
        "ASSISTANT_MAX_NEW_TOKENS": "60",
        "ASSISTANT_THREADS": "1",
    }
    token = prepare(**variables)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving("uvicorn", folder / "db.sqlite3", folder, **variables))
        port = stack.enter_context(_prometheus(program, folder, server))
        load = Load(server, token)
        load.start()
        stack.callback(lambda: (load.done.set(), load.join(30)))
        watch = Watch(f"http://127.0.0.1:{port}", server)
        _until_there_is_something(watch, load)
        yield watch
        assert load.error is None, f"{load.error!r}\n{server.log.read_text()[-3000:]}"


@contextlib.contextmanager
def _prometheus(program: str, folder: Path, server: Server) -> Iterator[int]:
    for name in ("prometheus.yml", "rules.yml"):
        text = (ROOT / "monitoring" / "prometheus" / name).read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        text = re.sub(r"(scrape_interval|scrape_timeout|evaluation_interval|  interval): \d+s",
                      r"\1: 1s", text)  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "metrics-token").write_text(TOKEN)
    port, log = free_port(), folder / "prometheus.log"
    command = [program, f"--config.file={folder / 'prometheus.yml'}"]
    command += [
        f"--storage.tsdb.path={folder / 'series'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/-/ready"), process, log)
        yield port
    finally:
        process.terminate()
        process.wait(20)


def _answers(address: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=2) as reply:
        return bool(reply.status == 200)
    return False


def _until_there_is_something(watch: Watch, load: Load) -> None:
    """Ten scrapes, the last ones of a server that has answered for a while."""
    deadline = time.monotonic() + 90
    while len(load.answers) < 25 or _scrapes(watch) < 10:
        assert load.error is None, f"{load.error!r}\n{watch.server.log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, (len(load.answers), watch.ask("targets"))
        time.sleep(0.2)


def _scrapes(watch: Watch) -> float:
    found = watch.query('sum_over_time(up{job="assistant"}[1h])')
    return float(found[0]["value"][1]) if found else 0
