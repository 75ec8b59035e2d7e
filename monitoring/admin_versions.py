"""The registry for staff: which models there are, what their gates measured, the way up and back.

Whoever may view model versions sees them and their audit trail; to promote, reject or roll back one
needs the permission to change them, a reason, and a second look. Nobody edits or deletes a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html

from assistant import registry
from assistant.models import ModelVersion, VersionChange
from assistant.registry import MOVES, RegistryError, State
from conversations.admin import OwnPage, ReadOnly
from monitoring import promotion

#: Changes shown below a version, the newest.
SHOWN_CHANGES = 50
_GATES = ("golden", "shadow", "canary")
_SAID = {True: "passed", False: "failed", None: "open"}


class WhyForm(forms.Form):
    why = forms.CharField(
        label="Why", max_length=300, widget=forms.TextInput(attrs={"class": "vTextField"})
    )


@dataclass(frozen=True, slots=True)
class Act:
    """A button: what it says, what it warns of, when it is there, and what it does."""

    label: str
    warning: str
    fits: Callable[[ModelVersion], bool]
    do: Callable[[ModelVersion, Any, str], str]


@admin.register(ModelVersion)
class ModelVersionAdmin(OwnPage):
    gone = "There is no such version."
    list_display = ["__str__", "shown_state", "golden", "shadow", "canary", "changed_at"]
    list_filter = ["state"]
    search_fields = ["name", "version", "sha256"]
    change_form_template = "admin/monitoring/modelversion/change_form.html"
    confirm_template = "admin/monitoring/modelversion/confirm.html"

    def get_urls(self) -> list[URLPattern]:
        confirm = self.admin_site.admin_view(self.confirm_view)
        return [
            path("<path:object_id>/do/<slug:name>/", confirm, name="assistant_modelversion_do"),
            *super().get_urls(),
        ]

    def has_move_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("assistant.change_modelversion")

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        may_look = request.user.has_perm("assistant.view_modelversion")
        return may_look or self.has_move_permission(request)

    # -- the list

    @admin.display(description="state", ordering="state")
    def shown_state(self, row: ModelVersion) -> str:
        share = f" ({row.canary_percent} %)" if row.state == State.CANARY else ""
        bold = row.state in registry.SINGLE
        return format_html("<strong>{}</strong>{}" if bold else "{}{}", row.state, share)

    @admin.display(description="golden")
    def golden(self, row: ModelVersion) -> str:
        return _said(row, "golden")

    @admin.display(description="shadow")
    def shadow(self, row: ModelVersion) -> str:
        return _said(row, "shadow")

    @admin.display(description="canary")
    def canary(self, row: ModelVersion) -> str:
        return _said(row, "canary")

    # -- one of them

    def told(self, request: HttpRequest, row: ModelVersion) -> dict[str, Any]:
        """What is known of it, its buttons and its audit trail; nothing can be edited."""
        return {
            "title": row.label,
            "gates": [_gate(row, name) for name in _GATES if name in row.gates],
            "changes": row.changes.select_related("by")[:SHOWN_CHANGES],
            "acts": _acts_for(row) if self.has_move_permission(request) else [],
        }

    def confirm_view(self, request: HttpRequest, object_id: str, name: str) -> HttpResponse:
        """What is about to happen, with a field for the reason; POST does it."""
        if not self.has_move_permission(request):
            raise PermissionDenied
        row, act = self.found(request, unquote(object_id)), ACTS.get(name)
        if row is None:
            self.message_user(request, self.gone, messages.WARNING)
        if row is None or act is None:
            return HttpResponseRedirect(self.home_url())
        form = WhyForm(request.POST or None)
        if request.method == "POST" and form.is_valid():
            self._do(request, row, act, form.cleaned_data["why"])
            return HttpResponseRedirect(_page(row))
        told = {
            "title": f"{act.label}: {row.label}",
            "act": act,
            "form": form,
            "fits": act.fits(row),
        }
        return self.page(request, row, told, template=self.confirm_template)

    def _do(self, request: HttpRequest, row: ModelVersion, act: Act, why: str) -> None:
        """Do it and say what came of it. The registry keeps the audit trail; so does the log."""
        try:
            told = act.do(row, request.user, why)
        except RegistryError as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self.log_change(request, row, f"{act.label}: {told} Why: {why}")
        self.message_user(request, told, messages.SUCCESS)


@admin.register(VersionChange)
class VersionChangeAdmin(ReadOnly, admin.ModelAdmin):  # type: ignore[type-arg]
    """The audit trail of all versions."""

    list_display = ["at", "version", "from_state", "to_state", "by", "forced", "why"]
    list_filter = ["to_state", "forced"]
    list_select_related = ["version", "by"]
    date_hierarchy = "at"


# -- buttons ---------------------------------------------------------------------------------------


def _advance(row: ModelVersion, by: Any, why: str) -> str:
    step = promotion.advance(row, by=by, why=why)
    return f"{_moved(*step.moved)} {step.gate.why if step.gate is not None else ''}"


def _force(row: ModelVersion, by: Any, why: str) -> str:
    step = promotion.promote(row, State.ACTIVE, by=by, why=why, force=True)
    return f"{_moved(*step.moved)} No gate was asked."


def _reject(row: ModelVersion, by: Any, why: str) -> str:
    was = row.state
    return _moved(was, promotion.reject(row, by=by, why=why).state)


def _back(row: ModelVersion, by: Any, why: str) -> str:
    return f"Now active: {promotion.roll_back(by=by, why=why).label}."


def _restore(row: ModelVersion, by: Any, why: str) -> str:
    return f"Now active: {promotion.roll_back(by=by, why=why, to=row).label}."


def _moved(was: str, now: str) -> str:
    return f"It stays {was}." if was == now else f"It was {was} and is {now} now."


ACTS: dict[str, Act] = {
    "promote": Act(
        "Promote",
        "The gate out of this state is asked. If it is passed, the version goes one step on; if it "
        "fails, the version is rejected.",
        lambda row: row.state in promotion.STEPS,
        _advance,
    ),
    "reject": Act(
        "Reject",
        "The version is taken out. A canary's conversations go on with the active model.",
        lambda row: State.REJECTED in MOVES[row.state],
        _reject,
    ),
    "force": Act(
        "Make active without gates",
        "No gate is asked, and all users are answered by this version within seconds. The audit "
        "trail says that it was forced.",
        lambda row: row.state in promotion.STEPS,
        _force,
    ),
    "rollback": Act(
        "Roll back",
        "The version that was active before this one answers again, within seconds.",
        lambda row: row.state == State.ACTIVE,
        _back,
    ),
    "restore": Act(
        "Make active again",
        "All users are answered by this version again, within seconds.",
        lambda row: row.state == State.RETIRED,
        _restore,
    ),
}


def _acts_for(row: ModelVersion) -> list[dict[str, Any]]:
    return [
        {"label": act.label, "url": _page(row, name), "first": name in {"promote", "rollback"}}
        for name, act in ACTS.items()
        if act.fits(row)
    ]


def _page(row: ModelVersion, act: str = "") -> str:
    if act:
        return reverse("admin:assistant_modelversion_do", args=[row.pk, act])
    return reverse("admin:assistant_modelversion_change", args=[row.pk])


# -- gates -----------------------------------------------------------------------------------------


def _said(row: ModelVersion, name: str) -> str:
    return _SAID.get(row.gates[name].get("passed"), "open") if name in row.gates else "-"


def _gate(row: ModelVersion, name: str) -> dict[str, Any]:
    """One gate as rows of a table: names of figures, and what they were."""
    kept = cast("dict[str, Any]", row.gates[name])
    told = {key: kept[key] for key in kept if key not in {"passed", "why", "at", "figures"}}
    figures = {**told, **(kept.get("figures") or {})}
    return {
        "name": name,
        "said": _said(row, name),
        "why": kept.get("why", ""),
        "at": str(kept.get("at", ""))[:16].replace("T", " "),
        "figures": [(key.replace("_", " "), text) for key, text in _flat(figures)],
    }


def _flat(figures: dict[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Nested figures, one line each, at most a screenful."""
    found: list[tuple[str, str]] = []
    for key, value in figures.items():
        if isinstance(value, dict):
            found += _flat(value, f"{before}{key}, ")
        else:
            found.append((f"{before}{key}", _text(value)))
    return found[:80]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value[:20])) or "none"
    return "unknown" if value is None else str(value)[:300]
