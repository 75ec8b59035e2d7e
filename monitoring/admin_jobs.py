"""Jobs, evaluations and golden cases for staff: what runs, what it found, and the buttons.

Looking needs the permission to view; to open a job the permission to add jobs, to approve, cancel
or repeat one the permission to change them. Each of these is written down in the admin's log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from django.contrib import admin, messages
from django.contrib.admin.models import ADDITION, CHANGE, LogEntry
from django.contrib.contenttypes.models import ContentType
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.views.decorators.http import require_POST

from assistant.models import ModelVersion
from conversations.admin import OwnPage
from monitoring import evaluation, jobs, loop, plots, retraining
from monitoring.golden_form import GoldenCaseForm
from monitoring.models import EvaluationRun, GoldenCase, Job

#: A page of a job that is not over is loaded again this often, in seconds.
LOOK_AGAIN_S = 5
#: After so many seconds in the queue it is said that nobody may be working.
_LONG_WAIT_S = 60
_SHOWN_RUNS = 30


def _log(request: HttpRequest, job: Job, flag: int, what: str) -> None:
    LogEntry.objects.create(
        user_id=cast(int, request.user.pk),
        content_type=ContentType.objects.get_for_model(Job),
        object_id=str(job.pk),
        object_repr=str(job),
        action_flag=flag,
        change_message=what,
    )


def _bar(job: Job) -> SafeString:
    return format_html(
        '<progress max="1" value="{}" aria-label="progress">{}</progress> {}',
        f"{job.progress:.3f}", f"{job.progress:.0%}", f"{job.progress:.0%}",
    )  # fmt: skip


# -- jobs -----------------------------------------------------------------------------------------


@admin.register(Job)
class JobAdmin(OwnPage):
    gone = "There is no such job."
    list_display = ["__str__", "state", "stage", "how_far", "why", "created_at"]
    list_filter = ["state", "kind"]
    change_list_template = "admin/monitoring/job/change_list.html"
    change_form_template = "admin/monitoring/job/change_form.html"

    @admin.display(description="progress")
    def how_far(self, job: Job) -> str:
        return _bar(job) if job.state == Job.State.RUNNING else f"{job.progress:.0%}"

    def get_urls(self) -> list[URLPattern]:
        own = [
            path("evaluate/", self._opening(_evaluate), name="monitoring_job_evaluate"),
            path("retrain/", self._opening(_retrain), name="monitoring_job_retrain"),
        ]
        return own + super().get_urls()

    def _opening(self, asked: Callable[[HttpRequest], Job]) -> Any:
        """For POST, by whoever may add jobs: the page of the job that ``asked`` opened."""

        def checked(request: HttpRequest) -> HttpResponse:
            if not request.user.has_perm("monitoring.add_job"):
                raise PermissionDenied
            try:
                job = asked(request)
            except jobs.JobError as error:
                self.message_user(request, str(error), messages.ERROR)
                return HttpResponseRedirect(reverse("admin:monitoring_job_changelist"))
            _log(request, job, ADDITION, "Asked for.")
            return HttpResponseRedirect(_job_url(job))

        return self.admin_site.admin_view(require_POST(checked))

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        told = {"may_open": request.user.has_perm("monitoring.add_job")}
        return super().changelist_view(request, {**told, **(extra_context or {})})

    def acted(self, request: HttpRequest, job: Job) -> HttpResponse:
        if not request.user.has_perm("monitoring.change_job"):
            raise PermissionDenied
        name = next((name for name in _ACTS if name in request.POST), None)
        if name is not None:
            act, done = _ACTS[name]
            try:
                act(job, request.user)
            except jobs.JobError as error:
                self.message_user(request, str(error), messages.ERROR)
            else:
                _log(request, job, CHANGE, done)
                self.message_user(request, done, messages.SUCCESS)
        return HttpResponseRedirect(request.path)

    def shown(self, request: HttpRequest, job: Job) -> HttpResponse:
        """State, progress, log; loaded again while it runs."""
        page = self.page(request, job, self.told(request, job))
        if job.state in (Job.State.QUEUED, Job.State.RUNNING):
            page["Refresh"] = str(LOOK_AGAIN_S)
        return page

    def told(self, request: HttpRequest, job: Job) -> dict[str, Any]:
        may_change = request.user.has_perm("monitoring.change_job")
        waited = (timezone.now() - job.created_at).total_seconds()
        return {
            "title": f"{job.get_kind_display()}: {job.get_state_display().lower()}",
            "bar": _bar(job),
            "result": list(_told(job.result)),
            "runs": job.evaluations.all()[:10],
            "acts": _acts(job) if may_change else [],
            "log": "\n".join(job.log.splitlines()[::-1]),
            "alive_s": (timezone.now() - (job.heartbeat_at or job.created_at)).total_seconds(),
            "waits_long": job.state == Job.State.QUEUED and waited > _LONG_WAIT_S,
        }


def _evaluate(request: HttpRequest) -> Job:
    """Raises: JobError."""
    wanted = request.POST.get("version", "")
    version = ModelVersion.objects.filter(pk=wanted).first() if wanted.isdigit() else None
    if wanted and version is None:
        raise jobs.JobError("There is no such model version. Load the page again.")
    return loop.run_now(request.user, version)


def _retrain(request: HttpRequest) -> Job:
    """Raises: JobError."""
    return retraining.retrain_now(request.user)


#: The buttons of a job's page: what each does, and what is said and logged then.
_ACTS: dict[str, tuple[Callable[[Job, Any], None], str]] = {
    "approve": (jobs.approve, "Approved."),
    "cancel": (lambda job, by: jobs.cancel(job), "Cancelled."),
    "again": (lambda job, by: jobs.again(job), "Queued once more."),
}
_LABELS = {"approve": "Approve", "cancel": "Cancel", "again": "Run again"}


def _acts(job: Job) -> list[tuple[str, str]]:
    """Name and label of the buttons that fit its state."""
    fitting = {
        Job.State.PROPOSED: ["approve", "cancel"],
        Job.State.QUEUED: ["cancel"],
        Job.State.RUNNING: ["cancel"],
        Job.State.FAILED: ["again"],
        Job.State.CANCELLED: ["again"],
    }
    return [(name, _LABELS[name]) for name in fitting.get(Job.State(job.state), [])]


def _told(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a job found, as lines; figures within figures are on the pages of its runs."""
    for name, value in result.items():
        if isinstance(value, list):
            value = ", ".join(str(one) for one in value) or "none"
        if name == "corrections" and isinstance(value, dict):
            left = value.get("left_out") or {}
            why = ", ".join(f"{count} {reason}" for reason, count in left.items())
            value = f"{value.get('rows')} learned" + (f"; left out: {why}" if why else "")
        if not isinstance(value, dict):
            yield name.replace("_", " "), "-" if value is None else str(value)


def _job_url(job: Job) -> str:
    return reverse("admin:monitoring_job_change", args=[job.pk])


# -- evaluations ----------------------------------------------------------------------------------


@admin.register(EvaluationRun)
class EvaluationRunAdmin(OwnPage):
    gone = "There is no such run."
    list_display = ["created_at", "suite", "model", "trigger", "well", "intents", "worse"]
    list_filter = ["suite", "trigger"]
    search_fields = ["model"]
    change_list_template = "admin/monitoring/evaluationrun/change_list.html"
    change_form_template = "admin/monitoring/evaluationrun/change_form.html"

    def get_queryset(self, request: HttpRequest) -> Any:
        return super().get_queryset(request).defer("failures", "by_intent", "by_kind")

    @admin.display(description="right")
    def well(self, run: EvaluationRun) -> str:
        return f"{len(run.right)} of {run.rows}"

    @admin.display(description="intents")
    def intents(self, run: EvaluationRun) -> str:
        return _percent(run.figures.get("intent_accuracy"))

    @admin.display(description="regressed")
    def worse(self, run: EvaluationRun) -> str:
        return str(len(run.regressed)) if run.against_id else "-"

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        told = {
            "may_open": request.user.has_perm("monitoring.add_job"),
            "plot": history(loop.GOLDEN) if self.has_view_permission(request) else None,
        }
        return super().changelist_view(request, {**told, **(extra_context or {})})

    def told(self, request: HttpRequest, run: EvaluationRun) -> dict[str, Any]:
        """What it said of each intent, and the cases that were wrong."""
        return {
            "title": str(run),
            "figures": [(name, _percent(run.figures.get(key))) for key, name in _FIGURES],
            "groups": list(_groups(run)),
            "intents": list(_intents(run)),
            "regressed": list(_cases(run, run.regressed)),
            "failures": list(_failures(run)),
        }


_FIGURES = (
    ("intent_accuracy", "right intents"),
    ("scope_auroc", "scope, AUROC"),
    ("coverage", "answered at 5 % error"),
    ("ece", "calibration error (ECE)"),
    ("placeholder_ok", "sound placeholders"),
    ("well_ended", "well ended"),
    ("answer_similarity", "likeness to reference answers"),
)


def _percent(value: Any) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _share(counted: dict[str, Any]) -> float:
    return float(counted["right"] / max(1, counted["rows"]))


def _groups(run: EvaluationRun) -> Iterator[tuple[str, str, str]]:
    """Each group: its name, how many are right, and the share before."""
    before = run.against.figures.get("groups", {}) if run.against else {}
    for name in loop.GROUPS:
        if one := run.figures.get("groups", {}).get(name):
            then = _percent(_share(before[name])) if name in before else "-"
            yield name, f"{one['right']} of {one['rows']} ({_percent(_share(one))})", then


def _recent(run: EvaluationRun) -> list[EvaluationRun]:
    """The runs of its suite up to it, the oldest first."""
    rows = EvaluationRun.objects.filter(suite=run.suite, created_at__lte=run.created_at)
    return list(rows.only("by_intent")[:_SHOWN_RUNS])[::-1]


def _intents(run: EvaluationRun) -> Iterator[dict[str, Any]]:
    """Every intent, the worst first: counts, and its share over the recent runs as a small line."""
    recent = _recent(run)
    for name, one in sorted(run.by_intent.items(), key=lambda item: (_share(item[1]), item[0])):
        shares = [_share(r.by_intent[name]) for r in recent if name in r.by_intent]
        told = f"{one['right']} of {one['rows']}"
        yield {"name": name, "told": told, "share": _percent(_share(one)), "line": spark(shares)}


def spark(shares: list[float]) -> str:
    """The points of a line through ``shares`` (0..1), 100 wide and 20 high; empty for fewer than
    two."""
    if len(shares) < 2:
        return ""
    step = 100 / (len(shares) - 1)
    return " ".join(f"{at * step:.1f},{18 - 16 * share:.1f}" for at, share in enumerate(shares))


def _cases(run: EvaluationRun, ids: list[str]) -> Iterator[dict[str, str]]:
    """Each case with its question, and where it can be looked at."""
    asked = _questions()
    failed = {one["id"] for one in run.failures}
    for id_ in ids:
        own = id_.removeprefix("case-")
        href = f"#row-{id_}" if id_ in failed else ""
        if own != id_ and own.isdigit():
            href = reverse("admin:monitoring_goldencase_change", args=[own])
        yield {"id": id_, "question": asked.get(id_, ""), "href": href}


def _failures(run: EvaluationRun) -> Iterator[dict[str, Any]]:
    asked = _questions()
    for one in run.failures:
        yield {**one, "faults": ", ".join(one["faults"]), "question": asked.get(one["id"], "")}


def _questions() -> dict[str, str]:
    """By id, as far as the golden set still has them."""
    try:
        rows = loop.golden_suite().rows
    except loop.LoopError:
        return {}
    return {row.id: row.question[:200] for row in rows}


def history(suite: str) -> plots.Plot:
    """Right intents of the recent runs, a line a model."""
    rows = EvaluationRun.objects.filter(suite=suite).only("model", "figures", "created_at")
    runs = list(rows[:_SHOWN_RUNS])[::-1]
    names = list(dict.fromkeys(run.model for run in runs))
    sheet = plots.Sheet(
        "history",
        "Right intents of the golden set",
        "One point a run, one colour a model.",
        "No evaluation yet. Press “Evaluate what answers now”, or wait for the night.",
        [f"{run.created_at:%d %b %H:%M}" for run in runs],
        lambda share: f"{share:.0%}",
        least=1.0,
    )
    return plots.lines(sheet, [plots.Series(name, _of(runs, name)) for name in names[-8:]])


def _of(runs: list[EvaluationRun], model: str) -> list[float | None]:
    """The model's share at each run; between two of its own, the last one still holds."""
    found: list[float | None] = []
    mine = [at for at, run in enumerate(runs) if run.model == model]
    for at, run in enumerate(runs):
        own = run.figures.get("intent_accuracy") if run.model == model else None
        held = found[-1] if found and at <= mine[-1] else None
        found.append(own if own is not None else held)
    return found


# -- golden cases ---------------------------------------------------------------------------------


@admin.register(GoldenCase)
class GoldenCaseAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    form = GoldenCaseForm
    fields = ["text", "intent", "scope", "active", "note"]
    list_display = ["__str__", "intent", "scope", "active", "created_at"]
    list_filter = ["active", "scope", "intent"]

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        count = len(evaluation.read_golden())
        title = f"Golden cases of staff (besides the {count} that ship)"
        return super().changelist_view(request, {"title": title, **(extra_context or {})})
