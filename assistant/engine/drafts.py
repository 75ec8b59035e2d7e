"""Guesses of how an answer goes on, so that one run of the model can check several tokens at once.

A model that was trained for a task writes much of what it was taught word for word: as long as its
answer follows a text that is known, the next tokens are read off there. The model decides as
ever; a wrong guess costs a little time and never a token. Knows token ids and nothing else.

Source: Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast Inference from Transformers
via Speculative Decoding", 2023 (here greedy: a guess counts only where it is the best token).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from assistant.engine.folder import fault

FILE = "drafts.json"
#: Tokens of a table at most: larger ones are none of ours.
_MOST_IDS = 1 << 18
#: A place is found by this many last tokens; at the beginning of a text by all there are.
_CONTEXT = 3
#: First guesses are short; one that held doubles the next.
_FIRST_GUESS = 3


class Known:
    """Texts that an answer may follow, found by its last tokens. Where several texts have them, the
    first counts."""

    def __init__(self, texts: Iterable[Sequence[int]] = ()) -> None:
        self._ids: list[int] = []
        #: Where each text begins.
        self._starts: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for text in texts:
            self._starts.append(len(self._ids))
            for token in text:
                self.add(token)

    @classmethod
    def load(cls, directory: Path, vocab_size: int) -> Known:
        """As ``read``. Raises: ManifestError."""
        return cls(read(directory, vocab_size))

    def add(self, token: int) -> None:
        """The last text goes on with ``token``."""
        start, at = self._starts[-1], len(self._ids)
        if at > start:
            self._after.setdefault(tuple(self._ids[max(start, at - _CONTEXT) :]), at)
        self._ids.append(token)

    def find(self, tail: Sequence[int]) -> int:
        """Where a text goes on that has these tokens; -1 where none has."""
        return self._after.get(tuple(tail), -1)

    def read(self, at: int, most: int) -> list[int]:
        """Up to ``most`` tokens from there, to the end of the text; none before 0."""
        if at < 0 or at >= len(self._ids):
            return []
        text = bisect_right(self._starts, at)
        end = self._starts[text] if text < len(self._starts) else len(self._ids)
        return self._ids[at : min(at + most, end)]


class Guess:
    """How one answer may go on: where it stands in ``known``, and how far that was right."""

    __slots__ = ("_at", "_known", "_most", "_tail", "_trust")

    def __init__(self, known: Known, most: int, tail: Sequence[int] = ()) -> None:
        """At most ``most`` tokens at once. ``tail``: what the answer's beginning belongs to."""
        self._known, self._most = known, most
        self._at = -1
        self._tail = list(tail[-_CONTEXT:])
        self._trust = min(_FIRST_GUESS, most)

    def saw(self, token: int) -> None:
        """The answer has gone on with ``token``."""
        self._tail = [*self._tail[1 - _CONTEXT :], token]
        follows = self._known.read(self._at, 1) == [token]
        self._at = self._at + 1 if follows else self._known.find(self._tail)

    def ahead(self, most: int) -> list[int]:
        """Tokens that may follow, as many as are worth a try."""
        return self._known.read(self._at, min(most, self._trust))

    def held(self, right: int, tried: int) -> None:
        """``right`` of ``tried`` guessed tokens were the model's own."""
        grown = 2 * (tried + 1) if right == tried else right + 1
        self._trust = min(grown, self._most)


class Lookup(Guess):
    """Guesses from the prompt and the answer itself, for models without a table."""

    __slots__ = ()

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        super().__init__(Known([prompt]), most, prompt)

    def saw(self, token: int) -> None:
        super().saw(token)
        self._known.add(token)


def read(directory: Path, vocab_size: int) -> list[list[int]]:
    """The answers beside a model. Raises: ManifestError."""
    path = directory / FILE
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise fault(path, f"holds no drafts ({error})") from error
    if not _sound(answers, vocab_size):
        raise fault(path, f"holds drafts that do not fit a vocabulary of {vocab_size}")
    found: list[list[int]] = answers
    return found


def save(directory: Path, answers: Iterable[Sequence[int]]) -> None:
    """Write ``answers`` beside a model: each its hidden first token, its tokens, its end. Those
    that go beyond what is read are left out, the last ones first."""
    lines, total = [], 0
    for answer in answers:
        total += len(answer)
        if total > _MOST_IDS:
            break
        lines.append(json.dumps(list(answer), separators=(",", ":")))
    (directory / FILE).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def _sound(answers: Any, vocab_size: int) -> bool:
    """Whether these are lists of ids, not too many."""
    if not isinstance(answers, list) or not all(type(answer) is list for answer in answers):
        return False
    ids = [token for answer in answers for token in answer]
    return len(ids) <= _MOST_IDS and all(
        type(token) is int and 0 <= token < vocab_size for token in ids
    )
