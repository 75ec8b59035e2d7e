"""The engines that are compared, one module each, run as a process of its own.

``CATALOGUE`` says what exists; nothing of any engine is imported until its process starts.
"""

from __future__ import annotations

from dataclasses import dataclass

#: What ``pip install -e '.[peers]'`` brings.
EXTRA = "pip install -e '.[peers]'"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine by others. ``variants``: ways to run it, each a process and a row."""

    module: str
    variants: tuple[str, ...]


CATALOGUE = {
    "llama.cpp": Peer("assistant.benchmark.peers.llama", ("Q8_0", "Q4_0")),
    "genai": Peer("assistant.benchmark.peers.genai", ("Engine", "Generator")),
    "optimum": Peer("assistant.benchmark.peers.hugging_face", ("ORT fp32",)),
    "transformers": Peer("assistant.benchmark.peers.hugging_face", ("torch fp32",)),
}
OURS = "assistant.benchmark.peers.ours"


def chosen(text: str) -> tuple[str, ...]:
    """``llama.cpp,genai`` or ``all`` as names. Raises: ValueError."""
    if text == "all":
        return tuple(CATALOGUE)
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in CATALOGUE]:
        raise ValueError(f"{unknown[0]!r} is no peer; known: {', '.join(CATALOGUE)}")
    return tuple(name for name in CATALOGUE if name in names)
