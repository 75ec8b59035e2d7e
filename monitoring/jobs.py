"""Work that takes longer than a request, as rows: claimed once, watched, revived, not done twice.

A row is ``Job``; what it does is its kind's handler, called with a ``Work``. A run writes only
while the row is still its own: whoever was given up or cancelled finds that out with its next
write. The handler has a thread of its own at low priority, and the thread that called ``run``
writes the signs of life. Without Celery, of which only ``call_worker`` knows, ``manage.py
run_jobs`` does the work.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from django.db import DatabaseError, IntegrityError, connections, transaction
from django.db.migrations.recorder import MigrationRecorder
from django.db.models import F, Max, Min
from django.utils import timezone
from django.utils.module_loading import import_string

from assistant.models import ModelVersion
from monitoring import metrics
from monitoring.models import EvaluationRun, Job
from monitoring.reading import Reading

log = logging.getLogger(__name__)

#: A sign of life this often; after ten missed ones its process is gone.
BEAT_S, STALE_S = 3.0, 30.0
#: Starts of one job before it is given up: what kills its worker three times will do so again.
MOST_STARTS = 3
#: How long a handler may take to notice that it must stop.
STOP_S = 15.0
MOST_LINES, MOST_LINE_CHARS, MOST_LOG_CHARS = 400, 500, 40_000
#: Looks for drift and evaluations are forgotten; a retraining says which examples it used.
KEPT_FOR = timedelta(days=30)
_LOW_PRIORITY = 15

Told = Callable[[str], None]

#: What does a job, by kind: a dotted path, so that nothing is loaded for the others.
HANDLERS: dict[str, str] = {
    Job.Kind.EVALUATE: "monitoring.loop.work_off",
    Job.Kind.DRIFT: "monitoring.jobs.look_for_drift",
    Job.Kind.RETRAIN: "monitoring.retraining.work_off",
}


class JobError(Exception):
    """A job cannot be done, or not be changed so. The message says why and what to do."""


class Lost(Exception):
    """The row is no longer this run's: cancelled, or given up and taken by another."""


# -- asking for work ------------------------------------------------------------------------------


def open_job(
    kind: str,
    key: str,
    *,
    why: str = "",
    params: dict[str, Any] | None = None,
    by: Any = None,
    proposed: bool = False,
    version: ModelVersion | None = None,
) -> Job:
    """The job of that key, opened if there is none; queued, or waiting for a person's yes.

    Raises: JobError where another retraining is open.
    """
    state = Job.State.PROPOSED if proposed else Job.State.QUEUED
    told = {"kind": kind, "state": state, "why": why[:500], "params": params or {},
            "asked_by": by, "version": version}  # fmt: skip
    try:
        job, made = Job.objects.get_or_create(key=key[:120], defaults=told)
    except IntegrityError as error:
        raise _other_open() from error
    if made and not proposed:
        transaction.on_commit(partial(call_worker, job.pk))
    return job


def approve(job: Job, by: Any) -> None:
    """Somebody's yes to a proposed job. Raises: JobError."""
    changed = Job.objects.filter(pk=job.pk, state=Job.State.PROPOSED)
    if not changed.update(state=Job.State.QUEUED, approved_by=by):
        raise JobError("This job is not waiting for approval any more. Load the page again.")
    transaction.on_commit(partial(call_worker, job.pk))


def cancel(job: Job) -> None:
    """End a job that is not over; a running one notices within seconds. Raises: JobError."""
    changed = Job.objects.filter(pk=job.pk, state__in=Job.OPEN)
    if not changed.update(state=Job.State.CANCELLED, finished_at=timezone.now()):
        raise JobError("This job is over already, so there is nothing to cancel.")


def again(job: Job) -> None:
    """Queue a job that failed or was cancelled once more. Raises: JobError."""
    ended = Job.objects.filter(pk=job.pk, state__in=[Job.State.FAILED, Job.State.CANCELLED])
    # Attempts are never set back: a run of long ago must not take this one for its own.
    params = {**job.params, "starts_before": job.attempt}
    try:
        with transaction.atomic():
            changed = ended.update(
                state=Job.State.QUEUED, params=params, error="", finished_at=None, progress=0.0
            )
    except IntegrityError as error:
        raise _other_open() from error
    if not changed:
        raise JobError("Only a job that failed or was cancelled can run again.")
    transaction.on_commit(partial(call_worker, job.pk))


def _other_open() -> JobError:
    return JobError("Another retraining is open. Let it finish, or cancel it first.")


def call_worker(pk: int) -> bool:
    """Whether a worker was told. If the broker is away the row waits, and ``revive`` finds it."""
    from monitoring import tasks

    try:
        tasks.run_job.apply_async((pk,), retry=False)
    except Exception as error:  # kombu's, or of the broker's own client
        log.warning("job %s waits as a row; no worker was told: %s", pk, type(error).__name__)
        return False
    return True


# -- one run of a job -----------------------------------------------------------------------------


class Work:
    """What a handler sees of its job: where to say how far it is, and whether to go on."""

    def __init__(self, job: Job, told: Told = lambda line: None) -> None:
        self.job = job
        self._told = told
        #: Whether the row was taken away, and whether the handler has ended.
        self.lost, self.over = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(job.log.splitlines(), maxlen=MOST_LINES)
        self._progress = 0.0
        self._stops: list[Callable[[], None]] = []
        self._beaten = time.monotonic()

    def say(self, line: str) -> None:
        """Into the log, with the next sign of life."""
        line = line.strip()[:MOST_LINE_CHARS]
        with self._lock:
            self._lines.append(f"{timezone.now():%H:%M:%S} {line}")
        self._told(line)

    def stage(self, name: str, progress: float) -> None:
        """What is begun now, stored at once. *Units*: ``progress`` 0..1. Raises: Lost."""
        self.check()
        self.job.stage, self._progress = name[:40], progress
        self.say(f"{name} ({progress:.0%})")
        self._store()

    def progress(self, share: float) -> None:
        """How far it is, 0..1; stored with the next sign of life. Raises: Lost."""
        self.check()
        self._progress = min(1.0, max(0.0, share))

    def note(self, **params: Any) -> None:
        """Keep what a run after this one must know. Raises: Lost."""
        self.job.params = {**self.job.params, **params}
        self._store(params=self.job.params)

    def check(self) -> None:
        """Raises: Lost once the row is no longer this run's."""
        if self.lost.is_set():
            raise Lost

    @contextlib.contextmanager
    def stopped_by(self, stop: Callable[[], None]) -> Iterator[None]:
        """Have ``stop`` called, from another thread, if the job is lost meanwhile."""
        self._stops.append(stop)
        try:
            self.check()
            yield
        finally:
            self._stops.remove(stop)

    def beat(self) -> None:
        """A sign of life. Without one for too long others take the job, so this run gives up."""
        try:
            self._store()
        except Lost:
            pass
        except DatabaseError as error:
            log.warning("job %s: no sign of life: %s", self.job.pk, type(error).__name__)
            if time.monotonic() - self._beaten > STALE_S:
                self.give_up()

    def give_up(self) -> None:
        """Have the handler stop; safe from every thread, any number of times."""
        if not self.lost.is_set():
            self.lost.set()
            for stop in list(self._stops):
                stop()

    def end(self, state: Job.State, **fields: Any) -> None:
        """Raises: Lost."""
        self._store(state=state, finished_at=timezone.now(), **fields)

    def release(self) -> None:
        """Back into the queue: this process ends."""
        self._mine().update(state=Job.State.QUEUED)

    def _mine(self) -> Any:
        return Job.objects.filter(pk=self.job.pk, attempt=self.job.attempt, state=Job.State.RUNNING)

    def _store(self, **fields: Any) -> None:
        """Raises: Lost where the row was taken away."""
        with self._lock:
            text = "\n".join(self._lines)[-MOST_LOG_CHARS:]
        told = {"heartbeat_at": timezone.now(), "stage": self.job.stage, "log": text,
                "progress": self._progress, **fields}  # fmt: skip
        if not self._mine().update(**told):
            self.give_up()
            raise Lost
        self._beaten = time.monotonic()


#: Runs of this process, to be stopped when it ends.
_at_work: set[Work] = set()


def run(pk: int, told: Told = lambda line: None) -> bool:
    """Do that job if it waits and nobody else takes it; whether it was ours. Returns at its end."""
    job = _claimed(pk)
    if job is None:
        return False
    work = Work(job, told)
    _at_work.add(work)
    threading.Thread(target=_do, args=(work,), name=f"job-{pk}", daemon=True).start()
    try:
        _watch(work)
    except BaseException:  # Ctrl-C, a worker that is told to end
        work.give_up()
        work.over.wait(STOP_S)
        work.release()
        raise
    finally:
        _at_work.discard(work)
    return True


def _claimed(pk: int) -> Job | None:
    """The job, now ours alone."""
    job = Job.objects.filter(pk=pk, state=Job.State.QUEUED).first()
    if job is None:
        return None
    now = timezone.now()
    # By the attempt that was read: ours is then the next, whoever else wanted it.
    mine = Job.objects.filter(pk=pk, state=Job.State.QUEUED, attempt=job.attempt).update(
        state=Job.State.RUNNING, attempt=job.attempt + 1, started_at=now, heartbeat_at=now, error=""
    )
    job.attempt += 1
    return job if mine else None


def _watch(work: Work) -> None:
    """Signs of life until the handler is done. One that is lost and does not stop is left alone."""
    deadline: float | None = None
    while not work.over.wait(BEAT_S):
        work.beat()
        if work.lost.is_set():
            deadline = deadline or time.monotonic() + STOP_S
            if time.monotonic() > deadline:
                log.error("job %s does not stop; its thread is left alone", work.job.pk)
                return


def _do(work: Work) -> None:
    """The handler in its thread, and how it ended."""
    _lower_priority()
    try:
        handler = import_string(HANDLERS[work.job.kind])
        work.end(Job.State.DONE, **_ended(work, handler(work)))
    except Lost:
        log.warning("%s was cancelled or taken over, attempt %s", work.job, work.job.attempt)
    except Exception as error:
        _failed(work, error)
    finally:
        connections.close_all()
        work.over.set()


def _ended(work: Work, result: dict[str, Any]) -> dict[str, Any]:
    work._progress = 1.0
    return {"result": result, "version": work.job.version}


def _failed(work: Work, error: Exception) -> None:
    """The reason in words where it is for people; else where it broke, without what was in it."""
    if isinstance(error, JobError):
        why = str(error)
    else:
        at = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(at.filename).name}:{at.lineno}"
        why = f"It broke off: {type(error).__name__} in {where}. Run it again."
    log.error("%s failed: %s", work.job, why)
    work.say(why)
    with contextlib.suppress(Lost, DatabaseError):  # unsaid, ``revive`` finds it
        work.end(Job.State.FAILED, error=why[:500])


def _lower_priority() -> None:
    """Answers come first: what this thread and all that it starts get is what is left."""
    with contextlib.suppress(OSError, AttributeError):  # where threads have no priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)


@atexit.register
def _stop_all() -> None:
    """A process that ends takes what its jobs started with it, and leaves the jobs to others."""
    for work in list(_at_work):
        work.give_up()
        with contextlib.suppress(DatabaseError):  # then ``revive`` finds it
            work.release()


# -- all jobs -------------------------------------------------------------------------------------


def waiting() -> int | None:
    """The job that waits longest."""
    rows = Job.objects.filter(state=Job.State.QUEUED).order_by("created_at", "pk")
    return rows.values_list("pk", flat=True).first()


def revive(now: datetime | None = None) -> int:
    """Queue jobs whose worker is gone once more, or fail them after too many starts; how many."""
    now = now or timezone.now()
    gone = {"state": Job.State.RUNNING, "heartbeat_at__lt": now - timedelta(seconds=STALE_S)}
    return sum(
        Job.objects.filter(pk=job.pk, attempt=job.attempt, **gone).update(**_after_death(job, now))
        for job in Job.objects.filter(**gone)
    )


def _after_death(job: Job, now: datetime) -> dict[str, Any]:
    starts = job.attempt - int(job.params.get("starts_before", 0))
    if starts < MOST_STARTS:
        log.warning("the worker of %s is gone; it is queued again", job)
        return {"state": Job.State.QUEUED}
    log.error("the worker of %s is gone for the %s. time; it is given up", job, starts)
    why = (
        f"Its worker ended {starts} times without finishing, the last time while at "
        f"“{job.stage or 'start'}”. Look for what ends the worker (memory?), then run it again."
    )
    return {"state": Job.State.FAILED, "error": why[:500], "finished_at": now}


def forget_old(now: datetime | None = None) -> int:
    """Delete jobs that ended long ago, but retrainings and each kind's last success; how many."""
    before = (now or timezone.now()) - KEPT_FOR
    old = Job.objects.filter(created_at__lt=before).exclude(kind=Job.Kind.RETRAIN)
    done = Job.objects.filter(state=Job.State.DONE).order_by().values("kind")
    newest = list(done.annotate(newest=Max("pk")).values_list("newest", flat=True))
    return old.exclude(state__in=Job.OPEN).exclude(pk__in=newest).delete()[0]


class _Background:
    """A thread of this process that does waiting jobs one after another, until none is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._asked = False

    def start(self) -> None:
        """Any number of times; returns at once."""
        with self._lock:
            self._asked = True
            if self._thread is None:
                self._thread = threading.Thread(target=self._live, name="jobs", daemon=True)
                self._thread.start()

    def _live(self) -> None:
        while self._is_asked():
            try:
                while (pk := waiting()) is not None:
                    run(pk)
            except DatabaseError as error:  # the timetable asks again
                log.warning("jobs wait: %s", type(error).__name__)
            finally:
                connections.close_all()

    def _is_asked(self) -> bool:
        with self._lock:
            asked, self._asked = self._asked, False
            if not asked:
                self._thread = None
            return asked


background = _Background()


def look_for_drift(work: Work) -> dict[str, Any]:
    """The handler of that kind."""
    work.stage("compare", 0.1)
    report = import_string("monitoring.drift.look")()
    found = {"report": report.pk, "breached": report.breached} if report is not None else {}
    return found or {"why": "Too few turns to compare."}


def last_successes() -> Iterable[Reading]:
    """For ``/metrics``: when each kind of job last came to its end; of one on the timetable that
    never did, when it could first have begun."""
    done = Job.objects.filter(state=Job.State.DONE).values_list("kind")
    found: dict[str, datetime] = dict(done.annotate(at=Max(F("finished_at"))).order_by())
    by_hand = EvaluationRun.objects.aggregate(at=Max("created_at"))["at"]
    if by_hand is not None:
        kind = str(Job.Kind.EVALUATE)
        found[kind] = max(by_hand, found.get(kind, by_hand))
    for kind in (Job.Kind.EVALUATE, Job.Kind.DRIFT):
        if kind not in found and (since := _installed_at()) is not None:
            found[str(kind)] = since
    for kind, at in found.items():
        yield Reading(metrics.LAST_SUCCESS, {"job": kind}, at.timestamp())


def _installed_at() -> datetime | None:
    """When there was first a table for jobs."""
    applied = MigrationRecorder.Migration.objects.filter(app="monitoring")
    found: datetime | None = applied.aggregate(at=Min("applied"))["at"]
    return found
