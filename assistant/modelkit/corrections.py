"""Reads reviewed corrections: questions a model took wrongly, with what they should be taken for.

Strict: whatever is doubtful in the file is refused with its line, before anything is trained on it.
Knows the format and the closed sets; knows nothing of tokens, models or training.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from assistant.engine.text import Slot
from assistant.modelkit import labels
from assistant.modelkit.corpus import CorpusError, normalise, read_rows
from assistant.modelkit.jsonlines import objects
from assistant.modelkit.tokens import Mask

#: More than this is a training set, and minutes are not enough to learn it.
MOST_ROWS = 2_000
MOST_CHARS = 2_000
_MOST_LINE_BYTES = 1 << 18
_FIELDS = ("id", "query", "turns", "intent", "answer")
_PLACEHOLDER = re.compile(r"\{\{([^{}]*)\}\}")
_KNOWN = re.compile(r"\{\{(" + "|".join(map(re.escape, labels.PLACEHOLDERS)) + r")\}\}", re.I)
_NAMES = {name.lower(): name for name in labels.PLACEHOLDERS}
#: Values that an answer must not hold: the model would tell them to everyone.
_PRIVATE = frozenset({"Order Number", "Invoice Number", "Email", "Phone"})


class Said(NamedTuple):
    """One turn: ``role`` is user or assistant."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class Case:
    """A conversation that ends with the user, and what its last question is about.

    ``where``: its file and line, for messages. ``answer``: what the model should say, if given.
    """

    where: str
    id: str
    turns: tuple[Said, ...]
    intent: str
    answer: str | None = None

    @property
    def question(self) -> str:
        return self.turns[-1].text

    @property
    def key(self) -> tuple[str, ...]:
        """What two cases share that are the same conversation; numbers and case do not matter."""
        return tuple(normalise(said.text) or said.text.casefold() for said in self.turns)


def read_corrections(path: Path, mask: Mask, known: Collection[str] = labels.INTENTS) -> list[Case]:
    """The rows of a ``.jsonl`` or ``.jsonl.gz`` file. Raises: CorpusError with file and line."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing. Name a .jsonl or .jsonl.gz file of corrections.")
    cases = [_case(row, f"{path} line {at}", at, known) for at, row in _objects(path)]
    for case in cases:
        _refuse_values(case, mask)
    if not cases:
        raise CorpusError(f"{path} holds no corrections. One JSON object a line: {_EXAMPLE}")
    _refuse_twice(cases)
    _refuse_contradictions(cases)
    return cases


def read_golden(path: Path) -> list[Case]:
    """The golden set's rows that say what they are about. Raises: CorpusError."""
    cases = []
    for at, row in enumerate(read_rows(path), 1):
        turns = row.get("turns") or [{"role": "user", "text": row["query"]}]
        intent = row.get("intent") or (labels.OUT_OF_SCOPE if row.get("scope") == "out" else None)
        if intent is not None:
            said = tuple(Said(turn["role"], turn["text"]) for turn in turns)
            cases.append(Case(f"{path} line {at}", str(row.get("id", at)), said, intent))
    return cases


@dataclass(frozen=True, slots=True)
class _Parted:
    parts: tuple[str, ...]


def redacted(mask: Mask) -> Mask:
    """``mask`` for texts that may be masked already: a placeholder written out is one, too."""

    def parts(text: str) -> _Parted:
        found: list[str] = []
        for at, piece in enumerate(_KNOWN.split(text)):
            found += [Slot(_NAMES[piece.lower()])] if at % 2 else mask(piece).parts
        return _Parted(tuple(found))

    return parts


def written_out(parts: Iterable[str]) -> str:
    """Text in which placeholders stand as ``{{Name}}``."""
    return "".join(part if type(part) is str else "{{" + part + "}}" for part in parts)


# -- one row -------------------------------------------------------------------------------------

_EXAMPLE = '{"query": "where is my stuff", "intent": "track_order"}'


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each correction."""
    found = objects(
        path, CorpusError, most_lines=10 * MOST_ROWS, line_bytes=_MOST_LINE_BYTES, like=_EXAMPLE
    )
    for count, (at, row) in enumerate(found, 1):
        if count > MOST_ROWS:
            raise CorpusError(
                f"{path} line {at}: over {MOST_ROWS:,} corrections, more than minutes can "
                "teach. Keep the latest, or train anew with the public sets: --data DIR."
            )
        _refuse_misspelt(row, f"{path} line {at}")
        yield at, row


def _refuse_misspelt(row: dict[str, Any], where: str) -> None:
    for name in row.keys() - set(_FIELDS):
        if meant := difflib.get_close_matches(name, _FIELDS, 1, 0.8):
            raise CorpusError(
                f"{where} has the field {name[:40]!r}; {meant[0]!r} is meant, surely."
            )


def _case(row: dict[str, Any], where: str, at: int, known: Collection[str]) -> Case:
    return Case(
        where=where,
        id=_id(row.get("id", f"line {at}"), where),
        turns=_turns(row, where),
        intent=_intent(row.get("intent"), where, known),
        answer=_answer(row.get("answer"), where),
    )


def _id(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise CorpusError(f"{where}: id is a text or a whole number, not {str(value)[:40]!r}.")
    return str(value)[:200]


def _turns(row: dict[str, Any], where: str) -> tuple[Said, ...]:
    if ("query" in row) == ("turns" in row):
        raise CorpusError(f'{where} needs "query" or "turns" (one of them), as in {_EXAMPLE}')
    if "query" in row:
        return (Said("user", _text(row["query"], "query", where)),)
    turns = row["turns"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise CorpusError(f'{where}: turns is a list of {{"role", "text"}} objects.')
    said = tuple(
        Said(str(turn.get("role")), _text(turn.get("text"), "text", where)) for turn in turns
    )
    wanted = ["user" if at % 2 == 0 else "assistant" for at in range(len(said))]
    if len(said) % 2 == 0 or [turn.role for turn in said] != wanted:
        raise CorpusError(
            f"{where}: turns go user, assistant, user, ...; the first and the last are the user's."
        )
    return said


def _text(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise CorpusError(f"{where}: {field} is a text, and this has none.")
    if len(value) > MOST_CHARS:
        raise CorpusError(
            f"{where}: {field} has {len(value):,} characters; at most {MOST_CHARS:,} are learned. "
            "Shorten it to what was asked."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: {field} holds half a character ({error.reason}).") from error
    return value


def _intent(value: Any, where: str, known: Collection[str]) -> str:
    if not isinstance(value, str) or not value:
        raise CorpusError(f'{where} needs an "intent", as in {_EXAMPLE}')
    if value not in known:
        nearest = difflib.get_close_matches(value[:100], sorted(known), 1, 0.0)[0]
        raise CorpusError(
            f"{where}: no intent is called {value[:60]!r}; the nearest is {nearest!r}. "
            f"Known: {', '.join(known)}."
        )
    return value


def _answer(value: Any, where: str) -> str | None:
    if value is None:
        return None
    text = _text(value, "answer", where)
    for name in _PLACEHOLDER.findall(text):
        if name not in labels.PLACEHOLDERS:
            nearest = difflib.get_close_matches(name[:100], labels.PLACEHOLDERS, 1, 0.0)[0]
            raise CorpusError(
                f"{where}: the answer has {{{{{name[:40]}}}}}, which is no placeholder; the "
                f"nearest is {{{{{nearest}}}}}."
            )
    if "{{" in _PLACEHOLDER.sub("", text):
        raise CorpusError(f"{where}: the answer opens a placeholder that it does not close.")
    return text.strip()


def _refuse_values(case: Case, mask: Mask) -> None:
    """Raises: CorpusError where the answer holds what belongs to one customer."""
    for part in mask(_PLACEHOLDER.sub(" ", case.answer or "")).parts:
        if type(part) is not str and part in _PRIVATE:
            raise CorpusError(
                f"{case.where}: the answer holds a value ({part}) that the model would learn by "
                f"heart and tell to others. Write a placeholder, such as {{{{{part}}}}}."
            )


# -- the file as a whole ---------------------------------------------------------------------------


def _refuse_twice(cases: Iterable[Case]) -> None:
    """Raises: CorpusError where two rows have one id."""
    seen: dict[str, Case] = {}
    for case in cases:
        if other := seen.get(case.id):
            raise CorpusError(f"{case.where}: the id {case.id!r} stands in {other.where} already.")
        seen[case.id] = case


def _refuse_contradictions(cases: Iterable[Case]) -> None:
    """Raises: CorpusError where one conversation is said to be about two things."""
    seen: dict[tuple[str, ...], Case] = {}
    for case in cases:
        other = seen.setdefault(case.key, case)
        if other.intent != case.intent:
            raise CorpusError(
                f"{case.where} says {case.intent!r} and {other.where} says {other.intent!r} of the "
                f"same question, {case.question[:60]!r}. Keep one of them."
            )
