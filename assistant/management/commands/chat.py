"""``manage.py chat``: the assistant in a terminal, streaming, with the web page's routes."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from contextlib import aclosing
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant.types import Delta, Event, Message, Params, Started

#: What the reader keeps of a long talk; the model's context is smaller still.
_KEPT_MESSAGES = 12


class Command(BaseCommand):
    help = "Talk to the model in the terminal. Ctrl-C stops an answer, Ctrl-D ends the talk."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py chat\n"
            '  manage.py chat --once "how do I cancel order 48213377?"\n'
            '  manage.py chat --once "hello" --backend echo'
        )
        parser.add_argument("--once", metavar="TEXT", help="answer once and exit")
        parser.add_argument("--backend", default="", help="alias from ASSISTANT['BACKENDS']")
        parser.add_argument("--quiet", action="store_true", help="only the answer's text")

    def handle(self, *args: Any, **options: Any) -> None:
        from django.conf import settings

        from assistant import backends
        from assistant.errors import AssistantError

        self._quiet = options["quiet"]
        alias = options["backend"] or settings.ASSISTANT_BACKEND
        try:
            self._backend = backends.get(alias)
            self._backend.check()
            if options["once"] is not None:
                self._answer([Message("user", options["once"])])
            else:
                self._talk()
        except AssistantError as error:
            raise CommandError(str(error)) from error
        finally:
            backends.reset()

    def _talk(self) -> None:
        self.stdout.write("Ask about orders, delivery, refunds, invoices or your account.\n")
        messages: list[Message] = []
        while True:
            try:
                text = input("\nyou > ").strip()
            except (EOFError, KeyboardInterrupt):
                self.stdout.write("\nGoodbye.")
                return
            if text:
                messages = [*messages, Message("user", text)][-_KEPT_MESSAGES:]
                messages.append(self._answer(messages))

    def _answer(self, messages: list[Message]) -> Message:
        if not messages[-1].text.strip():
            raise CommandError("The question is empty.")
        written = _Written(self)
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(self._stream(messages, written))
        self.stdout.write("")
        if not self._quiet and written.started and written.started.confidence is not None:
            self.stdout.write(self.style.HTTP_INFO(_caption(written.started)))
        intent = written.started.intent if written.started else None
        return Message("assistant", written.text, intent)

    async def _stream(self, messages: list[Message], written: _Written) -> None:
        from django.conf import settings

        from assistant.facts import known_facts

        params = Params(
            max_new_tokens=settings.ASSISTANT["MAX_NEW_TOKENS"], scope="chat", facts=known_facts()
        )
        stream: Any = self._backend.stream(messages, params)
        async with aclosing(stream) as events:
            async for event in events:
                written.take(event)


class _Written:
    """Prints deltas as they come and keeps them."""

    def __init__(self, command: BaseCommand) -> None:
        self._out = command.stdout
        self.started: Started | None = None
        self.text = ""

    def take(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Delta):
            self.text += event.text
            self._out.write(event.text, ending="")
            self._out.flush()


def _caption(started: Started) -> str:
    words = {"caution": ", with caution", "hand_on": ", better asked a person"}
    scope = "not a question for this desk" if started.band == "out_of_scope" else started.intent
    return f"[{scope}, {started.confidence:.0%} sure{words.get(started.band, '')}]"
