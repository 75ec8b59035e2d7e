"""Conversations made of single questions: what people say next, put behind a first question.

Dialogues written by hand teach the manner; there are too few to teach that "and 5520?" goes on with
whatever came before. Here any written question opens one. Knows texts and labels, no tokens.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from assistant.modelkit.labels import OUT_OF_SCOPE, SUPPORT

#: A question of an intent, as somebody might ask it.
Ask = Callable[[str], str]
#: Question, intent, and the answer where it is not just any of the intent's.
Exchange = tuple[str, str, str | None]

#: Requests about one order or invoice, so that a number alone can go on with them.
_NUMBERED = (
    *("cancel_order", "change_order", "change_shipping_address", "check_cancellation_fee"),
    *("complaint", "delivery_period", "get_refund", "payment_issue", "review"),
    *("track_order", "track_refund", "check_invoice", "get_invoice"),
)
_INVOICES = ("check_invoice", "get_invoice")
#: How often each kind of second turn is made.
_SHARES = {
    "next": 0.34, "number": 0.13, "second": 0.13, "same": 0.08, "person": 0.08,
    "correction": 0.12, "change": 0.12,
}  # fmt: skip
#: How often something else was asked before, and how often a topic change says so.
_EARLIER, _SAID = 0.35, 0.5


class FollowUps:
    """``rows``: ``written/followups.jsonl``; ``answers``: an answer of an intent, no value used."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], ask: Ask, answers: Ask) -> None:
        self._rows: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for row in rows:
            self._rows[row["kind"]].append(row)
        self._ask, self._answers = ask, answers

    def draw(self, rng: random.Random) -> list[Exchange]:
        """A conversation of two or three questions; the last one is to be answered."""
        kinds = [kind for kind in _SHARES if self._rows[kind]]
        (kind,) = rng.choices(kinds, [_SHARES[kind] for kind in kinds])
        made: list[Exchange] = getattr(self, f"_{kind}")(rng, rng.choice(self._rows[kind]))
        if rng.random() < _EARLIER:
            made.insert(0, self._question(rng.choice(SUPPORT)))
        return made

    def _next(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        return [self._question(row["after"]), (row["text"], row["intent"], None)]

    def _number(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        """The answer asks for a number, and the next turn is little more than that."""
        intent = rng.choice(_NUMBERED)
        asked = rng.choice(self._rows["ask_invoice" if intent in _INVOICES else "ask"])["text"]
        first = (self._ask(intent), intent, f"{self._answers(intent)} {asked}")
        return [first, (_numbered(row["text"], intent, rng), intent, None)]

    def _second(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        intent = rng.choice(_NUMBERED)
        return [self._question(intent), (_numbered(row["text"], intent, rng), intent, None)]

    def _same(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        intent = rng.choice(SUPPORT)
        return [self._question(intent), (row["text"], intent, None)]

    def _person(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        return [self._question(rng.choice(SUPPORT)), (row["text"], row["intent"], None)]

    def _correction(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        wrong, right = rng.sample(SUPPORT, 2)
        return [self._question(wrong), (_joined(row["text"], self._ask(right)), right, None)]

    def _change(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        before, after = rng.choice(SUPPORT), rng.choice((*SUPPORT, *SUPPORT, OUT_OF_SCOPE))
        lead = row["text"] if rng.random() < _SAID else ""
        return [self._question(before), (_joined(lead, self._ask(after)), after, None)]

    def _question(self, intent: str) -> Exchange:
        return self._ask(intent), intent, None


def _joined(lead: str, question: str) -> str:
    return lead + question if not lead else lead + question[0].lower() + question[1:]


def _numbered(text: str, intent: str, rng: random.Random) -> str:
    number = str(rng.randrange(10**4, 10 ** rng.randrange(5, 10)))
    return text.replace("{n}", f"INV-{number}" if intent in _INVOICES else number)


def shown(answer: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """``answer`` as an earlier turn of a running product: its facts filled, some of them."""
    for name, values in words.items():
        if "{{" + name + "}}" in answer:
            answer = answer.replace("{{" + name + "}}", rng.choice(values))
    return answer
