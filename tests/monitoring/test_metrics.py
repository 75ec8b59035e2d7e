"""``/metrics``: every name, counted right, in one process and in several, and nobody's business."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from assistant.engine.worker import EngineStats
from conversations import limits, turn
from conversations.limits import Caller
from conversations.models import Conversation
from conversations.turn import Turn, TurnRecord
from fallback import router, shared
from monitoring import metrics, reading
from monitoring.metrics import Distribution, count_turn
from monitoring.models import EvaluationRun
from monitoring.page import KEPT_S, MOST_FORMATS, Page, bury_the_dead, page
from tests.conftest import Server, serving
from tests.conversations.conftest import API, Api
from tests.monitoring.conftest import TOKEN, ask
from tests.services.conftest import needed

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.usefixtures("fresh_page")]

#: As dashboards and clients know them.
NAMES = (
    "assistant_requests_total",
    "assistant_request_duration_seconds",
    "assistant_time_to_first_token_seconds",
    "assistant_time_per_output_token_seconds",
    "assistant_queue_time_seconds",
    "assistant_prefill_time_seconds",
    "assistant_tokens_total",
    "assistant_requests_running",
    "assistant_requests_waiting",
    "assistant_batch_size",
    "assistant_kv_cache_usage_ratio",
    "assistant_fallbacks_total",
    "assistant_circuit_state",
    "assistant_cache_requests_total",
    "assistant_ratelimited_total",
    "assistant_feedback_total",
    "assistant_evaluation_score",
    "assistant_shadow_agreement_ratio",
    "assistant_drift_score",
    "assistant_model_info",
    "assistant_last_success_timestamp_seconds",
)
RECORD = TurnRecord(
    conversation_id=uuid.uuid4(),
    message_id=uuid.uuid4(),
    user_id=7,
    transport="ws",
    status="complete",
    route="model",
    reason="",
    model="tiny@1",
    intent="cancel_order",
    confidence=0.9,
    scope=0.9,
    input_tokens=12,
    output_tokens=21,
    ttft_ms=30.0,
    duration_ms=130.0,
    finish_reason="stop",
    error_code="",
    attempt=1,
    queue_ms=4.0,
    prefill_ms=20.0,
)


@pytest.fixture
def api(ana: User, token_of: Any) -> Api:
    return Api(token_of(ana))


@pytest.fixture
def asked(ana: User, token_of: Any) -> Callable[[str], Any]:
    return lambda text: ask(ana, token_of(ana), text)


def get(**headers: str) -> Any:
    return Client().get("/metrics", headers=headers)


# --- What is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_interface_is_on_the_page(name, settings):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    text = get(authorization=f"Bearer {TOKEN}").content.decode()
    assert f"# TYPE {name} " in text


def test_an_answer_is_counted_by_route_outcome_and_transport(asked, counted):
    assert asked("one two three").status_code == 200
    made = {"route": "model", "outcome": "ok", "transport": "rest"}
    assert counted("assistant_requests_total", **made) == 1
    assert counted("assistant_request_duration_seconds_count", route="model") == 1
    first = {"route": "model", "model": "echo"}
    assert counted("assistant_time_to_first_token_seconds_count", **first) == 1
    assert counted("assistant_tokens_total", model="echo", token_type="output") == 3
    assert counted("assistant_time_per_output_token_seconds_count", model="echo") == 1


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("complete", "ok"),
        ("failed", "error"),
        ("stopped", "cancelled"),
        ("interrupted", "cancelled"),
    ],
)
def test_each_ending_has_its_outcome(status, outcome, counted):
    count_turn(record=replace(RECORD, status=status))
    made = {"route": "model", "outcome": outcome, "transport": "ws"}
    assert counted("assistant_requests_total", **made) == 1


def test_times_of_a_turn_are_in_seconds(counted):
    count_turn(record=RECORD)
    for name, seconds, labels in [
        ("request_duration", 0.130, {"route": "model"}),
        ("time_to_first_token", 0.030, {"route": "model", "model": "tiny@1"}),
        ("time_per_output_token", 0.005, {"model": "tiny@1"}),
        ("queue_time", 0.004, {"model": "tiny@1"}),
        ("prefill_time", 0.020, {"model": "tiny@1"}),
    ]:
        found = counted(f"assistant_{name}_seconds_sum", **labels)
        assert found == pytest.approx(seconds), name


def test_an_answer_from_the_cache_counts_no_tokens_again(counted):
    count_turn(record=replace(RECORD, route="cache", queue_ms=None, prefill_ms=None))
    assert counted("assistant_tokens_total", model="tiny@1", token_type="output") == 0
    first = {"route": "cache", "model": "tiny@1"}
    assert counted("assistant_time_to_first_token_seconds_count", **first) == 1


def test_how_unsure_an_answer_was_written_is_seen_for_each_version(counted):
    for model, logprob in (("tiny@1", -0.5), ("tiny@1", -1.5), ("tiny@2", -0.25), ("tiny@2", None)):
        count_turn(record=replace(RECORD, model=model, logprob=logprob))
    for model, count, total in (("tiny@1", 2, 2.0), ("tiny@2", 1, 0.25)):
        assert counted("assistant_answer_nll_nats_count", model=model) == count
        assert counted("assistant_answer_nll_nats_sum", model=model) == pytest.approx(total)


@pytest.mark.parametrize("reason", metrics.FALLBACK_REASONS)
def test_who_answered_instead_is_a_fallback_with_its_reason(reason, counted):
    count_turn(record=replace(RECORD, route="rules", model="", reason=reason))
    moved = {"from_route": "model", "to_route": "rules", "reason": reason}
    assert counted("assistant_fallbacks_total", **moved) == 1
    assert counted("assistant_degraded_total", route="rules", reason=reason) == 1


def test_a_cautious_answer_is_degraded_and_no_fallback(counted):
    count_turn(record=replace(RECORD, reason="caution"))
    assert counted("assistant_degraded_total", route="model", reason="caution") == 1
    moved = {"from_route": "model", "to_route": "model", "reason": "caution"}
    assert counted("assistant_fallbacks_total", **moved) == 0


def test_a_refused_question_is_rejected_and_names_its_limit(asked, counted, settings):
    settings.ASSISTANT_RATE = "1/h"
    assert [asked("hello").status_code for _ in range(2)] == [200, 429]
    made = {"route": "none", "outcome": "rejected", "transport": "rest"}
    assert counted("assistant_requests_total", **made) == 1
    assert counted("assistant_ratelimited_total", scope="chat") == 1


def test_too_many_answers_at_once_are_a_limit_too(ana, counted, settings):
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 1
    caller = Caller(ana.pk)
    turn = Turn.open(caller, Conversation.objects.create(user=ana), "one", transport="sse")
    with pytest.raises(Exception, match="being written"):
        Turn.open(caller, Conversation.objects.create(user=ana), "two", transport="sse")
    turn.close()
    assert counted("assistant_ratelimited_total", scope="turns") == 1


def test_feedback_is_counted_when_it_is_given(api, asked, counted):
    answer = asked("hello").json()
    path = f"/api/v1/messages/{answer['id']}/feedback/"
    assert api("POST", path, {"value": "down", "text": "wrong"}).status_code == 200
    assert counted("assistant_feedback_total", value="down") == 1
    assert counted("assistant_feedback_total", value="up") == 0


def test_looks_for_a_kept_answer_are_hits_and_misses(counted):
    from fallback.router import looked_up

    for hit in (True, False, False):
        looked_up.send_robust(sender=None, kind="exact", hit=hit)
    assert counted("assistant_cache_requests_total", kind="exact", result="hit") == 1
    assert counted("assistant_cache_requests_total", kind="exact", result="miss") == 2


def test_the_breaker_shows_its_state(settings):
    from fallback import breaker

    breaker.reset()
    circuit = breaker.of("echo").circuit
    for _ in range(20):
        circuit.end(circuit.ask(), "bad", 1.0) if circuit.ask() else None
    reading.read()
    assert shown("assistant_circuit_state", target="echo") == 2
    assert shown("assistant_circuit_state", target="model") == 0
    breaker.reset()


def shown(name: str, **labels: str) -> float | None:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, labels)


# --- Nothing of a user ---------------------------------------------------------------------------


def test_the_page_holds_no_text_no_id_and_no_name(api, asked, settings):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    answer = asked("canaryword canary@example.com 48213377").json()
    path = f"/api/v1/messages/{answer['id']}/feedback/"
    api("POST", path, {"value": "up", "text": "canaryword"})
    api("GET", "/canaryword/")
    text = get(authorization=f"Bearer {TOKEN}").content.decode()
    for secret in ("canary", "48213377", answer["conversation"], answer["id"], "ana", TOKEN):
        assert not re.search(rf"(?<![\w]){re.escape(secret)}", text), secret


def test_series_do_not_grow_with_users(settings, token_of):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN

    def series_after(names: list[str]) -> int:
        for name in names:
            user = User.objects.create_user(name)
            ask(user, token_of(user), f"I am {name}")
        page.forget()
        text = get(authorization=f"Bearer {TOKEN}").content.decode()
        return sum(line.startswith("assistant_") for line in text.splitlines())

    series_after([])  # the page's own requests are a series
    few = series_after(["first"])
    assert series_after([f"user{at}" for at in range(10)]) - few <= 2


def test_names_of_models_are_bounded():
    label = metrics._Models()
    names = {label(f"model-{at}") for at in range(metrics.MOST_MODELS + 20)}
    assert len(names) == metrics.MOST_MODELS + 1 and metrics.OTHER in names
    assert label("") == metrics.NONE


def test_unknown_labels_become_other(counted):
    count_turn(record=replace(RECORD, route="moon", transport="pigeon"))
    made = {"route": "other", "outcome": "ok", "transport": "other"}
    assert counted("assistant_requests_total", **made) == 1


# --- The engine ----------------------------------------------------------------------------------


def test_the_same_value_many_times_is_the_same_histogram():
    one, many = CollectorRegistry(), CollectorRegistry()
    single = Histogram("h", "h", buckets=(1, 2, 4), registry=one)
    at_once = Distribution("h", "h", buckets=(1, 2, 4), registry=many)
    for value, times in ((1, 3), (3, 5), (9, 2)):
        for _ in range(times):
            single.observe(value)
        at_once.observe_many(value, times)
    assert generate_latest(one) == generate_latest(many)


def test_what_the_engine_counted_is_added_once_and_survives_its_crash(counted):
    first = EngineStats(steps=10, generated_tokens=30, busy_s=1.0, batches=(0, 4, 6))
    second = replace(first, steps=15, generated_tokens=50, busy_s=1.5, batches=(0, 9, 6))
    after_crash = EngineStats(steps=2, generated_tokens=3, busy_s=0.1, batches=(0, 2, 0))
    reading._add("engine@1", first, None)
    reading._add("engine@1", second, first)
    reading._add("engine@1", second, second)
    reading._add("engine@1", after_crash, second)
    assert counted("assistant_engine_steps_total", model="engine@1") == 17
    assert counted("assistant_engine_busy_seconds_total", model="engine@1") == pytest.approx(1.6)
    assert counted("assistant_engine_tokens_total", model="engine@1", kind="written") == 53
    assert counted("assistant_batch_size_count", model="engine@1") == 17
    assert counted("assistant_batch_size_sum", model="engine@1") == 9 + 2 * 6 + 2


def test_a_source_that_breaks_is_counted_and_the_rest_is_shown(monkeypatch, counted):
    def broken() -> list[reading.Reading]:
        raise RuntimeError("no table")

    def fine() -> list[reading.Reading]:
        return [reading.Reading(metrics.DRIFT, {"feature": "intent"}, 0.5)]

    monkeypatch.setattr(reading, "SOURCES", {"broken": broken, "fine": fine})
    reading.read()
    assert counted("assistant_metrics_errors_total", source="broken") == 1
    assert shown("assistant_drift_score", feature="intent") == 0.5


def test_what_a_source_tells_no_more_has_no_value(monkeypatch, counted):
    told = {"new@2": 0.9, "new@3": 0.8}

    def candidates() -> list[reading.Reading]:
        return [
            reading.Reading(metrics.SHADOW, {"model": model}, value)
            for model, value in told.items()
        ]

    def other() -> list[reading.Reading]:
        return [reading.Reading(metrics.SHADOW, {"model": "old@1"}, 0.7)]

    monkeypatch.setattr(reading, "SOURCES", {"shadow": candidates, "other": other})
    reading.read()
    assert shown("assistant_shadow_agreement_ratio", model="new@2") == 0.9
    del told["new@2"]
    reading.read()
    assert math.isnan(shown("assistant_shadow_agreement_ratio", model="new@2"))
    assert shown("assistant_shadow_agreement_ratio", model="new@3") == 0.8
    assert shown("assistant_shadow_agreement_ratio", model="old@1") == 0.7


def test_an_error_in_the_counting_reaches_no_user(api, asked, monkeypatch):
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk full")

    for metric in (metrics.REQUESTS, metrics.FEEDBACK, metrics.HTTP_REQUESTS, metrics.CACHE):
        monkeypatch.setattr(metric, "labels", broken)
    answer = asked("hello")
    assert answer.status_code == 200 and answer.json()["text"]
    path = f"/api/v1/messages/{answer.json()['id']}/feedback/"
    assert api("POST", path, {"value": "up"}).status_code == 200


@pytest.mark.parametrize("text", ["hello", "/echo fail=overloaded cancel my order"])
def test_every_observer_may_break_at_once_and_no_answer_is_another(asked, monkeypatch, text):
    """Fault F37: metrics, drift's rollups, shadow, logs, traces."""
    told = ("text", "status", "route", "degraded_reason")
    before = {name: asked(text).json()[name] for name in told}
    calls: list[str] = []

    def breaking(key: Any) -> Any:
        def broken(**_: Any) -> None:
            calls.append(str(key))
            raise RuntimeError("a bug")

        return key, broken, False

    for sent in (turn.turn_finished, turn.turn_refused, router.looked_up, limits.refused):
        monkeypatch.setattr(sent, "receivers", [breaking(key) for key, *_ in sent.receivers])
    answer = asked(text)
    assert answer.status_code == 200
    assert {name: answer.json()[name] for name in told} == before
    assert len(set(calls)) >= 5, "all of them were told"


def test_a_cache_that_fails_is_seen_at_the_next_scrape(settings, counted):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN

    def full(_: Any) -> None:
        raise OSError("OOM command not allowed")

    for _ in range(3):
        with pytest.raises(shared.Away):
            shared.ask(full)
    assert counted("assistant_cache_errors_total") == 1, "left alone for a while after the first"
    page = get(authorization=f"Bearer {TOKEN}").content.decode()
    assert re.search(r"^assistant_cache_errors_total [1-9]", page, re.MULTILINE)


# --- Who may look --------------------------------------------------------------------------------


def test_strangers_find_nothing_there_where_no_token_is_set(ana):
    assert get().status_code == 404
    client = Client()
    client.force_login(ana)
    assert client.get("/metrics").status_code == 404


def test_a_token_opens_it_and_a_wrong_one_is_a_401(settings):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    assert get(authorization=f"Bearer {TOKEN}").status_code == 200
    for wrong in ("", f"Bearer {TOKEN}x", "Bearer ", f"Basic {TOKEN}", "Bearer \u00e9"):
        reply = get(authorization=wrong)
        assert reply.status_code == 401 and reply["WWW-Authenticate"].startswith("Bearer")
        assert b"assistant_" not in reply.content


def test_staff_may_look_signed_in(sam):
    client = Client()
    client.force_login(sam)
    assert client.get("/metrics").status_code == 200


@pytest.mark.parametrize(
    ("peer", "headers", "proxies", "status"),
    [
        ("10.1.2.3", {}, 0, 200),
        ("11.1.2.3", {}, 0, 404),
        ("", {}, 0, 404),
        ("fd00::7", {}, 0, 200),
        # Passed on by a proxy nobody vouches for: its own address says nothing.
        ("10.1.2.3", {"x-forwarded-for": "10.9.9.9"}, 0, 404),
        ("10.1.2.3", {"x-real-ip": "8.8.8.8"}, 0, 404),
        ("10.1.2.3", {"forwarded": "for=8.8.8.8"}, 0, 404),
        # One of ours says who asks; what the client wrote before is not believed.
        ("10.1.2.3", {"x-forwarded-for": "8.8.8.8"}, 1, 404),
        ("8.8.8.8", {"x-forwarded-for": "10.9.9.9, 8.8.8.8"}, 1, 404),
        ("127.0.0.1", {"x-forwarded-for": "8.8.8.8, 10.9.9.9"}, 1, 200),
    ],
)
def test_an_internal_network_may_look(peer, headers, proxies, status, settings):
    import ipaddress

    settings.ASSISTANT_INTERNAL_NETWORKS = [
        ipaddress.ip_network("10.0.0.0/8"),
        ipaddress.ip_network("fd00::/8"),
    ]
    settings.ASSISTANT_TRUSTED_PROXIES = proxies
    reply = Client().get("/metrics", headers=headers, REMOTE_ADDR=peer)
    assert reply.status_code == status


def test_networks_in_the_environment_are_checked(monkeypatch):
    from django.core.exceptions import ImproperlyConfigured

    from config import settings as module

    monkeypatch.setenv("NETWORKS", "127.0.0.0/8, ::1")
    assert [str(found) for found in module.env_networks("NETWORKS", "")] == ["127.0.0.0/8", "::/64"]
    for wrong in ("all", "10.0.0.1/8", "2001:db8::5"):
        monkeypatch.setenv("NETWORKS", wrong)
        with pytest.raises(ImproperlyConfigured, match="NETWORKS"):
            module.env_networks("NETWORKS", "")
    module.ENVIRONMENT.pop("NETWORKS")


# --- The page ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4"),
        ("text/html,*/*", "text/plain; version=0.0.4"),
        (
            "application/openmetrics-text; version=1.0.0",
            "application/openmetrics-text; version=1.0",
        ),
        ("application/openmetrics-text;version=no;q=1", "text/plain; version=0.0.4"),
    ],
)
def test_the_format_is_the_one_the_client_asks_for(accept, kind, settings):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    reply = get(authorization=f"Bearer {TOKEN}", accept=accept)
    assert reply["Content-Type"].startswith(kind)
    assert reply.content.endswith(b"# EOF\n") == ("openmetrics" in kind)


def test_a_page_is_written_once_a_second_however_many_ask(monkeypatch):
    reads, now = [], [100.0]
    monkeypatch.setattr(reading, "read", lambda: reads.append(1))
    sheet = Page(lambda: now[0])
    for _ in range(10):
        sheet.render("")
    assert len(reads) == 1
    now[0] += KEPT_S
    sheet.render("")
    assert len(reads) == 2
    for at in range(20):  # formats that clients make up do not pile up
        sheet.render(f"application/openmetrics-text; version=1.{at}.0")
    assert len(sheet._pages) <= MOST_FORMATS


def test_promtool_finds_nothing_to_say(api, asked, settings):
    settings.ASSISTANT_METRICS_TOKEN = TOKEN
    asked("hello")
    count_turn(record=replace(RECORD, reason="caution"))
    text = get(authorization=f"Bearer {TOKEN}").content
    promtool = needed("promtool", "prometheus")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# --- Several processes ---------------------------------------------------------------------------


def say(server: Server, token: str, text: str) -> None:
    def call(path: str, body: Any) -> Any:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(server.http + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)

    opened = call(API, {})
    call(f"{API}{opened['id']}/messages/", {"text": text})


def series_text(server: Server) -> str:
    request = urllib.request.Request(
        f"{server.http}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        return str(reply.read().decode())


def series_of(server: Server) -> dict[tuple[Any, ...], float]:
    families = list(text_string_to_metric_families(series_text(server)))
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


OK = ("assistant_requests_total", ("outcome", "ok"), ("route", "model"), ("transport", "rest"))


@pytest.mark.slow
def test_two_processes_add_up_and_a_killed_one_takes_only_its_gauges(
    ana, token_of, database_file, tmp_path
):
    folder = tmp_path / "metrics"
    shared = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "ASSISTANT_METRICS_TOKEN": TOKEN}
    token = token_of(ana)
    places = [tmp_path / name for name in ("one", "two")]
    for place in places:
        place.mkdir()
    with serving("uvicorn", database_file, places[0], **shared) as one:
        with serving("uvicorn", database_file, places[1], **shared) as two:
            say(one, token, "to the first")
            say(two, token, "to the second")
            say(two, token, "to the second again")
            score = {"suite": "golden", "metric": "coverage", "model": "gone@1"}
            shown_as = ("assistant_evaluation_score", *sorted(score.items()))
            run = EvaluationRun.objects.create(
                model="gone@1", trigger="command", rows=1, seconds=1, figures={"coverage": 0.5}
            )
            assert series_of(one)[shown_as] == 0.5
            run.delete()
            assert shown_as not in series_of(two), "told by another process, which was asked before"
            time.sleep(reading.EVERY_S + KEPT_S)
            at_one, at_two = series_of(one), series_of(two)
            assert at_one[OK] == at_two[OK] == 3
            assert at_one["assistant_circuit_state", ("target", "echo")] == 0
            assert not any("pid" in dict(key[1:]) for key in at_one)
            assert list(folder.glob(f"gauge_livemax_{two.process.pid}.db"))
            os.kill(two.process.pid, signal.SIGKILL)
            two.process.wait(10)
        time.sleep(KEPT_S)
        assert series_of(one)[OK] == 3  # a total never falls
        assert not list(folder.glob(f"gauge_live*_{two.process.pid}.db"))


def test_a_file_its_process_died_over_is_taken_away(tmp_path: Path):
    child = subprocess.Popen(["true"])
    child.wait()
    empty, live = tmp_path / f"counter_{child.pid}.db", tmp_path / f"counter_{os.getpid()}.db"
    full, other = tmp_path / f"histogram_{child.pid}.db", tmp_path / "notes.db"
    for path, content in ((empty, b""), (live, b""), (full, b"x"), (other, b"")):
        path.write_bytes(content)
    bury_the_dead(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([live, full, other])


@pytest.mark.load
def test_ten_scrapers_a_second_take_little_of_a_core(database_file, tmp_path, django_db_setup):
    """Processor time instead of users' waits: the scrapers run on the same cores here."""
    seconds, took = 10, []
    with serving("uvicorn", database_file, tmp_path, ASSISTANT_METRICS_TOKEN=TOKEN) as server:
        series_of(server)
        began = cpu_s(server.process.pid)
        for _ in range(seconds):
            second = time.perf_counter()
            with ThreadPoolExecutor(10) as scrapers:
                took += scrapers.map(lambda _: _timed(lambda: series_text(server)), range(10))
            time.sleep(max(0.0, 1 - (time.perf_counter() - second)))
        share = (cpu_s(server.process.pid) - began) / seconds
    assert share < 0.05, f"{share:.1%} of a core"
    assert sorted(took)[98] < 0.2, f"{sorted(took)[98] * 1000:.0f} ms"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
