"""Keys and values of finished answers, kept so that a chat's next turn reads only what is new.

Found by token ids within one caller's scope: a hit shared between callers would tell, by its speed,
what others have asked. The fixed system prefix is the one thing shared. Bounded in bytes, least
recently used out first. Knows ids and opaque saved caches; knows nothing of slots or the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from assistant.engine.runner import Saved

#: Chats kept of one caller; matching compares the prompt with each.
_MOST_OF_A_SCOPE = 8


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """Saved cache of the tokens ``ids[start:]``; those before are the shared prefix."""

    ids: NDArray[np.int64]
    start: int
    saved: Saved = field(repr=False)

    @property
    def bytes(self) -> int:
        return self.ids.nbytes + sum(part.nbytes for part in self.saved)


@dataclass(frozen=True, slots=True)
class Hit:
    """The first ``tokens`` of a prompt are in ``kept``, if any, after the shared prefix."""

    tokens: int
    kept: Kept | None = None


class PrefixCache:
    """Not thread-safe: the engine's thread owns it."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        #: Oldest use first; a chat is found by its scope and what it holds.
        self._kept: OrderedDict[int, tuple[str, Kept]] = OrderedDict()
        self._scopes: dict[str, list[Kept]] = {}
        self.bytes = 0
        self.shared: Kept | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def share(self, kept: Kept) -> None:
        """Put ``kept`` in front of every prompt that begins with it. What was kept goes: it may
        stand on another prefix."""
        for _, one in list(self._kept.values()):
            self._drop(one)
        self.shared = kept

    def find(self, scope: str, prompt: Sequence[int]) -> Hit:
        """The longest known beginning of ``prompt``, never all of it nor all but one token."""
        ids = np.asarray(prompt, np.int64)
        best = Hit(self._begins(ids))
        for kept in self._scopes.get(scope, ()):
            tokens = min(_common(kept.ids, ids), len(ids) - 2)
            if tokens > max(best.tokens, kept.start):
                best = Hit(tokens, kept)
        if best.kept is not None:
            self._use(scope, best.kept)
        return best

    def starts_shared(self, prompt: Sequence[int]) -> int:
        """Tokens of the shared prefix where ``prompt`` begins with all of it, else 0."""
        shared = self.shared
        if shared is None or len(prompt) < len(shared.ids):
            return 0
        ids = np.asarray(prompt[: len(shared.ids)], np.int64)
        return len(shared.ids) if bool((ids == shared.ids).all()) else 0

    def keep(self, scope: str, kept: Kept) -> None:
        """Keep ``kept`` for ``scope``, in place of what it continues."""
        if kept.bytes > self._most_bytes:
            return
        for other in list(self._scopes.get(scope, ())):
            if _common(other.ids, kept.ids) == len(other.ids):
                self._drop(other)
        chats = self._scopes.setdefault(scope, [])
        chats.append(kept)
        self._kept[id(kept)] = (scope, kept)
        self.bytes += kept.bytes
        if len(chats) > _MOST_OF_A_SCOPE:
            self._drop(chats[0])
        while self.bytes > self._most_bytes:
            self._drop(next(iter(self._kept.values()))[1])

    def _use(self, scope: str, kept: Kept) -> None:
        self._kept.move_to_end(id(kept))
        chats = self._scopes[scope]
        chats.remove(kept)
        chats.append(kept)

    def _begins(self, ids: NDArray[np.int64]) -> int:
        shared = self.starts_shared(ids.tolist())
        return shared if len(ids) - shared >= 2 else 0

    def _drop(self, kept: Kept) -> None:
        scope, _ = self._kept.pop(id(kept))
        self.bytes -= kept.bytes
        chats = self._scopes[scope]
        chats[:] = [one for one in chats if one is not kept]
        if not chats:
            del self._scopes[scope]


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size
