"""Pairs of answers for staff: what a candidate would have said, beside what was said.

Figures are for whoever may view pairs. A user's words and both answers need the permission to read
conversations as well, and each reading is written down; to judge needs the one to change pairs.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils import timezone

from assistant import registry
from conversations.admin import OwnPage
from monitoring import shadow
from monitoring.models import ShadowPair

Verdict = ShadowPair.Verdict


def _judging(verdict: str, label: str) -> Any:
    """An action of the list."""

    def judge(self: Any, request: HttpRequest, queryset: QuerySet[ShadowPair]) -> None:
        self.judge(request, queryset, verdict)

    judge.__name__ = f"judge_{verdict}"
    return admin.action(description=f"Judge: {label}", permissions=["judge"])(judge)


@admin.register(ShadowPair)
class ShadowPairAdmin(OwnPage):
    gone = "This conversation was deleted."
    list_display = [
        *("created_at", "outcome", "live_intent", "intent", "similar", "speed", "verdict"),
    ]
    list_filter = ["agreed", "differs", "verdict", "version", "live_intent"]
    list_select_related = ["version"]
    actions = ["judge_agree", "judge_live", "judge_candidate"]
    change_list_template = "admin/monitoring/shadowpair/change_list.html"
    change_form_template = "admin/monitoring/shadowpair/change_form.html"

    judge_agree = _judging(Verdict.AGREE, "they agree")
    judge_live = _judging(Verdict.LIVE, "the live answer is better")
    judge_candidate = _judging(Verdict.CANDIDATE, "the candidate's is better")

    # -- the list

    @admin.display(description="outcome", ordering="differs")
    def outcome(self, pair: ShadowPair) -> str:
        return "agree" if pair.agreed else f"differ in {pair.differs}"

    @admin.display(description="similarity", ordering="similarity")
    def similar(self, pair: ShadowPair) -> str:
        return "" if pair.similarity is None else f"{pair.similarity:.0%}"

    @admin.display(description="ms, live / own")
    def speed(self, pair: ShadowPair) -> str:
        both = (pair.live_ms, pair.ms)
        return " / ".join("-" if ms is None else f"{ms:.0f}" for ms in both)

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        version = registry.shadow()
        context = {"shadowed": version, "gate": shadow.gate(version) if version else None}
        return super().changelist_view(request, {**context, **(extra_context or {})})

    # -- judging

    def has_judge_permission(self, request: HttpRequest) -> bool:
        return request.user.has_perm("monitoring.change_shadowpair")

    def judge(self, request: HttpRequest, pairs: QuerySet[ShadowPair], verdict: str) -> None:
        """Keep the verdict on each, and write it down."""
        judged = list(pairs.select_related("version"))
        for pair in judged:
            pair.verdict, pair.judged_by = verdict, request.user  # type: ignore[assignment]
            pair.judged_at = timezone.now()
            pair.save(update_fields=["verdict", "judged_by", "judged_at"])
            self.log_change(request, pair, f"Judged: {Verdict(verdict).label}.")
        self.message_user(request, f"Judged {len(judged)}.", messages.SUCCESS)

    # -- one pair

    def found(self, request: HttpRequest, key: str) -> ShadowPair | None:
        rows = ShadowPair.objects.select_related("version", "message__parent", "judged_by")
        return rows.filter(pk=key).first() if key.isdecimal() and len(key) < 19 else None

    def acted(self, request: HttpRequest, pair: ShadowPair) -> HttpResponse:
        verdict = request.POST.get("verdict", "")
        if not self.has_judge_permission(request):
            raise PermissionDenied
        if verdict not in Verdict.values:
            self.message_user(request, "Choose one of the three verdicts.", messages.ERROR)
            return HttpResponseRedirect(request.path)
        self.judge(request, ShadowPair.objects.filter(pk=pair.pk), verdict)
        following = self._following(pair)
        page = "admin:monitoring_shadowpair_change"
        where = reverse(page, args=[following.pk]) if following else self.home_url()
        return HttpResponseRedirect(where)

    def _following(self, pair: ShadowPair) -> ShadowPair | None:
        """The next older one on which they differ and nobody has judged."""
        rows = ShadowPair.objects.filter(version=pair.version, agreed=False, verdict="")
        return rows.filter(pk__lt=pair.pk).order_by("-pk").first()

    def told(self, request: HttpRequest, pair: ShadowPair) -> dict[str, Any]:
        """Both answers side by side, for who may read them."""
        may_read = request.user.has_perm("conversations.view_conversation")
        if may_read:
            self.log_change(request, pair, "Read the question and both answers.")
        asked = pair.message.parent
        return {
            "title": "Live and candidate",
            "question": asked.text if may_read and asked is not None else "",
            "live_text": pair.message.text if may_read else "",
            "text": pair.text if may_read else "",
            "may_read": may_read,
            "may_judge": self.has_judge_permission(request),
            "verdicts": Verdict.choices,
        }
