"""Asks a backend every row of a dataset and scores what it says.

Rows in, one ``Answer`` a row out, one report over them. Knows the dataset's format and how a chat
reaches the model; the figures are ``scoring``'s. Knows nothing of who asked or where they go.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant import facts
from assistant.backends.base import Backend
from assistant.errors import ContextTooLong
from assistant.modelkit import scoring
from assistant.modelkit.jsonlines import objects
from assistant.modelkit.labels import OUT_OF_SCOPE
from assistant.modelkit.scoring import Figures, Judged
from assistant.types import Delta, Finished, Message, Params, Started

#: The golden set is every dataset in this folder.
GOLDEN = Path(__file__).with_name("golden")
#: Placeholders stay visible in the answer unless the user gave the value: that is what is judged.
_VISIBLE = {name: "{{" + name + "}}" for name in facts.PLAIN_WORDS}
_MOST_ROWS = 200_000
_MOST_LINE_BYTES = 1 << 20


class DatasetError(ValueError):
    """A dataset cannot be read; the message names the file, the line and the fault."""


@dataclass(frozen=True, slots=True)
class Row:
    """One question, alone or as the last turn of a conversation, and what is expected."""

    id: str
    messages: tuple[Message, ...]
    intent: str | None = None
    scope: str | None = None
    answer: str | None = None
    attack: bool = False
    kind: str = "all"

    @property
    def question(self) -> str:
        return self.messages[-1].text


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Band, route and reason are what the model's own thresholds say."""

    id: str
    intent: str
    confidence: float
    scope: float
    route: str
    reason: str
    text: str
    ms: float
    finished: bool
    band: str


# -- reading -------------------------------------------------------------------------------------


def read_dataset(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` or ``.jsonl.gz`` file. Raises: DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{path} is not a file. Name a .jsonl or .jsonl.gz file.")
    found = objects(path, DatasetError, most_lines=_MOST_ROWS, line_bytes=_MOST_LINE_BYTES)
    rows = [_row(data, f"{path} line {at}", str(at)) for at, data in found]
    if not rows:
        raise DatasetError(f"{path} holds no rows.")
    return rows


def read_golden(folder: Path | None = None) -> list[Row]:
    """All rows of the golden set. Raises: DatasetError, also where two rows have one id."""
    folder = folder or GOLDEN
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise DatasetError(f"{folder} holds no .jsonl file, so there is no golden set.")
    rows = [row for path in files for row in read_dataset(path)]
    twice = [id_ for id_, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DatasetError(f"{folder}: the id {twice[0]} is given to more than one row.")
    return rows


def _row(data: dict[str, Any], where: str, default_id: str) -> Row:
    turns = data.get("turns") or [{"role": "user", "text": data.get("query")}]
    try:
        messages = tuple(Message(turn["role"], _text(turn["text"])) for turn in turns)
    except (KeyError, TypeError) as error:
        raise DatasetError(f'{where} needs "query" or "turns" with role and text.') from error
    if messages[-1].role != "user" or any(m.role not in ("user", "assistant") for m in messages):
        raise DatasetError(
            f"{where}: roles are user and assistant, and the last turn is the user's."
        )
    if data.get("scope") not in (None, "in", "out"):
        raise DatasetError(f'{where}: scope is "in" or "out", not {data["scope"]!r}.')
    for key in ("intent", "answer"):
        if not isinstance(data.get(key), str | None):
            raise DatasetError(f"{where}: {key} is a text, not {data[key]!r}.")
    return Row(
        id=default_id if data.get("id") is None else str(data["id"]),
        messages=messages,
        intent=data.get("intent"),
        scope=data.get("scope"),
        answer=data.get("answer"),
        attack=bool(data.get("attack", False)),
        kind=str(data.get("kind") or "all"),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError("no text")
    return value


# -- asking --------------------------------------------------------------------------------------


async def ask_all(
    backend: Backend,
    rows: Sequence[Row],
    *,
    at_once: int = 16,
    max_new_tokens: int = 160,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """One answer a row, in order. Raises: AssistantError."""
    gate = asyncio.Semaphore(at_once)
    count = 0

    async def one(row: Row) -> Answer:
        nonlocal count
        async with gate:
            answer = await _ask(backend, row, max_new_tokens)
        count += 1
        done(count)
        return answer

    return list(await asyncio.gather(*(one(row) for row in rows)))


async def _ask(backend: Backend, row: Row, max_new_tokens: int) -> Answer:
    """One answer. What does not fit the context loses its oldest turns first, as in a chat."""
    messages = await _as_in_a_chat(backend, row.messages)
    while True:
        try:
            return await _ask_once(backend, row.id, messages, max_new_tokens)
        except ContextTooLong:
            messages = messages[1:]
            if not messages:
                return _refused(row.id, ContextTooLong.code)


async def _as_in_a_chat(backend: Backend, messages: Sequence[Message]) -> Sequence[Message]:
    """Earlier answers as a chat keeps them: filled with what the user gave, and with the intent
    that the model finds in the question before them."""
    chat: list[Message] = []
    given: dict[str, str] = {}
    for message in messages:
        if message.role == "user":
            given |= facts.mask(message.text).values
            chat.append(message)
        else:
            said = facts.fill(message.text, given)
            chat.append(Message("assistant", said, await _understood(backend, chat)))
    return chat


async def _understood(backend: Backend, chat: Sequence[Message]) -> str | None:
    """The intent under which the last question of ``chat`` would be answered."""
    if not chat or chat[-1].role != "user":
        return None
    try:
        answer = await _ask_once(backend, "", chat, max_new_tokens=1)
    except ContextTooLong:
        return None
    return OUT_OF_SCOPE if answer.band == OUT_OF_SCOPE else answer.intent or None


async def _ask_once(
    backend: Backend, id_: str, messages: Sequence[Message], max_new_tokens: int
) -> Answer:
    began = time.perf_counter()
    started, text, finished = Started(""), "", False
    params = Params(max_new_tokens=max_new_tokens, facts=_VISIBLE)
    async for event in backend.stream(messages, params):
        if isinstance(event, Started):
            started = event
        elif isinstance(event, Delta):
            text += event.text
        elif isinstance(event, Finished):
            finished = event.reason == "stop"
    reasons = {"hand_on": "low_confidence", OUT_OF_SCOPE: OUT_OF_SCOPE}
    return Answer(
        id=id_,
        intent=started.intent or "",
        confidence=started.confidence if started.confidence is not None else 1.0,
        scope=started.scope if started.scope is not None else 1.0,
        route="model",
        reason=reasons.get(started.band, ""),
        text=text,
        ms=round((time.perf_counter() - began) * 1000, 1),
        finished=finished,
        band=started.band,
    )


def _refused(id_: str, reason: str) -> Answer:
    """A question the model never read: counted as wrong, with no opinion on its scope."""
    return Answer(
        id=id_, intent="", confidence=0.0, scope=0.5, route="", reason=reason, text="", ms=0.0,
        finished=False, band="",
    )  # fmt: skip


# -- scoring -------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], answers: Sequence[Answer]) -> Figures:
    """The scores of section 0's contract over these rows, and what became of them."""
    return scoring.figures(judged(rows, answers))


def judged(rows: Sequence[Row], answers: Sequence[Answer]) -> list[Judged]:
    """Each row with its answer, as ``scoring`` takes them."""
    return [_judged(row, answer) for row, answer in zip(rows, answers, strict=True)]


def _judged(row: Row, answer: Answer) -> Judged:
    return Judged(
        kind=row.kind,
        wanted=row.intent,
        scope=row.scope,
        intent=answer.intent,
        confidence=answer.confidence,
        inside=answer.scope,
        band=answer.band,
        turns=len(row.messages),
        placeholders_ok=_placeholders_ok(row, answer),
        well_ended=scoring.well_ended(answer.text, answer.finished),
        similarity=scoring.similarity(answer.text, row.answer) if row.answer else None,
    )


def _placeholders_ok(row: Row, answer: Answer) -> bool:
    given: dict[str, str] = {}
    for message in row.messages:
        given |= facts.mask(message.text).values
    return scoring.placeholders_ok(answer.text, given, frozenset(facts.PLAIN_WORDS))


def report(model: str, rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """The JSON of ``evaluate --json``: figures overall, by kind, and what went wrong."""
    found = judged(rows, answers)
    on_topic, talks = scoring.right_topic(found)
    return {
        "model": model,
        **asdict(scoring.figures(found)),
        "several_turns": {"rows": talks, "right_topic": on_topic},
        "by": {kind: asdict(one) for kind, one in scoring.by_kind(found).items()},
        "failures": failures(rows, answers),
    }


def failures(
    rows: Sequence[Row], answers: Sequence[Answer], most: int = 50
) -> list[dict[str, Any]]:
    """Rows with the wrong intent, the wrong scope or a broken answer; the first ``most``."""
    found = []
    for row, answer in zip(rows, answers, strict=True):
        wrong = _faults(row, answer)
        if wrong:
            expected = row.intent or f"scope {row.scope}"
            found.append({"id": row.id, "expected": expected, "intent": answer.intent,
                          "confidence": round(answer.confidence, 3), "faults": wrong})  # fmt: skip
    return found[:most]


def _faults(row: Row, answer: Answer) -> list[str]:
    faults = []
    if row.intent and answer.intent != row.intent:
        faults.append("intent")
    if row.scope and (row.scope == "out") != (answer.reason == OUT_OF_SCOPE):
        faults.append("scope")
    if not _placeholders_ok(row, answer):
        faults.append("placeholder")
    if not scoring.well_ended(answer.text, answer.finished):
        faults.append("ending")
    return faults


def prediction_lines(answers: Sequence[Answer]) -> Iterator[str]:
    """JSON lines in the order of the rows: what ``--predictions`` writes."""
    for answer in answers:
        data = asdict(answer)
        del data["finished"], data["band"]
        yield json.dumps(data, ensure_ascii=False)
