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
#: Requests that an e-mail address can go on with.
_ADDRESSED = (
    *("create_account", "delete_account", "edit_account", "newsletter_subscription"),
    *("recover_password", "registration_problems", "switch_account", "contact_customer_service"),
)
_ORDER_FORMS = ("{}", "{}", "{}", "#{}", "ORD-{}", "AB-{}", "no. {}")
_INVOICE_FORMS = ("INV-{}", "INV-{}", "RE-{}", "F-{}", "2025-{}")
_EMAILS = ("{}.{}@mail.example", "{}{}@post.example", "{}@{}.example")
_NAMES = ("anna", "tom", "office", "j.berg", "lee", "info", "maria", "pat", "shop", "kim")
#: How often each kind of second turn is made.
_SHARES = {
    "next": 0.34, "number": 0.17, "email": 0.07, "second": 0.12, "same": 0.12, "aside": 0.08,
    "correction": 0.1, "change": 0.1,
}  # fmt: skip
#: How often something else was asked before, how often a topic change says so, and how often a few
#: words that ask nothing come in between.
_EARLIER, _SAID, _FILLED = 0.3, 0.5, 0.2


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
        if self._rows["filler"] and rng.random() < _FILLED:
            made.insert(1, (rng.choice(self._rows["filler"])["text"], made[0][1], None))
        elif rng.random() < _EARLIER:
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

    def _email(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        """The same with an address."""
        intent = rng.choice(_ADDRESSED)
        asked = rng.choice(self._rows["ask_email"])["text"]
        first = (self._ask(intent), intent, f"{self._answers(intent)} {asked}")
        address = rng.choice(_EMAILS).format(*rng.sample(_NAMES, 2))
        return [first, (row["text"].replace("{e}", address), intent, None)]

    def _second(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        intent = rng.choice(_NUMBERED)
        return [self._question(intent), (_numbered(row["text"], intent, rng), intent, None)]

    def _same(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
        intent = rng.choice(SUPPORT)
        return [self._question(intent), (row["text"], intent, None)]

    def _aside(self, rng: random.Random, row: Mapping[str, Any]) -> list[Exchange]:
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
    number = rng.randrange(10**4, 10 ** rng.randrange(5, 10))
    form = rng.choice(_INVOICE_FORMS if intent in _INVOICES else _ORDER_FORMS)
    return text.replace("{n}", form.format(number))


def shown(answer: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    """``answer`` as an earlier turn of a running product: its facts filled, some of them."""
    for name, values in words.items():
        if "{{" + name + "}}" in answer:
            answer = answer.replace("{{" + name + "}}", rng.choice(values))
    return answer
