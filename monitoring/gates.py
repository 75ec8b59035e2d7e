"""What a gate says of a candidate: golden set, shadow and canary each answer with one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Gate:
    """``passed``: None while there is too little to judge by. ``why``: one sentence for people."""

    passed: bool | None
    why: str
    figures: dict[str, Any] = field(default_factory=dict)
