"""The OpenAI dialect: chat completions, responses, embeddings, models. Nothing is stored.

A request becomes one ``Turn.passing`` a choice, so admission, route, facts and slots are those of
every other transport. What may be asked is read in ``openai_request``; ``openai_wire`` writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from django.conf import settings
from django.http import HttpResponseBase, StreamingHttpResponse
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from assistant import backends
from assistant.backends.base import Backend, Vector
from assistant.errors import (
    AssistantError,
    GenerationFailed,
    InvalidRequest,
    NotFound,
    Overloaded,
)
from assistant.threads import waited
from conversations import limits, openai_request, openai_wire, wire
from conversations.access import caller_of
from conversations.counting import Places
from conversations.limits import Caller
from conversations.log import Completed, Created, Delta, Failed, Queued
from conversations.logins import WhileSignedIn
from conversations.openai_request import Asked, Embeddable
from conversations.openai_wire import Part, Reply
from conversations.turn import Turn

# --- Endpoints -----------------------------------------------------------------------------------


class ChatCompletions(APIView):
    def post(self, request: Request) -> HttpResponseBase:
        return _answer(request, openai_request.chat(request.data), openai_wire.ChatReply)


class Responses(APIView):
    def post(self, request: Request) -> HttpResponseBase:
        return _answer(request, openai_request.response(request.data), openai_wire.ResponseReply)


class Embeddings(APIView):
    def post(self, request: Request) -> Response:
        wanted = openai_request.embeddings(request.data)
        caller = caller_of(request)
        backend = _embedder(wanted)
        texts = [_text(backend, given) for given in wanted.inputs]
        tokens = sum(map(backend.count_tokens, texts))
        vectors = _embedded(caller, backend, texts)
        limits.spend(caller, tokens)
        reply = openai_wire.embeddings_json(
            vectors, model=wanted.model, encoding=wanted.encoding, tokens=tokens
        )
        return Response(reply, headers=wire.limit_headers(caller.standings, request.path))


class Models(APIView):
    def get(self, request: Request) -> Response:
        listed = [openai_wire.model_json(name) for name in _models()]
        return Response({"object": "list", "data": listed})


class Model(APIView):
    def get(self, request: Request, name: str) -> Response:
        _steps(name)
        return Response(openai_wire.model_json(name))


class Elsewhere(APIView):
    """Every other address of the dialect: a client's error class hangs on the reply's shape."""

    def _refuse(self, request: Request) -> Response:
        raise NotFound(
            "There is nothing at this address. Here are /v1/chat/completions, /v1/responses, "
            "/v1/embeddings and /v1/models, without a slash at their end."
        )

    get = post = put = patch = delete = _refuse


# --- Models: names of routes ---------------------------------------------------------------------


class UnknownModel(NotFound):
    param = "model"


def _models() -> dict[str, tuple[str, ...]]:
    """The steps behind each name; the default's are those in settings."""
    alias = backends.answering()
    model = {} if alias is None else {"model": (alias,)}
    return {openai_request.DEFAULT_MODEL: (), **model, "rules": ("rules",)}


def _steps(name: str) -> tuple[str, ...]:
    steps = _models().get(name)
    if steps is None:
        raise UnknownModel(f"There is no such model. There are {', '.join(_models())}.")
    return steps


# --- Embeddings ----------------------------------------------------------------------------------

_reading = Places()


class Unfit(InvalidRequest):
    """A value that is well-formed, and not one that this model can give."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def _embedder(wanted: Embeddable) -> Backend:
    """The backend that reads for that model. Raises: UnknownModel, Unfit, ModelUnavailable."""
    steps, alias = _steps(wanted.model), backends.answering()
    if alias is None or steps not in ((), (alias,)):
        raise Unfit("model", f"{wanted.model} has no embeddings.")
    backend = backends.get(alias)
    width = backend.embedding_width()
    if not width:
        raise Unfit("model", f"The model behind {wanted.model} has no embeddings.")
    if wanted.dimensions not in (None, width):
        raise Unfit("dimensions", f"Embeddings have {width} values here. Leave it out.")
    return backend


def _text(backend: Backend, given: str | tuple[int, ...]) -> str:
    if isinstance(given, str):
        return given
    try:
        return backend.text_of(given)
    except InvalidRequest as error:
        raise Unfit("input", error.message) from error


def _embedded(caller: Caller, backend: Backend, texts: list[str]) -> Sequence[Vector]:
    """The texts' vectors, counted as one request. Raises: AssistantError."""
    limits.take(caller)
    most = settings.ASSISTANT_MAX_TURNS_PER_CALLER
    if not _reading.take(caller.key, most):
        raise limits.TooMany(f"{most} requests are being read for you. Wait for one to end.")
    try:
        return waited(_in_time, backend, texts)
    finally:
        _reading.give_back(caller.key)


async def _in_time(backend: Backend, texts: list[str]) -> Sequence[Vector]:
    try:
        async with asyncio.timeout(settings.ASSISTANT["REQUEST_TIMEOUT_S"]):
            return await backend.embed(texts)
    except TimeoutError:
        raise Overloaded(
            "The texts were not read in time. Send fewer, or try again later.", retry_after_s=5
        ) from None


# --- One request ---------------------------------------------------------------------------------


def _answer(
    request: Request, asked: Asked, reply_of: Callable[[Asked, str], Reply]
) -> HttpResponseBase:
    caller = caller_of(request)
    turns = _turns(caller, asked)
    limits = wire.limit_headers(caller.standings, request.path)
    reply, choices = reply_of(asked, turns[0].message.pk.hex), Choices(turns)
    if asked.stream:
        return _streamed(request, choices, reply, limits)
    try:
        ends = waited(_ends, choices)
    finally:
        choices.close()
    headers = {"X-Assistant-Route": ends[0].source.route, **limits}
    return Response(reply.whole(ends), headers=headers)


def _turns(caller: Caller, asked: Asked) -> list[Turn]:
    """A turn for each choice, or none. Each counts, for the rate too: it is as much work."""
    steps, params, turns = _steps(asked.model), asked.params, list[Turn]()
    try:
        for at in range(asked.n):
            own = replace(params, seed=params.seed + at) if params.seed is not None else params
            turns.append(Turn.passing(caller, asked.said, own, steps=steps, transport="openai"))
    except BaseException:
        for turn in turns:
            turn.close("interrupted")
        raise
    return turns


async def _ends(choices: Choices) -> list[Part]:
    """How each answer ended. Raises: AssistantError if one of them broke off."""
    return [_sound(part) async for part in choices if not isinstance(part.event, Delta)]


def _streamed(
    request: Request, choices: Choices, reply: Reply, limits: dict[str, str]
) -> HttpResponseBase:
    """The answers as they are written, from the first word on: until then, errors have a status."""

    def write(part: Part) -> bytes:
        error = _error_of(part)
        return reply.broken(error) if error is not None else reply.piece(part)

    try:
        first = waited(choices.peek)
    except BaseException:
        choices.close()
        raise
    route = {"X-Assistant-Route": first.source.route} if first is not None else {}
    return StreamingHttpResponse(
        wire.EventStream(WhileSignedIn(choices, request), write, reply.broken),
        content_type="text/event-stream",
        headers={**wire.SSE_HEADERS, **route, **limits},
    )


def _sound(part: Part) -> Part:
    error = _error_of(part)
    if error is not None:
        raise error
    return part


def _error_of(part: Part) -> AssistantError | None:
    match part.event:
        case Failed():
            return part.event.error
        case Completed() if part.event.message.status != "complete":
            return GenerationFailed(
                "The answer was interrupted, as when a server stops. Please try again.",
                retry_after_s=1,
            )
    return None


class Choices:
    """The events of several turns that run at the same time, told one turn after the other.

    Read like a ``Reader`` and, like one, not an async generator. Nothing follows a failure.
    """

    def __init__(self, turns: list[Turn]) -> None:
        self._turns = turns
        self._readers = [turn.read() for turn in turns]
        self._at = 0
        self._peeked: Part | None = None

    def __aiter__(self) -> Choices:
        return self

    async def __anext__(self) -> Part:
        if self._peeked is not None:
            part, self._peeked = self._peeked, None
            return part
        for turn in self._turns:
            turn.start()
        while self._at < len(self._readers):
            event = await anext(self._readers[self._at], None)
            if event is None:
                self._at += 1
            elif not isinstance(event, Created | Queued):  # the dialect has no word for a queue
                part = Part(self._at, self._turns[self._at].source, event)
                if _error_of(part) is not None:
                    self.close()
                return part
        raise StopAsyncIteration

    async def peek(self) -> Part | None:
        """The first part, left to be read; None if nothing comes for as long as a stream may be
        silent. Raises: AssistantError if that part is a failure."""
        try:
            async with asyncio.timeout(wire.KEEP_ALIVE_S):
                self._peeked = _sound(await anext(self))
        except TimeoutError:
            return None
        return self._peeked

    def close(self) -> None:
        """Stop reading, from any thread; what nobody reads is stopped too."""
        for reader in self._readers:
            reader.close()
