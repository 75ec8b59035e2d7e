"""What a sentence asks for, word by word: two sentences with the same ``Ideas`` want one answer.

Strict on purpose, and English only. A word is dropped only if ``fixtures/words.toml`` lists it as
empty, exchanged only if it is listed as a synonym; everything else (names, cities, plans, numbers,
words never seen) has to stand in both sentences. Knows no model and no database.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from rapidfuzz.distance import OSA

from fallback.rules import worded

#: Longer texts tell a story that no list of words can follow; a reviewed question is no longer.
MAX_CHARS = 500
#: Whose things are meant is kept beside the ideas: words about both are not worth a difference.
_MINE, _YOURS = frozenset({"my", "mine"}), frozenset({"your", "ur", "yours"})
_SIGNS = {"$": " usd ", "€": " eur ", "£": " gbp ", "%": " percent ", "₹": " inr ", "¥": " yen "}
_SIGN = re.compile("[" + "".join(_SIGNS) + "]")
_PLACEHOLDER = re.compile(r"\{\{\s*([^{}]{1,40}?)\s*\}\}")
#: Two letters changed places in a word of so many; any other slip in a word of so many.
_SWAPPED_CHARS, _TYPO_CHARS = 5, 7


@dataclass(frozen=True, slots=True)
class Ideas:
    """``words``: what is asked, sorted; ``order``: those whose order matters, as they were said."""

    words: tuple[str, ...]
    order: tuple[str, ...]
    #: Whose things it speaks of: "", "my" (the customer's), "your" (ours) or "both".
    whose: str = field(default="", compare=False)

    def same(self, other: Ideas | None) -> bool:
        """Whether both ask for the same, of nobody's or of the same one's things."""
        return other is not None and self == other and {self.whose, other.whose} != {"my", "your"}


@lru_cache(maxsize=8192)
def ideas(text: str) -> Ideas | None:
    """What ``text`` asks for; None if that is nothing, or more than a list of words can hold."""
    tokens = _tokens(text) if len(text) <= MAX_CHARS else []
    said = tuple(_said([token for token in tokens if token not in _ARTICLES]))
    if not _enough(said):
        return None
    directed = not _DIRECTED.isdisjoint(said)
    order = said if directed else tuple(word for word in said if word not in _FREE)
    return Ideas(tuple(sorted(set(said))), order, _whose(frozenset(tokens)))


def signs(text: str) -> tuple[str, ...]:
    """Currencies and other signs that mean something, in order: what ``normalise`` drops."""
    return tuple(_SIGN.findall(text))


def _enough(said: Sequence[str]) -> bool:
    """One idea says too little ("and now?"), unless it is a whole request in itself; and a reply
    ("yes, the new one") is no request."""
    if not _REQUESTS.isdisjoint(said):
        return True
    return len(set(said)) > 1 and not _ASKING.isdisjoint(said)


def _whose(tokens: frozenset[str]) -> str:
    mine, yours = not _MINE.isdisjoint(tokens), not _YOURS.isdisjoint(tokens)
    return ("both" if yours else "my") if mine else ("your" if yours else "")


def _tokens(text: str) -> list[str]:
    """Words in lower case, short forms written out; a currency sign and a placeholder are words."""
    marked = _PLACEHOLDER.sub(lambda found: f" slot_{found[1].replace(' ', '_')} ", text)
    return worded(_SIGN.sub(lambda found: _SIGNS[found[0]], marked)).split()


def _said(tokens: Sequence[str]) -> Iterator[str]:
    """The ideas of ``tokens`` in order, the longest known wording first."""
    plain = [_plain(token) for token in tokens]
    at = 0
    while at < len(tokens):
        length, meant = _longest(tokens, plain, at)
        yield from meant
        at += length


def _longest(tokens: Sequence[str], plain: Sequence[str], at: int) -> tuple[int, tuple[str, ...]]:
    """How many words from ``at`` are one wording, and what it means."""
    for length in range(min(_LONGEST, len(tokens) - at), 0, -1):
        for words in (tokens, plain):
            found = _WORDINGS.get(" ".join(words[at : at + length]))
            if found is not None:
                return length, found
    return 1, (tokens[at],)


def _plain(token: str) -> str:
    """The listed word that ``token`` is a form or a misspelling of; else ``token``."""
    if token in _WORDINGS or not token.isalpha():
        return token
    forms = (form for form in _forms(token) if form in _VOCABULARY)
    return next(forms, None) or _spelt(token)


def _forms(token: str) -> Iterator[str]:
    """What ``token`` could be the plural or the "-ing" of."""
    if token.endswith("ies"):
        yield token[:-3] + "y"
    if token.endswith("s") and not token.endswith("ss"):
        yield from (token[:-1], token[:-2] if token.endswith("es") else token)
    if token.endswith("ing"):
        stem = token[:-3]
        yield from (stem, stem + "e", stem[:-1] if stem[-2:-1] == stem[-1:] else stem)


@lru_cache(maxsize=8192)
def _spelt(token: str) -> str:
    """The one listed word a slip of the keyboard away, between the same two outer letters."""
    if len(token) < _SWAPPED_CHARS or token in _NO_TYPO:
        return token
    near = {word for word in _SPELLING if _slip(token, word)}
    return near.pop() if len(near) == 1 else token


def _slip(token: str, word: str) -> bool:
    if (token[0], token[-1]) != (word[0], word[-1]) or OSA.distance(token, word) > 1:
        return False
    return len(token) >= _TYPO_CHARS or sorted(token) == sorted(word)


def _listed(entries: Sequence[str]) -> Iterator[str]:
    """Wordings as they are met in a text, which has lost its articles."""
    for entry in entries:
        yield " ".join(word for word in entry.split() if word not in _ARTICLES)


def _wordings(lists: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Every known wording and the ideas it stands for; a later list wins."""
    found: dict[str, tuple[str, ...]] = dict.fromkeys(_listed(lists["empty"]), ())
    found |= {word: (word,) for word in lists["plain"]}
    for idea, others in lists["same"].items():
        meant = tuple(idea.split("+"))
        found |= dict.fromkeys(_listed(others), meant) | {part: (part,) for part in meant}
    return found | {entry: (entry.replace(" ", "-"),) for entry in _listed(lists["apart"])}


_LISTS = tomllib.loads(
    (Path(__file__).parent / "fixtures" / "words.toml").read_text(encoding="utf-8")
)
_ARTICLES = frozenset(_LISTS["articles"])
_DIRECTED = frozenset(_LISTS["directed"])
_NO_TYPO = _DIRECTED | frozenset(_LISTS["no_typo"])
_REQUESTS = frozenset(_LISTS["requests"])
_WORDINGS = _wordings(_LISTS)
_VOCABULARY = frozenset(word for entry in _WORDINGS for word in entry.split())
_LONGEST = max(entry.count(" ") + 1 for entry in _WORDINGS)
_IDEAS = frozenset(idea for meant in _WORDINGS.values() for idea in meant)
#: Ideas that may stand in any order.
_FREE = _IDEAS - frozenset(_LISTS["valued"])
_ASKING = _FREE - frozenset(_LISTS["replies"])
_SPELLING = tuple(
    entry
    for entry in _WORDINGS
    if len(entry) >= _SWAPPED_CHARS and entry.isalpha() and entry not in _LISTS["deciding"]
)
