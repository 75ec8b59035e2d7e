"""Answers given before: fresh, stale, and one generation for many who ask the same at once.

An answer is shared between users only if it cannot be about one of them: the question is the first,
holds no personal value, and the text shows none that the product knows of the caller. Any other is
kept for its own caller, and a question that leans on earlier turns is not kept at all.

Purging writes down a moment; what was begun before it is not given again, in any process, and no
key is searched for. The cache is a helper: away or hanging, it costs ``PATIENCE_S`` and everybody
makes an answer of their own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
import time
import unicodedata
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from django.conf import settings
from django.core.cache import BaseCache

from assistant.redaction import redact
from assistant.types import Message, Params
from fallback import shared

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The longest wait for the cache in the path of an answer.
PATIENCE_S = 0.2
#: Different questions written at once in this process; beyond that nobody waits for another.
MOST_FLIGHTS = 1024
#: How long one process keeps others from writing the same answer, should it die meanwhile.
LOCK_S = 10
#: How often another process' answer is looked for.
_LOOK_EVERY_S = 0.05
#: Clocks of two machines may differ so much: what was begun within it after a purge goes too.
_SKEW_S = 1.0
#: A longer answer is not kept, and none to a longer question: that is not asked twice.
MOST_CHARS, MOST_ASKED_CHARS = 16_000, 1_000
_PREFIX = "answer:"


@dataclass(frozen=True, slots=True)
class Versions:
    """What an answer depends on besides the question; any text, a change makes a new key."""

    model: str
    prompt: str = ""
    policy: str = ""


@dataclass(frozen=True, slots=True)
class Key:
    """Where an answer is kept: for its caller alone and, unless it is about them, for all.

    Empty: not there. ``private``: values of the caller that a shared answer must not show.
    """

    own: str
    shared: str
    model: str
    text: str
    private: tuple[str, ...] = ()

    @property
    def places(self) -> tuple[str, ...]:
        return tuple(place for place in (self.shared, self.own) if place)

    def place_for(self, answer: Answer) -> str:
        """The most public place ``answer`` may be kept in; empty if there is none."""
        shown = answer.text.casefold()
        if self.shared and not any(value.casefold() in shown for value in self.private):
            return self.shared
        return self.own


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    intent: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A kept answer; one that is not ``fresh`` is better than none."""

    answer: Answer
    fresh: bool


# -- keys ------------------------------------------------------------------------------------------


def key_for(messages: Sequence[Message], params: Params, versions: Versions) -> Key | None:
    """Where the answer to ``messages`` is kept; None if it must not be.

    That is: there are earlier turns or a system's text, it was asked to be drawn at random, or the
    question is very long.
    """
    if len(messages) != 1 or (params.temperature > 0 and params.seed is None):
        return None
    if len(messages[0].text) > MOST_ASKED_CHARS:
        return None
    text = normalised(messages[0].text)
    public = settings.ASSISTANT["FACTS"]
    private = {name: value for name, value in params.facts.items() if public.get(name) != value}
    parts = [asdict(versions), _chosen(params), public, text]
    key = Key(
        own=_digest("own", params.scope, private, *parts) if params.scope else "",
        # Names only: whoever has no order number known is not told "your order number" for it.
        shared=_digest("shared", sorted(private), *parts)
        if _about_nobody(messages[0].text, private)
        else "",
        model=versions.model,
        text=_digest("text", text),
        private=tuple(value for value in private.values() if value),
    )
    return key if key.places else None


def _about_nobody(question: str, private: Mapping[str, str]) -> bool:
    """Whether the question shows no personal value, by its looks or because we know it."""
    asked = question.casefold()
    return redact([question]).texts == (question,) and not any(
        value and value.casefold() in asked for value in private.values()
    )


def normalised(text: str) -> str:
    """One case, one kind of space, no mark at the end. Signs stay: $5 is not 5 euros."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .!?")


def _chosen(params: Params) -> dict[str, Any]:
    """How the answer was asked to be written: every parameter but who asks and what is known."""
    names = {field.name for field in fields(params)} - {"scope", "sticky", "facts", "batch"}
    return {name: getattr(params, name) for name in names}


def _digest(*parts: Any) -> str:
    whole = json.dumps(parts, sort_keys=True)  # ASCII: a lone surrogate is only an escape
    return hashlib.sha256(whole.encode("ascii")).hexdigest()


# -- what is kept ----------------------------------------------------------------------------------


async def lookup(key: Key) -> Found | None:
    """The answer kept for ``key``; None also if the cache is away. At most ``PATIENCE_S``."""
    return await _ask(lambda cache: _read(cache, key, _clock()))


async def store(key: Key, answer: Answer, *, begun: float) -> None:
    """Keep ``answer``, whose writing began at ``begun`` (seconds since 1970), where it may be."""
    place = key.place_for(answer)
    if place and answer.text and len(answer.text) <= MOST_CHARS:
        kept, most = {**asdict(answer), "begun": begun}, settings.ASSISTANT["CACHE"]["STALE_S"]
        await _ask(lambda cache: cache.set(_PREFIX + place, kept, most))


def purge(*, question: str = "", intent: str = "", model: str = "") -> None:
    """No answer begun until now is given again: to that question, of that intent, by that model
    (as answers name theirs: support-en@1.0), or, without any of them, at all. Sync: up to one
    time-out. Raises: Away, nothing was purged."""
    named = [("text", _digest("text", normalised(question)) if question else "")]
    named += [("intent", intent), ("model", model)]
    stamps = [_stamp(*one) for one in named if one[1]] or [_stamp("all")]
    conf = settings.ASSISTANT
    # As long as an answer that was begun before this can still be kept.
    most = conf["CACHE"]["STALE_S"] + conf["REQUEST_TIMEOUT_S"] + 60
    until = _clock() + _SKEW_S
    shared.ask(lambda cache: cache.set_many(dict.fromkeys(stamps, until), most))


def _read(cache: BaseCache, key: Key, now: float) -> Found | None:
    """What is kept for all, else for the caller. Values that are not ours count as missing."""
    stamps = [_stamp("all"), _stamp("text", key.text)]
    got = _values(cache, [*(_PREFIX + place for place in key.places), *stamps])
    purged = max(_number(got.get(stamp)) for stamp in stamps)
    for place in key.places:
        if (kept := _kept(got.get(_PREFIX + place))) is None:
            continue
        answer, begun = kept
        of_it = [_stamp("intent", answer.intent), _stamp("model", answer.model)]
        since = max(map(_number, _values(cache, of_it).values()), default=0.0)
        if begun > max(purged, since) and (found := _aged(answer, now - begun)):
            return found
    return None


def _values(cache: BaseCache, names: Sequence[str]) -> dict[str, Any]:
    """What is kept under ``names``, without what is not JSON: that was not written by us."""
    with suppress(ValueError):
        return dict(cache.get_many(names))
    found: dict[str, Any] = {}
    for name in names:
        with suppress(ValueError):
            found[name] = cache.get(name)
    return found


def _aged(answer: Answer, age_s: float) -> Found | None:
    """A clock that was put back makes a kept answer stale, never fresh for longer."""
    conf = settings.ASSISTANT["CACHE"]
    if age_s > conf["STALE_S"]:
        return None
    return Found(answer, fresh=-_SKEW_S <= age_s <= conf["FRESH_S"])


def _kept(value: object) -> tuple[Answer, float] | None:
    if not isinstance(value, dict):
        return None
    texts = [value.get(field.name) for field in fields(Answer)]
    begun = _number(value.get("begun"))
    if not begun or not all(isinstance(text, str) for text in texts):
        return None
    return Answer(*map(str, texts)), begun


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _stamp(kind: str, name: str = "") -> str:
    return f"{_PREFIX}purged:{_digest(kind, name)}"


def _clock() -> float:
    return time.time()


async def _ask(operation: Callable[[BaseCache], T]) -> T | None:
    """What ``operation`` returns; None if the cache is away or slower than ``PATIENCE_S``."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            return await asyncio.to_thread(shared.ask, operation)
    except (shared.Away, TimeoutError):
        return None


# -- many who ask the same at once -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Outcome:
    """How a flight ended for those who waited; ``again``: one of them takes over."""

    answer: Answer | None = None
    again: bool = False


_flights: dict[str, asyncio.Future[_Outcome]] = {}


class Flight:
    """One answer being made. ``answer``: somebody made it already; else make it and ``land``."""

    def __init__(self, key: Key, answer: Answer | None = None) -> None:
        self.answer, self.model = answer, key.model
        self._key, self._begun = key, _clock()
        self._waiting: asyncio.Future[_Outcome] | None = None
        self._lock = ""

    async def land(self, answer: Answer, *, keep: bool = True) -> None:
        """Hand ``answer`` to all who wait, unless it is about the caller; ``keep`` it for later."""
        self.answer = answer
        for_all = not self._key.shared or self._key.place_for(answer) == self._key.shared
        self._settle(_Outcome(answer if for_all else None))
        if keep:
            await store(self._key, answer, begun=self._begun)

    async def _wait(self, deadline: float) -> bool:
        """Take off, or wait for whoever did; whether it is worth trying again."""
        name, loop = self._key.places[0], asyncio.get_running_loop()
        flying = _flights.get(name)
        if flying is not None and flying.get_loop() is loop:
            return await self._join(flying, deadline)
        if len(_flights) < MOST_FLIGHTS:
            self._waiting = _flights[name] = loop.create_future()
        return False

    async def _join(self, flying: asyncio.Future[_Outcome], deadline: float) -> bool:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait([flying], timeout=max(0.0, left))
        if not flying.done():
            return False
        outcome = flying.result()
        self.answer = outcome.answer
        return outcome.again

    async def _lock_out(self, deadline: float) -> None:
        """Keep other processes from making it too, or take what one of them has made."""
        token, loop = secrets.token_hex(8), asyncio.get_running_loop()
        while (claim := await _ask(lambda cache: _claim(cache, self._key, token))) is not None:
            locked, found = claim
            self._lock = token if locked else ""
            if found is not None and found.fresh:
                self.answer = found.answer
                self._settle(_Outcome(found.answer))
            if locked or self.answer or loop.time() + _LOOK_EVERY_S > deadline:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _end(self, *, again: bool) -> None:
        self._settle(_Outcome(again=again))
        if token := self._lock:
            await _ask(lambda cache: _unlock(cache, self._key, token))

    def _settle(self, outcome: _Outcome) -> None:
        if self._waiting is None or self._waiting.done():
            return
        self._waiting.set_result(outcome)
        name = self._key.places[0]
        if _flights.get(name) is self._waiting:
            del _flights[name]


@asynccontextmanager
async def flight(key: Key) -> AsyncIterator[Flight]:
    """A flight with the fresh answer, or one to make it: then nobody else makes it meanwhile.

    Waits for others ``CACHE["WAIT_S"]`` at most. Whoever leaves without landing lets the others
    make their own; one that was cancelled lets one of them take over.
    """
    deadline = asyncio.get_running_loop().time() + settings.ASSISTANT["CACHE"]["WAIT_S"]
    made = Flight(key, await _fresh(key))
    while made.answer is None and await made._wait(deadline):
        pass
    again = True  # unless it ends of itself
    try:
        if made._waiting is not None:
            await made._lock_out(deadline)
        yield made
        again = False
    except Exception:
        again = False
        raise
    finally:
        await asyncio.shield(made._end(again=again))


async def get_or_make(key: Key | None, make: Callable[[], Awaitable[Answer]]) -> Answer:
    """The fresh answer, somebody's who is just making it, or that of ``make``.

    Raises: what ``make`` raises; then nobody else gets its answer or its error.
    """
    if key is None:
        return await make()
    async with flight(key) as one:
        if one.answer is None:
            await one.land(await make())
        assert one.answer is not None
        return one.answer


async def _fresh(key: Key) -> Answer | None:
    found = await lookup(key)
    return found.answer if found and found.fresh else None


def _claim(cache: BaseCache, key: Key, token: str) -> tuple[bool, Found | None]:
    """Whether the lock is ours now, and what is kept: it may have been made since we looked."""
    return bool(cache.add(_lock_of(key), token, LOCK_S)), _read(cache, key, _clock())


def _unlock(cache: BaseCache, key: Key, token: str) -> None:
    """Unless it ran out meanwhile, and is another's now."""
    if _values(cache, [_lock_of(key)]).get(_lock_of(key)) == token:
        cache.delete(_lock_of(key))


def _lock_of(key: Key) -> str:
    return f"{_PREFIX}lock:{key.places[0]}"
