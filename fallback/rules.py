"""Which rule a question sounds like. Pure: values in, a rule or None out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

_APART = re.compile(r"[^\w]+")
#: Short forms written out, so that "where's my refund" is "where is my refund".
_SHORT = {"'s": " is", "'re": " are", "'m": " am", "'ll": " will", "'ve": " have", "n't": " not"}
_SHORT_FORM = re.compile(r"('s|'re|'m|'ll|'ve|n't)\b")
#: A pattern found inside a longer question has to be at least this long to count as a match.
_LEAST_PART_CHARS = 8


@dataclass(frozen=True, slots=True)
class RuleText:
    """A rule without its row; ``patterns`` are ``worded``."""

    name: str
    patterns: tuple[str, ...]
    answer: str
    intent: str = ""
    priority: int = 0


def normalise(text: str) -> str:
    """Lower case, words parted by one space: the key of a reviewed answer."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _APART.sub(" ", folded).strip()


def worded(text: str) -> str:
    """Normalised with short forms written out: what rules compare."""
    plain = text.casefold().replace("\u2019", "'")
    return normalise(_SHORT_FORM.sub(lambda found: _SHORT[found[1]], plain))


def similarity(question: str, pattern: str) -> float:
    """How alike two worded phrases are, 0..100; a phrase inside a longer question counts."""
    if not pattern:
        return 0.0
    if f" {pattern} " in f" {question} ":
        return 100.0
    whole = fuzz.token_sort_ratio(question, pattern)
    if len(pattern) < _LEAST_PART_CHARS or len(pattern) > len(question):
        return whole
    return max(whole, fuzz.partial_ratio(question, pattern))


def match(question: str, rules: Sequence[RuleText], *, score: float) -> RuleText | None:
    """The rule most alike to the question, if at least ``score``; priority decides a tie."""
    asked = worded(question)
    best: tuple[float, int] = (score, -(2**31))
    found: RuleText | None = None
    for rule in rules:
        alike = max((similarity(asked, pattern) for pattern in rule.patterns), default=0.0)
        if (alike, rule.priority) > best or (found is None and alike >= score):
            best, found = (alike, rule.priority), rule
    return found
