"""How many people can read at once: each at a steady pace, asking again when done reading.

A reader gains nothing from tokens that come faster than they read, so the question is not tokens a
second but how many chats keep up: first token within a second for 95 of 100 answers, and no answer
that falls behind its reader.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from assistant.benchmark import drive
from assistant.benchmark.drive import Answer, Room, ask, opened, prompts
from assistant.benchmark.figures import Fact, Level, Measured, percentile_ms
from assistant.benchmark.workloads import Sizes
from assistant.engine import Engine, EngineError

#: A reader does not notice two tokens' delay.
SLACK_S = 0.25
#: Rows of an engine that does not pace itself: it writes an answer at full speed and takes the
#: next while the first is being read.
_UNPACED_BATCH = 64


def readers(model: Path, threads: int, sizes: Sizes, progress: Callable[[str], None]) -> Measured:
    """Of the engine alone."""
    level = partial(_level, model, threads, sizes)
    return curve("readers", sizes, level, progress)


def curve(
    key: str, sizes: Sizes, level: Callable[[int], Level], progress: Callable[[str], None]
) -> Measured:
    """``level`` of rising numbers of readers, then closer to where it breaks."""
    found: list[Level] = []

    def good(count: int) -> bool:
        found.append(level(count))
        last = found[-1]
        progress(
            f"{count} readers: first token p95 {last.ttft_ms_p95:.0f} ms, "
            f"{last.behind} of {last.answers} answers behind"
        )
        return last.good

    most = search(sizes.readers, sizes.reader_steps, good)
    text = f"readers at {sizes.reading_tokens_per_s:g} tok/s, first token p95 within 1 s"
    levels = tuple(sorted(found, key=lambda one: one.chats))
    settings = "paced" if drive.PACED else "not paced"
    return Measured(facts=(Fact(key, most, "chats", text),), levels=levels, settings=settings)


def search(counts: Sequence[int], steps: int, good: Callable[[int], bool]) -> int:
    """The largest number known to be good: rising ``counts`` up to the first bad one, then
    ``steps`` halvings of the interval that is left. 0: not even the first."""
    low, high = 0, 0
    for count in counts:
        if not good(count):
            high = count
            break
        low = count
    for _ in range(steps if high else 0):
        middle = (low + high) // 2
        if middle in (low, high):
            break
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _level(model: Path, threads: int, sizes: Sizes, count: int) -> Level:
    batch = count if drive.PACED else min(count, _UNPACED_BATCH)
    room = Room(
        batch,
        sizes.prompt_tokens + sizes.new_tokens,
        queue=max(count, 8),
        reading_tokens_per_s=sizes.reading_tokens_per_s,
    )
    with opened(model, threads, room) as engine:
        seen = asyncio.run(_read_all(engine, sizes, count))
    return seen.level(count)


@dataclass(slots=True)
class Seen:
    """Of all readers. *Units*: seconds. ``failed``: answers that never came."""

    ttft: list[float] = field(default_factory=list)
    stalls: list[float] = field(default_factory=list)
    failed: int = 0

    def level(self, count: int) -> Level:
        behind = self.failed + sum(stall > SLACK_S for stall in self.stalls)
        return Level(
            chats=count,
            ttft_ms_p95=percentile_ms(self.ttft, 95),
            behind=behind,
            answers=self.failed + len(self.stalls),
            stall_ms_p99=percentile_ms(self.stalls, 99),
        )


async def _read_all(engine: Engine, sizes: Sizes, count: int) -> Seen:
    """Readers begin spread over the time one answer takes to read; their first is not counted."""
    seen, reading_s = Seen(), sizes.new_tokens / sizes.reading_tokens_per_s

    async def reader(at: int, prompt: list[int]) -> None:
        await asyncio.sleep(at / count * reading_s)
        for turn in range(sizes.reader_rounds + 1):
            asked = time.perf_counter()
            try:
                answer = await ask(engine, prompt, sizes.new_tokens, scope=f"reader-{at}")
            except EngineError:
                seen.failed += 1
                await asyncio.sleep(reading_s)
                continue
            if turn:
                seen.ttft.append(answer.ttft)
                seen.stalls.append(stall(answer, sizes.reading_tokens_per_s))
            done = asked + answer.ttft + reading_s
            await asyncio.sleep(max(0.0, done - time.perf_counter()))

    await asyncio.gather(*map(reader, range(count), _questions(engine, sizes, count)))
    return seen


def _questions(engine: Engine, sizes: Sizes, count: int) -> list[list[int]]:
    return prompts(engine, count, sizes.prompt_tokens, seed=40)


def stall(answer: Answer, tokens_per_s: float) -> float:
    """Seconds by which the latest token came after its reader was ready for it."""
    first = answer.arrivals[0]
    due = (first + at / tokens_per_s for at in range(len(answer.arrivals)))
    return max(came - when for came, when in zip(answer.arrivals, due, strict=True))
