"""What a thing that answers must do: one method. What it may do besides: embeddings.

A backend turns messages into events and knows nothing of users, conversations or HTTP. Its OPTIONS
are the fields of its ``Options`` dataclass, so that unknown keys can be refused by ``check``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from assistant.errors import InvalidRequest
from assistant.types import Event, Message, Params

if TYPE_CHECKING:
    from assistant.engine import Engine

#: What a text means, as a point on the unit sphere. *Shapes*: (embedding_width,).
Vector = NDArray[np.float32]


class Backend(ABC):
    """One way to answer. Built once per process, lazily; ``stream`` may run many times at once."""

    @dataclass(frozen=True, slots=True)
    class Options:
        pass

    options_class: ClassVar[type[Any]] = Options
    #: What its answers are called: of the model here, or of a larger one elsewhere.
    route: ClassVar[str] = "model"
    #: Whether a question could take this process with it: native code works on it here.
    in_process: ClassVar[bool] = False
    #: Seconds without another word after which one that writes is stuck (reliability F4, F26).
    idle_s: float = 10.0

    def __init__(self, alias: str, options: Any) -> None:
        self.alias = alias
        self.options = options

    @abstractmethod
    def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        """Started, Deltas, Finished. Closing the iterator stops the work.

        Raises: AssistantError and nothing else.
        """

    def embedding_width(self) -> int:
        """Values of an embedding; 0 where there are none. Raises: ModelUnavailable."""
        return 0

    async def embed(self, texts: Sequence[str]) -> Sequence[Vector]:
        """A vector for each text, in order; near each other where texts mean the same.

        Equal texts have equal vectors, whatever is asked beside them. Cancelling stops the work.
        Raises: AssistantError and nothing else.
        """
        raise InvalidRequest(f"The backend {self.alias!r} has no embeddings.")

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids. Raises: InvalidRequest for ids that are none of a text's."""
        raise InvalidRequest("Token ids are not read here. Send texts.")

    def count_tokens(self, text: str) -> int:
        """How much of the context ``text`` takes; the default is a safe over-estimate by bytes."""
        return len(text.encode(errors="surrogatepass")) // 3 + 1

    def context_tokens(self) -> int:
        """The largest prompt plus answer, in tokens."""
        return 1024

    def reads_system(self) -> bool:
        """Whether a system's text means anything to it; asked before one is passed on."""
        return True

    def version(self, params: Params | None = None) -> str:
        """What its answers depend on besides the question; empty while unknown, or where they are
        not worth keeping. Of several versions, the one that answers ``params``. Never waits."""
        return ""

    def expected_wait_s(self) -> float:
        """Seconds until a new question would be begun, as far as is known. Never waits."""
        return 0.0

    def crowded(self) -> bool:
        """Whether a new question would keep somebody waiting, or wait itself. Never waits."""
        found = [engine.stats() for engine in self.engines()]
        return any(
            stats.waiting or (stats.slots and stats.running >= max(1, stats.slots - 1))
            for stats in found
        )

    def loaded(self) -> Engine | None:
        """The engine in this process, if it has one and it was loaded. Never loads, never waits."""
        return None

    def engines(self) -> tuple[Engine, ...]:
        """Every engine that was loaded in this process, as ``loaded``; that one comes first."""
        engine = self.loaded()
        return () if engine is None else (engine,)

    def problem(self) -> str:
        """What is wrong although it answers, for staff; empty if nothing is. Never waits."""
        return ""

    def check(self) -> None:
        """Load whatever is loaded lazily. Raises: ModelUnavailable with what to do."""

    def close(self) -> None:
        """Free threads and memory; the backend may be used again afterwards."""
