"""The queue of users who asked for a person: who waits, for how long, and a box to answer in.

Whoever may view hand-overs reads the conversations that were handed over, and no others; to take,
close or answer one needs the permission to change hand-overs. Each of these is written down in the
admin's log, without a word of what was said.
"""

from __future__ import annotations

from typing import Any, cast

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import Case, F, IntegerField, OuterRef, QuerySet, Subquery, When
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.utils.timesince import timesince

from assistant.errors import AssistantError
from conversations import handover
from conversations.admin import OwnPage
from conversations.models import HandOver, Message

#: Messages shown above the box, the newest.
SHOWN_MESSAGES = 100
_RANKS = {HandOver.Status.WAITING: 0, HandOver.Status.TAKEN: 1}


class ReplyForm(forms.Form):
    """``seen``: the newest message on the page, so that two of the staff do not answer at once."""

    text = forms.CharField(
        label="Your answer",
        max_length=handover.MAX_REPLY_CHARS,
        widget=forms.Textarea(attrs={"rows": 6, "cols": 80, "class": "vLargeTextField"}),
    )
    seen = forms.IntegerField(min_value=0, widget=forms.HiddenInput)


@admin.register(HandOver)
class HandOverAdmin(OwnPage):
    gone = "This conversation was deleted."
    list_display = ["state", "age", "last_question", "reason", "taken_by", "created_at"]
    list_filter = ["status"]
    list_select_related = ["taken_by"]
    actions = ["take", "close"]
    change_form_template = "admin/conversations/handover/change_form.html"

    # -- the queue

    def get_ordering(self, request: HttpRequest) -> list[Any]:
        """Who waits, the longest first; then what somebody sees to; then what is done, newest
        first."""
        return ["rank", Case(When(rank__lt=2, then=F("created_at"))), "-created_at"]

    def get_queryset(self, request: HttpRequest) -> QuerySet[HandOver]:
        ranks = [When(status=status, then=rank) for status, rank in _RANKS.items()]
        rank = Case(*ranks, default=len(ranks), output_field=IntegerField())
        asked = Message.objects.filter(
            conversation=OuterRef("conversation"), role=Message.Role.USER, shown=True
        )
        last = Subquery(asked.order_by("-seq").values("text")[:1])
        # Not super's: that orders by the rank before there is one.
        rows = HandOver.objects.annotate(rank=rank, asked=last)
        return rows.order_by(*self.get_ordering(request))

    @admin.display(description="state", ordering="rank")
    def state(self, asked: HandOver) -> str:
        return asked.get_status_display()

    @admin.display(description="age", ordering="created_at")
    def age(self, asked: HandOver) -> str:
        return timesince(asked.created_at)

    @admin.display(description="last question")
    def last_question(self, asked: HandOver) -> str:
        return (cast(Any, asked).asked or "")[:120] or "(empty)"

    # -- taking and closing

    def has_answer_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("conversations.change_handover")

    @admin.action(description="Take (say that you see to it)", permissions=["answer"])
    def take(self, request: HttpRequest, queryset: QuerySet[HandOver]) -> None:
        self._each(request, queryset, lambda pk: handover.take(pk, request.user), "Taken.")

    @admin.action(description="Close (nobody needs to answer)", permissions=["answer"])
    def close(self, request: HttpRequest, queryset: QuerySet[HandOver]) -> None:
        self._each(request, queryset, handover.close, "Closed.")

    def _each(self, request: HttpRequest, rows: Any, act: Any, done: str) -> None:
        changed = [asked for asked in rows if act(asked.pk)]
        for asked in changed:
            self.log_change(request, asked, done)
        left = len(rows) - len(changed)
        words = f"{done} {len(changed)} of them" + (f"; {left} were already." if left else ".")
        self.message_user(request, words, messages.SUCCESS if changed else messages.WARNING)

    # -- one of them

    def acted(self, request: HttpRequest, asked: HandOver) -> HttpResponse:
        """The buttons: answer, ``take``, ``close``. What was not sent stays in the box."""
        if not self.has_answer_permission(request):
            raise PermissionDenied
        for name, act in (("take", self.take), ("close", self.close)):
            if name in request.POST:
                act(request, HandOver.objects.filter(pk=asked.pk))
                return HttpResponseRedirect(request.path)
        form = ReplyForm(request.POST)
        if not form.is_valid() or not self._answered(request, asked, form.cleaned_data):
            return self._shown(request, asked, form, status=400)
        return HttpResponseRedirect(self.home_url())

    def _answered(self, request: HttpRequest, asked: HandOver, told: dict[str, Any]) -> bool:
        try:
            handover.reply(asked.pk, request.user, told["text"], seen=told["seen"])
        except AssistantError as error:
            self.message_user(request, error.message, messages.ERROR)
            return False
        self.log_change(request, asked, "Answered.")
        self.message_user(request, "Sent. The user sees it at once.", messages.SUCCESS)
        return True

    def shown(self, request: HttpRequest, asked: HandOver) -> HttpResponse:
        """The conversation and the box below it."""
        return self._shown(request, asked)

    def _shown(
        self,
        request: HttpRequest,
        asked: HandOver,
        refused: ReplyForm | None = None,
        status: int = 200,
    ) -> HttpResponse:
        """The page of one; ``refused``: an answer that was not sent, which comes back."""
        rows = Message.objects.filter(conversation=asked.conversation_id).on_the_page()
        said = list(rows.order_by("-seq")[:SHOWN_MESSAGES])[::-1]
        text = refused.data.get("text", "") if refused is not None else ""
        told = {
            "title": "A user asked for a person",
            "said": said,
            "form": ReplyForm(initial={"text": text, "seen": said[-1].seq if said else 0}),
            "errors": refused.errors.get("text", []) if refused is not None else [],
            "may_answer": self.has_answer_permission(request),
            "age": timesince(asked.created_at),
        }
        return self.page(request, asked, told, status=status)
