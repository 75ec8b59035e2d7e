"""What the engine raises besides ``ManifestError`` and ``ValueError``. ::

EngineError
├── Overloaded      the queue is full; ``eta_s`` says how long a newcomer would wait
├── PromptTooLong   the prompt leaves no room for an answer
├── NoEmbeddings    the model has none
├── EngineCrashed   the thread died; start() makes a new one
└── EngineClosed    close() was called
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of what the engine raises."""


class Overloaded(EngineError):
    """The queue is full."""

    def __init__(self, message: str, eta_s: float) -> None:
        super().__init__(message)
        self.eta_s = eta_s


class PromptTooLong(EngineError):
    """The prompt leaves no room for an answer."""


class NoEmbeddings(EngineError):
    """The model tells what comes next, and nothing else."""


class EngineCrashed(EngineError):
    """The engine's thread died with requests in it, or has not been started since."""


class EngineClosed(EngineError):
    """The engine was closed."""
