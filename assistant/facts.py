"""Facts are never generated: values in the user's text become placeholders before the model reads
it, and placeholders in the answer become values while it streams.

Training and serving call the same ``mask``. What cannot be filled becomes plain words, never a
bracket on the screen and never an invented value. Knows no user and no database: callers bring the
values, ``known_facts`` reads settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from assistant.engine.text import Slot

#: Every placeholder the model may read or write, with the plain words for an unknown value.
PLAIN_WORDS: Mapping[str, str] = {
    "Order Number": "your order number",
    "Invoice Number": "your invoice number",
    "Amount": "the amount",
    "Date": "that date",
    "Email": "your e-mail address",
    "Phone": "your phone number",
    "Client Name": "you",
    "Company": "our shop",
    "Website": "our website",
    "Support Email": "our support e-mail address",
    "Support Phone": "our support line",
    "Support Hours": "our opening hours",
    "Live Chat": "live chat",
}

_MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_NUMBER = r"\d{1,3}(?:[,.\s]\d{3}){0,5}(?:[.,]\d{1,2})?|\d+(?:[.,]\d{1,2})?"
#: Order matters: the first alternative that fits at a position wins.
_VALUES = re.compile(
    rf"""
    (?P<Email>[\w.+-]{{1,64}}@[\w-]{{1,63}}(?:\.[\w-]{{1,63}}){{1,4}})
  | (?P<Amount>(?:[$€£₹]|\b(?:usd|eur|gbp|inr|rs\.?)\s?)\s?(?:{_NUMBER})(?!\w)
      | (?<![\w#-])(?:{_NUMBER})\s?
        (?:[$€£₹]|(?:usd|eur|gbp|inr|dollars?|euros?|pounds?|bucks|quid)\b))
  | (?P<Date>(?<!\d)\d{{4}}-\d{{1,2}}-\d{{1,2}}(?!\d)
      | (?<![\d/])\d{{1,2}}[/.]\d{{1,2}}[/.]\d{{2,4}}(?![\d/])
      | \b{_MONTH}\s\d{{1,2}}(?:st|nd|rd|th)?(?:,?\s\d{{4}})?\b
      | \b\d{{1,2}}(?:st|nd|rd|th)?\s(?:of\s)?{_MONTH}(?:\s\d{{4}})?(?!\w))
  | (?P<Phone>(?<![\w#])(?:\+\d{{1,3}}[\s.-]?)(?:\(?\d{{2,4}}\)?[\s.-]?){{2,4}}\d{{2,4}}\b
      | (?<![\w#-])\(?\d{{3}}\)?[\s.-]\d{{3}}[\s.-]\d{{4}}\b)
  | (?P<Number>(?<![\w#-])\#?\s?[A-Za-z]{{1,4}}[-\#]?\d{{3,}}(?:-\d+)*\b
      | (?<![\w#])\#\s?\d{{3,}}\b
      | (?<![\w#-])\d{{5,}}(?:-\d+)*\b)
  | \b(?:my\ name\ is|my\ name's|name\ is|this\ is)\s
        (?P<Name>[A-Z][\w'-]{{1,30}}(?:\s[A-Z][\w'-]{{1,30}})?)
    """,
    re.VERBOSE | re.IGNORECASE,
)
_INVOICE_NEAR = re.compile(r"\b(?:invoice|invoices|bill|receipt|inv)\b\W+(?:\w+\W+){0,3}$", re.I)
_KNOWN = {"Email": "Email", "Amount": "Amount", "Date": "Date", "Phone": "Phone"}


@dataclass(frozen=True, slots=True)
class Masked:
    """``parts`` alternate plain text and ``Slot``s; ``values`` keeps the first value of each."""

    parts: tuple[str | Slot, ...]
    values: dict[str, str]


def mask(text: str) -> Masked:
    """``text`` with order and invoice numbers, e-mails, amounts, dates and names taken out."""
    parts: list[str | Slot] = []
    values: dict[str, str] = {}
    end = 0
    for name, start, stop in spans(text):
        values.setdefault(name, text[start:stop])
        parts += [text[end:start], Slot(name)]
        end = stop
    parts.append(text[end:])
    return Masked(tuple(part for part in parts if part), values)


def spans(text: str) -> Iterator[tuple[str, int, int]]:
    """Placeholder, start and end of each value in ``text``, in order."""
    for match in _VALUES.finditer(text):
        name, start, stop = _classify(match, text)
        if name is not None:
            yield name, start, stop


def _classify(match: re.Match[str], text: str) -> tuple[str | None, int, int]:
    """Placeholder name (None: leave the text alone) and the span that it replaces."""
    kind = str(match.lastgroup)
    start, stop = match.span(kind)
    if kind == "Name":
        # IGNORECASE is for the words before it; a name itself must look like one.
        return ("Client Name" if match[kind][0].isupper() else None), start, stop
    if kind == "Number":
        value = match[kind]
        is_invoice = value.lower().lstrip("# ").startswith("inv") or _INVOICE_NEAR.search(
            text, max(0, start - 48), start
        )
        return ("Invoice Number" if is_invoice else "Order Number"), start, stop
    return _KNOWN[kind], start, stop


class Filler:
    """Replaces ``{{Name}}`` in a stream of text; holds back only what may become a placeholder."""

    _LONGEST = max(len(name) for name in PLAIN_WORDS) + 4

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values
        self._held = ""

    def push(self, text: str) -> str:
        """The part of ``text`` (and of what was held) that can be shown now."""
        self._held += text
        shown = _PLACEHOLDER.sub(self._fill, self._held)
        cut = shown.rfind("{")
        if cut > 0 and shown[cut - 1] == "{":
            cut -= 1
        if cut < 0 or "}}" in shown[cut:] or len(shown) - cut > self._LONGEST:
            cut = len(shown)
        self._held = shown[cut:]
        return shown[:cut]

    def flush(self) -> str:
        """What is still held; the stream is over."""
        held, self._held = self._held, ""
        return held

    def _fill(self, match: re.Match[str]) -> str:
        name = match[1]
        return self._values.get(name) or PLAIN_WORDS.get(name, name.lower())


_PLACEHOLDER = re.compile(r"\{\{([A-Za-z][A-Za-z ]{0,30})\}\}")


def fill(text: str, values: Mapping[str, str]) -> str:
    """``text`` with every placeholder replaced by its value or its plain words."""
    filler = Filler(values)
    return filler.push(text) + filler.flush()


def given(values: Mapping[str, str]) -> frozenset[str]:
    """Names that have a value; one that stands for itself, so as to stay visible, has none."""
    return frozenset(name for name, value in values.items() if value != "{{" + name + "}}")


def known_facts(user: Any = None) -> dict[str, str]:
    """Constants from settings, then what the registered functions know about ``user``.

    ``ASSISTANT["FACT_FUNCTIONS"]`` lists dotted paths of ``function(user) -> dict[str, str]``.
    """
    from django.conf import settings
    from django.utils.module_loading import import_string

    found = {name: value for name, value in settings.ASSISTANT.get("FACTS", {}).items() if value}
    for path in settings.ASSISTANT.get("FACT_FUNCTIONS", ()):
        function: Callable[[Any], Mapping[str, str]] = import_string(path)
        found |= function(user)
    return found
