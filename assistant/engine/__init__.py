"""An in-process, continuously batching engine for small ONNX language models.

No Django, no network, nothing of this project: token ids in, token ids and log-probabilities out.
Importing it is cheap; onnxruntime is loaded by ``Engine.start()``.
"""

from assistant.engine.engine import Engine
from assistant.engine.errors import (
    EngineClosed,
    EngineCrashed,
    EngineError,
    NoEmbeddings,
    Overloaded,
    PromptTooLong,
)
from assistant.engine.generation import Generation, Token
from assistant.engine.manifest import Manifest, ManifestError
from assistant.engine.sampling import FirstTokenRule, Sampling, Verdict
from assistant.engine.text import ChatTurn, Codec, Slot, StopFilter, TextStream
from assistant.engine.worker import EngineConfig, EngineStats

__all__ = [
    "ChatTurn",
    "Codec",
    "Engine",
    "EngineClosed",
    "EngineConfig",
    "EngineCrashed",
    "EngineError",
    "EngineStats",
    "FirstTokenRule",
    "Generation",
    "Manifest",
    "ManifestError",
    "NoEmbeddings",
    "Overloaded",
    "PromptTooLong",
    "Sampling",
    "Slot",
    "StopFilter",
    "TextStream",
    "Token",
    "Verdict",
]
