"""How things stand: results of evaluations, shadow and drift over time, and what is so right now.

The half of the staff's page that is read from results and from this process instead of rollups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from assistant import backends
from assistant.models import ModelVersion, VersionChange
from fallback import breaker
from fallback.circuit import State
from monitoring import plots, rollups
from monitoring.figures import Window, listed, named, percent, row, score
from monitoring.models import DriftReport, EvaluationRun, Job, ShadowPair
from monitoring.plots import Plot, Series, Sheet

#: Rows of the lists, runs and reports of the plots, and pairs that are looked at.
MOST_ROWS, MOST_RUNS, MOST_PAIRS = 10, 30, 5_000
#: Different candidates and features in one picture.
MOST_SERIES = 7
#: What evaluations are drawn by.
_SCORES = ("intent_accuracy", "scope_auroc", "coverage", "answer_similarity")
_BREAKER = {State.CLOSED: "well", State.HALF_OPEN: "on trial", State.OPEN: "left alone"}


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a list: its cells, and where more is."""

    cells: tuple[str, ...]
    href: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """Something that is so right now, as a table. ``empty``: what to do if it has no lines."""

    key: str
    title: str
    head: tuple[str, ...]
    lines: tuple[Line, ...]
    empty: str
    href: str = ""
    note: str = ""


# --- Plots of results ----------------------------------------------------------------------------


def results(window: Window) -> Iterable[Plot]:
    yield _evaluations(window.end)
    yield _shadow(window)
    yield _drift(window.end)


def _evaluations(end: datetime) -> Plot:
    runs = list(
        EvaluationRun.objects.filter(suite="golden", created_at__lte=end + rollups.SETTLE * 5)
        .defer("by_kind", "by_intent", "right", "failures", "regressed")
        .order_by("-created_at", "-id")[:MOST_RUNS]
    )[::-1]
    sheet = Sheet(
        "evaluations",
        "Evaluation",
        "Scores of the golden set, one column a run, the newest on the right.",
        "No evaluation is stored yet. Run one: manage.py evaluate, or the button at the jobs.",
        [f"{run.created_at:%d %b %H:%M} {run.model}" for run in runs],
        score,
        [f"{run.created_at:%d %b}" for run in runs],
        least=1.0,
        href=listed(EvaluationRun),
        hrefs=[row(EvaluationRun, run.pk) for run in runs],
        note=f"The newest {MOST_RUNS} at most, whatever the range.",
    )
    names = [name for name in _SCORES if any(_figure(run, name) is not None for run in runs)]
    return plots.lines(
        sheet,
        [Series(name.replace("_", " "), [_figure(run, name) for run in runs]) for name in names],
    )


def _figure(run: EvaluationRun, name: str) -> float | None:
    value = run.figures.get(name)
    return float(value) if isinstance(value, int | float) else None


def _shadow(window: Window) -> Plot:
    """Share of the newest pairs in which candidate and live model agreed, by candidate."""
    rows = ShadowPair.objects.order_by("-id").values_list(
        "created_at", "agreed", "version__name", "version__version", "version_id"
    )[:MOST_PAIRS]
    starts = window.starts()
    by_version: dict[tuple[str, int], list[list[bool]]] = {}
    for at, agreed, name, version, pk in rows:
        if window.begin <= at < window.end:
            columns = by_version.setdefault((f"{name}@{version}", pk), [[] for _ in starts])
            columns[window.column(at)].append(agreed)
    sheet = Sheet(
        "shadow",
        "Shadow agreement",
        "Share of questions that a candidate took as the live model did.",
        "No candidate answered beside the live model in this range. Move one to shadow in "
        "“Model versions”.",
        [start.strftime(window.range.format) for start in starts],
        percent,
        window.ticks(),
        least=1.0,
        href=listed(ShadowPair),
    )
    series = [
        Series(
            label,
            [sum(column) / len(column) if column else None for column in columns],
            listed(ShadowPair, version__id__exact=pk, agreed__exact=0),
        )
        for (label, pk), columns in sorted(by_version.items())[:MOST_SERIES]
    ]
    return plots.lines(sheet, series)


def _drift(end: datetime) -> Plot:
    """Every feature as a multiple of its threshold, so that one line tells for all."""
    reports = list(DriftReport.objects.filter(created_at__lte=end + rollups.SETTLE * 5)[:MOST_RUNS])
    reports.reverse()
    names = sorted({name for report in reports for name in report.features})[:MOST_SERIES]
    sheet = Sheet(
        "drift",
        "Drift",
        "How far questions are from the reference, as a multiple of each threshold: above the "
        "line is drift.",
        "No drift report yet. Run the drift job when some hundred questions were asked.",
        [f"{report.to_at:%d %b %H:%M}" for report in reports],
        score,
        [f"{report.to_at:%d %b}" for report in reports],
        least=1.2,
        limit=1.0,
        href=listed(DriftReport),
        hrefs=[row(DriftReport, report.pk) for report in reports],
        note=f"The newest {MOST_RUNS} reports at most, whatever the range.",
    )
    return plots.lines(
        sheet,
        [
            Series(name.replace("_", " "), [_strength(report, name) for report in reports])
            for name in names
        ],
    )


def _strength(report: DriftReport, name: str) -> float | None:
    told = report.features.get(name)
    if not isinstance(told, Mapping) or not told.get("threshold"):
        return None
    return float(told.get("score") or 0.0) / float(told["threshold"])


# --- What is so now ------------------------------------------------------------------------------


def listings() -> Iterable[Listing]:
    yield _breakers()
    yield _engines()
    yield _versions()
    yield _changes()
    yield _jobs()


def _breakers() -> Listing:
    forced = breaker.maintenance()
    lines = tuple(
        Line((name, _BREAKER[State(state)], forced[name].note if name in forced else ""))
        for name, state in breaker.states().items()
    )
    href = named("fallback_policychange_changelist")
    head = ("Backend", "State", "Forced by staff")
    return Listing("breakers", "Breakers", head, lines, "No backend is set up.", href)


def _engines() -> Listing:
    lines = []
    for alias, backend in backends.built().items():
        engine = backend.loaded()
        if engine is not None and engine.manifest is not None:
            stats = engine.stats()
            name = f"{engine.manifest.name}@{engine.manifest.version}"
            figures = (
                f"{stats.running} of {stats.slots}",
                f"{stats.waiting} of {engine.config.max_queue}",
            )
            lines.append(Line((alias, name, stats.state, *figures, percent(stats.kv_usage))))
    return Listing(
        "engines",
        "Engine",
        ("Backend", "Model", "State", "Running", "Waiting", "Memory used"),
        tuple(lines),
        "No model is loaded in the process that made this page. It is with the first question.",
        note="Of the process that made this page.",
    )


def _versions() -> Listing:
    lines = tuple(
        Line(
            (
                version.label,
                version.state
                + (f", {version.canary_percent} %" if version.state == "canary" else ""),
                ", ".join(f"{name}: {_passed(told)}" for name, told in version.gates.items()),
                f"{version.created_at:%Y-%m-%d %H:%M}",
            ),
            row(ModelVersion, version.pk),
        )
        for version in ModelVersion.objects.all()[:MOST_ROWS]
    )
    return Listing(
        "versions",
        "Model versions",
        ("Version", "State", "Gates", "Since"),
        lines,
        "None is registered: the model of the settings answers. See manage.py models.",
        named("assistant_modelversion_changelist"),
    )


def _passed(told: object) -> str:
    passed = told.get("passed") if isinstance(told, Mapping) else None
    return {True: "passed", False: "failed"}.get(passed, "open")  # type: ignore[arg-type]


def _changes() -> Listing:
    rows = VersionChange.objects.select_related("version", "by")[:MOST_ROWS]
    lines = tuple(
        Line(
            (
                f"{change.at:%Y-%m-%d %H:%M}",
                change.version.label,
                f"{change.from_state or 'new'} → {change.to_state}"
                + (" (forced)" if change.forced else ""),
                change.by.get_username() if change.by else "by itself",
                change.why,
            ),
            row(ModelVersion, change.version_id),
        )
        for change in rows
    )
    head = ("When", "Version", "Change", "Who", "Why")
    empty = "Nothing was changed yet."
    return Listing("changes", "Who changed which version", head, lines, empty)


def _jobs() -> Listing:
    rows = Job.objects.only("kind", "state", "stage", "progress", "why", "error", "created_at")[
        :MOST_ROWS
    ]
    lines = tuple(
        Line(
            (
                str(job),
                job.state
                + (f", {job.stage} {percent(job.progress)}" if job.state == "running" else ""),
                job.error or job.why,
                f"{job.created_at:%Y-%m-%d %H:%M}",
            ),
            row(Job, job.pk),
        )
        for job in rows
    )
    return Listing(
        "jobs",
        "Jobs",
        ("Job", "State", "Why", "Since"),
        lines,
        "None yet. A worker, or manage.py run_jobs, runs what is due.",
        listed(Job),
    )
