"""What a thing that answers must do: one method.

A backend turns messages into events and knows nothing of users, conversations or HTTP. Its OPTIONS
are the fields of its ``Options`` dataclass, so that unknown keys can be refused by ``check``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from assistant.types import Event, Message, Params


class Backend(ABC):
    """One way to answer. Built once per process, lazily; ``stream`` may run many times at once."""

    @dataclass(frozen=True, slots=True)
    class Options:
        pass

    options_class: ClassVar[type[Any]] = Options

    def __init__(self, alias: str, options: Any) -> None:
        self.alias = alias
        self.options = options

    @abstractmethod
    def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        """Started, Deltas, Finished. Closing the iterator stops the work.

        Raises: AssistantError and nothing else.
        """

    def count_tokens(self, text: str) -> int:
        """How much of the context ``text`` takes; the default is a safe over-estimate by bytes."""
        return len(text.encode()) // 3 + 1

    def context_tokens(self) -> int:
        """The largest prompt plus answer, in tokens."""
        return 1024

    def reads_system(self) -> bool:
        """Whether a system's text means anything to it; asked before one is passed on."""
        return True

    def check(self) -> None:
        """Load whatever is loaded lazily. Raises: ModelUnavailable with what to do."""

    def close(self) -> None:
        """Free threads and memory; the backend may be used again afterwards."""
