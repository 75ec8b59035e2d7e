"""The wide half of a model: what single words and their neighbours say of a question's intent.

A table of weights over hashed features, added to what the network makes of the same question. It
knows by heart what the network has to generalise to, and costs a tenth of a millisecond. Knows chat
turns and arrays; knows nothing of tokens, sessions or how it was fitted.

Source: Cheng et al., "Wide & Deep Learning for Recommender Systems", 2016; hashing: Weinberger et
al., "Feature Hashing for Large Scale Multitask Learning", 2009.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from assistant.engine.folder import fault
from assistant.engine.text import ChatTurn

FILE = "wide.npz"
#: Larger tables are none of ours.
_MOST_ROWS, _MOST_TEXT = 1 << 18, 4000
_PIECE, _STEM, _MOST_COUNTED = 4, 4, 12
#: How many of a conversation's last questions count.
_QUESTIONS = 3
#: How much it counts, in scores, what a question was taken for when its topic is looked back at.
_TAKEN = 1.0
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*|<\w+>|[^\w\s]")
_NUMBER = re.compile(r"\d+")
_ARRAYS = {"table": np.int8, "scale": np.float32, "bias": np.float32, "rarity": np.float16}


@dataclass(frozen=True, slots=True)
class Opinion:
    """``intents``: (K,) float64 scores, only their differences count; ``scope``: log-odds."""

    intents: NDArray[np.float64]
    scope: float


@dataclass(frozen=True, slots=True)
class Wide:
    """*Shapes*: table (rows, K + 1) int8, times scale (K + 1,), plus bias (K + 1,); rarity (rows,).
    The last column is the scope's. Rows are counted by hash; K intents in the manifest's order."""

    table: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32]
    rarity: NDArray[np.float16]

    @classmethod
    def load(cls, directory: Path, intents: int) -> Wide:
        """The table of a verified folder, for that many intents. Raises: ManifestError."""
        path = directory / FILE
        try:
            found = cls(*_arrays(path))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise fault(path, f"is no table of weights ({error})") from error
        if not found.fits(intents):
            raise fault(path, f"holds a table that does not fit {intents} intents")
        return found

    def fits(self, intents: int) -> bool:
        rows = len(self.table)
        return (
            0 < rows <= _MOST_ROWS
            and self.table.shape == (rows, intents + 1)
            and self.rarity.shape == (rows,)
            and self.scale.shape == self.bias.shape == (intents + 1,)
            and all(bool(np.isfinite(a).all()) for a in (self.scale, self.bias, self.rarity))
        )

    def save(self, directory: Path) -> None:
        np.savez(directory / FILE, **{name: getattr(self, name) for name in _ARRAYS})

    def opinion(self, turns: Sequence[ChatTurn], names: Sequence[str]) -> Opinion:
        """Of the last turn, in the light of those before it; ``names``: the K intents."""
        return self._of(rows_of(features(self.exchanges(turns, names)), len(self.table)))

    def exchanges(self, turns: Sequence[ChatTurn], names: Sequence[str]) -> list[Exchange]:
        """The last question and those before it, each taken for what it was answered as."""
        asked = [at for at, turn in enumerate(turns) if turn.role == "user"][-_QUESTIONS:]
        if not asked:
            return []
        before = [self._answered(turns, at, names) for at in asked[:-1]]
        return [*before, Exchange(plain(turns[asked[-1]]))]

    def _answered(self, turns: Sequence[ChatTurn], at: int, names: Sequence[str]) -> Exchange:
        text, reply = plain(turns[at]), turns[at + 1]
        said = "" if reply.role == "user" else plain(reply)
        return Exchange(text, self._topic(Exchange(text, "", said), reply.intent, names), said)

    def _topic(self, ended: Exchange, taken: str | None, names: Sequence[str]) -> str:
        """What an exchange was about. Its answer's words say so better than what its question was
        ``taken`` for, which may have been a mistake."""
        scores = self._of(rows_of(features([ended]), len(self.table))).intents
        if taken in names:
            scores[names.index(taken)] += _TAKEN
        return names[int(scores.argmax())]

    def _of(self, rows: NDArray[np.intp]) -> Opinion:
        scores = self.bias.astype(np.float64)
        if len(rows):
            weights = normalised(self.rarity[rows])
            scores += (weights @ self.table[rows].astype(np.float32)) * self.scale
        return Opinion(scores[:-1], float(scores[-1]))


def _arrays(path: Path) -> list[NDArray[Any]]:
    """In the order of ``_ARRAYS``. Raises: ValueError, KeyError, OSError, BadZipFile."""
    with zipfile.ZipFile(path) as packed:
        if any(one.compress_type != zipfile.ZIP_STORED for one in packed.infolist()):
            raise ValueError("it is packed")
    with np.load(path, allow_pickle=False) as arrays:
        found = [arrays[name] for name in _ARRAYS]
    for (name, kind), array in zip(_ARRAYS.items(), found, strict=True):
        if array.dtype != kind:
            raise ValueError(f"{name} is {array.dtype}")
    return found


# -- what counts of a conversation ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question as ``plain`` gives it, what it was about and its answer; the last has neither."""

    text: str
    intent: str = ""
    answer: str = ""


def plain(turn: ChatTurn) -> str:
    """The turn's text, a placeholder as ``<ordernumber>``."""
    parts = [p if type(p) is str else f" <{re.sub(r'[^a-z]', '', p.lower())}> " for p in turn.parts]
    return "".join(parts)[-_MOST_TEXT:].lower().replace("\u2019", "'")


def features(exchanges: Sequence[Exchange]) -> set[str]:
    """What counts of the last question: its words, their beginnings, neighbours and pieces, how it
    opens, its answer's words if it has one; and with questions before it, its words once more
    beside what those were about."""
    if not exchanges:
        return set()
    *before, last = exchanges
    words = _words(last.text)
    line = f" {' '.join(words)} "
    found = {*words, *(f"{one} {other}" for one, other in pairwise(words))}
    found |= {f"^{word[:_STEM]}" for word in words if len(word) > _STEM}
    found |= {line[at : at + _PIECE] for at in range(len(line) - _PIECE + 1)}
    found.add(f"<{' '.join(words[:2])}")
    said = _words(last.answer)
    found |= {
        *(f"!{word}" for word in said),
        *(f"!!{one} {other}" for one, other in pairwise(said)),
    }
    if before:
        found.update(_behind(words, before))
    return found


def _behind(words: Sequence[str], before: Sequence[Exchange]) -> Iterator[str]:
    """The last question's words once more, beside what was asked before them."""
    about, count = f"@{before[-1].intent}", min(len(words), _MOST_COUNTED)
    yield from (about, f"{about}@{min(count, 6)}", f"@{count}")
    for word in words:
        yield from (f"{about}|{word}", f"@{word}")
    for one, other in pairwise(words):
        yield f"@@{one} {other}"
    for back, exchange in enumerate(reversed(before)):
        yield from (f"~{back}{exchange.intent}", f"~{back}{exchange.intent}@{min(count, 6)}")


def _words(text: str) -> list[str]:
    return _WORD.findall(_NUMBER.sub("0", text))


def rows_of(found: set[str], rows: int) -> NDArray[np.intp]:
    """Rows of the table that these features stand for, each once, in order."""
    return np.array(sorted({zlib.crc32(name.encode()) % rows for name in found}), np.intp)


def normalised(rarity: NDArray[np.float16]) -> NDArray[np.float32]:
    """How much each of a question's rows counts: (n,), of length 1."""
    weights = rarity.astype(np.float32)
    found: NDArray[np.float32] = weights / max(1e-6, float(np.linalg.norm(weights)))
    return found
