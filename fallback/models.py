"""What staff write so that somebody always answers: rules, and answers they have reviewed."""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.utils import timezone

from assistant.backends import OWN_STEPS
from fallback import matching
from fallback.policy import Policy, policy
from fallback.rules import (
    MAX_PHRASE_CHARS,
    Button,
    RuleText,
    fault_of,
    is_expression,
    normalise,
    worded,
)

#: Bounds of one rule. A longer list is slower to read than to split into two rules.
MAX_PATTERNS, MAX_KEYWORDS, MAX_EXAMPLES, MAX_TESTS = 200, 100, 500, 100
MAX_BUTTONS, MAX_LABEL_CHARS, MAX_BUTTON_CHARS = 6, 40, 200
_PLACEHOLDER = re.compile(r"\{\{[A-Za-z][A-Za-z ]{0,30}\}\}")


def _lines(value: object, most: int) -> list[str]:
    """The phrases of a list. Raises: ValidationError."""
    if not isinstance(value, list) or not all(isinstance(p, str) and p.strip() for p in value):
        raise ValidationError('Write a list of phrases, such as ["cancel my order", "refund"].')
    if len(value) > most:
        raise ValidationError(f"At most {most} lines. Delete some, or make a second rule.")
    for line in value:
        if len(line) > MAX_PHRASE_CHARS:
            raise ValidationError(
                f'"{line[:30]}..." is longer than {MAX_PHRASE_CHARS} characters. Shorten it.'
            )
    return value


def _phrases(value: object) -> None:
    for line in _lines(value, MAX_PATTERNS):
        if is_expression(line):
            if fault := fault_of(line):
                raise ValidationError(f"The expression {line} cannot be used: {fault}.")
        elif not worded(line):
            raise ValidationError(f'"{line}" has no letters or digits to compare.')


def _keywords(value: object) -> None:
    for line in _lines(value, MAX_KEYWORDS):
        if not matching.keyword_words(line)[0]:
            raise ValidationError(f'"{line}" needs at least one word without a minus before it.')


def _examples(value: object) -> None:
    _lines(value, MAX_EXAMPLES)


def _tests(value: object) -> None:
    _lines(value, MAX_TESTS)


def _buttons(value: object) -> None:
    wanted = {"label": MAX_LABEL_CHARS, "text": MAX_BUTTON_CHARS}
    if not isinstance(value, list) or len(value) > MAX_BUTTONS:
        raise ValidationError(f"Write a list of at most {MAX_BUTTONS} buttons.")
    for button in value:
        if not isinstance(button, dict) or button.keys() != wanted.keys():
            raise ValidationError('A button is written as {"label": "...", "text": "..."}.')
        for name, most in wanted.items():
            if not isinstance(button[name], str) or not 0 < len(button[name].strip()) <= most:
                raise ValidationError(f"A button's {name} has 1 to {most} characters.")


class Touching(models.QuerySet[Any]):
    """Rows whose every change moves ``updated_at``, so that other processes notice it."""

    def update(self, **values: Any) -> int:
        return super().update(**{"updated_at": timezone.now(), **values})


class Rule(models.Model):
    """If a question sounds like this, this is the answer. Bounds and faults: ``full_clean``."""

    name = models.CharField(max_length=100, unique=True)
    patterns = models.JSONField(
        default=list,
        blank=True,
        validators=[_phrases],
        help_text="Phrases that decide alone, found inside a question or much like it. Between "
        "slashes a regular expression (RE2): /gift ?(wrap|card)s?/.",
    )
    keywords = models.JSONField(
        default=list,
        blank=True,
        validators=[_keywords],
        help_text="Words that stand in a question together, in any order and form; -word for one "
        "that must not: cancel order -fee.",
    )
    examples = models.JSONField(
        default=list,
        blank=True,
        validators=[_examples],
        help_text="Whole sentences as customers write them. The rule learns from them; from ten on "
        "it understands others too.",
    )
    intent = models.CharField(
        max_length=60, blank=True, default="", help_text="What is asked for, such as track_order."
    )
    knows_intent = models.BooleanField(
        "knows the intent",
        default=False,
        help_text="Learn from all sentences that ship for this intent, besides the examples.",
    )
    answer = models.TextField(
        max_length=4000,
        help_text="Markdown. {{Order Number}}, {{Website}} and the like are filled in.",
    )
    buttons = models.JSONField(
        default=list, blank=True, validators=[_buttons], help_text="Quick replies below the answer."
    )
    hand_over = models.BooleanField(default=False, help_text="Also ask a person to take over.")
    language = models.CharField(
        max_length=10, blank=True, default="", help_text="Such as en. Empty: any."
    )
    priority = models.IntegerField(default=0, help_text="Between equal matches the higher wins.")
    active = models.BooleanField(default=True)
    active_from = models.DateTimeField(null=True, blank=True)
    active_until = models.DateTimeField(null=True, blank=True)
    must_match = models.JSONField(
        default=list,
        blank=True,
        validators=[_tests],
        help_text="Tests: sentences that this rule has to answer.",
    )
    must_not_match = models.JSONField(
        default=list,
        blank=True,
        validators=[_tests],
        help_text="Tests: sentences that this rule has to leave alone.",
    )
    # Not auto_now: a fixture leaves it out.
    updated_at = models.DateTimeField(default=timezone.now, editable=False)

    objects = Touching.as_manager()

    class Meta:
        ordering = ["-priority", "name"]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        self.updated_at = timezone.now()
        if (only := kwargs.get("update_fields")) is not None:
            kwargs["update_fields"] = {*only, "updated_at"}
        super().save(*args, **kwargs)

    def clean(self) -> None:
        faults: dict[str, str] = {}
        if self.knows_intent and not self.intent:
            faults["intent"] = "Name the intent whose sentences the rule knows."
        if not (self.patterns or self.keywords or self.examples or self.knows_intent):
            faults["patterns"] = "Without a pattern, a keyword or an example it never answers."
        if self.active_from and self.active_until and self.active_from >= self.active_until:
            faults["active_until"] = "This is not after the time it begins."
        if re.search(r"\{\{|\}\}", _PLACEHOLDER.sub("", self.answer)):
            faults["answer"] = "A placeholder is written as {{Order Number}}: letters and spaces."
        if faults:
            raise ValidationError(faults)

    def text(self) -> RuleText:
        """The rule as the matcher takes it. Raises: TypeError, KeyError for what is no rule."""
        return RuleText(
            name=self.name,
            patterns=_words(self.patterns),
            answer=self.answer,
            intent=self.intent,
            priority=self.priority,
            keywords=_words(self.keywords),
            examples=_words(self.examples),
            knows_intent=self.knows_intent,
            language=self.language,
            starts=self.active_from,
            ends=self.active_until,
            buttons=tuple(Button(one["label"], one["text"]) for one in self.buttons),
            hand_over=self.hand_over,
            must_match=_words(self.must_match),
            must_not_match=_words(self.must_not_match),
        )


def _words(stored: Any) -> tuple[str, ...]:
    """Raises: TypeError for what is no list of texts, as a fixture may bring."""
    if not isinstance(stored, (list, tuple)) or not all(isinstance(one, str) for one in stored):
        raise TypeError(f"a list of texts, not {type(stored).__name__}")
    return tuple(stored)


class ReviewedAnswer(models.Model):
    """The answer a person approved for exactly this question."""

    # 500: a longer text is never asked twice, and PostgreSQL cannot index much more.
    question = models.CharField(max_length=500)
    normalised = models.CharField(max_length=500, unique=True, editable=False)
    answer = models.TextField(max_length=4000)
    intent = models.CharField(max_length=60, blank=True, default="")
    active = models.BooleanField(default=True)
    updated_at = models.DateTimeField(auto_now=True)

    objects = Touching.as_manager()

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


def _steps(value: object) -> None:
    """Raises: ValidationError where a step is unknown or repeated."""
    conf = settings.ASSISTANT
    known = [*sorted(OWN_STEPS), *conf["BACKENDS"]]
    if not isinstance(value, list) or not value or len(set(map(str, value))) < len(value):
        raise ValidationError('Write each step once, such as ["reviewed", "model", "rules"].')
    if unknown := [str(step) for step in value if step not in known]:
        raise ValidationError(f"Unknown: {', '.join(unknown)}. Known: {', '.join(known)}.")


class PolicyChange(models.Model):
    """What staff set otherwise than settings; of the active ones the newest is in force."""

    steps = models.JSONField(
        null=True,
        blank=True,
        validators=[_steps],
        help_text="Who is asked, in this order; a person comes last. Empty: as in settings.",
    )
    confidence_min = models.FloatField(
        null=True,
        blank=True,
        validators=[MinValueValidator(0.0), MaxValueValidator(1.0)],
        help_text="A model that is less sure (0 to 1) hands on. Empty: as in settings.",
    )
    rule_score = models.FloatField(
        null=True,
        blank=True,
        validators=[MinValueValidator(0.0), MaxValueValidator(100.0)],
        help_text="How sure (0 to 100) a rule must be. Empty: as in settings.",
    )
    note = models.CharField(max_length=200, blank=True, default="", help_text="Why it was changed.")
    active = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ["-created_at", "-pk"]
        verbose_name = "change of policy"
        verbose_name_plural = "changes of policy"

    def __str__(self) -> str:
        return self.note or f"change of {self.created_at:%Y-%m-%d %H:%M}"

    @classmethod
    def in_force(cls) -> Policy:
        """What settings say, but for the newest active change. Sync: touches the database."""
        change = cls.objects.filter(active=True).first()
        return change.policy() if change is not None else policy()

    def policy(self) -> Policy:
        return policy(
            {
                "steps": tuple(self.steps) if self.steps else None,
                "confidence_min": self.confidence_min,
                "rule_score": self.rule_score,
            }
        )
