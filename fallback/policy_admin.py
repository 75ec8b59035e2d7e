"""The admin page of the route: its policy, a sentence to try, breakers, and the kept answers.

Every change is written down in the admin's log. Needs the permission to change policies, but for
looking and trying.
"""

from __future__ import annotations

from typing import Any, cast

from asgiref.sync import async_to_sync
from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.views.decorators.http import require_POST

from assistant.errors import AssistantError
from fallback import answers, breaker, cache, explain, rulebook, shared
from fallback.circuit import State
from fallback.models import PolicyChange
from fallback.policy import policy

_STATES = {State.CLOSED: "well", State.HALF_OPEN: "on trial", State.OPEN: "left alone"}


class ForceForm(forms.Form):
    """Take a backend off, or put it on, for some hours; or let the breaker decide again."""

    target = forms.CharField(max_length=100)
    state = forms.ChoiceField(
        choices=[("open", "off"), ("closed", "on"), ("", "by itself")], required=False
    )
    hours = forms.IntegerField(min_value=1, max_value=breaker.MOST_FORCED_S // 3600, required=False)
    note = forms.CharField(max_length=200, required=False)


class PurgeForm(forms.Form):
    """All three empty: every kept answer goes."""

    question = forms.CharField(max_length=4000, required=False)
    intent = forms.CharField(max_length=60, required=False)
    model = forms.CharField(max_length=200, required=False)


@admin.register(PolicyChange)
class PolicyChangeAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["__str__", "active", "steps", "confidence_min", "rule_score", "created_at"]
    list_filter = ["active"]
    change_list_template = "admin/fallback/policychange/change_list.html"

    def save_model(self, request: HttpRequest, obj: PolicyChange, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        if failing := rulebook.failing(rulebook.current()):
            words = f"With this policy {len(failing)} tests of rules fail: {failing[0]}"
            self.message_user(request, f"{words}; see manage.py check_rules.", messages.WARNING)

    def get_urls(self) -> list[URLPattern]:
        own = [
            path("force/", self._changing(self._force), name="fallback_force"),
            path("purge/", self._changing(self._purge), name="fallback_purge"),
        ]
        return own + super().get_urls()

    def _changing(self, view: Any) -> Any:
        """``view`` for POST, by whoever may change policies."""

        def checked(request: HttpRequest) -> HttpResponse:
            if not self.has_change_permission(request):
                raise PermissionDenied
            view(request)
            return HttpResponseRedirect(reverse("admin:fallback_policychange_changelist"))

        return self.admin_site.admin_view(require_POST(checked))

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        query = request.GET.copy()
        sentence = query.pop("try", [""])[0][: settings.ASSISTANT_MAX_TEXT_CHARS]
        request.GET = cast(Any, query)  # the list knows no such filter
        context = {
            "tried": sentence,
            "rungs": self._tried(request, sentence) if sentence.strip() else [],
            "in_force": answers.known().policy or policy(),
            "backends": _backends(),
            "may_change": self.has_change_permission(request),
        }
        return super().changelist_view(request, {**context, **(extra_context or {})})

    def _tried(self, request: HttpRequest, sentence: str) -> list[explain.Rung]:
        try:
            return async_to_sync(explain.rungs)(explain.first_question(sentence))
        except AssistantError as error:
            self.message_user(request, error.message, messages.ERROR)
            return []

    def _force(self, request: HttpRequest) -> None:
        form = ForceForm(request.POST)
        if not form.is_valid():
            self.message_user(request, form.errors.as_text(), messages.ERROR)
            return
        told = form.cleaned_data
        for_s = 3600 * (told["hours"] or breaker.USUAL_FORCED_S // 3600)
        try:
            state = cast(Any, told["state"] or None)
            breaker.force(told["target"], state, by=request.user, note=told["note"], for_s=for_s)
        except ValueError as error:
            self.message_user(request, str(error), messages.ERROR)
        except shared.Away:
            words = "The cache is away: this process obeys now, the others when it is back."
            self.message_user(request, words, messages.WARNING)
        else:
            self.message_user(request, f"{told['target']} is changed.", messages.SUCCESS)

    def _purge(self, request: HttpRequest) -> None:
        form = PurgeForm(request.POST)
        if not form.is_valid():
            self.message_user(request, form.errors.as_text(), messages.ERROR)
            return
        chosen = {name: value for name, value in form.cleaned_data.items() if value}
        try:
            cache.purge(**chosen)
        except shared.Away:
            words = "The cache is away, so nothing was purged. Try again when it is back."
            self.message_user(request, words, messages.ERROR)
            return
        _log(request, f"purged kept answers: {', '.join(chosen) or 'all'}")
        self.message_user(request, "They are not given again.", messages.SUCCESS)


def _backends() -> list[dict[str, Any]]:
    """What the page tells of each backend that the policy may ask."""
    forced = breaker.maintenance()
    return [
        {"name": name, "state": _STATES[State(state)], "forced": forced.get(name)}
        for name, state in breaker.states().items()
    ]


def _log(request: HttpRequest, what: str) -> None:
    LogEntry.objects.create(
        user_id=cast(int, request.user.pk),
        object_repr="kept answers",
        action_flag=CHANGE,
        change_message=what,
    )
