"""Which of many rules a question sounds like, how sure that is, and why.

A ``Book`` is compiled once from all rules and asked many times. Four kinds of evidence: expressions
and phrases decide alone, keywords and what was learned from example sentences add up. A score is
roughly how often in a hundred that rule would be right. Pure: no database, the time comes with the
question.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import overload

import numpy as np
import re2
from numpy.typing import NDArray

from fallback import learning
from fallback.rules import (
    MAX_PHRASE_CHARS,
    RuleText,
    expression_options,
    fault_of,
    is_expression,
    likeness,
    similarity,
    worded,
)

#: A longer question says what it is about in its beginning.
MAX_QUESTION_CHARS = 600
#: Phrases that share the most letters with a question are compared in full; no others are.
_COMPARED = 48
_LEAST_SHARED = 0.34
#: How alike two phrases are (0..100) and how sure that makes: below 70 not at all, 86 is the point
#: up to which typing errors lead and from which other questions do.
_ALIKE, _SURE = (70.0, 86.0, 100.0), (0.0, 70.0, 100.0)
#: How sure several keywords together make, and one alone.
_KEYWORDS, _KEYWORD = 75.0, 30.0
#: A keyword of at least so many letters stands for longer words that begin like it.
_LEAST_STEM = 4
#: Chances below this are not worth a line.
_LEAST_CHANCE = 2.0
#: Bytes for all expressions of a book together.
_EXPRESSIONS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Ranked:
    """A rule with its ``score`` (0..100) and the reasons, the strongest first."""

    rule: RuleText
    score: float
    why: tuple[str, ...]

    def is_sure(self, least: float) -> bool:
        """Whether it answers where that much (0..100) is needed; people read whole figures."""
        return round(self.score) >= least


@dataclass(slots=True)
class _Evidence:
    """What speaks for one rule; all figures 0..100, ``length`` in characters."""

    decided: float = 0.0
    length: int = 0
    keywords: float = 0.0
    learned: float = 0.0
    why: list[tuple[float, str]] = field(default_factory=list)

    @property
    def score(self) -> float:
        together = 100 - (100 - self.keywords) * (100 - self.learned) / 100
        return max(self.decided, together)

    def decide(self, sure: float, length: int, why: str) -> None:
        if (sure, length) > (self.decided, self.length):
            self.decided, self.length = sure, length
        self.why.append((sure, why))

    def hint(self, sure: float, why: str) -> None:
        self.keywords = max(self.keywords, sure)
        self.why.append((sure, why))

    def learn(self, chance: float) -> None:
        self.learned = chance
        self.why.append((chance, f"sounds like its examples: {chance:.0f} %"))

    def reasons(self) -> tuple[str, ...]:
        return tuple(text for _, text in sorted(self.why, key=lambda item: -item[0])[:4])


class Book(Sequence[RuleText]):
    """All rules that may answer, ready to be asked; a sequence of them as they were given."""

    def __init__(self, rules: Sequence[RuleText]) -> None:
        self._rules = tuple(rules)
        self._phrases = _Phrases(self._rules)
        self._expressions = _Expressions(self._rules)
        self._keywords = _Keywords(self._rules)
        self._lessons = _Lessons(self._rules)

    @overload
    def __getitem__(self, at: int) -> RuleText: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[RuleText]: ...
    def __getitem__(self, at: int | slice) -> RuleText | Sequence[RuleText]:
        return self._rules[at]

    def __len__(self) -> int:
        return len(self._rules)

    def rank(
        self,
        question: str,
        *,
        now: datetime | None = None,
        languages: Sequence[str] = (),
        most: int = 8,
    ) -> list[Ranked]:
        """The rules that something speaks for, the surest first.

        ``now``: leave out rules whose time it is not. ``languages``: leave out rules of others.
        """
        found = self._evidence(question[:MAX_QUESTION_CHARS])
        fitting = [
            (self._rules[at], evidence)
            for at, evidence in found.items()
            if (now is None or self._rules[at].answers_at(now))
            and self._rules[at].speaks(languages)
        ]
        fitting.sort(key=_order)
        return [Ranked(rule, one.score, one.reasons()) for rule, one in fitting[:most]]

    def _evidence(self, question: str) -> dict[int, _Evidence]:
        found: dict[int, _Evidence] = defaultdict(_Evidence)
        asked = worded(question)
        for at, expression in self._expressions.fitting(question):
            found[at].decide(100.0, len(expression), f"fits {expression}")
        for at, phrase, alike, why in self._phrases.alike(asked):
            sure = float(np.interp(alike, _ALIKE, _SURE))
            if sure > 0:
                found[at].decide(sure, len(phrase), why)
        for at, sure, entry in self._keywords.standing_in(asked):
            found[at].hint(sure, f'has the keywords "{entry}"')
        for at, chance in self._lessons.chances(asked):
            found[at].learn(chance)
        return found


def _order(found: tuple[RuleText, _Evidence]) -> tuple[float, ...]:
    """Surest first; between equals priority, then what was learned, then the longer phrase."""
    rule, evidence = found
    return (-round(evidence.score), -rule.priority, -evidence.learned, -evidence.length)


def sure(
    question: str, rules: Sequence[RuleText], *, score: float, now: datetime | None = None
) -> list[Ranked]:
    """All rules that are at least that sure, the surest first; compiles unless a Book."""
    book = rules if isinstance(rules, Book) else Book(rules)
    return [one for one in book.rank(question, now=now, most=len(book)) if one.is_sure(score)]


# --- Tests that rules carry ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """A sentence of a rule's tests that went elsewhere; ``instead``: the rule it went to."""

    rule: str
    sentence: str
    wanted: bool
    instead: str
    score: float

    def __str__(self) -> str:
        went = f'"{self.instead}" ({self.score:.0f})' if self.instead else "no rule"
        should = "should match" if self.wanted else "should not match"
        return f'{self.rule}: "{self.sentence}" {should}, but went to {went}'


def check(book: Book, *, score: float, only: str = "") -> list[Failure]:
    """What fails of the tests stored on the rules (``only``: of that rule)."""
    return [
        failure
        for rule in book
        if not only or rule.name == only
        for failure in _check(book, rule, score)
    ]


def _check(book: Book, rule: RuleText, score: float) -> Iterator[Failure]:
    languages = (rule.language,) if rule.language else ()
    for wanted, sentences in ((True, rule.must_match), (False, rule.must_not_match)):
        for sentence in sentences:
            best = next(iter(book.rank(sentence, languages=languages, most=1)), None)
            first = best if best is not None and best.is_sure(score) else None
            if (first is not None and first.rule is rule) is not wanted:
                name = first.rule.name if first is not None else ""
                reached = best.score if best is not None else 0.0
                yield Failure(rule.name, sentence, wanted, name, reached)


# --- The four kinds of evidence ------------------------------------------------------------------


class _Phrases:
    """Patterns and examples, found by the groups of three letters they share with a question."""

    def __init__(self, rules: Sequence[RuleText]) -> None:
        self._items = [
            (at, worded(phrase), kind)
            for at, rule in enumerate(rules)
            for kind, phrases in (("pattern", rule.patterns), ("example", rule.examples))
            for phrase in phrases
            if not is_expression(phrase)
        ]
        where: dict[str, list[int]] = defaultdict(list)
        sizes = np.ones(len(self._items))
        for number, (_, phrase, _) in enumerate(self._items):
            grams = _grams(phrase[:MAX_PHRASE_CHARS])
            sizes[number] = max(1, len(grams))
            for gram in grams:
                where[gram].append(number)
        self._where = {gram: np.array(numbers) for gram, numbers in where.items()}
        self._sizes = sizes

    def alike(self, asked: str) -> Iterator[tuple[int, str, float, str]]:
        """Rule, phrase, how alike (0..100) and the words for it."""
        for number in self._nearest(asked):
            at, phrase, kind = self._items[number]
            alike = (similarity if kind == "pattern" else likeness)(asked, phrase)
            inside = f" {phrase} " in f" {asked} "
            yield at, phrase, alike, f'{"contains" if inside else "is like"} "{phrase}"'

    def _nearest(self, asked: str) -> NDArray[np.intp]:
        held = [self._where[gram] for gram in _grams(asked) if gram in self._where]
        if not held:
            return np.empty(0, dtype=np.intp)
        shared = np.bincount(np.concatenate(held), minlength=len(self._items)) / self._sizes
        near = np.flatnonzero(shared >= _LEAST_SHARED)
        if len(near) > _COMPARED:
            near = near[np.argpartition(-shared[near], _COMPARED)[:_COMPARED]]
        return near


def _grams(text: str) -> set[str]:
    padded = f" {text} "
    return {padded[at : at + 3] for at in range(len(padded) - 2)} if text else set()


class _Expressions:
    """All regular expressions of a book, compiled into one machine of linear time.

    One that cannot be used (nobody checked it: it came with a fixture) never fits.
    """

    def __init__(self, rules: Sequence[RuleText]) -> None:
        self._items = [
            (at, pattern)
            for at, rule in enumerate(rules)
            for pattern in rule.patterns
            if is_expression(pattern) and not fault_of(pattern)
        ]
        options = expression_options()
        options.max_mem = _EXPRESSIONS_BYTES
        self._set = re2.Set.SearchSet(options)
        for _, pattern in self._items:
            self._set.Add(pattern[1:-1])
        if self._items:
            self._set.Compile()

    def fitting(self, question: str) -> Iterator[tuple[int, str]]:
        """Rule and expression."""
        if self._items:
            plain = unicodedata.normalize("NFKC", question)
            for number in self._set.Match(plain) or ():
                yield self._items[number]


class _Keywords:
    """Words that have to stand in a question together, found by the beginning of the first."""

    def __init__(self, rules: Sequence[RuleText]) -> None:
        self._where: dict[str, list[tuple[int, str, list[str], list[str]]]] = defaultdict(list)
        for at, rule in enumerate(rules):
            for entry in rule.keywords:
                needed, banned = keyword_words(entry)
                if needed:
                    self._where[needed[0]].append((at, entry, needed, banned))

    def standing_in(self, asked: str) -> Iterator[tuple[int, float, str]]:
        """Rule, how sure that makes, and the keywords as staff wrote them."""
        said = asked.split()
        stand = {word[:end] for word in said for end in range(_LEAST_STEM, len(word))} | {*said}
        for first in stand & self._where.keys():
            for at, entry, needed, banned in self._where[first]:
                if stand.issuperset(needed) and stand.isdisjoint(banned):
                    yield at, (_KEYWORDS if len(needed) > 1 else _KEYWORD), entry


def keyword_words(entry: str) -> tuple[list[str], list[str]]:
    """Of "cancel order -fee": the words that must stand in a question, those that must not."""
    parts = entry.split()
    banned = [word for part in parts if part[0] == "-" for word in worded(part).split()]
    return [w for part in parts if part[0] != "-" for w in worded(part).split()], banned


class _Lessons:
    """What was learned from example sentences.

    Rules that know an intent share one heap of sentences; a rule with examples alone has its own.
    The shipped sentences of every intent that no rule knows are there too: a question of that kind
    is better left to nobody.
    """

    def __init__(self, rules: Sequence[RuleText]) -> None:
        members: dict[str, list[int]] = defaultdict(list)
        for at, rule in enumerate(rules):
            if rule.knows_intent or rule.examples:
                members[rule.intent if rule.knows_intent else f"rule {at}"].append(at)
        self._members = list(members.values())
        known = [rules[inside[0]] for inside in self._members]
        unknown = sorted(learning.intents() - members.keys()) if known else []
        intents = [rule.intent or f"rule {at}" for at, rule in enumerate(known)] + unknown
        numbers = {intent: number for number, intent in enumerate(dict.fromkeys(intents))}
        self._intents = np.array([numbers[intent] for intent in intents], dtype=np.intp)
        lessons = (
            *(
                (
                    rule.intent if rule.knows_intent else "",
                    tuple(text for at in inside for text in rules[at].examples),
                )
                for rule, inside in zip(known, self._members, strict=True)
            ),
            *((intent, ()) for intent in unknown),
        )
        self._learned = _learned(lessons) if known else None

    def chances(self, asked: str) -> Iterator[tuple[int, float]]:
        """Rule and the chance (0..100) that the question is of its examples' kind.

        Heaps of one intent do not compete: the likeliest rules have the chance of all.
        """
        if self._learned is None or not asked:
            return
        all_chances = self._learned.chances(asked) * 100
        together = np.bincount(self._intents, all_chances)
        chances, intents = all_chances[: len(self._members)], self._intents[: len(self._members)]
        best = np.zeros(len(together))
        np.maximum.at(best, intents, chances)
        whole = np.where(chances >= best[intents], together[intents], chances)
        for number in np.flatnonzero(whole >= _LEAST_CHANCE).tolist():
            yield from ((at, float(whole[number])) for at in self._members[number])


@lru_cache(maxsize=2)
def _learned(lessons: tuple[tuple[str, tuple[str, ...]], ...]) -> learning.Learned:
    """What is learned from each intent's shipped sentences and the examples beside them.

    Kept, because most changes to rules are not to their examples.
    """
    return learning.Learned(
        [learning.heap(examples) + learning.shipped(intent) for intent, examples in lessons]
    )
