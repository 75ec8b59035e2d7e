"""Stored turns as arrays: what was asked and how it was answered, the newest of a span of time.

No text leaves this module: words become keyed hashes, questions embeddings, values are masked
before either. Nobody counts for more than a few turns, however many they ask.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from django.conf import settings

from assistant import backends
from assistant.backends.base import Backend
from assistant.engine.text import Slot
from assistant.errors import AssistantError
from assistant.facts import mask
from conversations.models import Feedback, Message
from conversations.opening import OUT_OF_SCOPE
from monitoring import loop
from monitoring.drift_scale import SHARE_OF_ONE, TURNS_OF_ONE, Floats, Turns, bound_of

log = logging.getLogger(__name__)

#: Rows read for one that counts, where a few users ask nearly everything.
MOST_READ = 20
#: Answers of which a reference is an even part, the newest.
MOST_KEYS = 200_000
#: Turns of a reference that followed each other.
RUN = 40
#: Texts given to the model at a time; characters of a question that are read.
BATCH_TEXTS, MOST_CHARS = 64, 600
_WORD = re.compile(r"[^\W\d_]{2,}")
_COLUMNS = (
    *("created_at", "conversation_id", "conversation__user_id", "conversation__session_key"),
    *("parent__text", "intent", "confidence", "degraded_reason", "feedback__value"),
)


@dataclass(frozen=True, slots=True)
class Window:
    """Turns, when the first and the last of them was, and the space their embeddings are in."""

    turns: Turns
    from_at: datetime
    to_at: datetime
    space: str


def newest(after: datetime | None, until: datetime | None, most: int) -> list[dict[str, Any]]:
    """Rows of the newest answers in that span, at most so many, the newest first."""
    return _counting(_answers(after, until)[: MOST_READ * most].iterator(chunk_size=1_000), most)


def oldest(after: datetime) -> datetime | None:
    """When the first answer of then on was."""
    found: datetime | None = _answers(after, None).values_list("created_at", flat=True).last()
    return found


def spread(
    after: datetime | None, until: datetime | None, most: int
) -> tuple[list[dict[str, Any]], float]:
    """Rows of answers of then, the newest first, at most so many; and how many there were an hour.

    Evenly of all that time; the newest, if it has no beginning.
    """
    if after is None:
        rows = newest(None, until, most)
        return rows, _pace([row["created_at"] for row in rows])
    found = list(_answers(after, until).values_list("pk", "created_at")[:MOST_KEYS])
    some = [pk for pk, _ in _runs(found, most)]
    rows = _counting(_answers(after, until).filter(pk__in=some).iterator(), most)
    return rows, _pace([at for _, at in found])


def _pace(times: Sequence[datetime]) -> float:
    """Turns an hour; ``times`` the newest first."""
    if len(times) < 2:
        return 0.0
    return len(times) / max((times[0] - times[-1]) / timedelta(hours=1), 1e-3)


def _runs(found: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them: runs that are spread evenly, so that what one user said in a row
    stays together as it does in a window."""
    starts: Sequence[int] = range(0, len(found), RUN)
    if len(found) > most:
        starts = np.linspace(0, len(found) - RUN, most // RUN).astype(int).tolist()
    return [one for start in starts for one in found[start : start + RUN]]


def _counting(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Those of them that count, at most so many: nobody's are a large share of them."""
    asked: Counter[Any] = Counter()
    several, enough = max(TURNS_OF_ONE, int(SHARE_OF_ONE * most)), 0
    held: list[tuple[dict[str, Any], int]] = []
    for row in rows:
        asked[whose := _whose(row)] += 1
        if asked[whose] <= several:
            held.append((row, asked[whose]))
            enough += asked[whose] <= TURNS_OF_ONE
            if enough == most:
                break
    bound = bound_of(asked.values(), most)
    return [row for row, number in held if number <= bound][:most]


def _answers(after: datetime | None, until: datetime | None) -> Any:
    rows = Message.objects.filter(
        role=Message.Role.ASSISTANT, author="", shown=True, parent__isnull=False
    ).exclude(status=Message.Status.STREAMING)
    if after is not None:
        rows = rows.filter(created_at__gt=after)
    if until is not None:
        rows = rows.filter(created_at__lte=until)
    return rows.order_by("-created_at", "-id").values(*_COLUMNS)


def _whose(row: dict[str, Any]) -> Any:
    user, session = row["conversation__user_id"], row["conversation__session_key"]
    return user or session or row["conversation_id"]


def window_of(rows: Sequence[dict[str, Any]]) -> Window:
    """What these rows, the newest first, tell. Asks the model; without one there is less."""
    masked = [_masked(row["parent__text"]) for row in rows]
    space, vectors, tokens = _read(masked)
    chars = [float(len(text)) if space else 0.0 for text in masked]
    reasons = [row["degraded_reason"] for row in rows]
    people = {whose: at for at, whose in enumerate(dict.fromkeys(map(_whose, rows)))}
    turns = Turns(
        users=np.array([people[_whose(row)] for row in rows], np.int64),
        intents=[row["intent"] for row in rows],
        confidence=np.array([_number(row["confidence"]) for row in rows], float),
        outside=np.array([reason == OUT_OF_SCOPE for reason in reasons], bool),
        degraded=np.array([reason not in ("", OUT_OF_SCOPE) for reason in reasons], bool),
        down=np.array([row["feedback__value"] == Feedback.Value.DOWN for row in rows], bool),
        words=[word_numbers(text) for text in masked],
        tokens=np.array(tokens, float),
        chars=np.array(chars, float),
        vectors=vectors,
        hours=np.array([row["created_at"].timestamp() / 3600 for row in rows], float),
    )
    return Window(turns, rows[-1]["created_at"], rows[0]["created_at"], space)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _masked(text: str) -> str:
    """The question without its values, and no longer than what is read of it."""
    parts = mask(text[:MOST_CHARS]).parts
    return " ".join("".join(" " if isinstance(part, Slot) else part for part in parts).split())


def word_numbers(text: str) -> Any:
    """The words of ``text`` as numbers only this installation can make. *Shapes*: (words,)."""
    key = settings.SECRET_KEY.encode()[:64]
    digests = (
        hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=4, key=key).digest()
        for word in _WORD.findall(text.casefold())
    )
    return np.array([int.from_bytes(digest, "big") for digest in digests], np.int64)


# --- What the model makes of them ----------------------------------------------------------------


def _read(texts: Sequence[str]) -> tuple[str, Floats | None, list[float]]:
    """The embeddings' space, the embeddings (N, width), and each text's tokens.

    An empty space, None and noughts where no model can say.
    """
    nothing = [0.0] * len(texts)
    try:
        with _model() as backend:
            if backend is None:
                return "", None, nothing
            vectors = asyncio.run(_embedded(backend, texts)) if backend.embedding_width() else None
            tokens = [float(backend.count_tokens(text)) for text in texts]
            return backend.version() or backend.alias, vectors, tokens
    except (AssistantError, loop.LoopError) as error:
        log.warning("drift is looked for without the model: %s", error)
        return "", None, nothing


async def _embedded(backend: Backend, texts: Sequence[str]) -> Floats:
    found: list[Any] = []
    for at in range(0, len(texts), BATCH_TEXTS):
        found += await backend.embed(list(texts[at : at + BATCH_TEXTS]))
    return np.array(found, float)


@contextmanager
def _model() -> Iterator[Backend | None]:
    """What answers, if it is loaded here; else the same on one thread, only for now."""
    alias = backends.answering()
    here = backends.built().get(alias or "")
    options = settings.ASSISTANT["BACKENDS"].get(alias, {}).get("OPTIONS", {})
    if alias is None or (here is not None and here.engines()) or "model_dir" not in options:
        yield backends.get(alias) if alias else None
        return
    from assistant.backends.onnx import OnnxBackend, Options  # loads the runtime

    folder = loop.subject(None).folder
    own = OnnxBackend("drift", Options(str(folder), threads=1, max_batch=1, prefix_mb=0))
    try:
        own.check()
        yield own
    finally:
        own.close()
