"""A year of an imagined shop: rows as the product would have stored them, for pictures and timings.

``python manage.py shell -c "from tests.monitoring.shop_year import fill; fill()"``.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from django.contrib.auth.models import User
from django.utils import timezone

from assistant.models import ModelVersion, VersionChange
from conversations.models import Conversation, Feedback, HandOver, Message
from monitoring import rollups
from monitoring.models import (
    DriftReference,
    DriftReport,
    EvaluationRun,
    Job,
    Rollup,
    ShadowPair,
)

OLD, NEW, NEXT = "support-en@1.0", "support-en@1.1", "support-en@1.2"
QUESTIONS = (
    ("How do I cancel my order?", "cancel_order"),
    ("Where is my parcel?", "track_order"),
    ("I want my money back", "get_refund"),
    ("I forgot my password", "recover_password"),
    ("Can I change the delivery address?", "change_shipping_address"),
    ("Which payment methods do you accept?", "check_payment_methods"),
)
ROUTES = (("model", 70), ("reviewed", 12), ("cache", 9), ("rules", 7), ("upstream", 2))
REASONS = (("low_confidence", 5), ("out_of_scope", 3), ("overload", 1), ("timeout", 1))


def fill(*, days: int = 8, messages: int = 6_000, seed: int = 7) -> None:
    """``messages`` answers over that many days, and figures alone for the year before."""
    dice, now = random.Random(seed), timezone.now()
    _year(dice, now, days)
    answers = _answers(dice, now, days, messages)
    while rollups.roll_up(now).behind:
        pass
    _results(dice, now, answers)


def _busy(at: datetime) -> float:
    """Shoppers ask by day, less at weekends."""
    by_day = 0.15 + max(0.0, math.sin((at.hour + at.minute / 60 - 6) / 16 * math.pi))
    return by_day * (0.6 if at.weekday() > 4 else 1.0)


def _one(dice: random.Random, at: datetime, new_since: datetime) -> dict[str, Any]:
    """An answer's columns."""
    model = NEW if at > new_since else OLD
    route = dice.choices(*zip(*ROUTES, strict=True))[0]
    reason = ""
    if route in {"rules", "upstream"} or (route == "model" and dice.random() < 0.03):
        reason = "caution" if route == "model" else dice.choices(*zip(*REASONS, strict=True))[0]
    failed = route == "model" and dice.random() < 0.004
    first = {"reviewed": 3.0, "cache": 4.0, "rules": 6.0, "upstream": 420.0}.get(route, 24.0)
    ttft = first * dice.lognormvariate(0, 0.5)
    tokens = dice.randint(18, 70)
    sure = dice.betavariate(9 if model == NEW else 6, 1.4)
    return {
        "route": "" if failed else route,
        "degraded_reason": reason,
        "status": "failed" if failed else "complete",
        "error_code": "generation_failed" if failed else "",
        "model": model if route in {"model", "cache", "upstream"} else "",
        "confidence": round(sure, 3) if route == "model" else None,
        "ttft_ms": round(ttft, 2),
        "duration_ms": round(ttft + tokens * dice.uniform(0.9, 1.6), 2),
        "input_tokens": dice.randint(20, 160),
        "output_tokens": tokens,
    }


def _times(dice: random.Random, now: datetime, days: int, count: int) -> list[datetime]:
    found: list[datetime] = []
    while len(found) < count:
        at = now - timedelta(seconds=dice.uniform(0, days * 86_400))
        if dice.random() < _busy(at):
            found.append(at)
    return sorted(found)


def _answers(dice: random.Random, now: datetime, days: int, count: int) -> list[Message]:
    who = User.objects.order_by("pk").first() or User.objects.create_user("ana")
    talks, answers, questions = [], [], []
    new_since = now - timedelta(days=days * 0.6)
    for at in _times(dice, now, days, count):
        asked, intent = dice.choice(QUESTIONS)
        talk = Conversation(user=who, title=asked, created_at=at, updated_at=at)
        question = Message(conversation=talk, seq=1, role="user", text=asked, created_at=at)
        put = _one(dice, at, new_since)
        answer = Message(
            conversation=talk,
            seq=2,
            role="assistant",
            parent=question,
            text="Open **My Orders**, pick the order and choose what you need.",
            created_at=at,
            intent=intent if put["route"] == "model" else "",
            **put,
        )
        talks.append(talk)
        questions.append(question)
        answers.append(answer)
    Conversation.objects.bulk_create(talks, batch_size=500)
    Message.objects.bulk_create(questions, batch_size=300)
    Message.objects.bulk_create(answers, batch_size=300)
    _judged(dice, answers)
    return answers


def _judged(dice: random.Random, answers: list[Message]) -> None:
    said = [answer for answer in answers if answer.status == "complete"]
    Feedback.objects.bulk_create(
        [
            Feedback(
                message=answer,
                value="down" if dice.random() < 0.18 else "up",
                created_at=answer.created_at,
            )
            for answer in said
            if dice.random() < 0.08
        ],
        batch_size=300,
    )
    for answer in said[-40::13]:
        HandOver.objects.create(
            conversation=answer.conversation, message=answer, created_at=answer.created_at
        )


def _year(dice: random.Random, now: datetime, days: int) -> None:
    """Rows of figures from a year ago until the first answer, as merging would have left them."""
    first = rollups.floor(now - timedelta(days=days), rollups.DAY_S)
    rows = []
    for start, seconds in _periods(now, first):
        data = _figures(dice, start, seconds, now)
        if data:
            rows.append(Rollup(start=start, seconds=seconds, data=data))
    Rollup.objects.bulk_create(rows, batch_size=300)


def _periods(now: datetime, until: datetime) -> Iterator[tuple[datetime, int]]:
    at = rollups.floor(now - timedelta(days=370), rollups.DAY_S)
    while at < until:
        seconds = rollups.DAY_S if at < now - timedelta(days=32) else rollups.HOUR_S
        yield at, seconds
        at += timedelta(seconds=seconds)


def _figures(
    dice: random.Random, start: datetime, seconds: int, now: datetime
) -> Counter[str] | None:
    middle = start + timedelta(seconds=seconds / 2)
    rate = 40 * _busy(middle) if seconds == rollups.HOUR_S else 420
    growth = 1 - 0.5 * (now - start).days / 370
    data: Counter[str] = Counter()
    sample = [_one(dice, middle, now) for _ in range(max(1, int(rate * growth / 4)))]
    for put in sample:
        columns = [put[name] for name in rollups._MESSAGE[1:]]
        rollups._add_answer(data, *columns)
    data["feedback/up"] += dice.randint(0, 3)
    data["feedback/down"] += dice.randint(0, 1)
    for name in data:
        data[name] *= 4
    return data


def _results(dice: random.Random, now: datetime, answers: list[Message]) -> None:
    old, new, following = (
        ModelVersion.objects.create(
            name="support-en",
            version=label.partition("@")[2],
            sha256=f"{number:064x}",
            folder=f"var/models/{label}",
            state=state,
            gates={name: {"passed": True} for name in ("golden", "shadow")[: 2 - number // 3]},
            created_at=now - timedelta(days=40 - number * 12),
        )
        for number, (label, state) in enumerate(
            ((OLD, "retired"), (NEW, "active"), (NEXT, "shadow")), 1
        )
    )  # fmt: skip
    _history(now, old, new, following)
    _evaluated(dice, now, new, following)
    _compared(dice, now, following, answers)
    _drifted(dice, now)


def _history(now: datetime, old: ModelVersion, new: ModelVersion, following: ModelVersion) -> None:
    sam = User.objects.filter(is_staff=True).first()
    steps = (
        (new, "candidate", "shadow", None, "golden set passed: 88.1 %", 9),
        (new, "shadow", "canary", None, "200 pairs, 97 % agree", 7),
        (new, "canary", "active", sam, "promoted", 5),
        (old, "active", "retired", sam, f"{new.label} took its place", 5),
        (following, "candidate", "shadow", None, "golden set passed: 88.6 %", 2),
    )
    VersionChange.objects.bulk_create(
        VersionChange(
            version=version, from_state=before, to_state=after, by=by, why=why,
            at=now - timedelta(days=ago),
        )
        for version, before, after, by, why, ago in steps
    )  # fmt: skip
    for kind, state, hours in (
        ("evaluate", "done", 6),
        ("drift", "done", 1),
        ("retrain", "done", 50),
    ):
        Job.objects.create(
            kind=kind, key=f"shop {kind}", state=state, why="nightly", progress=1.0,
            created_at=now - timedelta(hours=hours),
        )  # fmt: skip


def _evaluated(
    dice: random.Random, now: datetime, new: ModelVersion, following: ModelVersion
) -> None:
    for ago in range(20, -1, -1):
        version = following if ago in {2, 1} else new
        base = 0.886 if version is following else 0.881
        EvaluationRun.objects.create(
            model=version.label,
            version=version,
            trigger="schedule",
            rows=295,
            seconds=14.0,
            figures={
                "intent_accuracy": round(base + dice.uniform(-0.004, 0.004), 4),
                "scope_auroc": round(0.955 + dice.uniform(-0.003, 0.003), 4),
                "coverage": round(0.79 + dice.uniform(-0.01, 0.01), 4),
            },
            created_at=now - timedelta(days=ago, hours=3),
        )


def _compared(
    dice: random.Random, now: datetime, candidate: ModelVersion, answers: list[Message]
) -> None:
    recent = [a for a in answers if a.route == "model" and a.created_at > now - timedelta(days=2)]
    ShadowPair.objects.bulk_create(
        [
            ShadowPair(
                version=candidate,
                message=answer,
                agreed=dice.random() < 0.96,
                live_model=answer.model,
                created_at=answer.created_at,
            )
            for answer in recent[:600]
        ],
        batch_size=300,
    )


def _drifted(dice: random.Random, now: datetime) -> None:
    reference = DriftReference.objects.create(
        model=NEW, turns=2_000, data={}, from_at=now - timedelta(days=30), to_at=now
    )
    for ago in range(24, -1, -1):
        features = {
            name: {"score": round(dice.uniform(0.25, 0.7), 3), "threshold": 1.0, "breached": False}
            for name in ("intents", "confidence", "embedding", "new_words")
        }
        at = now - timedelta(hours=8 * ago)
        DriftReport.objects.create(
            reference=reference,
            turns=500,
            features=features,
            from_at=at - timedelta(hours=8),
            to_at=at,
            created_at=at,
        )
