"""From corrections to a judged candidate: when it is time, what is learned, kills at each stage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import connections
from django.utils import timezone

from assistant.modelkit.build import build_random
from assistant.models import ModelVersion, VersionChange
from conversations.models import Conversation, Message
from monitoring import evaluation, examples, jobs, loop, retraining, tasks, trainer
from monitoring.gates import Gate
from monitoring.models import (
    DriftReference,
    DriftReport,
    EvaluationRun,
    Job,
    ReviewItem,
)
from tests.conftest import ROOT

pytestmark = pytest.mark.django_db(transaction=True)

PATIENCE_S = 30.0
STAGES = ("export", "train", "register", "judge", "report")
STAND_IN = "tests.monitoring.stand_in_trainer"
GOLDEN = [
    {"id": "a", "query": "please cancel my order", "intent": "cancel_order", "scope": "in"},
    {"id": "b", "query": "who won the match?", "scope": "out"},
]


def command(how: str = "ok") -> list[str]:
    return [sys.executable, "-m", STAND_IN, how]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_random("tiny", folder, quant="row8", seed=0)
    return folder


@pytest.fixture(autouse=True)
def shop(settings: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model that answers, a golden set of two rows, a trainer that takes a moment."""
    model = settings.ASSISTANT["BACKENDS"]["model"]
    options = {**model["OPTIONS"], "model_dir": str(tiny), "threads": 1}
    known = {**settings.ASSISTANT["BACKENDS"], "model": {**model, "OPTIONS": options}}
    settings.ASSISTANT = {**settings.ASSISTANT, "BACKENDS": known}
    settings.DATA_DIR = tmp_path
    golden = tmp_path / "golden"
    golden.mkdir()
    (golden / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOLDEN))
    monkeypatch.setattr(evaluation, "GOLDEN", golden)
    monkeypatch.setattr(trainer, "COMMAND", command())
    monkeypatch.setattr(tasks.run_job, "apply_async", lambda *_, **__: None)
    monkeypatch.setattr(jobs, "BEAT_S", 0.02)
    return tmp_path


def correction(
    user: User | None, *turns: str, intent: str = "track_order", said: str = "", **more: Any
) -> ReviewItem:
    """An answer to the last of ``turns`` (user, assistant, user, ...) that staff corrected."""
    talk = Conversation.objects.create(user=user, session_key="" if user else more.pop("who", "v"))
    parent = None
    for at, text in enumerate((*turns, "wrong answer"), 1):
        role = "user" if at % 2 else "assistant"
        parent = Message.objects.create(
            conversation=talk, seq=at, parent=parent, role=role, text=text
        )
    told = {"verdict": "bad", "as_example": True, "intent": intent, "correction": said, **more}
    return ReviewItem.objects.create(message=parent, **told)


def until(true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def drifted(breached: bool = True) -> DriftReport:
    now = timezone.now()
    reference = DriftReference.objects.create(turns=1, data={}, from_at=now, to_at=now)
    features = {"intents": {"score": 1, "threshold": 0.2, "breached": breached}}
    return DriftReport.objects.create(
        reference=reference, turns=500, features=features, breached=breached, from_at=now, to_at=now
    )


# --- When ----------------------------------------------------------------------------------------


def test_enough_corrections_propose_one_job_in_24_hours(
    settings: Any, ana: User, sam: User
) -> None:
    settings.ASSISTANT_RETRAIN_CORRECTIONS = 3
    for at in range(2):
        correction(ana, f"where is thing {at}")
    assert retraining.consider() is None
    correction(ana, "where is my stuff")
    job = retraining.consider()
    assert job and (job.state, job.kind) == ("proposed", "retrain")
    assert job.why == "Enough corrections to learn from. 3 unused corrections."
    assert retraining.consider() is None and not jobs.run(job.pk)
    jobs.cancel(job)
    assert retraining.consider() is None  # not for another day
    correction(ana, "and where is the other")
    assert retraining.consider(timezone.now() + timedelta(hours=25)) is not None
    assert Job.objects.count() == 2


def test_what_was_there_at_the_last_proposal_does_not_open_another(
    settings: Any, ana: User
) -> None:
    settings.ASSISTANT_RETRAIN_CORRECTIONS = 1
    correction(ana, "where is my stuff")
    drifted()
    assert retraining.consider()
    Job.objects.update(state="failed")
    assert retraining.consider(timezone.now() + timedelta(hours=25)) is None


def test_a_breach_of_drift_proposes_one_even_before_there_are_corrections(settings: Any) -> None:
    drifted(breached=False)
    assert retraining.consider() is None
    drifted()
    job = retraining.consider()
    assert job and job.why == "Drift of intents. No corrections yet: review some first."
    Job.objects.all().delete()
    settings.ASSISTANT_RETRAIN_APPROVAL = False
    assert retraining.consider() is None  # nobody would look, and there is nothing to learn


def test_without_approval_it_is_queued_at_once(settings: Any, ana: User) -> None:
    settings.ASSISTANT_RETRAIN_APPROVAL = False
    drifted()
    correction(ana, "where is my stuff")
    job = retraining.consider()
    assert job and job.state == "queued"


def test_two_processes_that_consider_at_once_open_one(ana: User) -> None:
    drifted()
    together, found = threading.Barrier(3), []

    def think() -> None:
        together.wait()
        found.append(retraining.consider())
        connections.close_all()

    threads = [threading.Thread(target=think) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(found) == 3 and Job.objects.count() == 1


def test_staff_may_ask_for_one_if_there_is_something_to_learn(ana: User, sam: User) -> None:
    with pytest.raises(jobs.JobError, match="no unused corrections"):
        retraining.retrain_now(sam)
    correction(ana, "where is my stuff")
    job = retraining.retrain_now(sam)
    assert (job.state, job.asked_by) == ("queued", sam)
    assert retraining.retrain_now(sam) == job


# --- What is learned -----------------------------------------------------------------------------


def exported(folder: Path) -> list[dict[str, Any]]:
    examples.export(folder / "c.jsonl")
    return [json.loads(line) for line in (folder / "c.jsonl").read_text().splitlines()]


def test_rows_carry_placeholders_for_every_personal_value(ana: User, tmp_path: Path) -> None:
    item = correction(
        ana,
        "I'm Maria Lopez, card 4111 1111 1111 1111, orders 48213377 and 90017342",
        "Tell maria@example.com",
        "nothing came to maria@example.com",
        said="Look at order 48213377 in My Orders.",
    )
    (row,) = exported(tmp_path)
    text = json.dumps(row)
    for value in ("Maria", "4111", "48213377", "90017342", "example.com"):
        assert value not in text
    assert row["id"] == str(item.pk) and row["intent"] == "track_order"
    assert [turn["role"] for turn in row["turns"]] == ["user", "assistant", "user"]
    assert row["turns"][0]["text"].endswith("orders {{Order Number}} and {{Order Number}}")
    assert "my card number" in row["turns"][0]["text"]
    assert row["answer"] == "Look at order {{Order Number}} in My Orders."


def test_one_question_is_one_row_and_an_unknown_intent_none(ana: User, tmp_path: Path) -> None:
    correction(ana, "where is my stuff")
    correction(ana, "what", intent="no_such_intent")
    correction(ana, "a good answer", as_example=False)
    assert examples.unused().count() == 2
    found = examples.export(tmp_path / "c.jsonl")
    assert (found.rows, found.left_out) == (1, {"unreadable": 1})
    assert "query" in exported(tmp_path)[0] and "answer" not in exported(tmp_path)[0]


def test_of_two_that_contradict_each_other_the_newer_is_learned(
    ana: User, ben: User, tmp_path: Path
) -> None:
    correction(ana, "where is my stuff", intent="track_order")
    correction(ben, "Where is my stuff", intent="get_refund")
    assert [row["intent"] for row in exported(tmp_path)] == ["get_refund"]


def test_nobody_gives_more_than_their_share(ana: User, ben: User, tmp_path: Path) -> None:
    for at in range(40):
        correction(ana, f"ana asks thing number {'abcdefghij'[at % 10] * (at + 1)}")
    correction(ben, "ben asks")
    correction(None, "a visitor asks", who="v1")
    rows = [row["query"] for row in exported(tmp_path)]
    assert len(rows) == 3 and sum(row.startswith("ana") for row in rows) == 1
    # Of 300 from 150 users, one percent is three.
    shared = examples._shared_out([(f"user {at % 150}", str(at)) for at in range(300)])
    assert len(shared) == 300
    flood = [("one", str(at)) for at in range(10_000)]
    assert len(examples._shared_out(flood + [(f"user {at}", "") for at in range(150)])) == 151


def test_nothing_to_learn_is_said_with_what_to_do(ana: User, tmp_path: Path) -> None:
    correction(ana, "what", intent="no_such_intent")
    with pytest.raises(examples.NothingToLearn, match=r"1 unreadable.*Review more"):
        examples.export(tmp_path / "c.jsonl")
    assert not (tmp_path / "c.jsonl").exists()


# --- The run -------------------------------------------------------------------------------------


@pytest.fixture
def job(ana: User, ben: User, sam: User) -> Job:
    correction(ana, "where is my stuff 48213377")
    correction(ben, "it never came")
    return retraining.retrain_now(sam)


def done(job: Job) -> Job:
    assert jobs.run(job.pk)
    job.refresh_from_db()
    return job


def holds_one_run(job: Job, shop: Path) -> None:
    """The effect of one run, however many there were."""
    assert job.state == "done", job.error
    version = ModelVersion.objects.exclude(state="active").get()
    assert version == job.version and version.label == "random-tiny@seed-0+1"
    assert VersionChange.objects.filter(version=version, from_state="").count() == 1
    assert ReviewItem.objects.filter(used_in=job).count() == 2
    assert job.result["candidate"] == version.label and job.result["passed"] is not None
    assert version.gates["golden"]["passed"] is job.result["passed"]
    assert version.state == ("candidate" if job.result["passed"] else "rejected")
    assert EvaluationRun.objects.filter(version=version).count() == 1
    folder = retraining.folder_of(job)
    assert not (folder / "corrections.jsonl").exists() and (folder / "model").is_dir()


def test_corrections_become_a_judged_candidate(job: Job, shop: Path) -> None:
    holds_one_run(done(job), shop)
    assert job.result["corrections"] == {"rows": 2, "left_out": {}}
    assert job.result["base"] == "random-tiny@seed-0"
    assert "corrections 2 of 2 right" in job.log and "passed: All held." in job.log
    assert examples.unused().count() == 0 and retraining.consider() is None


def test_a_worse_candidate_is_rejected_and_the_reason_audited(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "golden_gate", lambda *_, **__: Gate(False, "Worse.", {"run": 1}))
    done(job)
    assert job.state == "done" and job.result["passed"] is False and job.result["why"] == "Worse."
    version = job.version
    assert version and version.state == "rejected" and version.gates["golden"]["why"] == "Worse."
    assert version.changes.first().why == "Golden gate: Worse."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("refuse", "Training failed: torch, onnx is not installed. Install the extra: pip install"),
        ("die", "Training was ended by signal 9. Run it again."),
        ("fall_short", "Training failed: NOT PASSED: only 10.0% of the corrections"),
    ],
)
def test_training_that_fails_is_told_in_one_sentence(
    job: Job, monkeypatch: pytest.MonkeyPatch, how: str, said: str
) -> None:
    monkeypatch.setattr(trainer, "COMMAND", command(how))
    done(job)
    assert job.state == "failed" and job.error.startswith(said)
    assert not ModelVersion.objects.exclude(state="active").exists()
    assert not ReviewItem.objects.exclude(used_in=None).exists()
    assert not (retraining.folder_of(job) / "corrections.jsonl").exists()
    monkeypatch.setattr(trainer, "COMMAND", command())
    jobs.again(job)
    assert done(job).state == "done"


def test_training_that_takes_too_long_is_ended(
    job: Job, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "COMMAND", command("hang"))
    monkeypatch.setattr(trainer, "_STOP_S", 0.3)
    settings.ASSISTANT = {
        **settings.ASSISTANT, "RETRAIN": {**settings.ASSISTANT["RETRAIN"], "MOST_S": 0.5}
    }  # fmt: skip
    assert done(job).error.startswith("Training took longer than")
    assert not _alive(job)


def test_cancelling_ends_the_trainer_and_leaves_no_texts(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "COMMAND", command("hang"))
    monkeypatch.setattr(trainer, "_STOP_S", 0.3)

    def work_off() -> None:
        jobs.run(job.pk)
        connections.close_all()

    run = threading.Thread(target=work_off)
    run.start()
    until(lambda: "hanging" in Job.objects.get(pk=job.pk).log)
    assert _alive(job)
    jobs.cancel(job)
    run.join(PATIENCE_S)
    job.refresh_from_db()
    assert job.state == "cancelled" and not ModelVersion.objects.exists()
    assert [path.name for path in retraining.folder_of(job).iterdir()] == [trainer.LOCK]


@pytest.mark.slow
def test_cancelled_after_training_the_registered_model_stays_whole(
    job: Job, shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.golden_gate

    def cancelled_meanwhile(*args: Any, **more: Any) -> Gate:
        jobs.cancel(job)
        return real(*args, **more)

    monkeypatch.setattr(loop, "golden_gate", cancelled_meanwhile)
    done(job)
    version = ModelVersion.objects.get()
    assert (job.state, version.state, version.gates) == ("cancelled", "candidate", {})
    assert loop.at(Path(version.folder)).sha256 == version.sha256
    monkeypatch.setattr(loop, "golden_gate", real)
    jobs.again(job)
    monkeypatch.setattr(trainer, "COMMAND", command("die"))  # it is not trained again
    holds_one_run(done(job), shop)


def _alive(job: Job) -> bool:
    """Whether a trainer of that job still runs."""
    starts = retraining.folder_of(job) / "starts"
    pids = [int(line) for line in starts.read_text().split()] if starts.exists() else []
    return any(Path(f"/proc/{pid}/cmdline").exists()
               and b"stand_in" in Path(f"/proc/{pid}/cmdline").read_bytes()
               for pid in pids)  # fmt: skip


def test_how_far_training_is_is_read_from_its_lines() -> None:
    line = "step 40  answer 0.412  corrections 18 of 20 right, 15 surely  at most 3.1 min left"
    assert trainer.how_far(line) == 0.75
    assert trainer.how_far(" 42%  step 900  answer 1.2  9 min left") == 0.42
    assert trainer.how_far("building (static8) and judging the revised model ...") is None


# --- Killed --------------------------------------------------------------------------------------

WORKER = """
import json, os, signal, sys
from pathlib import Path
import django
django.setup()
from django.conf import settings
from monitoring import evaluation, jobs, trainer
told = json.loads(sys.argv[1])
settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"].update(model_dir=told["model"], threads=1)
evaluation.GOLDEN = Path(told["golden"])
trainer.COMMAND = told["command"]
real = jobs.Work.stage
def stage(self, name, progress):
    real(self, name, progress)
    if name == told["killed_at"]:
        os.kill(os.getpid(), signal.SIGKILL)
jobs.Work.stage = stage
jobs.BEAT_S = 0.05
jobs.run(told["job"])
"""


@pytest.fixture
def worker(shop: Path, tiny: Path, database_file: Path) -> Callable[..., Any]:
    """Another process that does the job, and kills itself after it has stored that stage."""

    def begun(job: Job, killed_at: str = "", how: str = "ok") -> Any:
        told = {"job": job.pk, "killed_at": killed_at, "model": str(tiny), "command": command(how),
                "golden": str(shop / "golden")}  # fmt: skip
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "config.settings",
            "SECRET_KEY": django_settings.SECRET_KEY,
            "DATABASE_URL": f"sqlite:///{database_file}",
            "ASSISTANT_DATA_DIR": str(shop),
        }
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(told)], cwd=ROOT, env=environment
        )

    return begun


def revived(job: Job) -> None:
    assert jobs.revive(timezone.now() + timedelta(seconds=jobs.STALE_S + 1)) == 1


@pytest.mark.parametrize(
    "stage",
    [
        stage if stage in ("train", "judge") else pytest.param(stage, marks=pytest.mark.slow)
        for stage in STAGES
    ],
)
def test_a_worker_killed_at_any_stage_leaves_nothing_half_done(
    stage: str, job: Job, shop: Path, worker: Callable[..., Any]
) -> None:
    assert worker(job, killed_at=stage).wait(PATIENCE_S) == -signal.SIGKILL
    job.refresh_from_db()
    assert (job.state, job.stage) == ("running", stage)
    assert ReviewItem.objects.filter(used_in=job).count() == 0
    found = ModelVersion.objects.all()
    assert [version.state for version in found] == ["candidate"] * (STAGES.index(stage) > 2)
    revived(job)
    holds_one_run(done(job), shop)
    assert job.attempt == 2


def test_a_worker_killed_after_the_report_is_not_done_again(
    job: Job, shop: Path, worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    done(job)
    Job.objects.filter(pk=job.pk).update(state="queued", result={}, finished_at=None)
    monkeypatch.setattr(trainer, "COMMAND", command("die"))
    holds_one_run(done(job), shop)


@pytest.mark.slow
def test_the_trainer_a_killed_worker_left_behind_is_ended_before_the_next(
    job: Job, shop: Path, worker: Callable[..., Any]
) -> None:
    process = worker(job, how="hang")
    until(lambda: (retraining.folder_of(job) / "starts").exists())
    process.kill()
    process.wait()
    assert _alive(job)
    revived(job)
    holds_one_run(done(job), shop)
    assert not _alive(job)
