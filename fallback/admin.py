"""Rules and reviewed answers, edited by staff; live at once.

Lists are written one entry a line. A rule's own tests have to pass before it is saved; what it
breaks of other rules is told afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.urls import reverse
from django.utils import timezone

from fallback import answers, rulebook
from fallback.matching import MAX_QUESTION_CHARS, Failure, Ranked
from fallback.models import PolicyChange, ReviewedAnswer, Rule
from fallback.policy_admin import PolicyChangeAdmin

__all__ = ["PolicyChangeAdmin", "ReviewedAnswerAdmin", "RuleAdmin"]

#: Failures that are told in full; a number stands for the rest.
_TOLD = 5


class LinesField(forms.JSONField):
    """A list of texts, one a line; a list in JSON is understood too."""

    def bound_data(self, data: Any, initial: Any) -> Any:
        return initial if self.disabled else data

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(value) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        if str(value or "").lstrip().startswith(("[", "{")):
            with suppress(ValueError):
                return json.loads(value)
        lines = (line.strip() for line in str(value or "").splitlines())
        return [self.entry(line) for line in lines if line]

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool((initial or []) != self.to_python(data))

    def entry(self, line: str) -> Any:
        return line


class ButtonsField(LinesField):
    """A list of buttons, one a line: what it says | what pressing it asks."""

    def prepare_value(self, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "\n".join(f"{button['label']} | {button['text']}" for button in value)

    def entry(self, line: str) -> dict[str, str]:
        label, bar, text = (part.strip() for part in line.partition("|"))
        return {"label": label, "text": text if bar else label}


class RuleForm(forms.ModelForm):  # type: ignore[type-arg]
    """A rule with its lists as lines. Refuses one that fails its own tests."""

    _LINES = ("patterns", "keywords", "examples", "must_match", "must_not_match")

    class Meta:
        model = Rule
        exclude = ["updated_at"]  # noqa: DJ006 - all others are staff's
        field_classes = {
            **dict.fromkeys(
                ("patterns", "keywords", "examples", "must_match", "must_not_match"), LinesField
            ),
            "buttons": ButtonsField,
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for name in (*self._LINES, "buttons"):
            if name in self.fields:
                self.fields[name].help_text += " One a line."
        if "buttons" in self.fields:
            self.fields["buttons"].help_text += " Written as: label | text that it sends."

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        if not self.errors and (self.instance.must_match or self.instance.must_not_match):
            book = rulebook.with_change(self.instance)
            for failure in rulebook.failing(book, only=self.instance.name):
                self.add_error("must_match" if failure.wanted else "must_not_match", str(failure))


@admin.register(Rule)
class RuleAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    form = RuleForm
    list_display = ["name", "intent", "priority", "active", "language", "hand_over", "updated_at"]
    list_filter = ["active", "hand_over", "knows_intent", "language", "intent"]
    search_fields = ["name", "intent", "patterns", "keywords", "examples", "answer"]
    actions = ["enable", "disable", "run_tests"]
    list_per_page = 50
    readonly_fields = ["updated_at"]
    fieldsets = [
        (None, {"fields": ["name", "answer", "buttons", "hand_over"]}),
        ("When", {"fields": ["patterns", "keywords", "examples", "intent", "knows_intent"]}),
        (
            "Whether",
            {"fields": ["active", "active_from", "active_until", "language", "priority"]},
        ),
        ("Tests", {"fields": ["must_match", "must_not_match"]}),
        (None, {"fields": ["updated_at"]}),
    ]

    # -- the list, with a sentence to try

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        query = request.GET.copy()
        tried = " ".join(query.pop("try", [])).strip()[:MAX_QUESTION_CHARS]
        request.GET = query  # type: ignore[assignment]
        context = {"tried": tried, "try_chars": MAX_QUESTION_CHARS, **(extra_context or {})}
        if tried and self.has_view_permission(request):
            context |= _tried(tried)
        return super().changelist_view(request, context)

    # -- bulk

    @admin.action(description="Enable selected rules", permissions=["change"])
    def enable(self, request: HttpRequest, rules: QuerySet[Rule]) -> None:
        self._switch(request, rules, active=True)

    @admin.action(description="Disable selected rules", permissions=["change"])
    def disable(self, request: HttpRequest, rules: QuerySet[Rule]) -> None:
        self._switch(request, rules, active=False)

    def _switch(self, request: HttpRequest, rules: QuerySet[Rule], *, active: bool) -> None:
        changed = list(rules.exclude(active=active))
        Rule.objects.filter(pk__in=[rule.pk for rule in changed]).update(active=active)
        answers.forget()
        if changed:
            note = [{"changed": {"fields": ["active"]}}]
            LogEntry.objects.log_actions(
                user_id=cast(int, request.user.pk),
                queryset=changed,
                action_flag=CHANGE,
                change_message=note,
            )
        word = "enabled" if active else "disabled"
        self.message_user(request, f"{len(changed)} rules {word}.", messages.SUCCESS)
        self._tell(request, rulebook.failing(rulebook.current()))

    @admin.action(description="Run the tests of selected rules", permissions=["view"])
    def run_tests(self, request: HttpRequest, rules: QuerySet[Rule]) -> None:
        names = set(rules.values_list("name", flat=True))
        book = rulebook.current()
        failing = [one for one in rulebook.failing(book) if one.rule in names]
        asleep = len(names - {rule.name for rule in book})
        self._tell(request, failing)
        if not failing:
            note = f" {asleep} are not active and were not tested." if asleep else ""
            self.message_user(request, f"All tests pass.{note}", messages.SUCCESS)

    def save_model(self, request: HttpRequest, obj: Rule, form: Any, change: bool) -> None:
        super().save_model(request, obj, form, change)
        self._tell(request, rulebook.failing(rulebook.current()))

    def _tell(self, request: HttpRequest, failing: Iterable[Failure]) -> None:
        found = list(failing)
        for failure in found[:_TOLD]:
            self.message_user(request, f"Fails: {failure}", messages.WARNING)
        if len(found) > _TOLD:
            more = f"And {len(found) - _TOLD} more; see manage.py check_rules."
            self.message_user(request, more, messages.WARNING)


def _tried(sentence: str) -> dict[str, Any]:
    """What the list shows of the rules that something speaks for."""
    needed = PolicyChange.in_force().rule_score
    ranked = rulebook.current().rank(sentence, now=timezone.now())
    keys = dict(Rule.objects.values_list("name", "pk"))
    found = [_line(one, keys.get(one.rule.name)) for one in ranked]
    if found:
        found[0]["answers"] = ranked[0].is_sure(needed)
    return {"found": found, "needed": f"{needed:g}"}


def _line(ranked: Ranked, key: int | None) -> dict[str, Any]:
    return {
        "name": ranked.rule.name,
        "url": reverse("admin:fallback_rule_change", args=[key]) if key else "",
        "score": round(ranked.score),
        "intent": ranked.rule.intent,
        "why": ranked.why,
    }


@admin.register(ReviewedAnswer)
class ReviewedAnswerAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["question", "intent", "active", "updated_at"]
    list_filter = ["active", "intent"]
    search_fields = ["question", "answer"]
