"""Fifty users, each with secrets of their own, ask at once and hang up at random: nobody is ever
told, shown or given from a cache what another one said. Threat T5; marked slow."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings as current
from django.contrib.auth.models import User

from assistant import backends
from conversations.limits import Caller
from conversations.log import Delta
from conversations.models import Conversation, Message
from conversations.turn import Turn

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]

USERS, AT_ONCE, CANCELLED = 50, 8, 0.3
#: The same words from everybody, so that what is kept for one may be given to another.
COMMON = (
    "where is my order?",
    "what did I just tell you?",
    "repeat my secret",
    "how do I cancel my order?",
    "what is my order number",
    "and when will it come?",
)


@dataclass(frozen=True)
class Person:
    """``secrets``: a word and an order number nobody else has."""

    caller: Caller
    conversation: Conversation
    secrets: tuple[str, str]

    def question(self, rng: random.Random, command: str) -> str:
        word, number = self.secrets
        own = (f"my word is {word}", f"where is order {number}", f"cancel {number} for {word}")
        return command + rng.choice((*own, *COMMON, *COMMON))


def people() -> list[Person]:
    found = []
    for at in range(USERS):
        user = User.objects.create(username=f"user-{at}")
        secrets = f"CANARY{at:02}x{at * 7919 % 10007:05}", str(71_000_000 + at * 104_729)
        conversation = Conversation.objects.create(user=user)
        found.append(Person(Caller(user.pk, address="192.0.2.1"), conversation, secrets))
    return found


async def ask(person: Person, text: str, rng: random.Random) -> str:
    """What was shown of the answer, to its end or to where the user hung up."""
    opening = sync_to_async(Turn.open, thread_sensitive=False)
    turn = await opening(person.caller, person.conversation, text)
    leaves = rng.randrange(1, 4) if rng.random() < CANCELLED else None
    shown = ""
    async for event in turn:
        if isinstance(event, Delta):
            shown += event.text
        if leaves is not None and event.seq >= leaves:
            turn.close("stopped")
            break
    await turn.result()
    return shown


async def storm(asked: Sequence[Person], turns: int, command: str) -> list[tuple[Person, str]]:
    """That many turns, spread over everybody; each person one at a time."""
    shown: list[tuple[Person, str]] = []
    gate = asyncio.Semaphore(AT_ONCE)

    async def talk(person: Person, rng: random.Random) -> None:
        for _ in range(turns // len(asked)):
            async with gate:
                shown.append((person, await ask(person, person.question(rng, command), rng)))

    await asyncio.gather(*(talk(person, random.Random(at)) for at, person in enumerate(asked)))
    return shown


def foreign(asked: Sequence[Person], found: Sequence[tuple[Person, str]]) -> list[str]:
    """Secrets of others in what each person was shown."""
    owner = {secret: person for person in asked for secret in person.secrets}
    return [
        f"{secret} in what {person.caller.key} saw"
        for person, text in found
        for secret, whose in owner.items()
        if whose is not person and secret in text
    ]


@pytest.mark.parametrize(
    ("backend", "turns", "command"), [("echo", 10_000, "/echo "), ("local", 500, "")]
)
async def test_no_secret_reaches_another_user(
    settings: Any, backend: str, turns: int, command: str
) -> None:
    settings.ASSISTANT_RATE = None
    entry = {"echo": {"BACKEND": "assistant.backends.echo.EchoBackend"}}
    bundled = {
        "local": {
            "BACKEND": "assistant.backends.onnx.OnnxBackend",
            "OPTIONS": {"model_dir": str(current.BASE_DIR / "assistant/bundled/support-en")},
        }
    }
    route = ["reviewed", "cache", backend, "stale", "rules", "human"]
    own = {"BACKENDS": {**entry, **bundled}, "ROUTE": route}
    settings.ASSISTANT = {**current.ASSISTANT, **own}
    asked = await sync_to_async(people)()
    shown = await storm(asked, turns, command)
    await asyncio.to_thread(backends.reset)
    assert len(shown) == turns
    assert foreign(asked, shown) == []
    # Not a test of silence: people are told their own secrets, and some hung up.
    assert sum(any(secret in text for secret in person.secrets) for person, text in shown) > 50
    whose = {person.conversation.pk: person for person in asked}
    rows = Message.objects.values_list("conversation", "role", "status", "text")
    stored = [row async for row in rows]
    assert foreign(asked, [(whose[pk], text) for pk, _, _, text in stored]) == []
    answers = [status for _, role, status, _ in stored if role == Message.Role.ASSISTANT]
    assert len(answers) == turns and answers.count(Message.Status.STOPPED) > turns // 20
    assert set(answers) <= {Message.Status.STOPPED, Message.Status.COMPLETE}
