"""Who answers in which order, and how sure they must be: settings, and what staff changed.

Pure values; the change that is in force comes from ``answers``, with the rest that staff wrote.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from django.conf import settings


@dataclass(frozen=True, slots=True)
class Policy:
    """``steps``: our own (``OWN_STEPS`` of ``assistant.backends``) and aliases of backends.
    ``confidence_min``: a model that is less sure hands on, whatever its own bands say; 0: they
    decide. ``rule_score``: how sure a rule must be, 0..100.
    """

    steps: tuple[str, ...]
    confidence_min: float
    rule_score: float

    @property
    def name(self) -> str:
        """Another one for every change: kept answers hold under one policy."""
        told = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def policy(changed: Mapping[str, Any] | None = None) -> Policy:
    """What settings say, but for what is ``changed``: field -> value, None as settings have it."""
    conf = settings.ASSISTANT
    values = {
        "steps": tuple(conf["ROUTE"]),
        "confidence_min": conf["CONFIDENCE_MIN"],
        "rule_score": conf["RULE_SCORE"],
    }
    given = {name: value for name, value in (changed or {}).items() if value is not None}
    return Policy(**{**values, **given})
