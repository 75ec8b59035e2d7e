"""The review desk in the admin: three queues, and an answer with its question and a form.

The desk shows what users wrote, so it needs both the permission to view messages and the one to
change reviews; every answer that is opened or judged is written down, without a word of it.
"""

from __future__ import annotations

from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.core.exceptions import PermissionDenied, ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse

from assistant.modelkit import labels
from conversations.admin import OwnPage
from conversations.models import Message
from monitoring import review
from monitoring.models import ReviewItem

#: Words of a question in a queue.
_SHORT = 120


class ReviewForm(forms.Form):
    """One judgement; what must go together is checked in ``review.judge``."""

    verdict = forms.ChoiceField(
        label="The answer is",
        choices=ReviewItem.Verdict.choices,
        widget=forms.RadioSelect,
        error_messages={"required": "Say whether the answer is good or bad."},
    )
    intent = forms.ChoiceField(
        label="The question is about",
        required=False,
        choices=[("", "(not said)"), *((name, name.replace("_", " ")) for name in labels.INTENTS)],
    )
    correction = forms.CharField(
        label="What should have been said",
        required=False,
        max_length=review.MOST_CORRECTION_CHARS,
        widget=forms.Textarea(attrs={"rows": 6, "class": "vLargeTextField"}),
        help_text="Personal values become placeholders before it is stored.",
    )
    as_example = forms.BooleanField(
        label="As a training example",
        required=False,
        help_text="The next retraining learns from it; needs what the question is about.",
    )
    as_reviewed = forms.BooleanField(
        label="As a reviewed answer",
        required=False,
        help_text="Whoever asks this from now on is given the correction, or this answer if good.",
    )
    wording = forms.CharField(
        label="Question of the reviewed answer",
        required=False,
        max_length=500,
        widget=forms.TextInput(attrs={"class": "vLargeTextField"}),
        help_text="As all may ask it, without personal values. Empty: as it was asked.",
    )


@admin.register(ReviewItem)
class ReviewItemAdmin(OwnPage):
    gone = "There is no such answer; its conversation may have been deleted."
    home = "admin:monitoring_review_desk"
    list_display = ["message_id", "verdict", "intent", "as_example", "as_reviewed", "by"]
    list_filter = ["verdict", "as_example", "as_reviewed", "created_at"]
    list_select_related = ["by"]
    ordering = ["-created_at"]
    change_list_template = "admin/monitoring/reviewitem/change_list.html"

    def get_urls(self) -> list[URLPattern]:
        desk = self.admin_site.admin_view(self.desk)
        return [path("desk/", desk, name="monitoring_review_desk"), *super().get_urls()]

    def has_review_permission(self, request: HttpRequest) -> bool:
        wanted = ("monitoring.change_reviewitem", "conversations.view_message")
        return request.user.has_perms(wanted)

    def _allowed(self, request: HttpRequest) -> None:
        if not self.has_review_permission(request):
            raise PermissionDenied

    # -- the queues

    def desk(self, request: HttpRequest) -> HttpResponse:
        """Who waits for a look: three queues, side by side."""
        self._allowed(request)
        queues = [(name, [_line(row) for row in review.queue(kind)])
                  for kind, name in review.QUEUES.items()]  # fmt: skip
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": "Answers to review",
            "queues": queues,
        }
        return TemplateResponse(request, "admin/monitoring/reviewitem/desk.html", context)

    # -- one answer

    def found(self, request: HttpRequest, key: str) -> Message | None:
        """The answer of that message, judged or not."""
        self._allowed(request)
        return _answer(key)

    def shown(self, request: HttpRequest, answer: Message) -> HttpResponse:
        _note(request, answer, "Opened for review.")
        return self._shown(request, answer, ReviewForm(initial=_known(answer)))

    def acted(self, request: HttpRequest, answer: Message) -> HttpResponse:
        form = ReviewForm(request.POST)
        if form.is_valid() and self._judged(request, answer, form):
            return HttpResponseRedirect(_next(request, answer))
        return self._shown(request, answer, form, status=400)

    def _judged(self, request: HttpRequest, answer: Message, form: ReviewForm) -> bool:
        try:
            item = review.judge(answer, review.Judgement(**form.cleaned_data), request.user)
        except ValidationError as error:
            for name, told in error.message_dict.items():
                form.add_error(name if name in form.fields else None, told)
            return False
        ticks = ((item.as_example, ", example"), (item.as_reviewed, ", reviewed"))
        ticked = "".join(word for tick, word in ticks if tick)
        _note(request, answer, f"Judged {item.verdict}{ticked}.")
        self.message_user(request, "Stored.", messages.SUCCESS)
        return True

    def _shown(
        self, request: HttpRequest, answer: Message, form: ReviewForm, status: int = 200
    ) -> HttpResponse:
        told = {
            "title": "Review an answer",
            "answer": answer,
            "said": review.context(answer),
            "form": form,
        }
        template = "admin/monitoring/reviewitem/change_form.html"
        return self.page(request, None, told, template=template, status=status)


def _answer(key: str) -> Message | None:
    try:
        rows = Message.objects.filter(pk=key, role=Message.Role.ASSISTANT)
        return rows.select_related("parent", "review", "feedback").first()
    except (ValidationError, ValueError):  # no id at all
        return None


def _known(answer: Message) -> dict[str, Any]:
    """What the form begins with: the judgement so far, else what the model thought."""
    item = ReviewItem.objects.filter(pk=answer.pk).first()
    if item is None:
        return {"intent": answer.intent}
    names = ("verdict", "intent", "correction", "as_example", "as_reviewed")
    return {name: getattr(item, name) for name in names}


def _next(request: HttpRequest, answer: Message) -> str:
    following = review.following(answer) if "_next" in request.POST else None
    if following is None:
        return reverse("admin:monitoring_review_desk")
    return reverse("admin:monitoring_reviewitem_change", args=[following.pk])


def _line(answer: Message) -> dict[str, Any]:
    asked = answer.parent.text if answer.parent is not None else ""
    return {
        "url": reverse("admin:monitoring_reviewitem_change", args=[answer.pk]),
        "asked": asked[:_SHORT] or "(empty)",
        "answer": answer,
    }


def _note(request: HttpRequest, answer: Message, what: str) -> None:
    """In the admin's log: who read or judged which message, and nothing of its text."""
    LogEntry.objects.log_actions(
        user_id=cast(int, request.user.pk),
        queryset=[ReviewItem(message=answer)],
        action_flag=CHANGE,
        change_message=what,
        single_object=True,
    )
