"""A rule without its row, and how alike two phrases are. Pure: values in, values out.

Which of many rules a question sounds like is ``matching``'s; where rules are kept is ``models``'.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import re2
from rapidfuzz import fuzz

_APART = re.compile(r"[^\w]+")
#: Short forms written out, so that "where's my refund" is "where is my refund".
_SHORT = {"'s": " is", "'re": " are", "'m": " am", "'ll": " will", "'ve": " have", "n't": " not"}
_SHORT_FORM = re.compile(r"('s|'re|'m|'ll|'ve|n't)\b")
#: A pattern found inside a longer question has to be at least this long to count as a match.
_LEAST_PART_CHARS = 8
#: Longest pattern or example. Every further bound of a rule is beside its column in ``models``.
MAX_PHRASE_CHARS = 300
#: Bytes one expression may take once compiled; ordinary ones take a few thousand.
_EXPRESSION_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Button:
    """A quick reply below the answer: what it says, and what pressing it asks."""

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class RuleText:
    """What one rule says, as staff wrote it.

    ``patterns``: phrases that decide alone, and expressions (``is_expression``). ``keywords``:
    words that have to stand in the question together, "-word" for one that must not. ``examples``:
    whole sentences to learn from; ``knows_intent`` adds those that ship for ``intent``. ``starts``
    and ``ends``: aware times between which it answers.
    """

    name: str
    patterns: tuple[str, ...]
    answer: str
    intent: str = ""
    priority: int = 0
    keywords: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    knows_intent: bool = False
    language: str = ""
    starts: datetime | None = None
    ends: datetime | None = None
    buttons: tuple[Button, ...] = ()
    hand_over: bool = False
    must_match: tuple[str, ...] = ()
    must_not_match: tuple[str, ...] = ()

    def speaks(self, languages: Sequence[str]) -> bool:
        """Whether it is for readers of one of these; for anybody where none is named."""
        return not languages or self.place_in(languages) < len(languages)

    def place_in(self, languages: Sequence[str]) -> int:
        """Where the first of them stands that it is written in: ``de`` is, of ``("fr", "de-at")``,
        second (1). Without a language it is for all (0)."""
        own = self.language.lower()
        read = (at for at, said in enumerate(languages) if f"{said}-".startswith(f"{own}-"))
        return next(read, len(languages)) if own else 0

    def answers_at(self, now: datetime) -> bool:
        return (self.starts is None or self.starts <= now) and (
            self.ends is None or now < self.ends
        )


def normalise(text: str) -> str:
    """Lower case, words parted by one space: the key of a reviewed answer."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _APART.sub(" ", folded).strip()


def worded(text: str) -> str:
    """Normalised with short forms written out: what rules compare."""
    plain = text.casefold().replace("\u2019", "'")
    return normalise(_SHORT_FORM.sub(lambda found: _SHORT[found[1]], plain))


def is_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression: it stands between slashes."""
    return len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/")


def expression_options() -> re2.Options:
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False
    options.max_mem = _EXPRESSION_BYTES
    return options


def fault_of(expression: str) -> str:
    """Why this expression (with its slashes) cannot be used; empty if it can.

    RE2 runs in time linear to the text, whatever the expression; what would need more than that
    (back references, look-around) or too much memory is refused.
    """
    try:
        found = re2.compile(expression[1:-1], expression_options())
    except re2.error as error:
        reason = error.args[0] if error.args else "it is not one"
        return reason.decode() if isinstance(reason, bytes) else str(reason)
    return "it fits every text" if found.search("") else ""


def similarity(question: str, pattern: str) -> float:
    """How alike two worded phrases are, 0..100; a phrase inside a longer question counts."""
    if not pattern:
        return 0.0
    if f" {pattern} " in f" {question} ":
        return 100.0
    whole = float(fuzz.token_sort_ratio(question, pattern))
    if len(pattern) < _LEAST_PART_CHARS or len(pattern) > len(question):
        return whole
    return max(whole, float(fuzz.partial_ratio(question, pattern)))


def likeness(question: str, example: str) -> float:
    """How alike a worded question is to a whole example sentence, 0..100.

    All words of the example in another order count as much as the same words with a slip; all of
    them inside a longer question a little less.
    """
    whole = float(fuzz.token_sort_ratio(question, example))
    if example.count(" ") < 2:
        return whole
    return max(whole, 0.9 * float(fuzz.token_set_ratio(question, example)))
