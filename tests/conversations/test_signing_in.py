"""Signing in: who fails too often waits, alone and no longer than needed, and leaves no trace."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any

import pytest
from axes.models import AccessAttempt, AccessFailureLog, AccessLog
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.db.backends.utils import CursorWrapper
from django.db.models import F
from django.test import Client

from conversations import limits
from conversations.tasks import forget_failed_tries
from tests.conftest import PASSWORD
from tests.conversations.conftest import API

pytestmark = pytest.mark.django_db

PAGE = "/accounts/login/"
RIGHT = {"username": "sam", "password": PASSWORD}
WRONG = {"username": "sam", "password": "wrong"}


def tried(*, address: str = "192.0.2.1", form: dict[str, str] = WRONG, **headers: str) -> int:
    """The status of a try: 200 failed, 302 signed in, 429 has to wait."""
    return Client(REMOTE_ADDR=address).post(PAGE, form, headers=headers).status_code


def later(**passed: float) -> None:
    AccessAttempt.objects.update(attempt_time=F("attempt_time") - timedelta(**passed))


@pytest.mark.parametrize("path", [PAGE, "/admin/login/"])
def test_tries_to_sign_in_are_counted_by_address(path, sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "3/h"
    client = Client()
    for _ in range(3):
        reply = client.post(path, WRONG)
        assert reply.status_code == 200 and "Too many" not in reply.content.decode()
    reply = client.post(path, RIGHT)
    assert "Too many tries to sign in. Wait" in reply.content.decode()
    assert "sessionid" not in client.cookies
    elsewhere = Client(REMOTE_ADDR="192.0.2.9")
    assert elsewhere.post(path, RIGHT).status_code == 302
    settings.ASSISTANT_LOGIN_RATE, settings.AXES_ENABLED = None, False
    assert client.post(path, RIGHT).status_code == 302


def test_the_limit_is_one_for_both_pages_and_says_429(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/h"
    client = Client()
    for path in (PAGE, "/admin/login/"):
        client.post(path, WRONG)
    assert client.post(PAGE, WRONG).status_code == 429


def test_who_knows_the_password_uses_up_nothing_and_makes_nothing_good(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/h"
    assert [tried(form=RIGHT) for _ in range(4)] == [302] * 4
    assert [tried(), tried(form=RIGHT), tried(), tried(form=RIGHT)] == [200, 302, 200, 429]


def test_an_address_waits_until_a_try_is_a_period_old_and_no_longer(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/5m"
    tried()
    later(minutes=4)
    tried()
    reply = Client(REMOTE_ADDR="192.0.2.1").post(PAGE, RIGHT)
    assert reply.status_code == 429 and 50 <= int(reply["Retry-After"]) <= 60
    later(seconds=61)
    assert tried() == 200, "one of two is forgotten"
    assert tried(form=RIGHT) == 429
    later(minutes=5)
    assert tried(form=RIGHT) == 302


def test_a_try_that_has_to_wait_makes_nobody_wait_longer(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/5m"
    assert [tried() for _ in range(5)] == [200, 200, 429, 429, 429]
    assert AccessAttempt.objects.count() == 2


def test_observers_hear_of_a_refusal(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "1/h"
    heard: list[str] = []

    def hear(scope: str, **_: Any) -> None:
        heard.append(scope)

    limits.refused.connect(hear)
    try:
        tried()
        assert heard == []
        tried()
    finally:
        limits.refused.disconnect(hear)
    assert heard == ["login"]


def test_saying_to_be_somebody_else_does_not_help(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/h"
    codes = [tried(**{"X-Forwarded-For": f"198.51.100.{n}"}) for n in range(4)]
    assert codes == [200, 200, 429, 429]


def test_a_household_is_one_address_and_so_are_those_without_any(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "1/h"
    assert tried(address="2001:db8::1") == 200
    assert tried(address="2001:db8::2:3", form=RIGHT) == 429
    assert tried(address="2001:db8:0:1::1", form=RIGHT) == 302
    assert [tried(address=""), tried(address="")] == [200, 429]


def test_nothing_that_was_typed_is_kept_or_logged(sam, settings, caplog):
    """A password in the wrong field, in the address, in a header: all of them are secret."""
    settings.ASSISTANT_LOGIN_RATE = "2/h"
    caplog.set_level(logging.DEBUG)
    typed = {"username": "secret-1", "password": "secret-2", "other": "secret-3"}
    odd = {"User-Agent": "secret-4", "Accept": "secret-5", "X-Request-ID": "req-7"}
    for _ in range(3):
        reply = Client().post(f"{PAGE}?next=/secret-6&secret-7=1", typed, headers=odd)
    assert reply.status_code == 429
    (row,) = AccessAttempt.objects.values()
    assert "secret" not in str(row) and row["failures_since_start"] == 2
    assert (row["ip_address"], row["path_info"], row["user_agent"]) == ("127.0.0.1", PAGE, "req-7")
    ours = [line for line in caplog.records if not line.name.startswith("django")]
    assert ours and not [line for line in ours if "secret" in line.getMessage()]
    assert not [line for line in ours if "127.0.0.1" in line.getMessage()]


def test_who_signs_in_and_out_is_not_written_down(sam):
    client = Client()
    client.post(PAGE, RIGHT)
    client.post("/accounts/logout/")
    tried()
    assert not AccessLog.objects.exists() and not AccessFailureLog.objects.exists()


def test_an_address_is_forgotten_though_it_never_comes_back(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "5/5m"
    tried()
    later(minutes=5)
    tried(address="192.0.2.2")  # axes itself forgets the first here
    assert AccessAttempt.objects.get().ip_address == "192.0.2.2"
    assert forget_failed_tries() == 0
    later(minutes=5)
    assert forget_failed_tries() == 1
    tried()
    settings.ASSISTANT_LOGIN_RATE, settings.AXES_ENABLED = None, False
    assert forget_failed_tries() == 1


def test_tries_are_counted_while_redis_is_away(sam, settings):
    nobody = {"BACKEND": "django_redis.cache.RedisCache", "LOCATION": "redis://127.0.0.1:1/0"}
    settings.CACHES = {**settings.CACHES, "default": nobody, "ratelimit": nobody}
    settings.ASSISTANT_LOGIN_RATE = "8/h"
    assert [tried() for _ in range(9)] == [200] * 8 + [429], "all of the limit, and no more"


@pytest.mark.django_db(transaction=True)
def test_many_tries_at_once_are_no_way_round_the_limit(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "2/h"
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.PBKDF2PasswordHasher"]  # takes long
    codes: list[int] = []

    def one() -> None:
        codes.append(tried())
        connection.close()

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] * 2 + [429] * 6


def test_staff_see_who_failed_and_let_them_try_again(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "1/h"
    tried()
    desk, listed = Client(REMOTE_ADDR="192.0.2.8"), "/admin/axes/accessattempt/"
    desk.force_login(sam)
    assert desk.get(listed).status_code == 403
    User.objects.filter(pk=sam.pk).update(is_superuser=True)
    row = AccessAttempt.objects.get()
    assert "192.0.2.1" in desk.get(listed).content.decode()
    assert "192.0.2.1" in desk.get(f"{listed}{row.pk}/change/").content.decode()
    ticked = {"action": "delete_selected", "_selected_action": [row.pk], "post": "yes"}
    assert tried(form=RIGHT) == 429
    assert desk.post(listed, ticked).status_code == 302
    assert tried(form=RIGHT) == 302


def test_one_command_lets_an_address_try_again(sam, settings):
    settings.ASSISTANT_LOGIN_RATE = "1/h"
    assert [tried(), tried()] == [200, 429]
    call_command("axes_reset_ip", "192.0.2.1")
    assert tried(form=RIGHT) == 302


@pytest.mark.django_db(transaction=True)
def test_who_only_asks_is_not_looked_up(api, monkeypatch):
    statements: list[str] = []
    run = CursorWrapper.execute

    def noted(self: Any, sql: Any, params: Any = None) -> Any:
        statements.append(str(sql))
        return run(self, sql, params)

    monkeypatch.setattr(CursorWrapper, "execute", noted)
    path = f"{API}{api('POST', API, {}).json()['id']}/messages/"
    assert api("POST", path, {"text": "hi"}).status_code == 200
    assert statements and not [sql for sql in statements if "axes" in sql]
