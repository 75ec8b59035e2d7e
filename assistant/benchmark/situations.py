"""Workloads that are more than a closed loop: random arrivals, shared prefixes, conversations,
intruders, overload, idleness, growth.

Each takes a model and the sizes, opens the engine it needs, and returns figures and facts.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from assistant.benchmark import drive
from assistant.benchmark.drive import Answer, Room, ask, opened, prompts
from assistant.benchmark.figures import Fact, Figures, Measured, Times, percentile_ms
from assistant.benchmark.guessing import own_answers
from assistant.benchmark.meter import Meter, memory_mb
from assistant.benchmark.stack import whole_stack
from assistant.benchmark.workloads import Load, Sizes, poisson
from assistant.engine import Engine, Overloaded


def random_arrivals(model: Path, threads: int, sizes: Sizes) -> Measured:
    """Requests at random times: what a queue costs that a closed loop never has."""
    room = Room(sizes.batch, sizes.prompt_tokens + sizes.new_tokens, queue=sizes.arrivals)
    with opened(model, threads, room) as engine:
        rate = _capacity(engine, sizes) * sizes.share
        meter = Meter()
        seen = asyncio.run(_arrive(engine, sizes, rate, sizes.arrivals))
        usage = meter.stop()
    times = Times()
    for answer in seen.answers:
        answer.into(times)
    figures = Figures.of(times, usage)
    return Measured(figures, (Fact("requests_per_s", round(rate, 2), "/s", "requests offered"),))


def overload(model: Path, threads: int, sizes: Sizes) -> Measured:
    """More than the engine can do, with a bounded queue: it must refuse, fast, with a true word."""
    room = Room(sizes.batch, sizes.prompt_tokens + sizes.new_tokens, queue=sizes.batch)
    with opened(model, threads, room) as engine:
        rate = _capacity(engine, sizes) * sizes.overload
        seen = asyncio.run(_arrive(engine, sizes, rate, sizes.overload_requests))
    waits = [answer.ttft for answer in seen.answers]
    facts = [
        Fact("offered_per_s", round(rate, 2), "/s", "requests offered"),
        Fact("refused_percent", _percent(len(seen.refusals), seen.asked), "%", "refused"),
        Fact("served_ttft_ms_p95", percentile_ms(waits, 95), "ms", "first token of the served p95"),
    ]
    return Measured(facts=(*facts, *_refusal_facts(seen)))


def _refusal_facts(seen: _Seen) -> list[Fact]:
    if not seen.refusals:
        return []
    took = [refusal.took_s for refusal in seen.refusals]
    facts = [
        Fact("refusal_ms_p50", percentile_ms(took, 50), "ms", "time to refuse p50"),
        Fact("refusal_ms_p99", percentile_ms(took, 99), "ms", "time to refuse p99"),
    ]
    errors = [
        (refusal.eta_s, real) for refusal in seen.refusals if (real := seen.wait_near(refusal))
    ]
    if errors:
        off = median(abs(eta - real) / real for eta, real in errors)
        bias = median(eta / real for eta, real in errors)
        seconds = [abs(eta - real) for eta, real in errors]
        facts += [
            Fact("eta_error_ms", percentile_ms(seconds, 50), "ms", "off by p50"),
            Fact("eta_error_percent", round(off * 100, 1), "%", "error of the promised wait p50"),
            Fact("eta_over_real", round(bias, 2), "x", "promised over real wait p50"),
        ]
    return facts


@dataclass(frozen=True, slots=True)
class _Refusal:
    at: float
    took_s: float
    eta_s: float


@dataclass(slots=True)
class _Seen:
    answers: list[Answer] = field(default_factory=list)
    refusals: list[_Refusal] = field(default_factory=list)

    @property
    def asked(self) -> int:
        return len(self.answers) + len(self.refusals)

    def wait_near(self, refusal: _Refusal) -> float:
        """The real wait of whoever was let in next to ``refusal`` in time: their queue was as long
        as the one the promise was made for."""
        if not self.answers:
            return 0.0
        return min(self.answers, key=lambda answer: abs(answer.asked - refusal.at)).ttft


async def _arrive(engine: Engine, sizes: Sizes, rate: float, count: int) -> _Seen:
    """Ask ``count`` times at random moments, ``rate`` a second; wait for all answers."""
    seen = _Seen()
    questions = prompts(engine, count, sizes.prompt_tokens, seed=3)
    began = time.perf_counter()

    async def one(at: float, question: Sequence[int]) -> None:
        await asyncio.sleep(began + at - time.perf_counter())
        before = time.perf_counter()
        try:
            seen.answers.append(await ask(engine, question, sizes.new_tokens))
        except Overloaded as refused:
            seen.refusals.append(_Refusal(before, time.perf_counter() - before, refused.eta_s))

    await asyncio.gather(*map(one, poisson(rate, count), questions))
    return seen


def _capacity(engine: Engine, sizes: Sizes) -> float:
    """Answers a second in a closed loop of as many chats as the engine has rows."""
    load = Load(sizes.batch, sizes.prompt_tokens, sizes.new_tokens, 2)
    return drive.measured(engine, load).output_tokens_per_s / sizes.new_tokens


def shared_prefix(model: Path, threads: int, sizes: Sizes) -> Measured:
    """First token behind a long system prompt, read by each chat and then shared by all."""
    tokens = sizes.prefix_tokens + sizes.own_tokens + sizes.new_tokens
    chats = max(sizes.chats[:1])
    with opened(model, threads, Room(chats, tokens)) as engine:
        (prefix,) = prompts(engine, 1, sizes.prefix_tokens, seed=5)
        read = asyncio.run(_first_tokens(engine, prefix, sizes, seed=6))
        share = getattr(engine, "share_prefix", None)
        if share is not None:
            share(prefix)
        shared = asyncio.run(_first_tokens(engine, prefix, sizes, seed=7))
        meter = Meter()
        times = asyncio.run(_behind(engine, prefix, sizes, chats))
        usage = meter.stop()
    figures = Figures.of(times, usage)
    return Measured(figures, _ratio("prefix", "shared", shared, read))


async def _first_tokens(engine: Engine, prefix: list[int], sizes: Sizes, seed: int) -> list[float]:
    """One after another, the first unmeasured."""
    own = prompts(engine, 9, sizes.own_tokens, seed)
    return [(await ask(engine, prefix + tail, 1)).ttft for tail in own][1:]


async def _behind(engine: Engine, prefix: list[int], sizes: Sizes, chats: int) -> Times:
    times = Times()

    async def chat(own: list[int]) -> None:
        for _ in range(sizes.rounds):
            (await ask(engine, prefix + own, sizes.new_tokens)).into(times)

    await asyncio.gather(*map(chat, prompts(engine, chats, sizes.own_tokens, seed=8)))
    return times


def conversation(model: Path, threads: int, sizes: Sizes) -> Measured:
    """First token of a chat's last turn, whose history is known, against reading it all."""
    tokens = sizes.turns * (sizes.turn_tokens * 2)
    with opened(model, threads, Room(8, tokens)) as engine:
        warm, cold = asyncio.run(_last_turns(engine, sizes))
    return Measured(facts=_ratio("turn", "warm", warm, cold))


async def _last_turns(engine: Engine, sizes: Sizes) -> tuple[list[float], list[float]]:
    warm, cold = [], []
    for chat in range(sizes.conversations + 1):
        history: list[int] = []
        for question in prompts(engine, sizes.turns, sizes.turn_tokens, seed=10 + chat):
            prompt = history + question
            answer = await ask(engine, prompt, sizes.turn_tokens, scope=f"chat-{chat}")
            history = prompt + answer.ids
        again = await ask(engine, prompt, 1)
        if chat:  # the first one warms up
            warm.append(answer.ttft)
            cold.append(again.ttft)
    return warm, cold


def _ratio(key: str, name: str, better: Sequence[float], cold: Sequence[float]) -> tuple[Fact, ...]:
    ratio = median(better) / median(cold)
    return (
        Fact(f"{key}_{name}_ms", percentile_ms(better, 50), "ms", f"first token {name}"),
        Fact(f"{key}_cold_ms", percentile_ms(cold, 50), "ms", "first token cold"),
        Fact(f"{key}_{name}_over_cold", round(ratio, 3), "x", f"{name} over cold"),
    )


def intruder(model: Path, threads: int, sizes: Sizes) -> Measured:
    """A long prompt beside chats that stream: their longest gap while it is read."""
    tokens = sizes.intruder_tokens + 1000
    room = Room(sizes.streams + 1, tokens)
    gaps, before, ttft = [], [], []
    with opened(model, threads, room) as engine:
        for at in range(sizes.intrusions + 1):
            one = asyncio.run(_intrude(engine, sizes, seed=20 + at))
            if at:  # the first one warms up
                gaps.append(one.gap)
                before.append(one.gap_before)
                ttft.append(one.ttft)
    return Measured(
        facts=(
            Fact("intruder_gap_ms", percentile_ms(gaps, 100), "ms", "longest gap of the streams"),
            Fact("calm_gap_ms", percentile_ms(before, 100), "ms", "longest gap without it"),
            Fact("intruder_ttft_ms", percentile_ms(ttft, 50), "ms", "first token of the intruder"),
        )
    )


@dataclass(frozen=True, slots=True)
class _Intrusion:
    gap: float
    gap_before: float
    ttft: float


async def _intrude(engine: Engine, sizes: Sizes, seed: int) -> _Intrusion:
    streams = [
        _Stream(engine, prompt)
        for prompt in prompts(engine, sizes.streams, sizes.prompt_tokens, seed)
    ]
    tasks = [asyncio.create_task(stream.read()) for stream in streams]
    await asyncio.gather(*(stream.first.wait() for stream in streams))
    calm = time.perf_counter()
    await asyncio.sleep(0.2)
    (long,) = prompts(engine, 1, sizes.intruder_tokens, seed + 1000)
    answer = await ask(engine, long, 1)
    for stream in streams:
        stream.generation.close()
    await asyncio.gather(*tasks)
    came = answer.arrivals[0]
    return _Intrusion(
        max(stream.longest(answer.asked, came) for stream in streams),
        max(stream.longest(calm, answer.asked) for stream in streams),
        answer.ttft,
    )


class _Stream:
    """A chat that goes on until it is closed."""

    def __init__(self, engine: Engine, prompt: list[int]) -> None:
        self.generation = drive.submit(engine, prompt, 10**6)
        self.first = asyncio.Event()
        self.arrivals: list[float] = []

    async def read(self) -> None:
        async for _ in self.generation:
            self.arrivals.append(time.perf_counter())
            self.first.set()

    def longest(self, start: float, end: float) -> float:
        """Longest gap that overlaps ``start`` to ``end``, a wait that goes on at ``end`` too."""
        stamps = [stamp for stamp in self.arrivals if stamp <= end]
        gaps = [
            later - earlier
            for earlier, later in zip(stamps, [*stamps[1:], end], strict=True)
            if later > start
        ]
        return max(gaps, default=0.0)


def idle(model: Path, threads: int, sizes: Sizes) -> Measured:
    """Processor time of an engine that has worked and has nothing to do."""
    load = Load(2, sizes.prompt_tokens, sizes.new_tokens, 1)
    with opened(model, threads, Room(2, load.room)) as engine:
        asyncio.run(drive.closed_loop(engine, load))
        time.sleep(min(0.5, sizes.idle_s))  # spinning threads come to rest
        meter = Meter()
        time.sleep(sizes.idle_s)
        usage = meter.stop()
    percent = round(usage.cpu_s / usage.wall_s * 100, 3)
    return Measured(facts=(Fact("idle_cpu_percent", percent, "%", "of one core, idle"),))


def growth(model: Path, threads: int, sizes: Sizes) -> Measured:
    """Memory after many requests of many lengths, against memory after the first tenth."""
    longest = min(4 * sizes.prompt_tokens, 256)
    with opened(model, threads, Room(8, longest + 8)) as engine:
        asyncio.run(_many(engine, max(8, sizes.growth // 10), longest, seed=30))
        before = _settled_mb()
        asyncio.run(_many(engine, sizes.growth, longest, seed=31))
        after = _settled_mb()
    return Measured(
        facts=(
            Fact("growth_requests", sizes.growth, "", "requests"),
            Fact("rss_before_mb", round(before, 1), "MiB", "memory before"),
            Fact("growth_mb", round(after - before, 2), "MiB", "growth"),
        )
    )


async def _many(engine: Engine, count: int, longest: int, seed: int) -> None:
    """``count`` short answers to prompts of all lengths, eight at a time."""
    (ids,) = prompts(engine, 1, longest, seed)
    waiting = iter(range(count))

    async def chat() -> None:
        for at in waiting:
            length = 1 + (at * 37) % longest
            await ask(engine, ids[:length], 4, scope=f"user-{at % 50}")

    await asyncio.gather(*(chat() for _ in range(8)))


def _settled_mb() -> float:
    gc.collect()
    return memory_mb()


def _percent(part: int, whole: int) -> float:
    return round(part / whole * 100, 1) if whole else 0.0


SITUATIONS: dict[str, Callable[[Path, int, Sizes], Measured]] = {
    "poisson": random_arrivals,
    "prefix": shared_prefix,
    "turns": conversation,
    "intruder": intruder,
    "overload": overload,
    "answers": own_answers,
    "stack": whole_stack,
    "idle": idle,
    "growth": growth,
}
