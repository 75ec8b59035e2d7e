"""What staff write so that somebody always answers: rules, and answers they have reviewed."""

from __future__ import annotations

from django.core.exceptions import ValidationError
from django.db import models

from fallback.rules import normalise


def _phrases(value: object) -> None:
    if not isinstance(value, list) or not all(isinstance(p, str) and p.strip() for p in value):
        raise ValidationError('Write a list of phrases, such as ["cancel my order", "refund"].')


class Rule(models.Model):
    """If a question sounds like one of the phrases, this is the answer."""

    name = models.CharField(max_length=100, unique=True)
    patterns = models.JSONField(
        default=list, validators=[_phrases], help_text='Phrases customers use: ["...", "..."]'
    )
    intent = models.CharField(max_length=60, blank=True, default="")
    answer = models.TextField(max_length=4000)
    priority = models.IntegerField(default=0, help_text="Between equal matches the higher wins.")
    active = models.BooleanField(default=True)

    class Meta:
        ordering = ["-priority", "name"]

    def __str__(self) -> str:
        return self.name


class ReviewedAnswer(models.Model):
    """The answer a person approved for exactly this question."""

    # 500: a longer text is never asked twice, and PostgreSQL cannot index much more.
    question = models.CharField(max_length=500)
    normalised = models.CharField(max_length=500, unique=True, editable=False)
    answer = models.TextField(max_length=4000)
    intent = models.CharField(max_length=60, blank=True, default="")
    active = models.BooleanField(default=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        ordering = ["question"]

    def __str__(self) -> str:
        return self.question[:80]

    def save(self, *args: object, **kwargs: object) -> None:
        self.normalised = normalise(self.question)[:500]
        super().save(*args, **kwargs)  # type: ignore[arg-type]

    def clean(self) -> None:
        same = ReviewedAnswer.objects.filter(normalised=normalise(self.question)[:500])
        if same.exclude(pk=self.pk).exists():
            raise ValidationError({"question": "There is a reviewed answer to this already."})
