"""Any server that speaks OpenAI's chat completions, streamed: your own, or somebody else's.

Personal values are taken out before anything leaves and put back while the answer streams. Every
wait, body and answer is bounded, and whatever goes wrong there is an ``UpstreamFailed`` with a
cause. At most one call is made again, and never after the first words; redirects are not followed.
Knows no users, budgets or consent: a subclass may refuse each call in ``_admit``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import random
import ssl
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    aclosing,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast
from urllib.parse import urlsplit

import httpx2

from assistant.backends.base import Backend
from assistant.backends.openai_wire import (
    Cause,
    Clock,
    Piece,
    cause_of,
    clean,
    error_of,
    failure,
    names_of,
    pieces_of,
    retry_after,
)
from assistant.engine import StopFilter
from assistant.errors import ModelUnavailable, Overloaded, UpstreamFailed
from assistant.redaction import Filler, Redacted, redact
from assistant.types import Delta, Event, Finished, FinishReason, Message, Params, Started, Usage

log = logging.getLogger(__name__)

#: Quick failures that may be over a moment later. A time-out has used up the time for a second try.
_PASSING: frozenset[Cause] = frozenset({"connect", "rate_limited", "status", "cut"})
#: A token of more than 16 characters is rare; a server that ignores the limit is stopped there.
_CHARS_PER_TOKEN = 16
#: Each answer earns this much of a second try, so that over time fewer than 10 % are tried again.
_RETRY_SHARE = 0.09
_MOST_RETRIES_SAVED = 5.0
#: Fields that newer models refuse by name; left out from then on.
_OPTIONAL = frozenset({"temperature", "top_p", "seed", "stream_options", "max_tokens"})


@dataclass(frozen=True, slots=True)
class Options:
    """``first_byte_s`` is until the first words; it and ``total_s`` include a second try.

    ``redact=False`` only for a server of your own. ``strict_model`` refuses answers that name
    another model than the one asked for; gateways with names of their own need it off.
    """

    base_url: str
    model: str
    api_key: str = field(default="", repr=False)
    redact: bool = True
    strict_model: bool = False
    system: str = ""
    connect_s: float = 2.0
    first_byte_s: float = 5.0
    idle_s: float = 10.0
    total_s: float = 60.0
    max_retry_after_s: float = 2.0
    max_new_tokens: int = 1024
    context_tokens: int = 8192
    max_bytes: int = 1 << 20
    max_event_bytes: int = 64 << 10
    max_concurrent: int = 8


class OpenAIBackend(Backend):
    options_class: ClassVar[type[Any]] = Options

    def __init__(self, alias: str, options: Options) -> None:
        super().__init__(alias, options)
        self.idle_s = options.idle_s + 1.0  # its own patience ends first, and tells the cause
        self._places = threading.BoundedSemaphore(max(1, options.max_concurrent))
        self._retries = 1.0
        self._unwanted: set[str] = set()
        self._model_noticed = False

    def context_tokens(self) -> int:
        limit: int = self.options.context_tokens
        return limit

    def check(self) -> None:
        options: Options = self.options
        if problem := _address_problem(options.base_url):
            raise ModelUnavailable(f"The larger model's address (OPENAI_BASE_URL) {problem}.")
        if not options.model or not options.api_key.isascii() or not options.api_key.isprintable():
            raise ModelUnavailable(
                "The larger model needs a name (ASSISTANT_UPSTREAM_MODEL) and a key of plain "
                "characters (OPENAI_API_KEY)."
            )

    async def models(self) -> tuple[str, ...]:
        """Names of the models that the server says it has; empty where it has no such list.

        Nobody's words leave, no model is asked and no budget spent. Raises: ModelUnavailable,
        UpstreamFailed.
        """
        self.check()
        options: Options = self.options
        clock = Clock(options.first_byte_s, options.idle_s, options.total_s)
        url = f"{options.base_url.rstrip('/')}/models"
        try:
            async with self._client() as client, self._answered(client, url, clock) as response:
                status = response.status_code
                if 300 <= status < 400:
                    raise failure("redirect")
                if status in {404, 405}:
                    return ()
                if status != 200:
                    raise await self._told(response, clock)
                return await names_of(response, clock, self.options.max_bytes)
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise failure(cause_of(error)) from error

    async def _admit(self, params: Params) -> None:
        """Called before each call to the server. Raises: AssistantError, and none is made."""

    # -- one answer --------------------------------------------------------------------------

    async def stream(self, messages: Sequence[Message], params: Params) -> AsyncIterator[Event]:
        self.check()
        options: Options = self.options
        with self._place():
            # In a thread: long histories and the first certificates take a hundred milliseconds.
            asked = await asyncio.to_thread(self._prepared, messages, params)
            input_tokens = sum(self.count_tokens(text) for text in asked.texts)
            clock = Clock(options.first_byte_s, options.idle_s, options.total_s)
            failed: UpstreamFailed | None = None
            while True:
                await self._admitted(params, failed)
                writer = self._writer(params, asked)
                try:
                    pieces = self._call(self._body(messages, asked, params), clock)
                    async with aclosing(self._events(pieces, writer)) as events:
                        async for event in events:
                            yield event
                    for event in writer.end(input_tokens):
                        yield event
                    return
                except UpstreamFailed as error:
                    if writer.started or failed is not None:
                        raise
                    failed = error
                    await self._pause(error, clock)

    async def _events(
        self, pieces: AsyncGenerator[Piece], writer: _Writer
    ) -> AsyncGenerator[Event]:
        """The pieces as events; the rest is not read once the answer has ended."""
        async with aclosing(pieces):
            async for piece in pieces:
                self._note_model(piece.model)
                for event in writer.push(piece):
                    yield event
                if writer.ended:
                    break

    async def _admitted(self, params: Params, failed: UpstreamFailed | None) -> None:
        try:
            await self._admit(params)
        except Exception:
            if failed is not None:
                raise failed from None  # the second try was not allowed: tell of the first
            raise
        if failed is None:
            self._retries = min(_MOST_RETRIES_SAVED, self._retries + _RETRY_SHARE)

    async def _pause(self, error: UpstreamFailed, clock: Clock) -> None:
        """Wait until the one second try. Raises: ``error`` if there is to be none."""
        wait = error.retry_after_s
        if wait is None:
            wait = random.uniform(0.1, 0.3)  # noqa: S311 - spreads tries, hides nothing
        too_long = wait > min(self.options.max_retry_after_s, clock.until_first_byte())
        if error.cause not in _PASSING or too_long or self._retries < 1:
            raise error
        self._retries -= 1
        await asyncio.sleep(wait)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """One of the places in this process. Raises: Overloaded at once, never waits."""
        if not self._places.acquire(blocking=False):
            raise Overloaded("The larger model is busy with other questions.", retry_after_s=2)
        try:
            yield
        finally:
            self._places.release()

    def _note_model(self, named: str) -> None:
        """Raises: UpstreamFailed if another model answers and that matters."""
        asked: str = self.options.model
        if not named or _same_model(asked, named):
            return
        if self.options.strict_model:
            raise failure("wrong_model")
        if not self._model_noticed:
            self._model_noticed = True
            log.warning("backend %s: %r was asked for, another model answers", self.alias, asked)

    def _writer(self, params: Params, asked: Redacted) -> _Writer:
        limit = min(params.max_new_tokens, self.options.max_new_tokens)
        return _Writer(f"{self.alias}:{self.options.model}", limit, params, asked.values)

    # -- what is sent ------------------------------------------------------------------------

    def _prepared(self, messages: Sequence[Message], params: Params) -> Redacted:
        _ = self._certificates
        texts = [message.text for message in messages]
        if not self.options.redact:
            return Redacted(tuple(texts), {})
        return redact(texts, params.facts)

    def _body(self, messages: Sequence[Message], asked: Redacted, params: Params) -> dict[str, Any]:
        options: Options = self.options
        said = [
            {"role": message.role, "content": clean(text)}
            for message, text in zip(messages, asked.texts, strict=True)
            if text.strip()
        ]
        system = [{"role": "system", "content": options.system}] if options.system else []
        body = {
            "model": options.model,
            "messages": system + said,
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": min(params.max_new_tokens, options.max_new_tokens),
            "temperature": params.temperature,
            **({"top_p": params.top_p} if params.top_p < 1 else {}),
            **({"seed": params.seed} if params.seed is not None else {}),
        }
        if "max_tokens" in self._unwanted:  # the name it has for models that think first
            body["max_completion_tokens"] = body["max_tokens"]
        return {name: value for name, value in body.items() if name not in self._unwanted}

    # -- one call ----------------------------------------------------------------------------

    async def _call(self, body: dict[str, Any], clock: Clock) -> AsyncGenerator[Piece]:
        """What the server writes, until it says that it is done. Raises: UpstreamFailed."""
        try:
            async with self._client() as client, self._opened(client, body, clock) as response:
                await self._accept(response, clock)
                source = httpx2.EventSource(response, self.options.max_event_bytes)
                async with aclosing(cast(Any, aiter(source))) as events:
                    async for piece in pieces_of(events, clock):
                        if response.num_bytes_downloaded > self.options.max_bytes:
                            raise failure("too_large")
                        yield piece
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise failure(cause_of(error)) from error

    def _client(self) -> httpx2.AsyncClient:
        """A client for one call: a connection is never shared by two users' questions, nor by two
        event loops. The certificates, which take long to load, are loaded once."""
        options: Options = self.options
        return httpx2.AsyncClient(
            headers={
                "Authorization": f"Bearer {options.api_key}",
                "Accept": "text/event-stream",
                "Accept-Encoding": "identity",  # nothing small here unpacks into something large
            },
            verify=self._certificates,
            follow_redirects=False,
            timeout=httpx2.Timeout(None, connect=options.connect_s),
        )

    @cached_property
    def _certificates(self) -> ssl.SSLContext:
        return httpx2.create_ssl_context()  # of the system, or SSL_CERT_FILE

    def _opened(
        self, client: httpx2.AsyncClient, body: dict[str, Any], clock: Clock
    ) -> AbstractAsyncContextManager[httpx2.Response]:
        url = f"{self.options.base_url.rstrip('/')}/chat/completions"
        return self._answered(client, url, clock, body)

    @asynccontextmanager
    async def _answered(
        self, client: httpx2.AsyncClient, url: str, clock: Clock, body: dict[str, Any] | None = None
    ) -> AsyncIterator[httpx2.Response]:
        """The response, as far as its headers; to a GET where there is no body."""
        request = client.build_request("GET" if body is None else "POST", url, json=body)
        async with clock.within("first_byte"):
            response = await client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def _accept(self, response: httpx2.Response, clock: Clock) -> None:
        """Raises: UpstreamFailed unless events follow."""
        status = response.status_code
        if 300 <= status < 400:
            raise failure("redirect")
        if status != 200:
            raise await self._told(response, clock)
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        packed = response.headers.get("content-encoding", "identity").lower() != "identity"
        if kind != "text/event-stream" or packed:
            raise failure("not_events")

    async def _told(self, response: httpx2.Response, clock: Clock) -> UpstreamFailed:
        """The failure that this error status means."""
        status = response.status_code
        error = await error_of(response, clock)
        if status == 400 and error.get("param") in _OPTIONAL:
            self._unwanted.add(error["param"])
            log.warning("backend %s: %s is left out from now on", self.alias, error["param"])
        cause: Cause = "refused"
        if status == 429:
            cause = "rate_limited"
        elif status >= 500 or status in {408, 409}:
            cause = "status"
        elif status == 404 or error.get("code") == "model_not_found":
            cause = "wrong_model"
        return failure(cause, f"HTTP {status}", retry_after(response.headers))


# -- what is shown -------------------------------------------------------------------------------


class _Writer:
    """Pieces to events: values filled in, stop strings, a bound. One try of one answer each."""

    def __init__(self, model: str, limit: int, params: Params, values: Mapping[str, str]) -> None:
        self._model, self._limit = model, limit
        self._filler = Filler({**params.facts, **values})
        self._stops = StopFilter(params.stop)
        self._chars = self._tokens = 0
        self._usage: Usage | None = None
        self._finish: FinishReason = "stop"
        self.started = self.ended = False

    def push(self, piece: Piece) -> Iterator[Event]:
        """Sets ``ended`` when nothing more is to be read."""
        self._usage = piece.usage or self._usage
        if piece.finish == "length":
            self._finish = "length"
        if piece.text:
            self._tokens += 1
            self._chars += len(piece.text)
            shown, self.ended = self._stops.push(self._filler.push(piece.text))
            yield from self._show(shown)
        if self._chars > self._limit * _CHARS_PER_TOKEN and not self.ended:
            self._finish, self.ended = "length", True

    def end(self, input_tokens: int) -> Iterator[Event]:
        """Raises: UpstreamFailed if nothing was written at all."""
        if not self._tokens:
            raise failure("empty")
        shown, _ = self._stops.push(self._filler.flush())
        yield from self._show(shown + self._stops.flush())
        yield from self._start()
        yield Finished(self._finish, self._usage or Usage(input_tokens, self._tokens))

    def _show(self, text: str) -> Iterator[Event]:
        if text:
            yield from self._start()
            yield Delta(text)

    def _start(self) -> Iterator[Event]:
        if not self.started:
            self.started = True
            yield Started(self._model)


# -- whom we talk to ------------------------------------------------------------------------------


def _address_problem(base_url: str) -> str:
    """Why that is no address to send keys and texts to; empty if it is one."""
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    if parts.scheme not in {"http", "https"} or not host:
        return "must begin with https:// and a host name"
    if parts.username or parts.password or parts.query or parts.fragment:
        return "must have no user, query or fragment; the key has its own setting"
    if parts.scheme == "http" and not _in_house(host):
        return "must be https: over http the key and every text could be read on the way"
    return ""


def _same_model(asked: str, named: str) -> bool:
    """Whether one may be a dated, tagged or prefixed name of the other."""
    one, other = sorted((name.rpartition("/")[2].lower() for name in (asked, named)), key=len)
    return other.startswith(one) and other[len(one) : len(one) + 1] in {"", "-", ":", "@"}


def _in_house(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith((".localhost", ".local", ".internal", ".lan"))
    return address.is_private or address.is_loopback
