"""The bookkeeping of a closed loop for engines that are stepped from outside.

Decode tokens first, then prompts as far as the batch has room: what llama.cpp's server does. Pure
but for the clock; knows no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from assistant.benchmark.figures import Times
from assistant.benchmark.workloads import Load

#: Chat, place of its first token, tokens, whether the last one asks for a next.
Row = tuple[int, int, list[int], bool]


class Chats:
    """All chats of one load: what to run next, and who has been answered."""

    def __init__(
        self,
        load: Load,
        vocab_size: int,
        prompts: Sequence[Sequence[int]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        given = prompts if prompts is not None else load.prompts(vocab_size)
        self._prompts = [list(prompt) for prompt in given]
        self._load, self._clock = load, clock
        count = len(self._prompts)
        self._left = [load.rounds] * count
        self._cached, self._next, self._count = [0] * count, [0] * count, [0] * count
        self._asked: list[int] = []
        self.times = Times()
        #: Every token of every chat, all rounds.
        self.written: list[list[int]] = [[] for _ in range(count)]

    def begin(self) -> None:
        self._last = [self._clock()] * len(self._prompts)

    def plan(self, room: int) -> list[Row]:
        """At most ``room`` tokens; nothing when all chats have their answers."""
        going = [chat for chat, left in enumerate(self._left) if left]
        writing = [chat for chat in going if self._cached[chat] >= len(self._prompts[chat])]
        rows: list[Row] = [(chat, self._cached[chat], [self._next[chat]], True) for chat in writing]
        room -= len(rows)
        for chat in going:
            start, prompt = self._cached[chat], self._prompts[chat]
            if start < len(prompt) and room:
                part = prompt[start : start + room]
                rows.append((chat, start, part, start + len(part) == len(prompt)))
                room -= len(part)
        for chat, _, tokens, _ in rows:
            self._cached[chat] += len(tokens)
        self._asked = [chat for chat, _, _, wanted in rows if wanted]
        return rows

    def accept(self, tokens: Sequence[int]) -> list[int]:
        """The next token of each row that asked, in order; chats whose answer is over."""
        now, over = self._clock(), []
        for chat, token in zip(self._asked, tokens, strict=True):
            self.times.saw(now - self._last[chat], 1, first=self._count[chat] == 0)
            self._last[chat], self._next[chat] = now, token
            self.written[chat].append(token)
            self._count[chat] += 1
            if self._count[chat] == self._load.new_tokens:
                self._count[chat] = self._cached[chat] = 0
                self._left[chat] -= 1
                over.append(chat)
        return over
