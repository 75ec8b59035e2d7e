"""From reviewed corrections to a judged candidate: when one is proposed, and the run itself.

The run's stages are export, train, register, judge, report. Each leaves something behind that a
later run of the same job finds, so that a killed one is gone on with and nothing is done twice.
Knows no training: ``trainer`` runs the command that does it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from assistant import registry
from assistant.engine.manifest import NAME, Manifest, ManifestError
from assistant.modelkit.revision import next_version
from assistant.models import ModelVersion
from monitoring import examples, jobs, loop, trainer
from monitoring.gates import Gate
from monitoring.models import DriftReport, Job, ReviewItem

#: At most one retraining is opened in this time, whatever is breached.
PAUSE = timedelta(hours=24)
#: ``_USED`` stands for ``_CORRECTIONS`` once they are learned: ids, and no word of a user.
_CORRECTIONS, _USED, _MODEL = "corrections.jsonl", "used.json", "model"

# -- when -----------------------------------------------------------------------------------------


def consider(now: datetime | None = None) -> Job | None:
    """The retraining that was opened because it is time for one; at most one in 24 hours."""
    now = now or timezone.now()
    last = Job.objects.filter(kind=Job.Kind.RETRAIN).order_by("-created_at", "-pk").first()
    if last is not None and (last.state in Job.OPEN or last.created_at > now - PAUSE):
        return None
    unused = examples.unused().count()
    why = _reason(last.created_at if last else None, unused)
    approval = settings.ASSISTANT_RETRAIN_APPROVAL
    if not why or not (unused or approval):  # without a yes and without a correction: no work
        return None
    return _opened(last, f"{why} {_stock(unused)}", proposed=approval)


def retrain_now(by: Any) -> Job:
    """The retraining that a person asks for, which is its approval; the open one if there is one.

    Raises: JobError where there is nothing to learn from.
    """
    last = Job.objects.filter(kind=Job.Kind.RETRAIN).order_by("-created_at", "-pk").first()
    if last is not None and last.state in Job.OPEN:
        return last
    if not (unused := examples.unused().count()):
        raise jobs.JobError(
            "There are no unused corrections. Mark answers as bad in the review desk, say what the "
            "question was about, and tick “as an example”."
        )
    return _opened(last, f"Asked by staff. {_stock(unused)}", by=by)


def _opened(last: Job | None, why: str, *, by: Any = None, proposed: bool = False) -> Job:
    # By the one before: two processes that find at once that it is time open one.
    key = f"{Job.Kind.RETRAIN}:after:{last.pk if last else 0}"
    return jobs.open_job(Job.Kind.RETRAIN, key, why=why, by=by, proposed=proposed)


def _reason(since: datetime | None, unused: int) -> str:
    """Why it is time, in a sentence; empty if it is not. What was there ``since`` counts."""
    report = DriftReport.objects.order_by("-created_at").first()
    if report and report.breached and (since is None or report.created_at > since):
        over = sorted(name for name, one in report.features.items() if one.get("breached"))
        return f"Drift of {', '.join(over) or 'questions'}."
    new = examples.unused().filter(created_at__gt=since) if since else examples.unused()
    if unused >= settings.ASSISTANT_RETRAIN_CORRECTIONS and new.exists():
        return "Enough corrections to learn from."
    return ""


def _stock(unused: int) -> str:
    return f"{unused} unused corrections." if unused else "No corrections yet: review some first."


# -- the run --------------------------------------------------------------------------------------


def folder_of(job: Job) -> Path:
    return Path(settings.DATA_DIR) / "runs" / f"retrain-{job.pk}"


def work_off(work: jobs.Work) -> dict[str, Any]:
    """The handler of retrainings. Raises: JobError, Lost."""
    folder = folder_of(work.job)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with trainer.alone(folder) as lock:
            if "report" not in work.job.params:
                _export(work, folder)
                _train(work, folder, lock)
                version = _register(work, folder)
                _report(work, folder, version, _judge(work, version))
    except jobs.JobError:
        (folder / _CORRECTIONS).unlink(missing_ok=True)  # what users wrote does not stay
        raise
    except jobs.Lost:
        if Job.objects.filter(pk=work.job.pk, state=Job.State.CANCELLED).exists():
            _clear(folder)
        raise
    report: dict[str, Any] = work.job.params["report"]
    return report


def _export(work: jobs.Work, folder: Path) -> None:
    work.stage("export", 0.02)
    path = folder / _CORRECTIONS
    if (folder / _USED).exists() or path.exists():
        return  # what training was begun with is what it is resumed with
    _clear(folder)
    work.note(base=_base(), exported=None)
    try:
        exported = asdict(examples.export(path))
    except examples.NothingToLearn as error:
        raise jobs.JobError(str(error)) from error
    work.note(exported=exported)
    work.say(f"{exported['rows']} corrections; left out: {exported['left_out'] or 'none'}")


def _base() -> dict[str, Any]:
    """What is corrected, as it is now, whatever is promoted while this job runs; what will be
    called what comes out."""
    model = loop.subject(None)
    version = model.version.pk if model.version else None
    return {
        "folder": str(model.folder),
        "model": model.label,
        "version": version,
        "next": _next_version(model.label),
    }


def _next_version(label: str) -> str:
    """Counted up until no registered version is called so."""
    name, _, version = label.rpartition("@")
    taken = set(ModelVersion.objects.filter(name=name).values_list("version", flat=True))
    found = next_version(version)
    while found in taken:
        found = next_version(found)
    return found


def _train(work: jobs.Work, folder: Path, lock: int) -> None:
    work.stage("train", 0.05)
    if (folder / _MODEL / NAME).exists():
        work.say("The model is built already.")
    else:
        trainer.train(
            work,
            lock,
            base=Path(work.job.params["base"]["folder"]),
            data=folder / _CORRECTIONS,
            out=folder,
            version=work.job.params["base"]["next"],
            progress=lambda share: work.progress(0.05 + 0.75 * share),
        )
    _refuse_failed(folder / _MODEL)
    _forget_texts(folder)


def _forget_texts(folder: Path) -> None:
    """What was learned is known by ids from here on; safe to be killed in."""
    path = folder / _CORRECTIONS
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        examples.write_whole(folder / _USED, json.dumps([json.loads(line)["id"] for line in lines]))
        path.unlink()


def _refuse_failed(folder: Path) -> None:
    """Raises: JobError for a model that is not whole, or says itself that it fell short."""
    try:
        manifest = Manifest.load(folder)
    except (ManifestError, OSError) as error:
        raise jobs.JobError(f"What training built is not whole: {error} Run it again.") from error
    if (manifest.quality.get("corrections") or {}).get("passed") is False:
        raise jobs.JobError(
            "Training did not pass: the corrections were not learned, or the golden set lost too "
            "much; MODEL_CARD.md in its folder has the figures. The active model is unchanged."
        )


def _register(work: jobs.Work, folder: Path) -> ModelVersion:
    work.stage("register", 0.82)
    parent = ModelVersion.objects.filter(pk=work.job.params["base"]["version"]).first()
    why = f"Retrained by job {work.job.pk}."
    try:
        version = registry.register(folder / _MODEL, parent=parent, why=why)
    except registry.RegistryError as error:
        raise jobs.JobError(str(error)) from error
    work.job.version = version
    return version


def _judge(work: jobs.Work, version: ModelVersion) -> Gate:
    work.stage("judge", 0.85)
    gate = loop.golden_gate(version, job=work.job, done=loop.watched(work, 0.85, 0.98))
    work.say(f"golden gate: {gate.why}")
    work.check()
    _keep_gate(version, gate)
    return gate


def _keep_gate(version: ModelVersion, gate: Gate) -> None:
    """On the version, which is stopped here if it did not pass and nobody moved it meanwhile."""
    registry.note_gate(version, "golden", gate.kept())
    version.refresh_from_db()
    if gate.passed is False and version.state == ModelVersion.State.CANDIDATE:
        why = f"Golden gate: {gate.why}"[:500]
        try:
            registry.move(version, ModelVersion.State.REJECTED, why=why)
        except registry.RegistryError as error:
            raise jobs.JobError(str(error)) from error


def _report(work: jobs.Work, folder: Path, version: ModelVersion, gate: Gate) -> None:
    """Notes the outcome and which examples were used, both or neither."""
    work.stage("report", 0.98)
    ids = [UUID(id_) for id_ in json.loads((folder / _USED).read_text(encoding="utf-8"))]
    report = {
        "candidate": version.label,
        "version": version.pk,
        "base": work.job.params["base"]["model"],
        "corrections": work.job.params["exported"] or {"rows": len(ids)},
        "passed": gate.passed,
        "why": gate.why,
        "gate": gate.figures,
    }
    with transaction.atomic():
        ReviewItem.objects.filter(pk__in=ids, used_in=None).update(used_in=work.job)
        work.note(report=report)


def _clear(folder: Path) -> None:
    """Everything but the lock, which is held; nothing of a model that has passed its training."""
    if (folder / _USED).exists():
        return
    for path in folder.iterdir():
        if path.name != trainer.LOCK:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
