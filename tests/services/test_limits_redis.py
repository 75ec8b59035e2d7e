"""The limits on a real Redis: counted together; without it stricter, never absent, never slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import caches
from django.test import Client as Browser

from conversations import limits
from conversations.limits import Caller, TooMany
from fallback import shared
from tests.services.conftest import Redis, stacked
from tests.services.test_stack import Client, timed

#: One time-out of 0.2 s, on a machine that is busy.
BOUND_S = 0.4
#: Redis is left alone after a failure: these calls do not touch it.
QUICK_S = 0.05

VISITOR = Caller(None, "visitor", "192.0.2.1")


@pytest.fixture
def on_redis(redis: Redis, settings: Any) -> Redis:
    options = {
        "SERIALIZER": "django_redis.serializers.json.JSONSerializer",
        "SOCKET_CONNECT_TIMEOUT": 0.2,
        "SOCKET_TIMEOUT": 0.2,
    }
    there = {
        "BACKEND": "django_redis.cache.RedisCache",
        "LOCATION": redis.url,
        "OPTIONS": options,
    }
    settings.CACHES = {**settings.CACHES, "default": there, "ratelimit": there}
    settings.ASSISTANT_RATE = "20/h"
    return redis


def passed(times: int, caller: Caller = VISITOR) -> int:
    """How many of so many requests are let through."""
    found = 0
    for _ in range(times):
        try:
            limits.take(caller)
            found += 1
        except TooMany:
            pass
    return found


def another_process() -> None:
    """Forget what only this process knows."""
    caches["local"].clear()


ENDS = pytest.mark.parametrize("end", [Redis.kill, Redis.hang, Redis.fill])


def test_processes_count_requests_together(on_redis):
    assert passed(12) == 12
    another_process()
    assert passed(12) == 8
    assert VISITOR.standings[0].left == 0 and VISITOR.standings[0].refused


def test_what_is_left_is_what_all_processes_leave(on_redis):
    passed(12)
    another_process()
    passed(1)
    assert VISITOR.standings[0].left == 7


def test_processes_count_tokens_together(on_redis, settings):
    settings.ASSISTANT_TOKENS_PER_MINUTE, settings.ASSISTANT_TOKENS_PER_DAY = 1_000, 100
    limits.spend(VISITOR, 60)
    another_process()
    limits.spend(VISITOR, 39)
    assert passed(1) == 1
    assert [each.left for each in VISITOR.standings] == [19, 901, 1]
    limits.spend(VISITOR, 1)
    another_process()
    assert passed(1) == 0


def test_a_redis_that_was_emptied_forgives_nobody_here(on_redis):
    assert passed(20) == 20
    with on_redis.client() as client:
        client.flushall()
    assert passed(20) == 0


def test_no_address_lies_in_redis(on_redis, settings):
    settings.ASSISTANT_TOKENS_PER_DAY = 100
    passed(3)
    limits.spend(VISITOR, 3)
    with on_redis.client() as client:
        keys = list(client.scan_iter())
        assert len(keys) == 2 and all(client.ttl(key) > 0 for key in keys)
    assert not any(b"192.0.2" in key or b"visitor" in key for key in keys)


@ENDS
def test_without_redis_a_quarter_is_let_through_and_nothing_waits(
    end: Callable[[Redis], None], on_redis: Redis
):
    assert passed(2) == 2
    end(on_redis)
    began = time.monotonic()
    assert passed(1) == 1
    assert time.monotonic() - began < BOUND_S
    began = time.monotonic()
    assert passed(20) == 2, "of a quarter, two were used before"
    assert time.monotonic() - began < QUICK_S
    assert VISITOR.standings[0].quota == 5


@ENDS
def test_without_redis_tokens_are_counted_too(
    end: Callable[[Redis], None], on_redis: Redis, settings: Any
):
    settings.ASSISTANT_RATE, settings.ASSISTANT_TOKENS_PER_MINUTE = None, 100
    limits.spend(VISITOR, 20)
    end(on_redis)
    began = time.monotonic()
    limits.spend(VISITOR, 4)
    assert passed(1) == 1
    limits.spend(VISITOR, 1)
    assert passed(1) == 0
    assert time.monotonic() - began < BOUND_S + QUICK_S


@ENDS
@pytest.mark.django_db
def test_tries_to_sign_in_are_counted_in_full_without_redis(
    end: Callable[[Redis], None], on_redis: Redis, settings: Any
):
    """They are counted in the database."""
    settings.ASSISTANT_LOGIN_RATE = "8/h"
    end(on_redis)
    page, form = Browser(), {"username": "ana", "password": "wrong"}
    codes = [page.post("/accounts/login/", form).status_code for _ in range(9)]
    assert codes == [200] * 8 + [429]


def test_the_whole_limit_is_back_with_redis(on_redis):
    on_redis.kill()
    assert passed(20) == 5
    again = Redis.start(on_redis.folder, on_redis.port)
    try:
        assert passed(1) == 0, "Redis is left alone for a moment"
        shared.forget()  # the moment is over
        assert passed(20) == 15
    finally:
        again.kill()


@pytest.mark.parametrize("end", [Redis.hang])
def test_a_redis_that_never_answered_costs_one_time_out(
    end: Callable[[Redis], None], on_redis: Redis
):
    end(on_redis)  # before there is any connection: it is made, and then nothing is said
    began = time.monotonic()
    assert passed(1) == 1
    assert time.monotonic() - began < BOUND_S


@pytest.mark.chaos
@ENDS
def test_a_server_answers_and_limits_whatever_redis_does(
    end: Callable[[Redis], None], redis: Redis, tmp_path: Path
):
    """Over REST: no 5xx, a quarter of the limit, and no turn that waits for Redis but the first."""
    database = f"sqlite:///{tmp_path / 'db.sqlite3'}"
    with (
        stacked(tmp_path, redis, database, ASSISTANT_RATE="40/h") as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        assert client.rest("before").headers["RateLimit-Policy"] == '"chat";q=40;w=3600'
        end(redis)
        turns = [timed(client, f"turn {at}") for at in range(14)]
        refused = client.rest("one more")
    assert [status for status, _ in turns] == [200] * 9 + [429] * 5
    # Waiting for Redis in each turn would take 14 times 0.2 s; what a turn takes by itself is left.
    slow = [seconds for _, seconds in turns[1:] if seconds > 0.2]
    assert len(slow) <= 2, turns
    assert refused.headers["RateLimit"].startswith('"chat";r=0;t=')
    assert "Traceback" not in stack.server.log.read_text()
