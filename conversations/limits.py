"""Who is asking and whether they may: one decision for every transport.

A transport only builds a ``Caller``; text, rate, tokens, running turns and open sockets are judged
here, and counted in ``counting``. Knows nothing of HTTP or frames. Redis being away makes a limit
stricter, never absent and never an error.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from django.conf import settings
from django.dispatch import Signal

from assistant.errors import InvalidRequest, RateLimited
from conversations import counting
from conversations.counting import Limit, Places, Standing, limit_of

#: The address of a peer that has none, as behind a socket file.
UNKNOWN = "unknown"
#: C0 and C1 controls but tab, line feed and carriage return.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Caller:
    """A signed-in user, or a visitor known by an id inside their session."""

    user_id: int | None
    session_key: str = ""
    address: str = ""
    #: What they read, as their browser says it: ``de-at``; empty where nothing was said.
    languages: tuple[str, ...] = field(default=(), compare=False)
    #: Where they stood when they were last counted, for the reply's headers.
    standings: list[Standing] = field(default_factory=list, compare=False, repr=False)

    @property
    def key(self) -> str:
        """Whose running turns are counted together."""
        return f"user:{self.user_id}" if self.user_id else f"visitor:{self.session_key}"

    @property
    def rate_key(self) -> str:
        """Whose requests are counted together: a visitor may drop the cookie, not the address."""
        return f"user:{self.user_id}" if self.user_id else f"address:{self.address}"


#: The ``traceparent`` header of the request or socket that is served, for observers; unchecked.
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
#: The id of that request, or of that socket's handshake, for logs.
request_id: ContextVar[str] = ContextVar("request_id", default="")
#: Sent for each refusal, with ``scope``: the name of the limit that was reached.
refused = Signal()


class TooMany(RateLimited):
    """A limit is reached; ``standings`` as those of a caller, the one that refuses among them."""

    def __init__(self, message: str, standings: Sequence[Standing] = ()) -> None:
        waits = [standing.reset_s for standing in standings if standing.refused]
        super().__init__(message, retry_after_s=max(waits, default=1))
        self.standings = tuple(standings)


def client_address(peer: str, forwarded: str) -> str:
    """The network the request came from: the address our own outermost proxy saw, or the peer.

    IPv6 is cut to its /64, which is what one household or server gets, unless it only wraps an
    IPv4 address. What is no address counts as the peer's: a header can never cause an error or
    choose its own bucket.
    """
    hops = settings.ASSISTANT_TRUSTED_PROXIES
    listed = [part.strip(" \t") for part in forwarded.split(",")]
    candidates = [listed[-hops]] if hops and len(listed) >= hops else []
    for candidate in [*candidates, peer]:
        try:
            address = ipaddress.ip_address(candidate.partition("%")[0])
        except ValueError:
            continue
        if isinstance(address, ipaddress.IPv4Address):
            return str(address)
        if address.ipv4_mapped is not None:  # what a server listening on both sees of an IPv4 peer
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False).network_address)
    return UNKNOWN


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


# --- How often, how much -------------------------------------------------------------------------


def take(caller: Caller) -> None:
    """Count one request of a caller who has tokens left. Sync: up to three calls of the cache.

    Raises: TooMany with the seconds until the next is let through.
    """
    key = caller.rate_key
    standings = counting.look(_token_limits(), key)
    if not any(standing.refused for standing in standings) and settings.ASSISTANT_RATE is not None:
        standings = [counting.take(limit_of("chat", settings.ASSISTANT_RATE), key), *standings]
    caller.standings[:] = standings
    reached = [standing for standing in standings if standing.refused]
    if reached:
        longest = max(reached, key=lambda each: each.reset_s)
        raise _too_many(longest.limit.name, _refusal(longest), standings)


def spend(caller: Caller, tokens: int) -> None:
    """Count what an answer took, once it has ended; the next ``take`` looks at it. Sync."""
    if tokens > 0 and counts_tokens():
        counting.spend(_token_limits(), caller.rate_key, tokens)


def counts_tokens() -> bool:
    """Whether there is a limit that ``spend`` would count for, which asks the cache."""
    return bool(_token_limits())


def take_conversation(caller: Caller) -> None:
    """Count one new conversation; they may be as many as questions, and are counted apart. Sync.

    Raises: TooMany.
    """
    rate = settings.ASSISTANT_RATE
    if rate is None:
        return
    standing = counting.take(limit_of("conversations", rate), caller.rate_key)
    if standing.refused:
        raise _too_many("conversations", _refusal(standing), [standing])


def login_refused(wait_s: int) -> str:
    """What an address that failed to sign in too often is told; observers hear of it."""
    return _too_many("login", f"Too many tries to sign in. Wait {wait_s} s.").message


def _too_many(scope: str, message: str, standings: Sequence[Standing] = ()) -> TooMany:
    """The error to raise; observers hear of it."""
    refused.send_robust(sender=TooMany, scope=scope)
    return TooMany(message, standings)


def _token_limits() -> list[Limit]:
    """Those that are set."""
    minute, day = settings.ASSISTANT_TOKENS_PER_MINUTE, settings.ASSISTANT_TOKENS_PER_DAY
    found = [Limit("tokens-minute", minute, 60)] if minute else []
    return [*found, Limit("tokens-day", day, 86_400)] if day else found


def _refusal(standing: Standing) -> str:
    """What happened and when it passes; ``quota`` is a quarter while the cache is away."""
    again = f"Try again in {standing.reset_s} s."
    per = _period(standing.limit.window_s)
    match standing.limit.name:
        case "chat":
            return f"Too many questions: at most {standing.quota:,} {per}. {again}"
        case "conversations":
            return f"Too many new conversations: at most {standing.quota:,} {per}. {again}"
    return f"Your answers have used the {standing.quota:,} tokens you have {per}. {again}"


def _period(seconds: int) -> str:
    for length, name in ((86_400, "day"), (3_600, "hour"), (60, "minute"), (1, "second")):
        if seconds % length == 0:
            number = seconds // length
            return f"per {name}" if number == 1 else f"per {number:,} {name}s"
    raise AssertionError("every whole number is a number of seconds")


# --- How many at the same time -------------------------------------------------------------------

_sockets = Places()


def may_write(held: int) -> None:
    """Whether one who has so many answers being written may start another. Raises: TooMany."""
    if held >= settings.ASSISTANT_MAX_TURNS_PER_CALLER:
        told = f"{held} answers are being written for you already. Wait for one to end."
        raise _too_many("turns", told)


class Seat:
    """What one socket holds: a place of its address from the start, one of its caller's later.

    The address's bounds those who have not said who they are. A peer without one is not counted:
    all of them would be one.
    """

    def __init__(self, address: str) -> None:
        """Raises: TooMany."""
        self._keys: list[str] = []
        if address != UNKNOWN:
            self._take(f"address:{address}", settings.ASSISTANT_MAX_SOCKETS_PER_ADDRESS)

    def belongs_to(self, caller: Caller) -> None:
        """Raises: TooMany; what was held stays held."""
        self._take(caller.key, settings.ASSISTANT_MAX_SOCKETS_PER_CALLER)

    def _take(self, key: str, most: int) -> None:
        if not _sockets.take(key, most):
            raise _too_many("sockets", f"{most} sockets are open already. Close one.")
        self._keys.append(key)

    def leave(self) -> None:
        """Any number of times."""
        while self._keys:
            _sockets.give_back(self._keys.pop())
