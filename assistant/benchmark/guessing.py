"""Whole answers to real questions, written with guesses of how they go on and without: how fast,
and whether they are the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from assistant.benchmark.drive import Room, opened, reply
from assistant.benchmark.figures import Fact, Figures, Measured, Times
from assistant.benchmark.meter import Meter
from assistant.benchmark.stack import QUESTIONS
from assistant.benchmark.workloads import Sizes
from assistant.engine import Engine, Manifest
from assistant.engine.drafts import FILE as DRAFTS

#: More than any prompt and its answer.
_ROOM_TOKENS = 1024


@dataclass(slots=True)
class _Run:
    """What one engine said and how fast. ``held``: the share of its guesses that were right."""

    figures: Figures
    answers: dict[str, list[int]]
    held: float


def own_answers(model: Path, threads: int, sizes: Sizes) -> Measured:
    """As many chats as ``sizes.chats`` says first, asking one question after another. A model that
    ships no answers to guess from is measured without."""
    plain = _run(model, threads, sizes, guesses=0)
    if DRAFTS not in Manifest.load(model).files:
        return Measured(plain.figures, settings=f"no guesses: the model ships no {DRAFTS}")
    guessed = _run(model, threads, sizes, guesses=None)
    gain = guessed.figures.output_tokens_per_s / plain.figures.output_tokens_per_s
    same = sum(guessed.answers[at] == plain.answers[at] for at in plain.answers)
    facts = (
        Fact("without_tokens_per_s", plain.figures.output_tokens_per_s, "tok/s", "without guesses"),
        Fact("over_without", round(gain, 2), "x", "gain"),
        Fact("guesses_held_percent", _percent(guessed.held), "%", "guesses right"),
        Fact("same_answers_percent", _percent(same / len(plain.answers)), "%", "same answers"),
    )
    return Measured(guessed.figures, facts)


def _percent(share: float) -> float:
    return round(share * 100, 1)


def _run(model: Path, threads: int, sizes: Sizes, guesses: int | None) -> _Run:
    chats = sizes.chats[0]
    with opened(model, threads, Room(chats, _ROOM_TOKENS, draft_tokens=guesses)) as engine:
        asyncio.run(_Loop(engine).run(chats, 1))
        before, loop, meter = engine.stats(), _Loop(engine), Meter()
        asyncio.run(loop.run(chats, sizes.rounds))
        figures, after = Figures.of(loop.times, meter.stop()), engine.stats()
    drafted = after.drafted_tokens - before.drafted_tokens
    held = (after.accepted_tokens - before.accepted_tokens) / drafted if drafted else 0.0
    return _Run(figures, loop.answers, held)


@dataclass(slots=True)
class _Loop:
    """A closed loop over the questions: whoever is answered asks the next."""

    engine: Engine
    times: Times = field(default_factory=Times)
    answers: dict[str, list[int]] = field(default_factory=dict)

    async def run(self, chats: int, rounds: int) -> None:
        questions = iter(QUESTIONS * (rounds * chats))
        await asyncio.gather(*(self._chat(questions) for _ in range(chats)))

    async def _chat(self, questions: Iterator[str]) -> None:
        for question in questions:
            answer = await reply(self.engine, question)
            answer.into(self.times)
            self.answers[question] = answer.ids
