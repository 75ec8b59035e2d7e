"""What crosses the boundary between a conversation and whatever answers it.

Frozen values only: no Django, no arrays, no tokens. A backend takes ``Message``s and ``Params`` and
yields ``Event``s: ``Waiting``s while it keeps the question in a queue, one ``Started``, any number
of ``Delta``s, one ``Finished``. Failures are raised, never yielded (see ``assistant.errors``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length", "cancelled"]
#: Answer; answer with caution; better let somebody else answer; a polite "that is not ours".
Band = Literal["answer", "caution", "hand_on", "out_of_scope"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation as people see it; ``intent`` only on an assistant's turn."""

    role: Role
    text: str
    intent: str | None = None


@dataclass(frozen=True, slots=True)
class Params:
    """How to write the answer. ``temperature=0`` is greedy; ``top_k=0`` means no limit."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    #: Who asks: a backend may reuse what it computed for earlier turns, and share its queue fairly,
    #: within one scope. Empty: nobody in particular.
    scope: str = ""
    #: Whoever has the same is answered by the same version of a model while two are on trial: a
    #: conversation's id, else the caller. Empty: the version that answers everybody else.
    sticky: str = ""
    #: Work that nobody waits for: a model answers it only where nobody is kept waiting by it.
    batch: bool = False
    #: Values the caller knows about this user, by placeholder name; they win over settings.
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens read and written."""

    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Waiting:
    """The question has that place in the queue (1: the next); its first word is about so many
    seconds away. Told again where it changes, about twice a second at most."""

    place: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Started:
    """The answer is about to be shown. ``confidence`` and ``scope`` are calibrated, 0..1.

    The confidence of a model without intents is not: it is the geometric mean of the probabilities
    of its first tokens.

    ``intent`` is the best intent of the closed set (also when the question is out of scope), or
    None for a model without intents. ``scope`` is the probability that the question is in scope.
    ``band`` is what the model's own fitted thresholds say of the answer that follows. Where an
    engine here writes: seconds in its queue, and from there to its first token.
    """

    model: str
    intent: str | None = None
    confidence: float | None = None
    scope: float | None = None
    band: Band = "answer"
    queue_s: float | None = field(default=None, compare=False)
    prefill_s: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Delta:
    """More text to show, never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a good answer. ``logprob`` is the mean log-probability of its tokens (nats)."""

    reason: FinishReason
    usage: Usage
    logprob: float | None = None


Event = Waiting | Started | Delta | Finished
