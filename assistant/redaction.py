"""Takes personal values out of a conversation before it leaves the house, and puts them back.

Every value gets a placeholder of its own (``{{Order Number}}``, ``{{Order Number B}}``), the same
wherever it occurs, so that a model elsewhere can tell two orders apart and the answer names the
right one. Built on ``facts.spans``, wider: cards, bank accounts, addresses, passwords and codes,
names in greetings (and as people type theirs: "my name is ana"), and every value the product knows
of the user. Patterns find what looks like such a value; a name in the middle of a sentence that
nobody introduced is not found. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from assistant import facts

#: What the company says of itself is no secret, and the model needs it.
_PUBLIC = frozenset(
    {"Company", "Website", "Support Email", "Support Phone", "Support Hours", "Live Chat"}
)
_STREET = (
    r"(?:street|str|st|road|rd|avenue|ave|lane|ln|drive|dr|boulevard|blvd|way|court|ct|square|sq)"
)
_CODE_WORDS = (
    r"(?:password|passcode|pass\ phrase|pw|pin|otp|cvv|cvc"
    r"|(?:security|verification|one[\s-]time)\ code)"
)
#: Words after "my name is" that are no name, or end one written without capitals.
_NO_NAME = (
    r"(?:and|but|or|i|im|my|the|an?|is|was|on|in|at|from|with|not|wrong|spell?ed|spelt|misspelled"
    r"|missing|incorrect|still|please|can|could|would|will|want|need|have|has|how|what|where|when"
    r"|why|you|your|we|do|does|did|to|for|of|this|that|it|as|so|also|he|she)\b"
)
#: Wider than what the bundled model was trained on; case matters only where a name must look like
#: one. Order matters: the first alternative that fits at a position wins.
_PERSONAL = re.compile(
    rf"""
    (?P<Password>(?:(?i:\b{_CODE_WORDS}\s?(?:is\s?[:=]?|:|=)\s?)
      | (?i:\b{_CODE_WORDS}\s)(?=\S{{0,60}}\d)
      | [?&](?i:token|key|secret|sig|signature|password|code)=(?=\S))
      (?P<secret>\S{{3,64}}))
  | (?P<Iban>\b[A-Z]{{2}}\d{{2}}(?:\s?[A-Z0-9]{{4}}){{2,7}}(?:\s?[A-Z0-9]{{1,3}})?\b)
  | (?P<Card>(?<![\w-])\d{{4}}(?:[\s-]?\d{{4}}){{2}}[\s-]?\d{{1,7}}(?![\w-])
      | (?<![\w-])\d{{4}}[\s-]?\d{{6}}[\s-]?\d{{5}}(?![\w-]))
  | (?P<National>(?<![\w-])\d{{3}}-\d{{2}}-\d{{4}}(?![\w-]))
  | (?P<Address>\b\d{{1,5}}[A-Za-z]?\s(?:[A-Z][\w.'-]{{0,30}}\s){{1,4}}(?i:{_STREET})\b)
  | (?P<Network>\b(?:\d{{1,3}}\.){{3}}\d{{1,3}}\b
      | \b(?:[0-9a-fA-F]{{1,4}}:){{4,7}}[0-9a-fA-F]{{1,4}}\b)
  | (?P<Phone>(?<![\w.,-])\(?0\d{{1,4}}\)?(?:[\s./-]\d{{2,8}}){{1,4}}(?![\w-])
      | (?<![\w.,-])\d{{3}}-\d{{4}}(?![\w-]))
  | (?i:\bmy\ name(?:\ is|['\u2019]s)\s+(?!{_NO_NAME}))
    (?P<Introduced>[^\W\d_][\w'\u2019-]{{1,30}}
      (?:\s(?!(?i:{_NO_NAME}))[^\W\d_][\w'\u2019-]{{1,30}}){{0,2}})
  | (?i:\b(?:i\ am|i['\u2019]m|call\ me|it['\u2019]s|regards|sincerely|signed|dear
      |mr|mrs|ms|miss|dr)[,.]?\s+)
    (?P<Name>[A-ZÀ-Þ][\w'\u2019-]{{1,30}}(?:\s[A-ZÀ-Þ][\w'\u2019-]{{1,30}}){{0,2}})
    """,
    re.VERBOSE,
)
#: group -> placeholder
_KINDS = {
    "Password": "Password",
    "Iban": "Bank Account",
    "Card": "Card Number",
    "Address": "Address",
    "Network": "Network Address",
    "National": "National Id",
    "Phone": "Phone",
    "Introduced": "Client Name",
    "Name": "Client Name",
}
#: Shorter ones would be found everywhere.
_LEAST_CHARS = 3

Span = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Redacted:
    """``texts`` without personal values; ``values`` by the placeholder that stands for each."""

    texts: tuple[str, ...]
    values: dict[str, str]


def redact(texts: Sequence[str], known: Mapping[str, str] | None = None) -> Redacted:
    """The texts of one conversation, in order. ``known``: values the product knows of the user."""
    private = {name: value for name, value in (known or {}).items() if name not in _PUBLIC}
    book = _Book(private)
    found = [list(_spans(text)) for text in texts]
    for text, spans in zip(texts, found, strict=True):
        for kind, start, stop in spans:
            book.add(kind, text[start:stop])
    literal = book.pattern()
    return Redacted(
        tuple(
            _replaced(text, _merged(spans, literal.finditer(text)), book)
            for text, spans in zip(texts, found, strict=True)
        ),
        book.values(),
    )


class Filler(facts.Filler):
    """Puts values back into a stream of text; knows the longer names given here."""

    _LONGEST = 36


class _Book:
    """Which placeholder stands for which value."""

    def __init__(self, known: Mapping[str, str]) -> None:
        self._names: dict[str, str] = {}  # by value, folded
        self._values: dict[str, str] = {}
        self._kinds: dict[str, int] = {}
        for kind, value in known.items():
            if len(value.strip()) >= _LEAST_CHARS:
                self.add(kind, value.strip())

    def add(self, kind: str, value: str) -> None:
        if value.casefold() in self._names:
            return
        at = self._kinds[kind] = self._kinds.get(kind, -1) + 1
        name = kind if at == 0 else f"{kind} {_letters(at)}"
        self._names[value.casefold()], self._values[name] = name, value
        if kind == "Client Name":
            for part in value.split():
                if len(part) >= _LEAST_CHARS and part != value:
                    self.add(kind, part)  # "Ana" alone, after "Ana Lopez"

    def name(self, value: str) -> str:
        """Its placeholder. Patterns fold a few letters (dotted I) that ``casefold`` does not."""
        return self._names.get(value.casefold(), "Personal Value")

    def values(self) -> dict[str, str]:
        return dict(self._values)

    def pattern(self) -> re.Pattern[str]:
        """Finds every value again, wherever it is written; the longest first."""
        values = sorted(self._values.values(), key=len, reverse=True)
        some = "|".join(re.escape(value) for value in values) or r"(?!)"
        return re.compile(rf"(?<!\w)(?:{some})(?!\w)", re.IGNORECASE)


def _letters(at: int) -> str:
    """B, C, ... Z, AA, AB, ...: the placeholder's pattern knows no digits."""
    letters = ""
    while at >= 0:
        letters = ascii_uppercase[at % 26] + letters
        at = at // 26 - 1
    return letters


def _spans(text: str) -> Iterator[Span]:
    """Personal values in ``text``, in order; the wider patterns win where both fit."""
    wide: list[Span] = []
    for match in _PERSONAL.finditer(text):
        group = next(name for name in _KINDS if match[name] is not None)
        start, stop = match.span("secret" if group == "Password" else group)
        wide.append((_KINDS[group], start, stop))
    narrow = [span for span in facts.spans(text) if not _overlaps(span, wide)]
    yield from sorted([*wide, *narrow], key=lambda span: span[1])


def _merged(spans: list[Span], literal: Iterator[re.Match[str]]) -> list[Span]:
    again = [("", *match.span()) for match in literal]
    more = [span for span in again if not _overlaps(span, spans)]
    return sorted([*spans, *more], key=lambda span: span[1])


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(span[1] < stop and start < span[2] for _, start, stop in others)


def _replaced(text: str, spans: Sequence[Span], book: _Book) -> str:
    parts, end = [], 0
    for _, start, stop in spans:
        parts += [text[end:start], "{{", book.name(text[start:stop]), "}}"]
        end = stop
    return "".join([*parts, text[end:]])
