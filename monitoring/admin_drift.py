"""Drift for staff: each feature over time against its threshold, a look now, a new reference.

Looking at pages needs the permission to view; a look the one to add reports, a new reference the
one to add references. Both are written down. There are figures here and no user's word.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path
from django.views.decorators.http import require_POST

from conversations.admin import CheapList, OwnPage
from monitoring import drift, plots, references
from monitoring.drift_scale import NAMES
from monitoring.models import DriftReference, DriftReport

_LOOK, _REFER = "monitoring.add_driftreport", "monitoring.add_driftreference"
#: Reports in a picture, the newest.
SHOWN = 90
TITLES = {
    "intents": ("Intents", "How else the questions are spread over the intents (PSI)."),
    "confidence": ("Confidence", "How else the model's confidence is spread (PSI)."),
    "embedding": ("Meaning", "Distance between the questions' mean embeddings."),
    "out_of_scope": (
        "Out of scope",
        "More questions that are not ours (difference of angles).",
    ),
    "degraded": ("Degraded", "More answers that are not the model's best (difference of angles)."),
    "feedback": ("Thumbs down", "More answers that readers disliked (difference of angles)."),
    "language": ("Language", "More tokens a character, as in another language (logarithm)."),
    "new_words": ("New words", "Share of words the reference has not seen (angle)."),
    "new_subject": ("New subject", "Share of users who say the most frequent new word (angle)."),
}


def feature_plots(reports: list[DriftReport]) -> list[plots.Plot]:
    """One picture a feature, its score and its threshold; ``reports`` the oldest first."""
    names = [f"{report.to_at:%m-%d %H:%M}" for report in reports]
    days = [f"{report.to_at:%m-%d}" for report in reports]
    return [_plot(name, names, days, reports) for name in NAMES]


def _plot(
    name: str, columns: list[str], ticks: list[str], reports: list[DriftReport]
) -> plots.Plot:
    title, about = TITLES[name]
    sheet = plots.Sheet(
        key=f"drift-{name}",
        title=title,
        about=about,
        empty="Not measured yet.",
        columns=columns,
        ticks=ticks,
        write=lambda value: f"{value:.3f}",
    )
    series = [plots.Series(word, [_value(report, name, word) for report in reports])
              for word in ("score", "threshold")]  # fmt: skip
    return plots.lines(sheet, series)


def _value(report: DriftReport, name: str, word: str) -> float | None:
    """A figure of a stored report; a picture has no place for less than nothing."""
    found = report.features.get(name, {}).get(word)
    return None if found is None else max(0.0, float(found))


def rows_of(report: DriftReport) -> list[dict[str, Any]]:
    """The features of one report, for its table."""
    return [
        {"title": TITLES[name][0], "about": TITLES[name][1], "times": drift.ratio(found), **found}
        for name in NAMES
        if (found := report.features.get(name)) is not None
    ]


@admin.register(DriftReport)
class DriftReportAdmin(OwnPage):
    gone = "This report is gone."
    list_display = ["__str__", "breached", "drifting", "turns", "created_at"]
    list_filter = ["breached"]
    ordering = ["-created_at", "-id"]
    change_list_template = "admin/monitoring/driftreport/change_list.html"
    change_form_template = "admin/monitoring/driftreport/change_form.html"

    def get_urls(self) -> list[URLPattern]:
        own = [
            path("look/", self._doing(self._look, _LOOK), name="monitoring_drift_look"),
            path("refer/", self._doing(self._refer, _REFER), name="monitoring_drift_refer"),
        ]
        return own + super().get_urls()

    def _doing(self, view: Any, permission: str) -> Any:
        """``view`` for POST, by whoever has that permission."""

        def checked(request: HttpRequest) -> HttpResponse:
            if not request.user.has_perm(permission):
                raise PermissionDenied
            try:
                view(request)
            except references.DriftError as error:
                self.message_user(request, str(error), messages.ERROR)
            return HttpResponseRedirect(self.home_url())

        return self.admin_site.admin_view(require_POST(checked))

    @admin.display(description="drifts")
    def drifting(self, report: DriftReport) -> str:
        return ", ".join(row["title"].lower() for row in rows_of(report) if row["breached"])

    # -- the buttons

    def _look(self, request: HttpRequest) -> None:
        """Raises: DriftError."""
        report = drift.look()
        if report is None:
            words = f"Too few turns to compare: {drift.LEAST_WINDOW} are needed after the reference"
            self.message_user(request, f"{words}'s end. Look again later.", messages.WARNING)
            return
        self.log_change(request, report, "Looked for drift.")
        words = "Drift was found." if report.breached else "There is no drift."
        level = messages.WARNING if report.breached else messages.SUCCESS
        self.message_user(request, f"{words} {report.turns} turns were compared.", level)

    def _refer(self, request: HttpRequest) -> None:
        """The turns of the report that is named, else the newest. Raises: DriftError."""
        key = request.POST.get("report", "")
        span: Any = (None, None)
        if key:
            report = DriftReport.objects.filter(pk=key).first() if key.isdecimal() else None
            if report is None:
                raise references.DriftError("This report is gone. Choose another.")
            span = (references.just_before(report.from_at), report.to_at)
        made = references.reference(*span)
        self.log_addition(request, made, f"New reference of {made.turns} turns.")
        words = f"From now on windows are compared to these {made.turns} turns."
        self.message_user(request, words, messages.SUCCESS)

    # -- the pages

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        reports = list(DriftReport.objects.filter(reference__active=True)[:SHOWN])[::-1]
        context = {
            "reference": references.current(),
            "collecting": references.collecting(),
            "plots": feature_plots(reports) if reports else [],
            "may_look": request.user.has_perm(_LOOK),
            "may_refer": request.user.has_perm(_REFER),
            "least_reference": references.LEAST,
        }
        return super().changelist_view(request, {**context, **(extra_context or {})})

    def told(self, request: HttpRequest, report: DriftReport) -> dict[str, Any]:
        """One window against its reference."""
        return {
            "title": "Drift" if report.breached else "No drift",
            "rows": rows_of(report),
            "may_refer": request.user.has_perm(_REFER),
        }


@admin.register(DriftReference)
class DriftReferenceAdmin(CheapList):
    list_display = ["__str__", "active", "model", "from_at", "to_at", "created_at"]
    list_filter = ["active"]
    fields = ["turns", "model", "from_at", "to_at", "active", "created_at"]
    ordering = ["-created_at", "-id"]
