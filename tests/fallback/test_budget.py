"""The day's budget: exact in a crowd, in many processes, at midnight, and without its cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import BaseCache, caches

from fallback import budget, shared
from fallback.budget import BudgetSpent
from tests.conftest import ROOT
from tests.services.conftest import Redis, redis  # noqa: F401 - a fixture

NOON = datetime(2026, 5, 4, 12, tzinfo=UTC)

Set = Callable[..., None]


@pytest.fixture(autouse=True)
def rested() -> Iterator[None]:
    shared.forget()
    yield
    shared.forget()


@pytest.fixture
def limits(settings: Any) -> Set:
    def to(total: int, per_user: int) -> None:
        conf = {**settings.ASSISTANT["UPSTREAM"], "CALLS_PER_DAY": total}
        conf["CALLS_PER_USER_DAY"] = per_user
        settings.ASSISTANT = {**settings.ASSISTANT, "UPSTREAM": conf}

    return to


@pytest.fixture
def away(monkeypatch: Any) -> list[int]:
    """The shared cache fails; how often it was asked."""
    asked: list[int] = []

    class Broken(BaseCache):
        def __init__(self) -> None:
            super().__init__({})

        def add(self, *args: Any, **kwargs: Any) -> bool:
            asked.append(1)
            raise ConnectionError("refused")

        get = add

    real = {"local": caches["local"], "default": Broken()}
    monkeypatch.setattr(shared, "caches", real)
    return asked


def taken(who: str, now: datetime = NOON) -> bool:
    try:
        budget.take(who, now=now)
    except BudgetSpent:
        return False
    return True


def test_ten_of_fifty_at_once_are_allowed(limits: Set) -> None:
    limits(total=10, per_user=100)
    with ThreadPoolExecutor(25) as crowd:
        assert sum(crowd.map(lambda at: taken(f"user:{at % 5}"), range(50))) == 10


def test_one_user_cannot_spend_what_is_everybodys(limits: Set) -> None:
    limits(total=10, per_user=3)
    assert sum(taken("user:1") for _ in range(20)) == 3
    assert sum(taken("user:2") for _ in range(20)) == 3
    assert budget.left("user:3", now=NOON) == 3
    assert sum(taken(f"user:{at}") for at in range(3, 20)) == 4


def test_a_refused_call_costs_nobody_anything(limits: Set) -> None:
    limits(total=2, per_user=2)
    assert taken("user:1") and taken("user:2")
    assert not taken("user:1") and not taken("user:3")
    limits(total=4, per_user=2)
    assert budget.left("user:1", now=NOON) == 1
    assert budget.left("user:3", now=NOON) == 2
    assert taken("user:1") and not taken("user:1")


def test_a_new_day_has_a_new_budget_and_the_refusal_says_when(limits: Set) -> None:
    limits(total=1, per_user=1)
    assert taken("user:1")
    with pytest.raises(BudgetSpent) as spent:
        budget.take("user:1", now=NOON)
    assert spent.value.retry_after_s == 12 * 3600
    assert not taken("user:1", NOON + timedelta(hours=11, minutes=59))
    assert taken("user:1", NOON + timedelta(hours=12))


def test_nothing_is_allowed_of_nothing(limits: Set, away: list[int]) -> None:
    limits(total=0, per_user=5)
    assert not taken("user:1")
    limits(total=5, per_user=0)
    shared.forget()
    assert not taken("user:1")


def test_without_the_cache_a_quarter_is_allowed_and_it_is_asked_once(
    limits: Set, away: list[int]
) -> None:
    limits(total=40, per_user=100)
    assert sum(taken(f"user:{at}") for at in range(50)) == 10
    assert len(away) == 1, "a cache that is away is not asked by every question"
    assert budget.left("user:1", now=NOON) == 0


def test_a_cache_that_was_emptied_gives_no_second_budget(limits: Set) -> None:
    limits(total=10, per_user=10)
    assert sum(taken("user:1") for _ in range(6)) == 6
    caches["default"].clear()
    assert sum(taken("user:1") for _ in range(20)) == 4


def test_what_was_spent_before_the_cache_went_away_counts(limits: Set, monkeypatch: Any) -> None:
    limits(total=40, per_user=40)
    assert sum(taken("user:1") for _ in range(8)) == 8
    monkeypatch.setattr(shared, "_away_until", float("inf"))
    assert sum(taken("user:1") for _ in range(20)) == 2


def test_no_key_holds_a_name(limits: Set) -> None:
    limits(total=10, per_user=10)
    budget.take("visitor:ana@example.org", now=NOON)
    assert "ana" not in " ".join(caches["local"]._cache)  # type: ignore[attr-defined]


_TAKE = """
import django, sys
django.setup()
from fallback import budget
allowed = 0
for _ in range(20):
    try:
        budget.take(sys.argv[1])
        allowed += 1
    except budget.BudgetSpent:
        pass
print(allowed)
"""


@pytest.mark.slow
def test_two_processes_share_one_budget_through_redis(
    redis: Redis,  # noqa: F811
    tmp_path: Path,
) -> None:
    import os

    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "config.settings",
        "REDIS_URL": redis.url,
        "ASSISTANT_DATA_DIR": str(tmp_path),
        "SECRET_KEY": "one key for both, or they would race to make one in the folder",
        "ASSISTANT_UPSTREAM_CALLS_PER_DAY": "13",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TAKE, f"user:{at}"],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )
        for at in range(2)
    ]  # fmt: skip
    allowed = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert sum(allowed) == 13, allowed
