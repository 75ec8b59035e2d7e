"""A candidate's answers beside the live ones: how they are compared, counted and judged.

Rows and figures only; who asks the candidate, and when, is ``shadowing``'s. ``gate`` says whether
the candidate may go on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.conf import settings
from django.db import IntegrityError
from django.db.models import Count, Q, QuerySet

from assistant import registry
from assistant.engine.text import Slot
from assistant.facts import mask
from assistant.modelkit import scoring
from assistant.models import ModelVersion
from conversations.models import Message
from conversations.opening import OUT_OF_SCOPE
from monitoring import metrics
from monitoring.gates import Gate
from monitoring.models import ShadowPair
from monitoring.reading import Reading

#: Pairs looked at for a median, the newest; more change nothing.
MOST_TIMED = 2_000
#: With fewer first questions than this, all pairs are timed.
LEAST_TIMED = 20
#: How sure a sign test must be.
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Said:
    """One answer, as far as it is compared. *Units*: ``ms`` from the question to the last word.

    ``fate``: what becomes of the question: answer, hand_on or out_of_scope.
    """

    intent: str
    confidence: float | None
    fate: str
    text: str
    tokens: int
    ms: float | None
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """``differs``: the first of failed, band, intent, text in which they differ; empty: in none."""

    differs: str
    similarity: float | None

    @property
    def agreed(self) -> bool:
        return not self.differs


def compare(live: Said, candidate: Said, similar_from: float) -> Comparison:
    """``similar_from``: how alike (0..1) two texts of one meaning are. Pure."""
    if candidate.failed:
        return Comparison("failed", None)
    similarity = scoring.similarity(live.text, candidate.text)
    if live.fate != candidate.fate:
        return Comparison("band", similarity)
    if live.fate != OUT_OF_SCOPE and live.intent != candidate.intent:
        return Comparison("intent", similarity)
    return Comparison("" if similarity >= similar_from else "text", similarity)


def fate(band_or_reason: str) -> str:
    """What the user gets of an answer with that band, or with that ``degraded_reason``."""
    if band_or_reason == OUT_OF_SCOPE:
        return OUT_OF_SCOPE
    return "hand_on" if band_or_reason in ("hand_on", "low_confidence") else "answer"


def said_live(answer: Message, queue_ms: float | None) -> Said:
    """The stored answer; what it waited in the queue says nothing of its model."""
    ms = answer.duration_ms
    return Said(
        intent=answer.intent,
        confidence=answer.confidence,
        fate=fate(answer.degraded_reason),
        text=answer.text,
        tokens=answer.output_tokens,
        ms=ms if ms is None else max(0.0, ms - (queue_ms or 0.0)),
    )


def keep(version: ModelVersion, answer: Message, live: Said, candidate: Said) -> ShadowPair | None:
    """The pair as a row; None if its message or version was deleted meanwhile."""
    found = compare(live, candidate, settings.ASSISTANT["SHADOW"]["SIMILARITY"])
    values: dict[str, Any] = {
        "agreed": found.agreed,
        "differs": found.differs,
        "similarity": found.similarity,
        "live_model": answer.model,
        "live_intent": live.intent,
        "live_confidence": live.confidence,
        "live_tokens": live.tokens,
        "live_ms": live.ms,
        "intent": candidate.intent,
        "confidence": candidate.confidence,
        "tokens": candidate.tokens,
        "ms": candidate.ms,
        "text": "" if found.agreed else candidate.text,
        "verdict": "",
        "judged_by": None,
        "judged_at": None,
    }
    try:
        pair, _ = ShadowPair.objects.update_or_create(
            version=version, message=answer, defaults=values
        )
    except IntegrityError:
        return None
    return pair


# --- Figures -------------------------------------------------------------------------------------


def figures(version: ModelVersion) -> dict[str, Any]:
    """Counts, agreement (0..1), verdicts and medians (ms) of all pairs of that version."""
    rows = ShadowPair.objects.filter(version=version)
    differing = rows.filter(agreed=False).values_list("differs").order_by()
    differs = dict(differing.annotate(count=Count("pk")))
    judged = rows.exclude(verdict="").values_list("verdict").order_by()
    verdicts = dict(judged.annotate(count=Count("pk")))
    pairs = rows.count()
    ms, live_ms = _medians(rows)
    return {
        "pairs": pairs,
        "agreement": _share(pairs - sum(differs.values()), pairs),
        "failed": _share(differs.get("failed", 0), pairs),
        "differs": differs,
        "verdicts": {name: verdicts.get(name, 0) for name in ShadowPair.Verdict.values},
        "ms": ms,
        "live_ms": live_ms,
        "slower": round(ms / live_ms, 3) if ms and live_ms else None,
    }


def _share(count: int, of: int) -> float | None:
    return round(count / of, 4) if of else None


def _medians(rows: QuerySet[ShadowPair]) -> tuple[float | None, float | None]:
    """Of the candidate and of the live model.

    Of first questions where there are enough: later ones the live model has half read already.
    """
    timed = rows.filter(ms__gt=0, live_ms__gt=0).exclude(differs="failed")
    first = list(timed.filter(message__seq=2).values_list("ms", "live_ms")[:MOST_TIMED])
    found = first if len(first) >= LEAST_TIMED else list(timed.values_list("ms", "live_ms"))
    if not found:
        return None, None
    own, live = zip(*found[:MOST_TIMED], strict=True)
    return round(statistics.median(own), 2), round(statistics.median(live), 2)


def sign_test(wins: int, losses: int) -> float:
    """Chance of at least so many ``losses`` if each side were as good. 1 without any.

    Source: exact binomial, one-sided.
    """
    number = wins + losses
    ways = sum(math.comb(number, count) for count in range(losses, number + 1))
    return ways / float(1 << number) if number < 1_000 else _normal_tail(wins, losses)


def _normal_tail(wins: int, losses: int) -> float:
    number = wins + losses
    z = (losses - 0.5 - number / 2) / math.sqrt(number / 4)
    return 1 - statistics.NormalDist().cdf(z)


# --- The gate ------------------------------------------------------------------------------------


def gate(version: ModelVersion) -> Gate:
    """Whether that candidate has shown enough beside the live model to be let on."""
    found, limits = figures(version), settings.ASSISTANT["SHADOW"]
    if stop := _stop_at_once(found, limits):
        return Gate(False, stop, found)
    if found["pairs"] < limits["PAIRS"]:
        return Gate(None, f"{found['pairs']} of {limits['PAIRS']} pairs so far.", found)
    if found["slower"] is not None and found["slower"] > limits["SLOWER_MAX"]:
        why = f"It takes {found['slower']:.1f} times as long as the live model: "
        return Gate(False, f"{why}{found['ms']:.0f} ms, not {found['live_ms']:.0f}.", found)
    return _by_agreement(found, limits)


def _stop_at_once(found: dict[str, Any], limits: dict[str, Any]) -> str:
    """Why no further pair could help; else nothing."""
    failed = found["differs"].get("failed", 0)
    of = max(found["pairs"], limits["PAIRS"])
    if failed <= limits["FAILED_MAX"] * of:
        return ""
    return f"{failed} of its {found['pairs']} answers failed; {limits['FAILED_MAX']:.0%} may."


def _by_agreement(found: dict[str, Any], limits: dict[str, Any]) -> Gate:
    agreement, verdicts = found["agreement"], found["verdicts"]
    if agreement >= limits["AGREEMENT_MIN"]:
        return Gate(True, f"It agrees with the live model in {agreement:.0%}.", found)
    low = f"It agrees in {agreement:.0%} only, and {limits['AGREEMENT_MIN']:.0%} are wanted"
    better, worse = verdicts["candidate"], verdicts["live"]
    if sign_test(better, worse) < SIGNIFICANT:
        return Gate(False, f"{low}; judged, the live answer is better {worse} times "
                    f"and the candidate's {better}.", found)  # fmt: skip
    judged = sum(verdicts.values())
    if judged < limits["JUDGED"]:
        return Gate(None, f"{low}: judge {limits['JUDGED'] - judged} more of the pairs.", found)
    return Gate(True, f"{low}, but of {judged} judged pairs it is no worse.", found)


# --- The report ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Example:
    """A pair in which they disagree; the question with its values masked."""

    pair: int
    differs: str
    question: str
    live_intent: str
    intent: str
    live_text: str
    text: str


def by_intent(version: ModelVersion) -> list[dict[str, Any]]:
    """Pairs and agreements by the live model's intent, the most frequent first."""
    rows = ShadowPair.objects.filter(version=version).values("live_intent").order_by()
    found = rows.annotate(pairs=Count("pk"), agreed=Count("pk", filter=Q(agreed=True)))
    return [
        {"intent": row["live_intent"], "pairs": row["pairs"], "agreed": row["agreed"]}
        for row in found.order_by("-pairs", "live_intent")
    ]


def examples(version: ModelVersion, most: int = 10) -> list[Example]:
    """The newest disagreements."""
    rows = ShadowPair.objects.filter(version=version, agreed=False)
    return [_example(pair) for pair in rows.select_related("message__parent")[:most]]


def _example(pair: ShadowPair) -> Example:
    asked = pair.message.parent
    return Example(
        pair=pair.pk,
        differs=pair.differs,
        question=masked(asked.text) if asked is not None else "",
        live_intent=pair.live_intent,
        intent=pair.intent,
        live_text=masked(pair.message.text),
        text=masked(pair.text),
    )


def masked(text: str) -> str:
    """``text`` in one line, its personal values as placeholders."""
    parts = mask(" ".join(text.split())).parts
    return "".join("{{" + part + "}}" if isinstance(part, Slot) else part for part in parts)


def readings() -> Iterator[Reading]:
    """The agreement of the version that is in shadow now."""
    version = registry.shadow()
    if version is None:
        return
    rows = ShadowPair.objects.filter(version=version)
    found = rows.aggregate(pairs=Count("pk"), agreed=Count("pk", filter=Q(agreed=True)))
    if found["pairs"]:
        label = metrics.model_label(version.label)
        yield Reading(metrics.SHADOW, {"model": label}, found["agreed"] / found["pairs"])
