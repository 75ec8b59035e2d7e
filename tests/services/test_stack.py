"""The product on a real Redis and PostgreSQL, and what is left of it when Redis goes away."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from websockets.sync.client import connect

from tests.conftest import ROOT, free_port, serving
from tests.services.conftest import (
    SIGN_IN,
    Redis,
    Stack,
    manage,
    prepare,
    stacked,
    wait_until,
)

TURN_S = 3.0


class Client:
    """A program with a token: one conversation, asked over each transport."""

    def __init__(self, http: str, token: str) -> None:
        self._http = httpx2.Client(
            base_url=http, headers={"Authorization": f"Bearer {token}"}, timeout=20
        )
        self._ws = http.replace("http", "ws", 1)
        self._token = token
        made = self._http.post("/api/v1/conversations/", json={})
        assert made.status_code == 201, made.text
        self.id = made.json()["id"]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()

    @property
    def path(self) -> str:
        return f"/api/v1/conversations/{self.id}/messages/"

    def get(self, path: str) -> httpx2.Response:
        return self._http.get(path)

    def rest(self, text: str) -> httpx2.Response:
        return self._http.post(self.path, json={"text": text})

    def sse(self, text: str) -> list[dict[str, Any]]:
        headers = {"Accept": "text/event-stream"}
        with self._http.stream("POST", self.path, json={"text": text}, headers=headers) as reply:
            assert reply.status_code == 200
            lines = [line.removeprefix("data: ") for line in reply.iter_lines() if "data: " in line]
        return [json.loads(line) for line in lines]

    def ws(self, text: str) -> list[dict[str, Any]]:
        headers = {"Authorization": f"Bearer {self._token}"}
        url = f"{self._ws}/ws/chat/{self.id}/"
        with connect(url, additional_headers=headers, open_timeout=20) as socket:
            socket.send(json.dumps({"type": "message.create", "text": text}))
            frames = [json.loads(socket.recv(20))]
            while frames[-1]["type"] in ("message.created", "message.delta"):
                frames.append(json.loads(socket.recv(20)))
        return frames


# -- both there ----------------------------------------------------------------------------------


def test_a_turn_is_answered_over_rest_sse_and_websocket(stack: Stack) -> None:
    with Client(stack.server.http, stack.token) as client:
        reply = client.rest("one two")
        assert reply.status_code == 200
        assert reply.json()["text"] == "one two" and reply.json()["status"] == "complete"
        for events, text in ((client.sse("three four"), "three four"), (client.ws("five"), "five")):
            created, *deltas, completed = events
            assert created["type"] == "message.created"
            assert "".join(delta["text"] for delta in deltas) == text
            assert completed["type"] == "message.completed"
            assert completed["message"]["text"] == text
        listed = client.get(client.path).json()["results"]
    assert {message["text"] for message in listed} == {"one two", "three four", "five"}


def test_conversations_lie_in_postgresql(stack: Stack) -> None:
    with Client(stack.server.http, stack.token) as client:
        assert client.rest("kept in a real database").status_code == 200
    with psycopg.connect(stack.database_url) as database:
        rows = database.execute(
            "SELECT role, text FROM conversations_message WHERE conversation_id = %s ORDER BY seq",
            [client.id],
        ).fetchall()
    text = "kept in a real database"
    assert rows == [("user", text), ("assistant", text)]


def test_words_are_found_by_postgresqls_full_text_and_its_index(stack: Stack) -> None:
    with Client(stack.server.http, stack.token) as client:
        assert client.rest("two Parcels were delivered").status_code == 200

        def found(words: str) -> int:
            query = f"/api/v1/messages/?conversation={client.id}&search={words}"
            return len(client.get(query).json()["results"])

        assert [found(w) for w in ("parcel deliver", '"two parcels"', "refund", "-two")] == [
            *(2, 2, 0, 0)
        ]
        odd = ("%27%29%3B--", "%22", "%3A%2A%26%7C!()", "%5C", "the")
        assert [found(words) for words in odd] == [0] * len(odd)
    with psycopg.connect(stack.database_url) as database:
        database.execute("SET enable_seqscan = off")
        plan = database.execute(
            "EXPLAIN SELECT 1 FROM conversations_message AS m WHERE to_tsvector('english', m.text)"
            " @@ websearch_to_tsquery('english', 'parcel')"
        ).fetchall()
    assert any("message_fulltext" in line for (line,) in plan)


def test_redis_holds_json_and_never_pickle(stack: Stack, shared_redis: Redis) -> None:
    with Client(stack.server.http, stack.token) as client:
        assert client.rest("counted").status_code == 200
    with shared_redis.client() as redis:
        kept = {key: redis.get(key) for key in redis.scan_iter() if redis.type(key) == b"string"}
    assert kept, "the limiter counts in Redis"
    for key, value in kept.items():
        json.loads(value)  # a pickle is not JSON
        assert b"counted" not in value, f"{key!r} holds what a user wrote"


@pytest.mark.slow
def test_two_processes_count_a_callers_questions_together(
    redis: Redis, postgres: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    rate = {"ASSISTANT_RATE": "3/h"}
    with (
        stacked(tmp_path / "one", redis, postgres, **rate) as one,
        stacked(tmp_path / "two", redis, postgres, **rate) as two,
        Client(one.server.http, one.token) as first,
        Client(two.server.http, two.token) as second,
    ):
        codes = [client.rest("hi").status_code for client in (first, second, first, second, first)]
    assert codes == [200, 200, 200, 429, 429]


def test_the_doctor_sees_both(shared_redis: Redis, postgres: str, tmp_path: Path) -> None:
    variables = {"ASSISTANT_DATA_DIR": str(tmp_path), "DATABASE_URL": postgres}
    prepare(**variables)
    found = manage("manage.py", "doctor", "--no-color", REDIS_URL=shared_redis.url, **variables)
    for line in (r"ok      database           PostgreSQL", "ok      cache              Redis, "):
        assert line in found.stdout, found.stdout + found.stderr
    assert "ok      migrations" in found.stdout


@pytest.mark.slow
def test_the_doctor_says_what_to_do_when_both_are_gone(tmp_path: Path) -> None:
    nowhere = free_port()
    found = manage(
        "manage.py", "doctor", "--no-color",
        ASSISTANT_DATA_DIR=str(tmp_path),
        REDIS_URL=f"redis://127.0.0.1:{nowhere}/0",
        DATABASE_URL=f"postgres://postgres@127.0.0.1:{nowhere}/none",
    )  # fmt: skip
    assert found.returncode == 1, found.stdout
    assert "Traceback" not in found.stderr
    broken = [line.split()[1] for line in found.stdout.splitlines() if line.startswith("broken")]
    assert {"database", "migrations", "cache"} <= set(broken)
    assert "Is Redis running at REDIS_URL?" in found.stdout
    assert "Is the server running?" in found.stdout


# -- Redis goes away -----------------------------------------------------------------------------


def timed(client: Client, text: str) -> tuple[int, float]:
    began = time.monotonic()
    return client.rest(text).status_code, time.monotonic() - began


@pytest.mark.chaos
@pytest.mark.parametrize("end", [Redis.kill, Redis.hang])
def test_the_chat_goes_on_without_redis(
    end: Any, redis: Redis, postgres: str, tmp_path: Path
) -> None:
    with (
        stacked(tmp_path, redis, postgres, ASSISTANT_RATE="400/h") as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        assert client.rest("before").status_code == 200
        end(redis)
        turns = [timed(client, f"turn {at}") for at in range(12)]
        assert [status for status, _ in turns] == [200] * 12
        assert max(seconds for _, seconds in turns) < TURN_S
        assert client.sse("over a stream")[-1]["type"] == "message.completed"
        assert client.ws("over a socket")[-1]["type"] == "message.completed"
        for path in ("/livez", "/accounts/login/", client.path):
            assert client.get(path).status_code == 200
        redis.kill()
        again = Redis.start(redis.folder, redis.port)
        try:
            assert client.rest("after").status_code == 200
        finally:
            again.kill()
    assert "Traceback" not in stack.server.log.read_text()


#: Faults F5, F6 and F7: which share of turns may take how much longer than with Redis, in seconds.
LONGER = [(Redis.kill, 0.95, 0.05), (Redis.hang, 0.99, 0.25), (Redis.fill, 0.95, 0.05)]
LAG_S, BACK_WITHIN_S = 0.05, 5.0
METRICS_TOKEN = "a token for the page of metrics"


@pytest.mark.chaos
@pytest.mark.parametrize(("end", "share", "longer_s"), LONGER)
def test_without_redis_turns_take_hardly_longer_and_none_is_lost(
    end: Any, share: float, longer_s: float, redis: Redis, postgres: str, tmp_path: Path
) -> None:
    settings = {"ASSISTANT_RATE": "4000/h", "ASSISTANT_METRICS_TOKEN": METRICS_TOKEN}
    with (
        stacked(tmp_path, redis, postgres, **settings) as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        for at in range(10):  # threads, connections and templates come with the first turns
            assert client.rest(f"warm {at}").status_code == 200
        before = [timed(client, f"before {at}") for at in range(100)]
        assert _cache_errors(stack) == 0
        end(redis)
        with _pinged(stack, client) as lags:
            after = [timed(client, f"after {at}") for at in range(200)]
        assert {status for status, _ in (*before, *after)} == {200}
        added = _quantile(after, share) - _quantile(before, share)
        lag = sorted(lags)[int(len(lags) * 0.99)]
        assert _cache_errors(stack) >= 1, "seen at the first scrape"
        assert _signs_in(stack), "logins still work"
        _comes_back(redis, client)
    with psycopg.connect(stack.database_url) as database:
        query = "SELECT count(*) FROM conversations_message WHERE conversation_id = %s"
        (kept,) = database.execute(query + " AND status = 'complete'", [client.id]).fetchone()  # type: ignore[misc]
    assert kept >= 2 * (len(before) + len(after)), "questions and answers"
    assert (added <= longer_s, lag <= LAG_S) == (True, True), (added, lag, len(lags))


#: Fault F6 at its full length, and how often somebody asks meanwhile.
HANGS_S, EVERY_S = 60.0, 0.1


@pytest.mark.slow
@pytest.mark.chaos
def test_a_redis_that_hangs_for_a_minute_costs_nobody_more_than_its_patience(
    redis: Redis, postgres: str, tmp_path: Path
) -> None:
    settings = {"ASSISTANT_RATE": "10000/h"}
    with (
        stacked(tmp_path, redis, postgres, **settings) as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        _asked_for(3.0, client)  # threads, connections and templates come with the first turns
        before = _asked_for(10.0, client)
        redis.hang()
        with _pinged(stack, client) as lags:
            after = _asked_for(HANGS_S / 2, client)
            assert _signs_in(stack), "logins still work"
            after += _asked_for(HANGS_S / 2, client)
        redis.process.send_signal(signal.SIGCONT)
        with redis.client() as there:
            there.flushall()
        _counts_again(redis, client)
    added = _quantile(after, 0.99) - _quantile(before, 0.99)
    lag = sorted(lags)[int(len(lags) * 0.99)]
    print(f"{len(after)} turns, p99 longer by {added * 1000:.0f} ms, lag p99 {lag * 1000:.0f} ms")
    assert {status for status, _ in (*before, *after)} == {200}
    assert (added <= 0.25, lag <= LAG_S) == (True, True), (added, lag, len(after), len(lags))


def _asked_for(seconds: float, client: Client) -> list[tuple[int, float]]:
    """Turns at a steady rate, each timed."""
    turns, until = [], time.monotonic() + seconds
    while (began := time.monotonic()) < until:
        turns.append(timed(client, f"turn {len(turns)}"))
        time.sleep(max(0.0, began + EVERY_S - time.monotonic()))
    return turns


def _quantile(turns: list[tuple[int, float]], share: float) -> float:
    return sorted(seconds for _, seconds in turns)[int(len(turns) * share)]


@contextlib.contextmanager
def _pinged(stack: Stack, client: Client) -> Iterator[list[float]]:
    """How long the server's loop takes to answer a WebSocket's ping, every 20 ms."""
    lags: list[float] = []
    over = threading.Event()
    headers = {"Authorization": f"Bearer {stack.token}"}
    url = f"{stack.server.ws}/ws/chat/{client.id}/"

    def ping(socket: Any) -> None:
        while not over.wait(0.02):
            began = time.monotonic()
            assert socket.ping().wait(20)
            lags.append(time.monotonic() - began)

    with connect(url, additional_headers=headers) as socket, ThreadPoolExecutor(1) as pool:
        pinging = pool.submit(ping, socket)
        try:
            yield lags
        finally:
            over.set()
        pinging.result(20)


def _cache_errors(stack: Stack) -> float:
    headers = {"Authorization": f"Bearer {METRICS_TOKEN}"}
    page = httpx2.get(f"{stack.server.http}/metrics", headers=headers, timeout=20).text
    found = re.search(r"^assistant_cache_errors_total (\S+)", page, re.MULTILINE)
    return float(found[1]) if found else -1


def _signs_in(stack: Stack) -> bool:
    """Whether a browser that says name and password is sent on, with a session."""
    with httpx2.Client(base_url=stack.server.http, timeout=20) as browser:
        browser.get("/accounts/login/")
        said = {"csrfmiddlewaretoken": browser.cookies["csrftoken"], **SIGN_IN}
        reply = browser.post("/accounts/login/", data=said, headers={"Referer": stack.server.http})
        return reply.status_code == 302 and "sessionid" in browser.cookies


def _comes_back(redis: Redis, client: Client) -> None:
    """Within seconds of its return, requests are counted in Redis again."""
    with contextlib.suppress(ProcessLookupError):
        redis.kill()
    again = Redis.start(redis.folder, redis.port)
    try:
        _counts_again(again, client)
    finally:
        again.kill()


def _counts_again(redis: Redis, client: Client) -> None:
    """Within seconds there is something in that empty Redis."""
    began = time.monotonic()
    with redis.client() as there:
        while not there.dbsize():
            assert client.rest("and now?").status_code == 200
            assert time.monotonic() - began < BACK_WITHIN_S
            time.sleep(0.05)


@pytest.mark.chaos
def test_the_limit_still_holds_without_redis(redis: Redis, postgres: str, tmp_path: Path) -> None:
    with (
        stacked(tmp_path, redis, postgres, ASSISTANT_RATE="8/h") as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        redis.kill()
        codes = [client.rest("hi").status_code for _ in range(4)]
    assert codes == [200, 200, 429, 429], "a quarter of the limit, in each process"


@pytest.mark.chaos
def test_a_turn_is_answered_again_after_postgresql_dropped_every_connection(
    stack: Stack,
) -> None:
    with Client(stack.server.http, stack.token) as client:
        assert client.rest("before").status_code == 200
        with psycopg.connect(stack.database_url, autocommit=True) as database:
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        codes = [client.rest("after").status_code for _ in range(12)]
    assert codes == [200] * 12


# -- development and background work -------------------------------------------------------------


def test_runserver_is_daphne_and_answers(tmp_path: Path) -> None:
    variables = {"ASSISTANT_DATA_DIR": str(tmp_path), "ASSISTANT_BACKEND": "echo"}
    token, port, log = prepare(**variables), free_port(), tmp_path / "runserver.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "manage.py", "runserver", "--noreload", f"127.0.0.1:{port}"],
            cwd=ROOT, env={**os.environ, **variables}, stdout=output, stderr=output,
        )  # fmt: skip
    http = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _alive(http), process, log)
        with Client(http, token) as client:
            assert client.rest("one two").json()["text"] == "one two"
            assert client.ws("three")[-1]["message"]["text"] == "three"
            style = client.get("/static/conversations/chat.css")
            assert style.status_code == 200
    finally:
        process.terminate()
        process.wait(20)
    assert "Daphne" in log.read_text()


def _alive(http: str) -> bool:
    try:
        return httpx2.get(f"{http}/livez", timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


@pytest.mark.parametrize(
    ("variables", "broker"),
    [
        ({}, "filesystem://"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "redis://127.0.0.1:1/0"),
        (
            {"REDIS_URL": "redis://127.0.0.1:1/0", "CELERY_BROKER_URL": "redis://127.0.0.1:2/0"},
            "redis://127.0.0.1:2/0",
        ),
    ],
)
def test_background_work_queues_where_it_is_told(
    variables: dict[str, str], broker: str, tmp_path: Path
) -> None:
    show = "from config import settings as s; print(s.CELERY_BROKER_URL)"
    found = manage("-c", show, ASSISTANT_DATA_DIR=str(tmp_path), **variables)
    assert found.stdout.strip() == broker, found.stderr


@pytest.mark.slow
def test_a_worker_takes_its_tasks_from_redis(redis: Redis, postgres: str, tmp_path: Path) -> None:
    variables = {
        "ASSISTANT_DATA_DIR": str(tmp_path),
        "REDIS_URL": redis.url,
        "DATABASE_URL": postgres,
        "ASSISTANT_LOG_FORMAT": "json",
    }
    prepare(**variables)
    send = "from config.celery import app; app.send_task('conversations.tasks.reap_stale_turns')"
    sent = manage("-c", send, **variables)
    assert sent.returncode == 0, sent.stderr
    log = tmp_path / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "--quiet", "-A", "config", "worker", "-P", "solo"],
            cwd=ROOT, env={**os.environ, **variables}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_until(lambda: "task_succeeded" in log.read_text(), process, log)
    finally:
        process.terminate()
        process.wait(30)
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    began, ended = (line for line in lines if line["event"] in {"task_started", "task_succeeded"})
    assert began["task"] == "conversations.tasks.reap_stale_turns"
    assert began["task_id"] == ended["task_id"] and ended["duration_ms"] >= 0
    assert not [line for line in log.read_text().splitlines() if line.startswith("[")]


def test_daphne_and_uvicorn_serve_the_same_database(stack: Stack, tmp_path: Path) -> None:
    with (
        serving("daphne", tmp_path / "unused", tmp_path, DATABASE_URL=stack.database_url) as other,
        Client(stack.server.http, stack.token) as client,
    ):
        assert client.rest("told to uvicorn").status_code == 200
        headers = {"Authorization": f"Bearer {stack.token}"}
        listed = httpx2.get(f"{other.http}{client.path}", headers=headers, timeout=20).json()
    assert {message["text"] for message in listed["results"]} == {"told to uvicorn"}


def test_who_waits_for_an_answer_holds_no_connection(
    shared_redis: Redis, postgres: str, tmp_path: Path
) -> None:
    """Three times as many at once as the pool has connections, each for a second."""
    limits = {
        "ASSISTANT_RATE": "1000/m",
        "ASSISTANT_MAX_TURNS_PER_CALLER": "100",
        "ASSISTANT_REQUESTS_AT_ONCE": "30",
    }
    with (
        stacked(tmp_path, shared_redis, postgres, **limits) as stack,
        ThreadPoolExecutor(30) as pool,
        contextlib.ExitStack() as clients,
    ):
        asked = [clients.enter_context(Client(stack.server.http, stack.token)) for _ in range(30)]
        began = time.monotonic()
        said = "/echo delay=0.05 words=20 word"
        replies = list(pool.map(lambda client: client.rest(said), asked))
        took = time.monotonic() - began
    assert [reply.status_code for reply in replies] == [200] * 30
    assert {reply.json()["status"] for reply in replies} == {"complete"}
    assert took < 15
