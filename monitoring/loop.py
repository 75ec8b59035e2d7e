"""The evaluation loop: a model asked a whole suite, kept as a row, compared to the active model.

Runs on an engine of its own with one thread, and not in a process that answers users. The figures
are ``evaluation``'s; what follows from them is ``golden_gate``'s one sentence. Knows nothing of
when it is called.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db.models import QuerySet
from django.utils import timezone

from assistant import backends, registry
from assistant.engine.manifest import NAME, Manifest, ManifestError
from assistant.errors import AssistantError
from assistant.modelkit import scoring
from assistant.modelkit.scoring import Judged
from assistant.models import ModelVersion
from assistant.types import Message
from monitoring import evaluation, jobs, metrics
from monitoring.evaluation import Answer, DatasetError, Row
from monitoring.gates import Gate
from monitoring.models import EvaluationRun, GoldenCase, Job
from monitoring.reading import Reading

GOLDEN = "golden"
#: What is judged by itself, in this order. A kind of the golden set's files belongs to one of them.
GROUPS = ("single", "several turns", "out of scope", "rude", "injection")
_OUTSIDE = frozenset({"out of scope", "injection"})
#: Figures that go to ``/metrics``.
_SHOWN = (
    "intent_accuracy", "scope_auroc", "ece", "coverage", "placeholder_ok", "well_ended",
    "answer_similarity",
)  # fmt: skip
_MOST_FAILURES, _MOST_SHOWN_RUNS = 200, 50
_SHOWN_FOR = timedelta(days=30)

Done = Callable[[int, int], None]


class LoopError(jobs.JobError):
    """An evaluation cannot be made. The message says why and what to do."""


class _Serving(LoopError):
    """This process answers users."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be asked: where it lies, what it is called, and the digest of its weights."""

    folder: Path
    label: str
    sha256: str
    version: ModelVersion | None


@dataclass(frozen=True, slots=True)
class Suite:
    """Rows under a name; ``digest`` changes with any of them."""

    name: str
    rows: Sequence[Row]
    digest: str


def _nobody(done: int, of: int) -> None:
    pass


# -- what is asked --------------------------------------------------------------------------------


def golden_suite() -> Suite:
    """The golden set's files and what staff added to them. Raises: LoopError."""
    try:
        return suite(GOLDEN, [*evaluation.read_golden(), *map(as_row, _active_cases())])
    except DatasetError as error:
        raise LoopError(str(error)) from error


def suite(name: str, rows: Sequence[Row]) -> Suite:
    told = json.dumps([asdict(row) for row in rows], sort_keys=True).encode("utf-8", "replace")
    return Suite(name, rows, hashlib.sha256(told).hexdigest())


def _active_cases() -> Iterable[GoldenCase]:
    return GoldenCase.objects.filter(active=True).order_by("pk")


def as_row(case: GoldenCase) -> Row:
    """Raises: DatasetError."""
    try:
        messages = tuple(Message(turn["role"], turn["text"]) for turn in case.turns)
    except (KeyError, TypeError) as error:
        raise DatasetError(f"Golden case {case.pk} has no readable turns. Mend it.") from error
    if not messages:
        raise DatasetError(f"Golden case {case.pk} has no turns. Mend it or switch it off.")
    return Row(f"case-{case.pk}", messages, case.intent or None, case.scope, kind="staff")


def group_of(row: Row) -> str:
    if row.attack:
        return "injection"
    if row.kind == "rude":
        return "rude"
    if row.scope == "out":
        return "out of scope"
    return "several turns" if len(row.messages) > 1 else "single"


def subject(version: ModelVersion | None) -> Subject:
    """That version, or what answers now. Raises: LoopError where its folder cannot be read."""
    version = version or registry.active()
    usual = settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]["model_dir"]
    return at(Path(version.folder if version else usual), version)


def at(folder: Path, version: ModelVersion | None = None) -> Subject:
    """The model in that folder. Raises: LoopError."""
    try:
        manifest = Manifest.parse((folder / NAME).read_text(encoding="utf-8"), folder)
        sha256 = manifest.digest
    except (OSError, UnicodeError, KeyError, ManifestError) as error:
        raise LoopError(f"There is no model to evaluate in {folder}: {_words(error)}") from error
    return Subject(folder, f"{manifest.name}@{manifest.version}", sha256, version)


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, ManifestError) else f"{type(error).__name__}."


# -- asking ---------------------------------------------------------------------------------------


def evaluate_model(
    version: ModelVersion | None,
    *,
    suite: str = GOLDEN,
    trigger: str,
    job: Job | None = None,
    done: Done = _nobody,
    while_serving: bool = False,
) -> EvaluationRun:
    """The stored run of that version, or of what answers now, on the golden set.

    ``done`` hears how many of how many rows are answered. Raises: LoopError, also in a process that
    answers users, unless ``while_serving``.
    """
    if suite != GOLDEN:
        raise LoopError(f"There is no suite {suite!r} here, only {GOLDEN!r}.")
    return _evaluated(subject(version), golden_suite(), trigger, job, done, while_serving)


def _evaluated(
    model: Subject, suite: Suite, trigger: str, job: Job | None, done: Done, while_serving: bool
) -> EvaluationRun:
    if serves() and not while_serving:
        raise _Serving(
            "This process answers users, and an evaluation would slow them down. Let a worker do "
            "it, or call manage.py run_jobs or manage.py evaluate --save."
        )
    began = time.monotonic()
    answers = _asked(model.folder, suite.rows, done)
    return store(suite, model, answers, time.monotonic() - began, trigger, job)


def serves() -> bool:
    """Whether this process has loaded a model to answer users with."""
    return any(backend.loaded() is not None for backend in backends.built().values())


def _asked(folder: Path, rows: Sequence[Row], done: Done) -> list[Answer]:
    from assistant.backends.onnx import OnnxBackend, Options  # loads the engine

    options = Options(str(folder), threads=1, max_batch=16, max_queue=256)
    backend = OnnxBackend("evaluate", options)
    try:
        backend.check()
        return asyncio.run(
            evaluation.ask_all(backend, rows, done=lambda count: done(count, len(rows)))
        )
    except AssistantError as error:
        raise LoopError(f"The model in {folder} cannot be evaluated: {error}") from error
    finally:
        backend.close()


def store(
    suite: Suite,
    model: Subject,
    answers: Sequence[Answer],
    seconds: float,
    trigger: str,
    job: Job | None = None,
) -> EvaluationRun:
    """The run as a row, with what it lost against the active model's last one."""
    found = evaluation.judged(suite.rows, answers)
    wrong = evaluation.failures(suite.rows, answers, most=len(suite.rows))
    right = _right_ids(suite.rows, wrong)
    against = _last_of_active(suite.name)
    return EvaluationRun.objects.create(
        job=job,
        suite=suite.name[:60],
        model=model.label[:100],
        version=model.version,
        trigger=trigger[:20],
        rows=len(suite.rows),
        seconds=round(seconds, 2),
        figures=_figures(suite, model, answers, found),
        by_kind={kind: asdict(one) for kind, one in scoring.by_kind(found).items()},
        by_intent=_counted((row.wanted, row.right) for row in found if row.wanted),
        right=right,
        failures=wrong[:_MOST_FAILURES],
        regressed=_regressed(against, suite.rows, right),
        against=against,
    )


def _figures(
    suite: Suite, model: Subject, answers: Sequence[Answer], found: Sequence[Judged]
) -> dict[str, Any]:
    report = evaluation.report(model.label, suite.rows, answers)
    for name in ("by", "failures", "model"):
        del report[name]
    groups = ((group_of(row), one) for row, one in zip(suite.rows, found, strict=True))
    counted = _counted((name, _well(name, one)) for name, one in groups if _tells(name, one))
    return {**report, "groups": counted, "rows_sha256": suite.digest, "model_sha256": model.sha256}


def _tells(group: str, row: Judged) -> bool:
    return group in _OUTSIDE or bool(row.wanted)


def _well(group: str, row: Judged) -> bool:
    """In scope the intent has to be right; the others have to be found to be none of ours."""
    return row.band == "out_of_scope" if group in _OUTSIDE else row.right


def _counted(pairs: Iterable[tuple[str | None, bool]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, right in pairs:
        one = found.setdefault(str(name), {"rows": 0, "right": 0})
        one["rows"] += 1
        one["right"] += right
    return dict(sorted(found.items()))


def _right_ids(rows: Sequence[Row], wrong: Iterable[Mapping[str, Any]]) -> list[str]:
    ids = {one["id"] for one in wrong}
    return [row.id for row in rows if row.id not in ids]


def _regressed(
    against: EvaluationRun | None, rows: Sequence[Row], right: Collection[str]
) -> list[str]:
    if against is None:
        return []
    before, now = set(against.right), set(right)
    return [row.id for row in rows if row.id in before and row.id not in now]


def _last_of_active(suite: str) -> EvaluationRun | None:
    """The last run of what answers now; before its first, the last of what answered then."""
    try:
        mine = _runs(suite).filter(figures__model_sha256=subject(None).sha256).first()
    except LoopError:
        mine = None
    return mine or _runs(suite).exclude(trigger="candidate").first()


def _runs(suite: str) -> QuerySet[EvaluationRun]:
    return EvaluationRun.objects.filter(suite=suite)


# -- the gate -------------------------------------------------------------------------------------


def golden_gate(version: ModelVersion, *, job: Job | None = None, done: Done = _nobody) -> Gate:
    """Whether that version may go on: not worse than the active model on the golden set.

    Asks both where that was not done on today's rows. In a process that answers users a job does
    it, and the gate says so.
    """
    try:
        rows = golden_suite()
    except LoopError as error:
        return Gate(None, str(error))
    try:
        mine = _on(rows, version, job, done)
    except _Serving:
        return _later(version)
    except LoopError as error:
        return Gate(False, str(error))
    try:
        theirs = _on(rows, None, job, done)
    except LoopError as error:
        return Gate(None, f"The active model could not be compared to: {error}")
    faults = _faults(mine, theirs)
    why = "; ".join(faults) if faults else f"Not worse than {theirs.model} on {mine.rows} cases"
    return Gate(not faults, f"{why[0].upper()}{why[1:]}.", _compared(mine, theirs))


def _on(suite: Suite, version: ModelVersion | None, job: Job | None, done: Done) -> EvaluationRun:
    """That model's run on these very rows, made if there is none. Raises: LoopError."""
    model = subject(version)
    kept: EvaluationRun | None = (
        _runs(suite.name)
        .filter(figures__model_sha256=model.sha256, figures__rows_sha256=suite.digest)
        .first()
    )
    trigger = "candidate" if version else "baseline"
    return kept or _evaluated(model, suite, trigger, job, done, while_serving=False)


def _later(version: ModelVersion) -> Gate:
    key = f"{Job.Kind.EVALUATE}:gate:{version.sha256[:16]}:{golden_suite().digest[:16]}"
    job = jobs.open_job(
        Job.Kind.EVALUATE, key, why="golden gate", params={"gate": True}, version=version
    )
    if job.state == Job.State.FAILED:
        return Gate(None, f"Its evaluation failed (job {job.pk}): {job.error} Run the job again.")
    return Gate(None, f"It is being evaluated (job {job.pk}); ask again when that is done.")


def _faults(mine: EvaluationRun, theirs: EvaluationRun) -> list[str]:
    """What ``mine`` lost that it must not."""
    limits = settings.ASSISTANT["GOLDEN_GATE"]
    found = []
    for name, what, points in (
        ("intent_accuracy", "right intents", limits["INTENT_POINTS"]),
        ("placeholder_ok", "sound placeholders", limits["ANSWER_POINTS"]),
        ("well_ended", "well ended answers", limits["ANSWER_POINTS"]),
    ):
        lost = _points(theirs.figures.get(name)) - _points(mine.figures.get(name))
        if lost > points + 1e-6:
            found.append(f"{lost:.1f} points fewer {what} (at most {points:g})")
    return found + list(_worse_groups(mine, theirs, limits["KIND_POINTS"], limits["KIND_CASES"]))


def _worse_groups(
    mine: EvaluationRun, theirs: EvaluationRun, points: float, cases: int
) -> Iterator[str]:
    for name in GROUPS:
        now, before = mine.figures["groups"].get(name), theirs.figures["groups"].get(name)
        if now and before:
            lost = before["right"] - now["right"]
            share = 100 * lost / now["rows"]
            if lost > cases and share > points + 1e-6:
                yield f"{share:.1f} points lost of “{name}” (at most {points:g})"


def _points(share: float | None) -> float:
    return 100 * share if share is not None else 0.0


def _compared(mine: EvaluationRun, theirs: EvaluationRun) -> dict[str, Any]:
    names = ("intent_accuracy", "placeholder_ok", "well_ended", "groups")
    return {
        "run": mine.pk,
        "against_run": theirs.pk,
        "against": theirs.model,
        "candidate": {name: mine.figures.get(name) for name in names},
        "active": {name: theirs.figures.get(name) for name in names},
        "regressed": _regressed(theirs, golden_suite().rows, mine.right)[:50],
    }


# -- as a job, and for /metrics -------------------------------------------------------------------


def work_off(work: jobs.Work) -> dict[str, Any]:
    """The handler of evaluations; with ``params["gate"]`` what the golden gate says."""
    work.stage("ask", 0.0)
    version, params = work.job.version, work.job.params
    if params.get("gate") and version is not None:
        gate = golden_gate(version, job=work.job, done=watched(work))
        return {"passed": gate.passed, "why": gate.why, **gate.figures}
    run = evaluate_model(
        version, trigger=params.get("trigger", "staff"), job=work.job, done=watched(work)
    )
    work.say(f"{run.model}: {len(run.right)} of {run.rows} right, {len(run.regressed)} regressed")
    return {"run": run.pk, "model": run.model, "right": len(run.right), "rows": run.rows,
            "regressed": run.regressed[:50]}  # fmt: skip


def watched(work: jobs.Work, begin: float = 0.0, end: float = 1.0) -> Done:
    """Tells ``work`` how far it is, between two shares; ends with Lost where the job was lost."""
    return lambda count, of: work.progress(begin + (end - begin) * count / of)


def run_now(by: Any, version: ModelVersion | None = None) -> Job:
    """A job that evaluates that version, or what answers now; the open one if there is one."""
    waits = Job.objects.filter(kind=Job.Kind.EVALUATE, state__in=Job.OPEN, version=version)
    if (job := waits.exclude(params__gate=True).first()) is not None:
        return job
    key = f"{Job.Kind.EVALUATE}:{version.pk if version else 'active'}:{timezone.now():%FT%T}"
    return jobs.open_job(
        Job.Kind.EVALUATE, key, why="asked by staff", by=by, version=version,
        params={"trigger": "staff"},
    )  # fmt: skip


def latest_scores() -> Iterator[Reading]:
    """For ``/metrics``: the last run of each suite and model of the last month."""
    recent = EvaluationRun.objects.filter(created_at__gte=timezone.now() - _SHOWN_FOR)
    seen = set()
    for run in recent.only("suite", "model", "figures")[:_MOST_SHOWN_RUNS]:
        if (run.suite, run.model) in seen:
            continue
        seen.add((run.suite, run.model))
        for name in _SHOWN:
            value = run.figures.get(name)
            if value is not None:
                labels = {"suite": run.suite, "metric": name,
                          "model": metrics.model_label(run.model)}  # fmt: skip
                yield Reading(metrics.EVALUATION, labels, value)
