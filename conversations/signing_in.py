"""Signing in: both login forms, and which failed tries django-axes counts.

axes counts in the database, so for all processes and while Redis is away; by address alone, so that
nobody locks another out. Here is what it is told of a try and what an address that has to wait is
told. Who somebody is, is Django's to find out; whether they still are, is watched in ``logins``.
"""

from __future__ import annotations

import math
import threading
from datetime import timedelta
from typing import Any, NoReturn, cast

from axes.handlers.database import AxesDatabaseHandler
from axes.handlers.proxy import AxesProxyHandler
from axes.helpers import get_credentials
from axes.models import AccessAttempt
from django.conf import settings
from django.contrib.admin.forms import AdminAuthenticationForm
from django.contrib.auth.forms import AuthenticationForm
from django.core.exceptions import ValidationError
from django.http import HttpRequest
from django.utils import timezone

from conversations.access import address_of
from conversations.counting import Limit, limit_of
from conversations.limits import UNKNOWN, login_refused, request_id

#: How long a try waits for others of its address.
PATIENCE_S = 10
#: Tries of one address are looked at one after the other: of many at once, each would be let in
#: before any has failed. Several processes let in one more each.
_turnstiles = tuple(threading.Lock() for _ in range(256))


class GuardedLogin(AuthenticationForm):
    """Django's, but an address that has failed too often waits, before a password is looked at."""

    def clean(self) -> dict[str, Any]:
        request = cast(HttpRequest, self.request)
        turnstile = _turnstiles[hash(address_of(request)) % len(_turnstiles)]
        if not turnstile.acquire(timeout=PATIENCE_S):
            self._refuse(1)
        try:
            if wait_s := seconds_to_wait(request):
                self._refuse(wait_s)
            return super().clean()
        finally:
            turnstile.release()

    def _refuse(self, wait_s: int) -> NoReturn:
        self.wait_s = wait_s
        raise ValidationError(login_refused(wait_s), "rate_limited")


class GuardedAdminLogin(GuardedLogin, AdminAuthenticationForm):
    """The same for the admin's page, which also asks for staff."""


def seconds_to_wait(request: HttpRequest) -> int:
    """Until that address may try again; 0: it may now."""
    if not settings.AXES_ENABLED or AxesProxyHandler.is_allowed(request):
        return 0
    now, left = timezone.now(), _limit().quota
    ends = now + cool_off()
    for failed_at, failures in _newest_first(kept_address(request)):
        ends, left = failed_at + cool_off(), left - failures
        if left <= 0:
            break  # without this one it may again
    return max(1, math.ceil((ends - now).total_seconds()))


def forget_failed_tries() -> int:
    """Those that do not count any more; how many. axes does so too, whenever somebody signs in."""
    kept = cool_off() if settings.AXES_ENABLED else timedelta(0)
    gone = AccessAttempt.objects.filter(attempt_time__lte=timezone.now() - kept).delete()
    return int(gone[0])


def _newest_first(address: str) -> Any:
    rows = AccessAttempt.objects.filter(ip_address=address).order_by("-attempt_time")
    return rows.values_list("attempt_time", "failures_since_start")


def _limit() -> Limit:
    return limit_of("login", settings.ASSISTANT_LOGIN_RATE)


# --- What axes asks; each is named in the settings -----------------------------------------------


class FailedTries(AxesDatabaseHandler):  # type: ignore[misc]
    """axes' own, but nothing that somebody typed is kept: a password ends up in any field.

    A row for each try, told apart by the request's id: a try stops counting when it is a period
    old, however many follow it.
    """

    def user_login_failed(
        self, sender: Any, credentials: Any, request: HttpRequest | None = None, **kwargs: Any
    ) -> None:
        known = None if request is None else _what_is_kept(request)
        super().user_login_failed(sender, get_credentials(""), known, **kwargs)


def _what_is_kept(request: Any) -> HttpRequest:
    """A request without query, body and headers. axes has prepared the one it is made from."""
    kept: Any = HttpRequest()
    for name in ("ip_address", "attempt_time", "path_info", "locked_out"):
        setattr(kept, f"axes_{name}", getattr(request, f"axes_{name}"))
    kept.axes_user_agent, kept.axes_http_accept = request_id.get(), ""
    return kept  # type: ignore[no-any-return]


def kept_address(request: HttpRequest) -> str:
    """By which tries are counted; what has none counts as the address of nobody, for a database
    may take nothing else."""
    address = address_of(request)
    return "0.0.0.0" if address == UNKNOWN else address  # noqa: S104  nothing listens there


def failure_limit(request: HttpRequest, credentials: Any) -> int:
    return _limit().quota


def cool_off(request: HttpRequest | None = None) -> timedelta:
    return timedelta(seconds=_limit().window_s)
