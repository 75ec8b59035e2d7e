"""Asks a backend every row of a dataset and scores what it says.

Rows in, one ``Answer`` a row out, one ``Report`` over them. Knows the dataset's format and the
scoring functions; knows nothing of who asked or where the figures go.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from assistant import facts
from assistant.backends.base import Backend
from assistant.errors import ContextTooLong
from assistant.modelkit import scoring
from assistant.types import Delta, Finished, Message, Params, Started

GOLDEN = Path(__file__).with_name("golden") / "support-en.jsonl"
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
    """What came back. ``route`` and ``reason`` are what the model's own thresholds say."""

    id: str
    intent: str
    confidence: float
    scope: float
    route: str
    reason: str
    text: str
    ms: float
    finished: bool


@dataclass(frozen=True, slots=True)
class Figures:
    """Scores over some rows; None where no row can tell."""

    rows: int
    intent_accuracy: float | None
    scope_auroc: float | None
    ece: float | None
    placeholder_ok: float | None
    well_ended: float | None
    coverage: float | None
    answer_similarity: float | None


# -- reading -------------------------------------------------------------------------------------


def read_dataset(path: Path) -> list[Row]:
    """The rows of a ``.jsonl`` or ``.jsonl.gz`` file. Raises: DatasetError."""
    if not path.is_file():
        raise DatasetError(f"{path} is not a file. Name a .jsonl or .jsonl.gz file.")
    rows = [_row(data, f"{path} line {at}", str(at)) for at, data in _objects(path)]
    if not rows:
        raise DatasetError(f"{path} holds no rows.")
    return rows


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as raw:
            stream = gzip.open(raw) if path.suffix == ".gz" else raw
            for at, line in enumerate(_lines(stream, path), 1):
                if line.strip():
                    yield at, _object(line, f"{path} line {at}")
    except (OSError, EOFError, zlib.error) as error:
        raise DatasetError(f"{path} cannot be read: {error}.") from error


def _lines(stream: Any, path: Path) -> Iterator[bytes]:
    count = 0
    while line := stream.readline(_MOST_LINE_BYTES + 1):
        count += 1
        if len(line) > _MOST_LINE_BYTES or count > _MOST_ROWS:
            raise DatasetError(f"{path} line {count}: over {_MOST_ROWS:,} rows or 1 MiB a line.")
        yield line


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise DatasetError(f"{where} is not a JSON object.")
    return data


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
    messages = row.messages
    while True:
        try:
            return await _ask_once(backend, row.id, messages, max_new_tokens)
        except ContextTooLong:
            messages = messages[1:]
            if not messages:
                return _refused(row.id, ContextTooLong.code)


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
    reasons = {"hand_on": "low_confidence", "out_of_scope": "out_of_scope"}
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
    )


def _refused(id_: str, reason: str) -> Answer:
    """A question the model never read: counted as wrong, with no opinion on its scope."""
    return Answer(
        id=id_, intent="", confidence=0.0, scope=0.5, route="", reason=reason, text="", ms=0.0,
        finished=False,
    )  # fmt: skip


# -- scoring -------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], answers: Sequence[Answer]) -> Figures:
    """The scores of section 0's contract over these rows."""
    pairs = list(zip(rows, answers, strict=True))
    judged = [(row, answer) for row, answer in pairs if row.intent]
    right = [answer.intent == row.intent for row, answer in judged]
    sure = [answer.confidence for _, answer in judged]
    inside = [answer.scope for row, answer in pairs if row.scope == "in"]
    outside = [answer.scope for row, answer in pairs if row.scope == "out"]
    alike = [scoring.similarity(a.text, r.answer) for r, a in pairs if r.answer]
    return Figures(
        rows=len(pairs),
        intent_accuracy=_mean(right),
        scope_auroc=_known(scoring.auroc(inside, outside)),
        ece=_known(scoring.ece(sure, right)),
        placeholder_ok=_mean([_placeholders_ok(row, answer) for row, answer in pairs]),
        well_ended=_mean([scoring.well_ended(a.text, a.finished) for a in answers]),
        coverage=_known(scoring.coverage_at_error(sure, right)),
        answer_similarity=_mean(alike),
    )


def _placeholders_ok(row: Row, answer: Answer) -> bool:
    given: dict[str, str] = {}
    for message in row.messages:
        given |= facts.mask(message.text).values
    return scoring.placeholders_ok(answer.text, given, frozenset(facts.PLAIN_WORDS))


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return round(sum(found) / len(found), 4) if found else None


def _known(value: float) -> float | None:
    return round(value, 4) if value == value else None


def report(model: str, rows: Sequence[Row], answers: Sequence[Answer]) -> dict[str, Any]:
    """The JSON of ``evaluate --json``: figures overall, by kind, and what went wrong."""
    kinds = sorted({row.kind for row in rows})
    by = {}
    for kind in kinds:
        chosen = [at for at, row in enumerate(rows) if row.kind == kind]
        by[kind] = asdict(figures([rows[at] for at in chosen], [answers[at] for at in chosen]))
    return {
        "model": model,
        **asdict(figures(rows, answers)),
        "by": by,
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
    if row.scope and (row.scope == "out") != (answer.reason == "out_of_scope"):
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
        del data["finished"]
        yield json.dumps(data, ensure_ascii=False)
