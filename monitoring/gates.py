"""What a gate says of a candidate: golden set, shadow and canary each answer with one of these."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from django.utils import timezone


@dataclass(frozen=True, slots=True)
class Gate:
    """``passed``: None while there is too little to judge by. ``why``: one sentence for people."""

    passed: bool | None
    why: str
    figures: dict[str, Any] = field(default_factory=dict)

    def kept(self) -> dict[str, Any]:
        """As ``ModelVersion.gates`` keeps it, with the time."""
        return {"passed": self.passed, "why": self.why, "figures": self.figures,
                "at": timezone.now().isoformat(timespec="seconds")}  # fmt: skip
