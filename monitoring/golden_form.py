"""The form of a golden case: a question or a conversation as plain text, checked before it is kept.

Knows the closed set of intents and what is in the golden set already.
"""

from __future__ import annotations

import re
from typing import Any

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError

from assistant.modelkit import labels
from monitoring import evaluation
from monitoring.models import GoldenCase

MOST_TURNS = 20
_TURN = re.compile(r"(?im)^\s*(user|assistant)\s*:\s*")
_INTENTS = [("", "(none: out of scope)"), *((name, name) for name in labels.INTENTS[:-1])]


class GoldenCaseForm(forms.ModelForm):  # type: ignore[type-arg]
    """``turns`` of the row come from ``text``."""

    text = forms.CharField(
        widget=forms.Textarea(attrs={"rows": 6, "cols": 80, "class": "vLargeTextField"}),
        max_length=20_000,
        help_text="A question; or a conversation, each turn on a line of its own that begins with "
        "“user:” or “assistant:”. Leave out what belongs to one customer.",
    )
    intent = forms.ChoiceField(
        choices=_INTENTS, required=False, help_text="What the last question is about."
    )

    class Meta:
        model = GoldenCase
        fields = ["intent", "scope", "active", "note"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk and "text" in self.fields:
            self.initial["text"] = as_text(self.instance.turns)

    def clean_text(self) -> str:
        text: str = self.cleaned_data["text"]
        self.instance.turns = as_turns(text)
        self._refuse_twice(self.instance.turns)
        return text

    def clean(self) -> dict[str, Any]:
        told = super().clean() or self.cleaned_data
        if told.get("scope") == "in" and not told.get("intent"):
            self.add_error("intent", "A question in scope needs its intent. Choose one.")
        if told.get("scope") == "out" and told.get("intent"):
            self.add_error("intent", "A question out of scope has no intent. Choose the first.")
        return told

    def _refuse_twice(self, turns: list[dict[str, str]]) -> None:
        """Raises: ValidationError for what the golden set asks already."""
        asked = [_folded(turn["text"]) for turn in turns]
        for row in evaluation.read_golden():
            if [_folded(message.text) for message in row.messages] == asked:
                raise ValidationError(f"The golden set asks this already, as {row.id}.")
        for case in GoldenCase.objects.exclude(pk=self.instance.pk):
            if [_folded(turn.get("text", "")) for turn in case.turns] == asked:
                raise ValidationError(f"Golden case {case.pk} asks this already.")


def as_turns(text: str) -> list[dict[str, str]]:
    """Raises: ValidationError with what is wrong."""
    parts = _TURN.split(text.strip())
    if len(parts) == 1:
        turns = [{"role": "user", "text": parts[0].strip()}]
    else:
        said = zip(parts[1::2], parts[2::2], strict=True)
        turns = [{"role": role.lower(), "text": what.strip()} for role, what in said]
        if parts[0].strip():
            raise ValidationError("The first line must begin with “user:”, as the others do.")
    _refuse_disorder(turns)
    return turns


def _refuse_disorder(turns: list[dict[str, str]]) -> None:
    """Raises: ValidationError."""
    most = settings.ASSISTANT_MAX_TEXT_CHARS
    if len(turns) > MOST_TURNS:
        raise ValidationError(f"At most {MOST_TURNS} turns; these are {len(turns)}.")
    if any(not turn["text"] for turn in turns):
        raise ValidationError("A turn says nothing. Write its text, or leave it out.")
    if any(len(turn["text"]) > most for turn in turns):
        raise ValidationError(f"A turn has at most {most:,} characters.")
    wanted = ["user" if at % 2 == 0 else "assistant" for at in range(len(turns))]
    if [turn["role"] for turn in turns] != wanted or len(turns) % 2 == 0:
        raise ValidationError("Turns go user, assistant, user, ...; the last is the user's.")


def as_text(turns: list[dict[str, str]]) -> str:
    """What ``as_turns`` reads."""
    if len(turns) == 1:
        return turns[0].get("text", "")
    return "\n".join(f"{turn.get('role')}: {turn.get('text')}" for turn in turns)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
