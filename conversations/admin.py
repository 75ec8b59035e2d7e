"""Conversations for staff: to read and search, never to change; cheap on millions of rows.

Reading is a permission of its own (``conversations.view_conversation``); nobody may add or edit.
"""

from __future__ import annotations

from typing import Any, cast

from axes.models import AccessAttempt
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.core.paginator import Paginator
from django.db.models import Exists, OuterRef, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.functional import cached_property
from django.utils.html import format_html

from conversations.models import Conversation, Feedback, Message

#: Why somebody else answered, or the model with caution.
REASONS = (
    *("caution", "low_confidence", "out_of_scope", "overload", "timeout", "breaker_open", "error"),
    "hurry",
)
#: Messages shown below a conversation; the rest are behind the message list's filter.
INLINE_MESSAGES = 200


class ReadOnly:
    """No adding, changing or deleting, by anyone."""

    def has_add_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False


class CheapPaginator(Paginator):  # type: ignore[type-arg]
    """Counts no further than anybody pages: an exact count of a big table takes seconds."""

    MOST = 10_000

    @cached_property
    def count(self) -> int:
        rows = self.object_list
        return rows[: self.MOST].count() if isinstance(rows, QuerySet) else len(rows)


class MessageInline(ReadOnly, admin.TabularInline):  # type: ignore[type-arg]
    model = Message
    fields = ("seq", "shown", "role", "text", "status", "route", "degraded_reason")
    readonly_fields = fields
    ordering = ["seq"]
    extra = 0
    show_change_link = True

    def get_queryset(self, request: HttpRequest) -> QuerySet[Message]:
        rows: QuerySet[Message] = super().get_queryset(request)
        return rows.filter(seq__lte=INLINE_MESSAGES)


class AnswerFilter(admin.SimpleListFilter):
    """Conversations with an answer of that kind; found by an index, not by a join of all."""

    field = ""

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        choices = cast(Any, Message._meta.get_field(self.field)).choices
        return [(str(value), str(label)) for value, label in choices or ()]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if not self.value():
            return queryset
        answers = Message.objects.filter(
            conversation=OuterRef("pk"), role=Message.Role.ASSISTANT, **{self.field: self.value()}
        )
        return queryset.filter(Exists(answers))


class StatusFilter(AnswerFilter):
    title, parameter_name, field = "status of an answer", "status", "status"


class RouteFilter(AnswerFilter):
    title, parameter_name, field = "route of an answer", "route", "route"


class ReasonFilter(admin.SimpleListFilter):
    """Why an answer was not the model's best; ``any`` for all of these."""

    title, parameter_name = "degraded reason", "degraded_reason"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("any", "any"), *((reason, reason.replace("_", " ")) for reason in REASONS)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        reason = self.value()
        if reason == "any":
            return queryset.exclude(degraded_reason="")
        return queryset.filter(degraded_reason=reason) if reason else queryset


class ModelFilter(admin.SimpleListFilter):
    """Models of the newest answers; to look through all of them would take seconds."""

    NEWEST = 2_000
    title, parameter_name = "model", "model"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        newest = Message.objects.order_by("-created_at").values_list("model", flat=True)
        found = {name for name in newest[: self.NEWEST] if name}
        if (chosen := self.value()) is not None:
            found.add(chosen)
        return [(name, name) for name in sorted(found)]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(model=self.value()) if self.value() else queryset


class CheapList(ReadOnly, admin.ModelAdmin):  # type: ignore[type-arg]
    paginator = CheapPaginator
    show_full_result_count = False
    list_per_page = 50


class OwnPage(CheapList):
    """Rows with a page instead of a form: looked at by whoever may view them, POST is a button."""

    #: What is said of a row that is not there, and which page comes then; empty: the list.
    gone, home = "This is gone.", ""

    def change_view(
        self,
        request: HttpRequest,
        object_id: str,
        form_url: str = "",
        extra_context: dict[str, Any] | None = None,
    ) -> HttpResponse:
        if not self.has_view_permission(request):
            raise PermissionDenied
        row = self.found(request, unquote(object_id))
        if row is None:
            self.message_user(request, self.gone, messages.WARNING)
            return HttpResponseRedirect(self.home_url())
        if not self.has_view_permission(request, row):
            raise PermissionDenied
        return self.acted(request, row) if request.method == "POST" else self.shown(request, row)

    def home_url(self) -> str:
        listed = f"admin:{self.opts.app_label}_{self.opts.model_name}_changelist"
        return reverse(self.home or listed)

    def found(self, request: HttpRequest, key: str) -> Any:
        return self.get_object(request, key)

    def shown(self, request: HttpRequest, row: Any) -> HttpResponse:
        """The page of one row, as ``told`` has it."""
        return self.page(request, row, self.told(request, row))

    def told(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        """What the page shows."""
        return {}

    def acted(self, request: HttpRequest, row: Any) -> HttpResponse:
        """A button of the page; it has none."""
        raise PermissionDenied

    def page(
        self, request: HttpRequest, row: Any, told: dict[str, Any],
        *, template: str = "", status: int = 200,
    ) -> TemplateResponse:  # fmt: skip
        base = {**self.admin_site.each_context(request), "opts": self.opts, "original": row}
        return TemplateResponse(
            request,
            template or cast(str, self.change_form_template),
            {**base, **told},
            status=status,
        )


@admin.register(Conversation)
class ConversationAdmin(CheapList):
    list_display = ["title", "user", "created_at", "updated_at"]
    list_filter = [StatusFilter, RouteFilter]
    list_select_related = ["user"]
    search_fields = ["title", "user__username", "messages__text"]
    fields = ["id", "title", "user", "created_at", "updated_at"]
    ordering = ["-updated_at", "-id"]
    inlines = [MessageInline]


@admin.register(Message)
class MessageAdmin(CheapList):
    list_display = ["shortened", "role", "status", "route", "degraded_reason", "created_at"]
    list_filter = ["status", "route", ReasonFilter, ModelFilter, "role", "created_at"]
    search_fields = ["text"]
    ordering = ["-created_at", "-id"]

    @admin.display(description="text")
    def shortened(self, message: Message) -> str:
        return message.text[:120] or "(empty)"


@admin.register(Feedback)
class FeedbackAdmin(CheapList):
    """What readers thought of answers, with the way to the conversation."""

    list_display = ["value", "reason", "text", "answer", "conversation", "created_at"]
    list_filter = ["value", "reason", "message__route", "created_at"]
    list_select_related = ["message__conversation"]
    search_fields = ["text"]
    fields = ("value", "reason", "text", "answer", "conversation", "created_at")
    readonly_fields = fields
    ordering = ["-created_at"]

    @admin.display()
    def answer(self, feedback: Feedback) -> str:
        return feedback.message.text[:200] or "(empty)"

    @admin.display()
    def conversation(self, feedback: Feedback) -> str:
        held = feedback.message.conversation
        path = reverse("admin:conversations_conversation_change", args=[held.pk])
        return format_html('<a href="{}">{}</a>', path, held)


@admin.register(AccessAttempt)
class FailedTryAdmin(CheapList):
    """Who failed to sign in lately, by address; without its rows an address may try again."""

    list_display = ["attempt_time", "ip_address", "path_info", "request_id"]
    search_fields = ["ip_address"]
    fields = ("attempt_time", "ip_address", "path_info", "request_id")
    readonly_fields = fields
    ordering = ["-attempt_time", "-id"]

    @admin.display(description="request, as in the log")
    def request_id(self, attempt: Any) -> str:
        return str(attempt.user_agent)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)


from conversations import handover_admin  # noqa: E402, F401  it needs the lists above
