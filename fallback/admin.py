"""Rules and reviewed answers, edited by staff; live at once."""

from django.contrib import admin

from fallback.models import ReviewedAnswer, Rule


@admin.register(Rule)
class RuleAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["name", "intent", "priority", "active"]
    list_filter = ["active", "intent"]
    search_fields = ["name", "patterns", "answer"]


@admin.register(ReviewedAnswer)
class ReviewedAnswerAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    list_display = ["question", "intent", "active", "updated_at"]
    list_filter = ["active", "intent"]
    search_fields = ["question", "answer"]
