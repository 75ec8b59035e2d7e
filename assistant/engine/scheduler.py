"""Decides what each step computes: who holds a slot, whose tokens run, who is done.

Pure bookkeeping over integers: knows no arrays, no threads and no model; the time comes in. One
step is ``plan()``, a run of the model elsewhere, ``advance()``, and ``accept()`` for each token
chosen.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from assistant.engine.drafts import Guess

FinishReason = Literal["stop", "length", "cancelled"]
#: With fewer prompt tokens in a step, some prompts could not be cut at all: see ``chunk``.
LEAST_STEP = 4
#: What a run and each of its rows cost besides their tokens, in tokens' worth: measured on a model
#: of 9 M parameters.
RUN_COST = 13.0
ROW_COST = 2.0
#: Tokens and guesses that one step decodes at most, where there are not more answers.
DRAFTED_ROWS = 256
#: Prompts move on by this much even where the time allowed for a step is used up.
_LEAST_CHUNK = 16
#: Tokens of a paced answer that come at full speed first: so far it stays ahead of its reader.
_HEAD_START = 4
#: Slots whose paced rows run together. A step computes every slot between its lowest and highest
#: row, so rows far apart would be paid for with idle ones.
PACED_BLOCK = 128


@dataclass(slots=True, eq=False)
class Request:
    """One generation's place in the books. ``slot`` is -1 while it waits and after it ended."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    #: The caller: waiting requests are served fairly over scopes.
    scope: str = ""
    slot: int = -1
    #: Tokens whose keys and values are in the slot's cache.
    cached: int = 0
    #: Tokens generated and shown.
    written: int = 0
    #: The token to run next, once the prompt is in the cache.
    next_token: int = -1
    #: Tokens that were fed after the prompt, in order: with it, what the cache holds.
    fed: list[int] = field(default_factory=list)
    #: How the answer may go on, where that is known.
    guess: Guess | None = None
    #: When the reader of a paced answer needs the next token; seconds of the clock of ``plan``.
    due_s: float = 0.0

    @property
    def missing(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, len(self.prompt) - self.cached)

    def ahead(self, most: int) -> Sequence[int]:
        """Tokens that may follow the next one."""
        room = min(most, self.max_new_tokens - self.written - 1)
        return self.guess.ahead(room) if self.guess is not None and room > 0 else ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of one request to run after ``start`` cached ones; ``samples``: how many of
    the last of them ask for a next token. ``draft``: guesses that run behind the next token."""

    request: Request
    start: int
    count: int
    samples: int
    draft: Sequence[int] = ()

    @property
    def decodes(self) -> bool:
        return self.start >= len(self.request.prompt)

    def tokens(self) -> Sequence[int]:
        if self.decodes:
            return (self.request.next_token, *self.draft)
        return self.request.prompt[self.start : self.start + self.count]


class Move(NamedTuple):
    """A request that changed its slot: its cache must follow before the step."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Step:
    """What to run: decode rows first, then prefill chunks. ``wait_s``: with nothing to run, when to
    plan again."""

    chunks: list[Chunk]
    wait_s: float = 0.0


class Waiting:
    """Requests without a slot, fairly over scopes: next is who has the fewest running, then who
    was served longest ago."""

    def __init__(self) -> None:
        self._scopes: OrderedDict[str, deque[Request]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._scopes.values()))

    def __iter__(self) -> Iterator[Request]:
        return (request for queue in self._scopes.values() for request in queue)

    def add(self, request: Request) -> None:
        self._scopes.setdefault(request.scope, deque()).append(request)

    def take(self, running: Counter[str]) -> Request:
        """The next one, and its scope goes last."""
        scope = min(self._scopes, key=lambda name: running[name])
        queue = self._scopes.pop(scope)
        request = queue.popleft()
        if queue:
            self._scopes[scope] = queue
        return request

    def in_order(self, running: Counter[str]) -> list[Request]:
        """All of them as ``take`` would give them while nobody comes or ends."""
        turns = [(running[scope], at, scope) for at, scope in enumerate(self._scopes)]
        heapq.heapify(turns)
        taken: Counter[str] = Counter()
        found: list[Request] = []
        while turns:
            busy, _, scope = heapq.heappop(turns)
            queue = self._scopes[scope]
            found.append(queue[taken[scope]])
            taken[scope] += 1
            if taken[scope] < len(queue):
                heapq.heappush(turns, (busy + 1, len(self._scopes) + len(found), scope))
        return found

    def remove(self, request: Request) -> None:
        """Harmless when it is not there."""
        queue = self._scopes.get(request.scope, deque())
        if request in queue:
            queue.remove(request)
            if not queue:
                del self._scopes[request.scope]


class Scheduler:
    """``step_tokens`` bounds the prompt tokens of a step. The lowest free slot is given first, so
    that busy slots stay together; ``reading_tokens_per_s`` paces answers, 0 does not."""

    def __init__(self, *, slots: int, step_tokens: int, reading_tokens_per_s: float = 0.0) -> None:
        if step_tokens < LEAST_STEP:
            raise ValueError(f"step_tokens ({step_tokens}) must be at least {LEAST_STEP}")
        self._step_tokens = step_tokens
        self._period_s = 1 / reading_tokens_per_s if reading_tokens_per_s else 0.0
        self._free = list(range(slots))
        self._steps = 0
        self.waiting = Waiting()
        self.running: list[Request] = []

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Take ``request`` out, wherever it is; harmless when it has gone already."""
        if request.slot >= 0:
            heapq.heappush(self._free, request.slot)
            request.slot = -1
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def admit(self) -> list[Request]:
        """Give free slots to who waits. What a slot's cache holds for them is the caller's to say:
        set ``cached`` before the next ``plan``."""
        admitted = []
        running = self._by_scope()
        while self.waiting and self._free:
            request = self.waiting.take(running)
            request.slot = heapq.heappop(self._free)
            running[request.scope] += 1
            self.running.append(request)
            admitted.append(request)
        return admitted

    def line(self) -> list[Request]:
        """Who waits, the next one first."""
        return self.waiting.in_order(self._by_scope())

    def _by_scope(self) -> Counter[str]:
        return Counter(request.scope for request in self.running)

    def tidy(self) -> Move | None:
        """Where busy slots lie far apart, the highest moves down into a hole: a step computes every
        slot between the lowest and the highest."""
        slots = {request.slot: request for request in self.running}
        if not slots or not self._free:
            return None
        top, low = max(slots), min(slots)
        hole = self._free[0]
        if hole > top or top - low + 1 <= len(slots) + max(2, len(slots) // 2):
            return None
        request = slots[top]
        heapq.heapreplace(self._free, top)
        request.slot = hole
        return Move(top, hole, request.cached)

    def plan(self, now_s: float, prompt_tokens: int | None = None) -> Step:
        """The next step: rows that decode, and up to ``prompt_tokens`` of prompts (None: as many
        as a step may hold)."""
        self._steps += 1
        prompts = self._prompts(prompt_tokens)
        rows = self._decoding(now_s)
        if rows or prompts:
            return Step(_decode(rows) + prompts)
        due = min((request.due_s for request in self.running), default=now_s)
        return Step([], wait_s=max(0.0, due - now_s))

    def _decoding(self, now_s: float) -> list[Request]:
        """Rows with a token to run. Paced ones by blocks of neighbouring slots, so that few steps
        serve many: the block whose reader is due first, with all who may have theirs early."""
        rows = [request for request in self.running if not request.missing]
        rows.sort(key=lambda row: row.slot)  # neighbours run together
        if not self._period_s or not rows:
            return rows
        first = min(rows, key=lambda row: row.due_s)
        if first.due_s > now_s:
            return []
        block, early = first.slot // PACED_BLOCK, now_s + self._period_s
        return [row for row in rows if row.slot // PACED_BLOCK == block and row.due_s <= early]

    def _prompts(self, prompt_tokens: int | None) -> list[Chunk]:
        """Chunks of prompts, the shortest rest first; every second step the oldest prompt is first,
        so that a long one moves on whatever comes."""
        budget = self._step_tokens
        if prompt_tokens is not None:
            budget = min(budget, max(_LEAST_CHUNK, prompt_tokens))
        reading = [request for request in self.running if request.missing]
        oldest = reading[0] if reading and self._steps % 2 == 0 else None
        # One single token runs among the rows that decode, and those come first.
        reading.sort(key=lambda one: (one.missing > 1, one is not oldest, one.missing))
        chunks = []
        for request in reading:
            count = chunk(request.missing, budget)
            if count > 0:
                ends = int(count == request.missing)
                chunks.append(Chunk(request, request.cached, count, ends))
                budget -= count
        return chunks

    def advance(self, step: Step) -> None:
        """Note that ``step`` ran: its tokens are in the cache, guesses only once they are
        ``confirm``ed."""
        for chunk in step.chunks:
            if chunk.decodes:
                self.confirm(chunk.request)
            else:
                chunk.request.cached += chunk.count

    def confirm(self, request: Request) -> None:
        """The next token of ``request`` ran: it is in the cache."""
        request.cached += 1
        request.fed.append(request.next_token)

    def feed(self, request: Request, token: int) -> None:
        """Run ``token`` next without counting or showing it."""
        request.next_token = token
        if request.guess is not None:
            request.guess.saw(token)

    def accept(self, request: Request, token: int, now_s: float) -> FinishReason | None:
        """Take a chosen token; why the request is over, if it is. A stop token is not shown."""
        if token in request.stop_ids:
            return "stop"
        self.feed(request, token)
        request.written += 1
        if self._period_s:
            self._pace(request, now_s)
        return "length" if request.written >= request.max_new_tokens else None

    def _pace(self, request: Request, now_s: float) -> None:
        """Set when the next token is due; who fell behind may catch up."""
        ahead = request.written < _HEAD_START
        request.due_s = now_s if ahead else request.due_s + self._period_s

    def cached_tokens(self) -> int:
        return sum(request.cached for request in self.running)


def _decode(rows: Sequence[Request]) -> list[Chunk]:
    """Each row's next token, with as many guesses behind it as pay: a run takes the time of its
    widest row for all."""
    most = max(2, DRAFTED_ROWS // max(1, len(rows))) - 1
    drafts = [row.ahead(most) for row in rows]
    longest = max(map(len, drafts), default=0)
    if longest:
        width = best_width(drafts, [2**power for power in range(1, longest.bit_length() + 1)])
        drafts = [draft[: width - 1] for draft in drafts]
    return [
        Chunk(row, row.cached, 1 + len(draft), 1 + len(draft), draft)
        for row, draft in zip(rows, drafts, strict=True)
    ]


def best_width(drafts: Sequence[Sequence[int]], widths: Sequence[int]) -> int:
    """The number of tokens a row that gives the most tokens for the time, if all guesses hold."""

    def speed(width: int) -> float:
        tokens = sum(min(1 + len(draft), width) for draft in drafts)
        return tokens / (RUN_COST + len(drafts) * (ROW_COST + width))

    return max(widths, key=speed)


def chunk(missing: int, budget: int) -> int:
    """Prompt tokens to run now. Never one of several, nor all but one: a chunk of one token is
    rounded differently in attention, and how a prompt was cut must not show in the answer."""
    count = min(missing, budget)
    if missing - count == 1:
        count -= 1
    return count if count >= 2 or count == missing else 0


@dataclass(slots=True)
class Rates:
    """Measured speeds, and what they promise. *Units*: seconds, tokens."""

    #: Pessimistic until measured.
    prefill_s: float = 1e-3
    step_s: float = 20e-3
    answer_tokens: float = 64.0
    #: Tokens that an answer gains in a step.
    gained: float = 1.0
    #: Moving means over first tokens: the wait, and by how much its promise was off.
    waited_s: float = 0.0
    missed_s: float = 0.0
    _weight: float = field(default=0.1, repr=False)

    def ran(self, *, prefill_tokens: int, seconds: float, gained: float = 1.0) -> None:
        """One step took ``seconds``, with this many prompt tokens in it; each answer that ran
        ``gained`` tokens."""
        self.gained += self._weight * (gained - self.gained)
        if prefill_tokens:
            share = max(seconds - self.step_s, 0.25 * seconds) / prefill_tokens
            self.prefill_s += self._weight * (share - self.prefill_s)
        else:
            self.step_s += self._weight * (seconds - self.step_s)

    def finished(self, tokens: int) -> None:
        self.answer_tokens += self._weight * (tokens - self.answer_tokens)

    def prompt_budget(self, most_s: float) -> int:
        """Prompt tokens that fit beside running answers into a step of ``most_s``."""
        return int(max(0.0, most_s - self.step_s) / self.prefill_s)

    def eta_s(
        self,
        *,
        prompt_tokens: int,
        ahead: int,
        slots: int,
        free: bool,
        left: Sequence[float] = (),
        period_s: float = 0.0,
    ) -> float:
        """Until a newcomer's first token: the prompts before it and its own, and slots to fall
        free, of which it gets number ``ahead`` + 1. ``left``: tokens that running answers still
        have to write; without it they end evenly. ``period_s``: a paced answer's time per token."""
        tokens = 0.0
        if not free and left:
            rounds, nth = divmod(ahead, len(left))
            tokens = sorted(left)[nth] + rounds * self.answer_tokens
        elif not free:
            tokens = (ahead + 1) / (slots + 1) * self.answer_tokens
        return prompt_tokens * self.prefill_s + tokens * max(self.step_s / self.gained, period_s)

    def left(self, requests: Sequence[Request]) -> list[float]:
        """About how many tokens each of them still writes: to the usual length; one that is past
        it, or near, goes on for a part of that; none beyond what it may."""
        least = self.answer_tokens / (len(requests) + 1)
        return [
            min(one.max_new_tokens - one.written, max(least, self.answer_tokens - one.written))
            for one in requests
        ]

    def waited(self, promised_s: float, real_s: float) -> None:
        """A first token came ``real_s`` after a promise of ``promised_s``."""
        self.waited_s += self._weight * (real_s - self.waited_s)
        self.missed_s += self._weight * (abs(promised_s - real_s) - self.missed_s)
