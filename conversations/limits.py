"""Who is asking and whether they may: one decision for every transport.

A transport only builds a ``Caller``; text, rate and running turns are judged here. Knows nothing of
HTTP or sockets. Redis being away makes the limit stricter, never absent and never an error.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from django.conf import settings
from django.core.cache import caches
from django_ratelimit.core import get_usage

from assistant.errors import InvalidRequest, RateLimited

log = logging.getLogger(__name__)

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
#: C0 and C1 controls but tab, line feed and carriage return.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Caller:
    """A signed-in user, or a visitor known by an id inside their session."""

    user_id: int | None
    session_key: str = ""
    address: str = ""

    @property
    def key(self) -> str:
        """Whose running turns are counted together."""
        return f"user:{self.user_id}" if self.user_id else f"visitor:{self.session_key}"

    @property
    def rate_key(self) -> str:
        """Whose requests are counted together: a visitor may drop the cookie, not the address."""
        return f"user:{self.user_id}" if self.user_id else f"address:{self.address}"


def client_address(peer: str, forwarded: str) -> str:
    """The network the request came from: the address our own outermost proxy saw, or the peer.

    IPv6 is cut to its /64, which is what one household or server gets. What is no address counts
    as the peer's: a header can never cause an error or choose its own bucket.
    """
    hops = settings.ASSISTANT_TRUSTED_PROXIES
    listed = [part.strip() for part in forwarded.split(",")]
    candidates = [listed[-hops]] if hops and len(listed) >= hops else []
    for candidate in [*candidates, peer]:
        try:
            address = ipaddress.ip_address(candidate.partition("%")[0])
        except ValueError:
            continue
        if address.version == 6:
            return str(ipaddress.ip_network((address, 64), strict=False).network_address)
        return str(address)
    return "unknown"


def admit(caller: Caller, text: str) -> str:
    """The question, if it can be one and the caller has not asked too often.

    Raises: InvalidRequest, RateLimited.
    """
    valid_text(text, limit=settings.ASSISTANT_MAX_TEXT_CHARS)
    take(caller)
    return text


def valid_text(text: object, *, limit: int) -> str:
    """``text`` unchanged. Raises: InvalidRequest saying which rule it breaks, never quoting it."""
    if not isinstance(text, str):
        raise InvalidRequest("The text must be a string.")
    if not text.strip():
        raise InvalidRequest("The text is empty. Write a question.")
    if len(text) > limit:
        raise InvalidRequest(
            f"The text has {len(text):,} characters; at most {limit:,} are read. Shorten it."
        )
    if _CONTROL.search(text):
        raise InvalidRequest("The text contains control characters. Remove them.")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise InvalidRequest("The text contains half of a surrogate pair, which is not Unicode.")
    return text


def take(caller: Caller) -> None:
    """Count one request. Raises: RateLimited with the seconds until the next is let through."""
    rate = settings.ASSISTANT_RATE
    if rate is None:
        return
    usage = _usage(caller.rate_key, rate)
    if usage["should_limit"]:
        wait = max(1, int(usage["time_left"]))
        raise RateLimited(
            f"Too many questions: at most {rate.replace('/', ' per ')}. Try again in {wait} s.",
            retry_after_s=wait,
        )


def take_login(address: str) -> None:
    """Count one try to sign in, by address: nobody locks others out. Raises: RateLimited."""
    rate = settings.ASSISTANT_LOGIN_RATE
    if rate is None:
        return
    usage = _usage(f"login:{address}", rate)
    if usage["should_limit"]:
        wait = max(1, int(usage["time_left"]))
        raise RateLimited(f"Too many tries to sign in. Wait {wait} s.", retry_after_s=wait)


def _usage(key: str, rate: str) -> Mapping[str, Any]:
    request = SimpleNamespace(method="POST", META={})
    try:
        usage: Mapping[str, Any] | None = get_usage(
            request, group="chat", key=lambda group, request: key, rate=rate, increment=True
        )
    except Exception as error:  # any of redis-py's; a limiter must not stop the chat
        log.warning("rate limiter is counting in this process: %s", type(error).__name__)
        return _emergency_usage(key, rate)
    if usage is None or usage["limit"] == 0:  # the library's word for "my cache is away"
        return _emergency_usage(key, rate)
    return usage


def _emergency_usage(key: str, rate: str) -> Mapping[str, Any]:
    """The same window counted in this process, at a quarter: other processes count theirs."""
    count, multiple, unit = re.fullmatch(r"(\d+)/(\d*)([smhd])", rate).groups()  # type: ignore[union-attr]
    period = int(multiple or 1) * _SECONDS[unit]
    now = int(time.time())
    name = f"emergency:{key}:{now // period}"
    cache = caches["local"]
    cache.add(name, 0, period + 5)
    used = cache.incr(name)
    return {"should_limit": used > max(1, int(count) // 4), "time_left": period - now % period}
