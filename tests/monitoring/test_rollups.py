"""Figures of closed periods: counted once, caught up after a gap, added up, kept without rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User

from conversations.models import Conversation, Feedback, HandOver, Message
from monitoring import rollups
from monitoring.models import Rollup

NOW = datetime(2026, 3, 10, 12, 1, tzinfo=UTC)
Answer = Callable[..., Message]


@pytest.fixture
def answer(ana: User) -> Answer:
    """Puts an answer into the database, as it was given so long before ``NOW``."""
    kept = Conversation.objects.create(user=ana)
    given = 0

    def put(ago: timedelta, **values: Any) -> Message:
        nonlocal given
        given += 1
        told = {"role": "assistant", "route": "model", "model": "m@1", "text": "so", **values}
        return Message.objects.create(conversation=kept, seq=given, created_at=NOW - ago, **told)

    return put


def minutes(number: float) -> timedelta:
    return timedelta(minutes=number)


def counted() -> rollups.Figures:
    return rollups.total(Rollup.objects.values_list("data", flat=True))


def test_a_closed_period_holds_every_figure_of_its_answers(answer: Answer) -> None:
    answer(
        minutes(9),
        confidence=0.93,
        ttft_ms=40.0,
        duration_ms=140.0,
        output_tokens=21,
        input_tokens=7,
    )
    answer(minutes(8.5), route="rules", model="", degraded_reason="low_confidence")
    failed = answer(minutes(8), status="failed", error_code="overloaded", route="")
    Feedback.objects.create(message=failed, value="down", created_at=NOW - minutes(8))
    HandOver.objects.create(
        conversation=failed.conversation, message=failed, created_at=NOW - minutes(8)
    )
    assert rollups.roll_up(NOW) == rollups.Caught(NOW - minutes(6), behind=False)
    (row,) = Rollup.objects.all()
    assert (row.start, row.seconds) == (NOW - minutes(11), 300)
    assert row.data == {
        **{"answers": 3, "route/model": 1, "route/rules": 1, "route/none": 1},
        **{"status/complete": 2, "status/failed": 1, "model/m@1": 2},
        **{"reason/low_confidence": 1, "error/overloaded": 1, "confidence/9/m@1": 1},
        **{f"first/{rollups.bucket(40)}": 1, f"whole/{rollups.bucket(140)}": 1},
        **{"input_tokens": 7, "output_tokens": 21, "written_tokens": 20, "writing_ms": 100},
        **{"feedback/down": 1, "hand_overs": 1},
    }


def test_counting_twice_changes_nothing_and_what_is_open_waits(answer: Answer) -> None:
    for ago in (20, 10, 3):
        answer(minutes(ago))
    for _ in range(3):
        rollups.roll_up(NOW)
    assert counted()["answers"] == 2
    rollups.roll_up(NOW + minutes(10))
    assert counted()["answers"] == 3


def test_running_answers_questions_and_what_a_person_wrote_are_no_answers(answer: Answer) -> None:
    answer(minutes(20), status="streaming")
    answer(minutes(20), role="user", route="")
    answer(minutes(20), route="human", author="Sam")
    rollups.roll_up(NOW)
    assert not Rollup.objects.exists()


def test_a_gap_is_caught_up_in_calls_that_are_bounded(answer: Answer) -> None:
    for day in range(6):
        answer(timedelta(days=day, hours=1))
    calls = []
    while not calls or calls[-1].behind:
        calls.append(rollups.roll_up(NOW, most_messages=2))
    assert [call.behind for call in calls] == [True, True, False]
    assert counted()["answers"] == 6


def test_old_periods_become_hours_then_days_and_are_forgotten(answer: Answer) -> None:
    for ago in (minutes(70), minutes(64), minutes(20)):
        answer(ago, ttft_ms=50.0)
    rollups.roll_up(NOW)
    before = counted()
    assert set(Rollup.objects.values_list("seconds", flat=True)) == {300}
    Message.objects.all().delete()
    for later, seconds, rows in ((4, 3_600, 2), (40, 86_400, 1)):
        rollups.roll_up(NOW + timedelta(days=later))
        assert list(Rollup.objects.values_list("seconds", flat=True)) == [seconds] * rows
        assert counted() == before
    rollups.roll_up(NOW + timedelta(days=402))
    assert not Rollup.objects.exists()


def test_two_that_count_at_once_store_each_period_once(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(minutes(20))
    count = rollups._count

    def beaten(begin: datetime, end: datetime) -> int:
        count(begin, end)  # another process, between our look and our write
        return count(begin, end)

    monkeypatch.setattr(rollups, "_count", beaten)
    rollups.roll_up(NOW)
    assert counted()["answers"] == 1


def test_a_period_of_many_models_stays_bounded(answer: Answer) -> None:
    for number in range(rollups.MOST_MODELS + 5):
        answer(minutes(20), model=f"vendor/m{number}", confidence=0.5)
    rollups.roll_up(NOW)
    models = rollups.part(counted(), "model/")
    assert len(models) == rollups.MOST_MODELS + 1
    assert models["other"] == 5
    assert rollups.part(counted(), "confidence/5/")["other"] == 5


def test_counting_takes_few_statements(answer: Answer, django_assert_max_num_queries: Any) -> None:
    for number in range(60):
        answer(minutes(10 + number / 2))
    with django_assert_max_num_queries(30):
        rollups.roll_up(NOW)
    with django_assert_max_num_queries(14):
        rollups.roll_up(NOW)


@pytest.mark.parametrize("ms", [0.2, 1, 1.3, 2, 17, 40, 999, 131_000])
def test_a_latency_lies_in_its_bucket(ms: float) -> None:
    at = rollups.bucket(ms)
    assert ms <= rollups.upper(at) * 1.000001
    assert at == 0 or rollups.upper(at - 1) < ms


def test_percentiles_of_merged_buckets_are_near_those_of_the_values() -> None:
    values = [5 + number**2 / 900 for number in range(1_000)]
    buckets: dict[str, int] = {}
    for value in values:
        name = str(rollups.bucket(value))
        buckets[name] = buckets.get(name, 0) + 1
    for share in (0.5, 0.95, 0.99):
        exact = values[int(share * 1_000) - 1]
        assert rollups.percentile(buckets, share) == pytest.approx(exact, rel=0.1)
    assert rollups.percentile({}, 0.5) is None


# --- Answers written once more -------------------------------------------------------------------


def again(message: Message, attempt: int = 2, **values: Any) -> None:
    """Its row, as a retry leaves it, and what observers are told."""
    Message.objects.filter(pk=message.pk).update(attempt=attempt, **values)
    told: Any = SimpleNamespace(message_id=message.pk, attempt=attempt, stored=True)
    rollups.count_retry(record=told)


def test_a_retry_after_its_period_was_counted_is_one_more_answer_of_it(answer: Answer) -> None:
    broken = answer(minutes(9), status="failed", error_code="internal", route="", model="")
    rollups.roll_up(NOW)
    again(broken, status="complete", route="model", model="m@1", error_code="", ttft_ms=40.0)
    (row,) = Rollup.objects.all()
    assert row.data["answers"] == 2 and row.data["status/failed"] == 1
    assert row.data["status/complete"] == 1 and row.data["model/m@1"] == 1
    rollups.roll_up(NOW + minutes(30))
    assert counted()["answers"] == 2, "counting once more changes nothing"


def test_a_retry_of_an_hour_that_was_added_up_is_added_to_it(answer: Answer) -> None:
    broken = answer(timedelta(days=5), status="failed", route="", model="")
    rollups.roll_up(NOW)
    again(broken, status="complete", route="model")
    assert counted()["answers"] == 2 and Rollup.objects.get().seconds == rollups.HOUR_S


def test_a_retry_that_ran_while_its_period_was_counted_is_not_lost(answer: Answer) -> None:
    running = answer(minutes(20), status="streaming")
    answer(minutes(9))
    rollups.roll_up(NOW)
    assert counted()["answers"] == 1
    again(running, status="complete")
    assert counted()["answers"] == 2 and Rollup.objects.count() == 2


def test_a_retry_in_a_period_that_is_open_is_counted_once_as_it_ended(answer: Answer) -> None:
    answer(minutes(20))
    broken = answer(minutes(1), status="failed", route="", model="")
    rollups.roll_up(NOW)
    again(broken, status="complete", route="model")
    assert counted()["answers"] == 1
    rollups.roll_up(NOW + minutes(10))
    assert counted()["answers"] == 2 and "status/failed" not in counted()


def test_a_first_try_is_left_to_the_count(answer: Answer) -> None:
    given = answer(minutes(9))
    rollups.roll_up(NOW)
    again(given, attempt=1)
    assert counted()["answers"] == 1
