"""Jobs as rows: claimed once, watched, revived after a kill, cancelled, never written over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connections
from django.db.migrations.recorder import MigrationRecorder
from django.utils import timezone

from config.celery import app
from monitoring import jobs, tasks
from monitoring.models import EvaluationRun, Job
from tests.conftest import ROOT

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE_S = 20.0
KIND = Job.Kind.EVALUATE


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Jobs of which a worker was told; there is none."""
    told: list[int] = []
    monkeypatch.setattr(tasks.run_job, "apply_async", lambda args, **_: told.append(args[0]))
    monkeypatch.setattr(jobs, "BEAT_S", 0.02)
    return told


@pytest.fixture
def handle(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has evaluations done by that function."""

    def by(function: Any) -> None:
        globals()["_handler"] = function
        monkeypatch.setitem(jobs.HANDLERS, KIND, f"{__name__}._handler")

    return by


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- Opening -------------------------------------------------------------------------------------


def test_equal_work_opens_one_job_and_tells_a_worker_once(sam: User, called: list[int]) -> None:
    first = jobs.open_job(KIND, "k", why="because", params={"a": 1}, by=sam)
    again = jobs.open_job(KIND, "k", why="otherwise")
    assert again.pk == first.pk and again.why == "because" and called == [first.pk]
    assert (first.state, first.asked_by, first.params) == ("queued", sam, {"a": 1})


def test_a_proposed_job_waits_for_a_yes_which_is_written_down(sam: User, called: list[int]) -> None:
    job = jobs.open_job(KIND, "k", proposed=True)
    assert called == [] and jobs.waiting() is None and not jobs.run(job.pk)
    jobs.approve(job, sam)
    job.refresh_from_db()
    assert (job.state, job.approved_by, called) == ("queued", sam, [job.pk])
    with pytest.raises(jobs.JobError, match="not waiting for approval"):
        jobs.approve(job, sam)


def test_a_second_open_retraining_is_refused_in_words() -> None:
    jobs.open_job(Job.Kind.RETRAIN, "one")
    with pytest.raises(jobs.JobError, match="Another retraining is open"):
        jobs.open_job(Job.Kind.RETRAIN, "two")


def test_without_a_broker_a_job_waits_as_a_row(
    monkeypatch: pytest.MonkeyPatch, handle: Any
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(tasks.run_job, "apply_async", away)
    handle(lambda work: {"done": True})
    job = jobs.open_job(KIND, "k")
    assert Job.objects.get(pk=job.pk).state == "queued"
    tasks.revive()  # the timetable's next look finds it
    until(lambda: Job.objects.get(pk=job.pk).state == "done")
    until(lambda: jobs.background._thread is None)


# --- Running -------------------------------------------------------------------------------------


def test_a_job_is_done_with_its_result_stages_and_log(handle: Any) -> None:
    stages = []

    def work_off(work: jobs.Work) -> dict[str, Any]:
        work.stage("ask", 0.5)
        stored = Job.objects.get(pk=work.job.pk)
        stages.append((stored.state, stored.stage, stored.progress, stored.attempt))
        work.say("  half of it\n")
        return {"right": 7}

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    assert jobs.run(job.pk)
    job.refresh_from_db()
    assert stages == [("running", "ask", 0.5, 1)]
    assert (job.state, job.result, job.progress, job.error) == ("done", {"right": 7}, 1.0, "")
    assert [line[9:] for line in job.log.splitlines()] == ["ask (50%)", "half of it"]
    assert job.started_at <= job.heartbeat_at <= timezone.now() and job.finished_at
    assert not jobs.run(job.pk)  # it is over


def test_of_many_who_want_a_job_one_gets_it(handle: Any) -> None:
    began: list[int] = []
    handle(lambda work: began.append(work.job.attempt) or {})
    job = jobs.open_job(KIND, "k")
    ran: list[bool] = []
    together = threading.Barrier(4)

    def want() -> None:
        together.wait()
        ran.append(jobs.run(job.pk))
        connections.close_all()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(ran) == [False, False, False, True] and began == [1]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jobs.JobError("No model there. Build one."), "No model there. Build one."),
        (ValueError("what ana wrote"), "It broke off: ValueError in test_jobs.py:"),
    ],
)
def test_a_failure_is_told_without_what_was_in_it(handle: Any, error: Any, said: str) -> None:
    def work_off(work: jobs.Work) -> dict[str, Any]:
        raise error

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    jobs.run(job.pk)
    job.refresh_from_db()
    assert job.state == "failed" and job.error.startswith(said)
    assert "ana wrote" not in job.error + job.log


def test_the_log_keeps_its_newest_lines_only(handle: Any) -> None:
    def work_off(work: jobs.Work) -> dict[str, Any]:
        for at in range(3_000):
            work.say(f"line {at} " + "x" * 700)
        return {}

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    jobs.run(job.pk)
    job.refresh_from_db()
    assert len(job.log) <= jobs.MOST_LOG_CHARS
    assert "line 2999 " in job.log and "line 2000 " not in job.log


def test_a_handler_that_works_long_shows_signs_of_life(handle: Any) -> None:
    seen = set()

    def work_off(work: jobs.Work) -> dict[str, Any]:
        work.progress(0.25)
        until(lambda: seen.add(Job.objects.get(pk=work.job.pk).heartbeat_at) or len(seen) > 3)
        assert Job.objects.get(pk=work.job.pk).progress == 0.25
        return {}

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    jobs.run(job.pk)
    job.refresh_from_db()
    assert job.state == "done", job.error


# --- Ending otherwise ----------------------------------------------------------------------------


def test_a_cancelled_job_stops_what_it_started_and_stays_cancelled(handle: Any) -> None:
    stopped = threading.Event()

    def work_off(work: jobs.Work) -> dict[str, Any]:
        with work.stopped_by(stopped.set):
            jobs.cancel(work.job)
            assert stopped.wait(PATIENCE_S)
        return {"never": "kept"}

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    jobs.run(job.pk)
    job.refresh_from_db()
    assert (job.state, job.result) == ("cancelled", {})
    with pytest.raises(jobs.JobError, match="over already"):
        jobs.cancel(job)


def test_a_run_that_was_given_up_cannot_write_over_the_next(handle: Any) -> None:
    lost = []

    def work_off(work: jobs.Work) -> dict[str, Any]:
        if work.job.attempt == 1:
            jobs.revive(timezone.now() + timedelta(seconds=60))
            assert jobs.run(work.job.pk)
            for write in (lambda: work.stage("late", 0.9), lambda: work.note(late=True)):
                try:
                    write()
                except jobs.Lost:
                    lost.append(True)
            return {"by": 1}
        return {"by": work.job.attempt}

    handle(work_off)
    job = jobs.open_job(KIND, "k")
    jobs.run(job.pk)
    job.refresh_from_db()
    assert lost == [True, True]
    assert (job.state, job.result, job.attempt) == ("done", {"by": 2}, 2)
    assert job.stage != "late" and "late" not in job.params


def test_stale_jobs_are_queued_again_and_after_three_starts_failed() -> None:
    now = timezone.now()
    old = now - timedelta(seconds=jobs.STALE_S + 1)
    told = {"kind": KIND, "state": "running", "stage": "ask"}
    once = Job.objects.create(key="once", attempt=1, heartbeat_at=old, **told)
    thrice = Job.objects.create(key="thrice", attempt=3, heartbeat_at=old, **told)
    alive = Job.objects.create(key="alive", attempt=3, heartbeat_at=now, **told)
    assert jobs.revive(now) == 2
    states = [Job.objects.get(pk=job.pk).state for job in (once, thrice, alive)]
    assert states == ["queued", "failed", "running"]
    assert "ended 3 times" in Job.objects.get(pk=thrice.pk).error
    jobs.again(Job.objects.get(pk=thrice.pk))
    Job.objects.filter(pk=thrice.pk).update(state="running", attempt=4, heartbeat_at=old)
    assert jobs.revive(now) == 1  # the starts of before do not count
    assert Job.objects.get(pk=thrice.pk).state == "queued"


def test_only_what_failed_or_was_cancelled_runs_again(handle: Any) -> None:
    handle(lambda work: {})
    job = jobs.open_job(KIND, "k")
    with pytest.raises(jobs.JobError, match="Only a job that failed"):
        jobs.again(job)
    jobs.cancel(job)
    jobs.again(job)
    assert jobs.run(job.pk) and Job.objects.get(pk=job.pk).state == "done"


WORKER = """
import os, signal, sys, time
import django
django.setup()
from monitoring import jobs
jobs.BEAT_S, jobs.STOP_S = 0.05, 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background ignores it
def handler(work):
    work.stage("held", 0.5)
    time.sleep(60)
sys.modules["stand_in"] = type(sys)("stand_in")
sys.modules["stand_in"].handler = handler
jobs.HANDLERS["evaluate"] = "stand_in.handler"
jobs.run(int(sys.argv[1]))
"""


@pytest.fixture
def worker(database_file: Path, tmp_path: Path) -> Iterator[Callable[[int], Any]]:
    """Another process that does that job, until it is told otherwise."""
    started = []

    def begun(pk: int) -> Any:
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "SECRET_KEY": django_settings.SECRET_KEY,
            "DATABASE_URL": f"sqlite:///{database_file}",
            "ASSISTANT_DATA_DIR": str(tmp_path),
        }
        process = subprocess.Popen([sys.executable, "-c", WORKER, str(pk)], cwd=ROOT,
                                   env=environment)  # fmt: skip
        started.append(process)
        until(lambda: Job.objects.get(pk=pk).stage == "held")
        return process

    yield begun
    for process in started:
        process.kill()
        process.wait()


def test_a_killed_worker_is_noticed_and_its_job_done_by_another(worker: Any, handle: Any) -> None:
    job = jobs.open_job(KIND, "k")
    process = worker(job.pk)
    assert jobs.revive() == 0  # it lives
    process.kill()
    process.wait()
    assert jobs.revive(timezone.now() + timedelta(seconds=jobs.STALE_S + 1)) == 1
    handle(lambda work: {"by": "another"})
    assert jobs.run(job.pk)
    job.refresh_from_db()
    assert (job.state, job.attempt, job.result) == ("done", 2, {"by": "another"})


@pytest.mark.slow
def test_a_worker_that_is_told_to_end_gives_its_job_back(worker: Any) -> None:
    job = jobs.open_job(KIND, "k")
    process = worker(job.pk)
    process.send_signal(signal.SIGINT)
    # The handler sleeps and does not notice; the row is free at once all the same.
    until(lambda: Job.objects.get(pk=job.pk).state == "queued")


# --- By command, by timetable, for /metrics ------------------------------------------------------


def test_the_queue_is_worked_off_by_command_the_oldest_first(handle: Any) -> None:
    order = []
    handle(lambda work: order.append(work.job.key) or work.stage("ask", 0.5) or {})
    for key in ("first", "second"):
        jobs.open_job(KIND, key)
    out = StringIO()
    call_command("run_jobs", "--once", stdout=out)
    assert order == ["first", "second"]
    assert "ask (50%)" in out.getvalue() and out.getvalue().endswith("2 jobs done.\n")
    out = StringIO()
    call_command("run_jobs", "--once", stdout=out)
    assert out.getvalue() == "No job waits.\n"


def test_jobs_are_listed_with_state_and_reason() -> None:
    out = StringIO()
    call_command("jobs", stdout=out)
    assert out.getvalue() == "There are no jobs.\n"
    job = jobs.open_job(KIND, "k", why="nightly")
    Job.objects.create(kind=KIND, key="old", state="failed", error="No model.", log="12:00:00 no")
    out = StringIO()
    call_command("jobs", stdout=out)
    assert f"{job.pk}  evaluate  queued" in out.getvalue() and "nightly" in out.getvalue()
    assert "No model." in out.getvalue()
    out = StringIO()
    call_command("jobs", "--open", stdout=out)
    assert "No model." not in out.getvalue()
    with pytest.raises(CommandError, match="There is no job 999"):
        call_command("jobs", "--log", "999")


def test_the_timetable_names_tasks_that_exist() -> None:
    named = {entry["task"] for entry in app.conf.beat_schedule.values()}
    assert {name for name in named if name.startswith("monitoring.")} == {
        f"monitoring.tasks.{name}"
        for name in ("revive", "watch_canary", "follow_retrained", "roll_up", "evaluate",
                     "look_for_drift", "consider_retraining")
    }  # fmt: skip
    app.loader.import_default_modules()
    assert named <= set(app.tasks)


def test_what_is_missing_is_said_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert tasks._call("monitoring.nowhere.look") is None
    assert "monitoring.nowhere.look cannot be called" in caplog.text
    with pytest.raises(ZeroDivisionError):
        monkeypatch.setattr(jobs, "revive", lambda: 1 / 0)
        tasks.revive()
    tasks.look_for_drift()
    tasks.look_for_drift()
    tasks.evaluate()
    assert sorted(Job.objects.values_list("kind", flat=True)) == ["drift", "evaluate"]


def test_old_jobs_are_forgotten_but_retrainings_and_open_ones() -> None:
    old = timezone.now() - jobs.KEPT_FOR - timedelta(days=1)
    for kind, state in (
        ("drift", "done"), (KIND, "done"), (KIND, "failed"), (KIND, "queued"), ("retrain", "done")
    ):  # fmt: skip
        Job.objects.create(kind=kind, state=state, key=f"{kind} {state}", created_at=old)
    Job.objects.create(kind=KIND, state="done", key="evaluate of late")
    assert jobs.forget_old() == 2
    # Of a kind that succeeds no more, the last success is what an alert is raised by.
    assert sorted(Job.objects.values_list("key", flat=True)) == [
        *("drift done", "evaluate of late", "evaluate queued", "retrain done"),
    ]


def test_a_kind_that_never_succeeded_is_as_old_as_the_installation() -> None:
    """Else nobody would be told of a worker that was never started."""
    Job.objects.create(kind=Job.Kind.DRIFT, state="failed", key="a", finished_at=timezone.now())
    found = {one.labels["job"]: one.value for one in jobs.last_successes()}
    assert set(found) == {"drift", "evaluate"}, "a retraining is rare"
    installed = min(MigrationRecorder.Migration.objects.values_list("applied", flat=True))
    assert all(installed.timestamp() <= at < time.time() for at in found.values())


def test_the_last_success_of_each_kind_is_read_from_rows() -> None:
    now = timezone.now()
    for key, state, ago in (("a", "done", 3), ("b", "done", 9), ("c", "failed", 1)):
        at = now - timedelta(hours=ago)
        Job.objects.create(kind=Job.Kind.DRIFT, state=state, key=key, finished_at=at)
    EvaluationRun.objects.create(model="m@1", trigger="command", rows=1, seconds=1, created_at=now)
    found = {one.labels["job"]: one.value for one in jobs.last_successes()}
    assert found == {
        "drift": (now - timedelta(hours=3)).timestamp(),
        "evaluate": now.timestamp(),
    }
