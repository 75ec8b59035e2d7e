"""The sequential test by simulation, then on rows, then the roll-back it ends in."""

from __future__ import annotations

import math
import random
import uuid
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest
from django.utils import timezone

from assistant import registry
from assistant.models import ModelVersion, VersionChange
from conversations.models import Conversation, Feedback, Message
from monitoring import betting, canary
from monitoring.betting import Talk, judge
from tests.monitoring.canary_power import talks
from tests.monitoring.conftest import Counted

#: Seconds after which all processes are sure to know of the move.
LATER = canary.SETTLE + timedelta(seconds=1)


# -- the bets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "hits"), [(2, 0), (2, 1), (2, 2), (10, 1), (10, 4), (51, 50)])
def test_a_bet_on_a_hit_is_fair_whoever_of_the_block_is_the_canary(n: int, hits: int) -> None:
    paid = betting.fair_hits(np.array([1.0] * hits + [0.0] * (n - hits)))
    assert paid.mean(axis=0) == pytest.approx(1.0)
    assert paid.min() > 0


@pytest.mark.parametrize("block", [[1.0, 2.0], [5.0, 5.0, 5.0], [1.0, 1.0, 3.0, 9.0, 9.0]])
def test_a_bet_on_a_rank_is_fair_too(block: list[float]) -> None:
    paid = betting.fair_ranks(np.array(block))
    assert paid.mean(axis=0) == pytest.approx(1.0)
    assert paid.min() > 0 and (paid.argmax(axis=0) == np.argmax(block)).all()


def bets_on(name: str) -> slice:
    at = list(betting.STAKES).index(name) * len(betting.ODDS)
    return slice(at, at + len(betting.ODDS))


def test_a_time_counts_without_its_slack() -> None:
    block = [Talk(True, duration=[109.0]), Talk(False, duration=[100.0])]
    assert (betting.prices(block)[0, bets_on("duration")] < 0).all(), "a little slower is no loss"
    block[0].duration = [112.0]
    assert (betting.prices(block)[0, bets_on("duration")] > 0).all()


def test_what_nobody_measured_is_no_bet() -> None:
    block = [Talk(True), Talk(False, first_word=[1.0]), Talk(False)]
    for name in ("first_word", "duration"):
        assert not betting.prices(block)[:, bets_on(name)].any()


def test_a_little_is_spent_with_each_conversation_and_never_more_than_all() -> None:
    spent = [betting.spent(number) for number in range(1, 20_000)]
    assert spent == sorted(spent) and 0 < spent[0] < 1e-5
    assert spent[-1] < betting.FALSE - 1 / betting.SURE


def test_blocks_hold_one_of_the_canary_each_and_use_nobody_twice() -> None:
    said = talks(1, 500, share=0.4)
    blocks = list(betting.blocks(said))
    used = [id(talk) for block in blocks for talk in block]
    assert len(used) == len(set(used)) and len(blocks) > 100
    assert all(block[0].canary and len(block) > 1 for block in blocks)
    assert not any(talk.canary for block in blocks for talk in block[1:])


# -- by simulation ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_equal_models_at_most_one_in_twenty_is_taken_back_within_5000_turns() -> None:
    """40 runs here; ``python -m tests.monitoring.canary_power`` makes thousands."""
    assert sum(judge(talks(seed, 5_000)).worse for seed in range(40)) <= 4


@pytest.mark.slow
def test_hours_that_are_bad_for_both_are_nobodys_fault() -> None:
    assert sum(judge(talks(seed, 3_000, share=0.3, rush=True)).worse for seed in range(20)) <= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("worse", "name", "turns"),
    [
        ({"errors": (0.02, 0.08)}, "errors", 1_500),
        ({"slower": 1.5}, "first_word", 1_000),
        ({"degraded": (0.1, 0.3)}, "degraded", 1_500),
        ({"thumbs": (0.03, 0.15)}, "thumbs_down", 1_500),
    ],
)
def test_a_worse_canary_is_found_within_so_many_turns(
    worse: dict[str, Any], name: str, turns: int
) -> None:
    verdicts = [judge(talks(seed, turns, **worse)) for seed in range(20)]
    found = [verdict for verdict in verdicts if verdict.worse]
    assert len(found) >= 15
    names = {name, "duration"} if name == "first_word" else {name}
    assert sum(verdict.suspect in names for verdict in found) >= 0.8 * len(found)


def test_a_better_canary_is_not_taken_back() -> None:
    better = {"errors": (0.08, 0.02), "slower": 0.5}
    assert sum(judge(talks(seed, 3_000, **better)).worse for seed in range(10)) <= 1


def test_a_little_slower_is_no_reason() -> None:
    for seed in range(10):
        verdict = judge(talks(seed, 3_000, slower=1.08))
        assert not verdict.worse or verdict.suspect in betting.HITS


def test_one_that_fails_at_once_is_found_by_its_first_conversations() -> None:
    said = talks(1, 300, errors=(0.02, 1.0))
    found = next(at for at in range(300) if judge(said[:at]).worse)
    assert sum(talk.canary for talk in said[:found]) <= 8


def test_weak_evidence_is_named_and_not_the_largest_stake() -> None:
    """A verdict may rest on little: then the stake on errors, which nobody saw, is worth more."""
    banks = dict.fromkeys(betting.STAKES, 1.0) | {"degraded": 7.9}
    verdict = betting.Verdict((1182, 146), 140, True, 1.44, 1.18, banks, {})
    assert verdict.suspect == "degraded"


def test_an_alarm_is_not_taken_back_by_what_comes_later() -> None:
    bad = talks(3, 3_000, errors=(0.02, 0.3))
    good = talks(4, 20_000, share=0.5, errors=(0.3, 0.0))
    assert judge(bad).worse and judge([*bad, *good]).worse


def test_nothing_is_said_of_nothing_or_of_one_side() -> None:
    for said in ([], [Talk(True, errors=True)] * 50, [Talk(False, errors=True)] * 50):
        assert judge(said).bank == pytest.approx(1.0)


# -- rows ------------------------------------------------------------------------------------------


@pytest.fixture
def version(db: None) -> ModelVersion:
    """A canary of a fifth of the conversations, since an hour ago."""
    began = timezone.now() - timedelta(hours=1)
    active = ModelVersion.objects.create(
        name="m", version="1", sha256="1" * 64, folder="/1", state="active",
        changed_at=began - timedelta(days=30),
    )  # fmt: skip
    found = ModelVersion.objects.create(
        name="m", version="2", sha256="2" * 64, folder="/2", state="canary", canary_percent=20,
        parent=active, changed_at=began,
    )  # fmt: skip
    VersionChange.objects.create(
        version=found, from_state="shadow", to_state="canary", why="x", at=began
    )
    return found


def ask(
    version: ModelVersion, n: int, *, bad: float = 0.0, normal: float = 0.0, seed: int = 0,
    at: datetime | None = None, **answer: Any,
) -> None:  # fmt: skip
    """That many conversations of one turn; ``bad`` of the canary's and ``normal`` of the others'
    end as ``answer`` says."""
    rng, start = random.Random(seed), at or version.changed_at + LATER
    rows, held = [], []
    for number in range(n):
        # Which of them get the canary is drawn from their keys.
        key = uuid.UUID(int=rng.getrandbits(128), version=4)
        conversation = Conversation(pk=key, title=f"{seed}-{number}")
        mine = registry.gets_canary(str(conversation.pk), version.sha256, version.canary_percent)
        told: dict[str, Any] = {
            "route": "model", "status": "complete", "model": version.label if mine else "m@1",
            "ttft_ms": 20 * math.exp(rng.gauss(0, 0.4)),
            "duration_ms": 80 * math.exp(rng.gauss(0, 0.4)),
        }  # fmt: skip
        if rng.random() < (bad if mine else normal):
            told |= answer
        held.append(conversation)
        rows.append(
            Message(conversation=conversation, seq=2, role="assistant",
                    created_at=start + timedelta(milliseconds=number), **told)
        )  # fmt: skip
    Conversation.objects.bulk_create(held)
    Message.objects.bulk_create(rows)


def test_a_canary_that_answers_as_well_passes_after_enough_conversations(
    version: ModelVersion,
) -> None:
    ask(version, 400, normal=0.02, bad=0.02, degraded_reason="low_confidence")
    early = canary.gate(version)
    assert early.passed is None and "of 200 conversations" in early.why
    ask(version, 800, normal=0.02, bad=0.02, seed=1, degraded_reason="low_confidence")
    gate = canary.gate(version)
    assert gate.passed is True, gate
    assert gate.figures["conversations"]["canary"] >= 200
    assert 15 < gate.figures["first_word"]["canary"] < 30


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ({"status": "failed", "route": "", "model": "", "error_code": "internal"}, "errors"),
        ({"route": "rules", "model": "", "degraded_reason": "timeout"}, "errors"),
        ({"model": "m@1"}, "errors"),  # the active version stood in
        ({"route": "rules", "model": "", "degraded_reason": "low_confidence"}, "degraded"),
        ({"ttft_ms": 400.0}, "first word"),
    ],
)
def test_what_is_worse_is_found_in_the_rows_and_named(
    version: ModelVersion, answer: dict[str, Any], name: str
) -> None:
    ask(version, 600, bad=0.6, normal=0.02 if "model" in answer else 0.0, **answer)
    gate = canary.gate(version)
    assert gate.passed is False
    assert name in gate.why and version.label in gate.why


def test_thumbs_count(version: ModelVersion) -> None:
    ask(version, 600)
    for row in Message.objects.filter(model=version.label)[:60]:
        Feedback.objects.create(message=row, value="down")
    gate = canary.gate(version)
    assert gate.passed is False and "thumbs down" in gate.why


def test_what_no_model_was_asked_and_what_came_before_says_nothing(version: ModelVersion) -> None:
    ask(version, 300, bad=1.0, at=version.changed_at - timedelta(days=1), status="failed")
    ask(version, 300, bad=1.0, seed=1, at=version.changed_at + timedelta(seconds=1), model="m@1")
    ask(version, 300, bad=1.0, normal=1.0, seed=2, route="cache", model="m@1")
    assert len(canary.talks_of(version)) == 0


def test_beside_another_active_model_it_begins_anew(version: ModelVersion) -> None:
    ask(version, 300, normal=1.0, status="failed")
    assert len(canary.talks_of(version)) == 300
    since = timezone.now() - timedelta(minutes=30)
    ModelVersion.objects.filter(state="active").update(changed_at=since)
    assert not canary.talks_of(version), "the model before was worse than either"
    ask(version, 40, seed=1, at=since + LATER)
    assert len(canary.talks_of(version)) == 40


def test_a_conversation_counts_once_however_long_it_is(version: ModelVersion) -> None:
    ask(version, 40)
    first = Message.objects.order_by("created_at").first()
    assert first is not None
    for seq in range(4, 40, 2):
        Message.objects.create(
            conversation=first.conversation, seq=seq, role="assistant", route="model",
            status="failed", model=first.model,
        )  # fmt: skip
    found = canary.talks_of(version)
    assert len(found) == 40 and sum(talk.errors for talk in found) == 1


def test_a_gate_that_is_asked_of_another_version_stays_open(version: ModelVersion) -> None:
    assert canary.gate(registry.find("m@1")).passed is None


# -- the watch -------------------------------------------------------------------------------------


def test_a_worse_canary_is_taken_back_by_nobody_with_its_reason(
    version: ModelVersion, counted: Counted, caplog: pytest.LogCaptureFixture
) -> None:
    ask(version, 600, bad=0.5, status="failed", route="", model="")
    gate = canary.watch()
    assert gate is not None and gate.passed is False
    version.refresh_from_db()
    assert (version.state, version.canary_percent) == ("rejected", 0)
    assert version.gates["canary"]["passed"] is False
    change = version.changes.first()
    assert change is not None and change.by is None and "worse than the active" in change.why
    assert counted("assistant_canary_rollbacks_total") == 1
    assert "was taken back" in caplog.text
    assert canary.watch() is None


def test_a_canary_that_does_well_stays_and_its_figures_are_kept(version: ModelVersion) -> None:
    ask(version, 100)
    assert canary.watch() is not None
    version.refresh_from_db()
    assert version.state == "canary" and version.gates["canary"]["passed"] is None


def test_somebody_who_was_faster_is_no_error(
    version: ModelVersion, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(version, 600, bad=0.5, status="failed", route="", model="")
    real = canary.gate

    def slow(asked: ModelVersion) -> Any:
        found = real(asked)
        registry.move(ModelVersion.objects.get(pk=asked.pk), "candidate", why="by hand")
        return found

    monkeypatch.setattr(canary, "gate", slow)
    canary.watch()
    version.refresh_from_db()
    assert version.state == "candidate"
    assert counted("assistant_canary_rollbacks_total") == 0
