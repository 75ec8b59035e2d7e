"""What is measured: the names a user picks from, their sizes, and the jobs they become.

Pure: plans only. Knows no engine; whoever runs a job gets all of it in one ``Job``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

#: Name, what it does. The order is the order of measuring and of the table.
WORKLOADS = {
    "single": "one chat, one answer after another",
    "chats": "many chats at once, each asking again as soon as it is answered",
    "ttft": "first token of a short and of a long prompt, alone",
    "poisson": "requests at random times, at a share of the measured capacity",
    "prefix": "a system prompt that all chats share: read by each, and shared",
    "turns": "a conversation: first token of its last turn, warm against read from cold",
    "intruder": "a long prompt arrives beside streaming chats: the longest gap they see",
    "overload": "four times the capacity: refusals, their speed, and whether promises hold",
    "readers": "how many chats can read at a steady pace",
    "answers": "whole answers to real questions, with guesses of how they go on, and without",
    "stack": "32 chats through WebSocket and database, against the engine alone (--end-to-end)",
    "stack-readers": "how many chats can read at a steady pace through WebSocket and database",
    "idle": "processor time of an engine nobody asks",
    "growth": "memory before and after many requests",
}
CORE = ("single", "chats", "ttft")
#: Run on every engine; the others need what only ours offers, or describe ours only.
SHARED = CORE


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: each of ``chats`` asks ``rounds`` times for ``new_tokens``, no more, no less.
    Prompts are ids drawn from ``seed``."""

    chats: int
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.chats, self.prompt_tokens, self.new_tokens, self.rounds) < 1:
            raise ValueError("chats, prompt tokens, new tokens and rounds all start at 1")

    @property
    def room(self) -> int:
        """Tokens a chat's context must hold."""
        return self.prompt_tokens + self.new_tokens

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """One per chat, from the upper half of the vocabulary: no control tokens there."""
        rng = np.random.default_rng(self.seed)
        shape = (self.chats, self.prompt_tokens)
        # The last id stays free: some engines need an end token that cannot be met.
        found: list[list[int]] = rng.integers(vocab_size // 2, vocab_size - 1, shape).tolist()
        return found

    def warm_up(self) -> Load:
        """The same shape, briefly and with other prompts."""
        return replace(self, rounds=1, new_tokens=min(self.new_tokens, 16), seed=self.seed + 1)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large each workload is. *Units* stand in the names; the rest are counts."""

    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 4
    chats: tuple[int, ...] = (8, 32)
    ttft_prompts: tuple[int, ...] = (64, 512)
    ttft_rounds: int = 12
    arrivals: int = 160
    #: Offered load of ``poisson``, as a share of what a closed loop reaches.
    share: float = 0.7
    batch: int = 32
    prefix_tokens: int = 512
    own_tokens: int = 32
    conversations: int = 5
    turns: int = 8
    turn_tokens: int = 32
    streams: int = 8
    intruder_tokens: int = 2000
    intrusions: int = 3
    overload: float = 4.0
    overload_requests: int = 400
    readers: tuple[int, ...] = (50, 100, 200, 300, 400, 600, 800, 1000)
    reading_tokens_per_s: float = 8.0
    #: Answers each reader reads at every level after its first, unmeasured one.
    reader_rounds: int = 2
    #: Levels tried between the last that worked and the first that did not.
    reader_steps: int = 2
    idle_s: float = 60.0
    growth: int = 2000

    def __post_init__(self) -> None:
        counts = [value for value in asdict(self).values() if isinstance(value, int)]
        lists = (*self.chats, *self.ttft_prompts, *self.readers)
        if min(*counts, *lists) < 1:
            raise ValueError("chats, prompt tokens, new tokens and rounds all start at 1")
        if min(self.share, self.overload, self.reading_tokens_per_s, self.idle_s) <= 0:
            raise ValueError("share, overload, reading speed and idle time must be above 0")
        if list(self.readers) != sorted(self.readers):
            raise ValueError("the numbers of readers must rise")

    @classmethod
    def quick(cls) -> Sizes:
        """Tiny: proves that everything runs; its figures mean nothing."""
        return cls(
            prompt_tokens=8,
            new_tokens=6,
            rounds=2,
            chats=(2, 3),
            ttft_prompts=(8, 24),
            ttft_rounds=2,
            arrivals=6,
            batch=4,
            prefix_tokens=24,
            own_tokens=8,
            conversations=1,
            turns=3,
            turn_tokens=8,
            streams=2,
            intruder_tokens=200,
            intrusions=1,
            overload_requests=24,
            readers=(2, 3),
            reader_rounds=1,
            reader_steps=1,
            idle_s=0.2,
            growth=20,
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One cell of the table: what one engine is asked to do, once."""

    workload: str
    label: str
    sizes: Sizes
    load: Load | None = None

    def wire(self) -> dict[str, Any]:
        """As JSON's types, for the pipe."""
        return asdict(self)

    @classmethod
    def from_wire(cls, found: dict[str, Any]) -> Job:
        lists = {
            key: tuple(value) for key, value in found["sizes"].items() if isinstance(value, list)
        }
        load = Load(**found["load"]) if found["load"] else None
        return cls(**{**found, "sizes": Sizes(**{**found["sizes"], **lists}), "load": load})


def chosen(text: str) -> tuple[str, ...]:
    """``single,chats`` or ``all`` as names, in the order of measuring. Raises: ValueError."""
    if text == "all":
        return tuple(WORKLOADS)
    names = {name.strip() for name in text.split(",")}
    if unknown := sorted(names - set(WORKLOADS)):
        known = ", ".join(WORKLOADS)
        raise ValueError(f"{unknown[0]!r} is no workload; known: {known}, or all")
    return tuple(name for name in WORKLOADS if name in names)


def jobs(names: Sequence[str], sizes: Sizes) -> list[Job]:
    """The cells of ``names``."""
    found: list[Job] = []
    for name in names:
        found += _LOADS[name](sizes) if name in _LOADS else [Job(name, _label(name, sizes), sizes)]
    return found


def _label(name: str, sizes: Sizes) -> str:
    labels = {
        "poisson": f"poisson at {sizes.share:.0%}",
        "prefix": f"shared {sizes.prefix_tokens}",
        "turns": f"turn {sizes.turns} of a chat",
        "intruder": f"{sizes.streams} + {sizes.intruder_tokens} prompt",
        "answers": f"answers to {sizes.chats[0]} chats",
        "overload": f"overload {sizes.overload:g}x",
        "stack-readers": f"readers {sizes.reading_tokens_per_s:g} tok/s, whole stack",
        "readers": f"readers {sizes.reading_tokens_per_s:g} tok/s",
    }
    return labels.get(name, name)


def _closed(workload: str, label: str, chats: int, sizes: Sizes) -> Job:
    # One chat alone takes no longer for more rounds, and its percentiles need them.
    rounds = sizes.rounds * 2 if chats == 1 else sizes.rounds
    load = Load(chats, sizes.prompt_tokens, sizes.new_tokens, rounds)
    return Job(workload, label, sizes, load)


def _ttft(sizes: Sizes) -> list[Job]:
    return [
        Job("ttft", f"prompt {tokens}", sizes, Load(1, tokens, 4, sizes.ttft_rounds))
        for tokens in sizes.ttft_prompts
    ]


def _chats(sizes: Sizes) -> list[Job]:
    return [_closed("chats", f"{chats} chats", chats, sizes) for chats in sizes.chats]


_LOADS = {
    "single": lambda sizes: [_closed("single", "1 chat", 1, sizes)],
    "chats": _chats,
    "ttft": _ttft,
}


def poisson(rate: float, count: int, seed: int = 0) -> list[float]:
    """Arrival times in seconds, ``rate`` a second, the same for the same seed."""
    if rate <= 0 or count < 1:
        raise ValueError("a rate above 0 and at least one arrival")
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times
