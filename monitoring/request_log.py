"""One line when a request begins, one when it ends or fails, and the same of a reply that streams.

django-structlog's middleware and events, with what our lines may hold: the id that the reply
carries and the view, no query and no name of a browser, for both are a caller's words.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

from django.http import HttpRequest, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.utils.functional import LazyObject, empty
from django_structlog import signals
from django_structlog.middlewares.request import RequestMiddleware, logger
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars

from monitoring.metrics import view_of

log = logging.getLogger(__name__)


class RequestLog(RequestMiddleware):
    def prepare(self, request: HttpRequest) -> None:
        request.began = time.perf_counter()  # type: ignore[attr-defined]
        with _harmless():
            super().prepare(request)

    def handle_response(self, request: HttpRequest, response: HttpResponseBase) -> None:
        content: Any = getattr(response, "streaming_content", None)
        context = get_contextvars()
        with _harmless():
            super().handle_response(request, response)  # type: ignore[arg-type]
        clear_contextvars()  # it did, unless its line broke
        if isinstance(response, StreamingHttpResponse) and response.is_async:
            response.streaming_content = Streamed(content, context)

    def process_got_request_exception(self, sender: Any, request: HttpRequest, **more: Any) -> None:
        with _harmless():
            super().process_got_request_exception(sender, request, **more)

    @staticmethod
    def bind_user_id(request: HttpRequest) -> None:
        """Only of who is known by now: a line is worth no query, and no error without database."""
        user = getattr(request, "user", None)
        if not isinstance(user, LazyObject) or user._wrapped is not empty:
            bind_contextvars(user_id=getattr(user, "pk", None))

    @staticmethod
    def format_request(request: HttpRequest) -> str:
        return f"{request.method} {request.path}"


@contextmanager
def _harmless() -> Iterator[None]:
    """Whatever is wrong with a line, the request goes on."""
    try:
        yield
    except Exception as error:
        log.error("a request's line was not written: %s", type(error).__name__)


class Streamed:
    """Passes a reply on and tells its begin and its end, once, however it ends.

    The library's own wrapper is a generator, which says nothing of a client that hangs up while a
    part is being sent to it.
    """

    def __init__(self, content: AsyncIterator[bytes], context: dict[str, Any]) -> None:
        self._content, self._log = content, logger.bind(**context)
        self._begun = self._ended = False

    def __aiter__(self) -> Streamed:
        return self

    async def __anext__(self) -> bytes:
        if not self._begun:
            self._begun = True
            self._log.info("streaming_started")
        try:
            return await anext(self._content)
        except StopAsyncIteration:
            self._end(logging.INFO, "streaming_finished")
            raise
        except asyncio.CancelledError:
            self.close()
            raise
        except Exception as error:
            self._end(logging.ERROR, "streaming_failed", exc_info=error)
            raise

    def close(self) -> None:
        """Django calls this of every reply, also after its end."""
        self._end(logging.INFO, "streaming_cancelled")

    def _end(self, level: int, event: str, **more: Any) -> None:
        if not self._ended:
            self._ended = True
            self._log.log(level, event, **more)


# --- What the library's lines hold of ours -------------------------------------------------------


def _begun(*, request: HttpRequest, **_: Any) -> None:
    bind_contextvars(request_id=getattr(request, "request_id", ""))


def _ended(*, request: HttpRequest, log_kwargs: dict[str, Any], **_: Any) -> None:
    log_kwargs["http_status"], log_kwargs["view"] = log_kwargs.pop("code"), view_of(request)
    began: float = request.began  # type: ignore[attr-defined]
    log_kwargs["duration_ms"] = round((time.perf_counter() - began) * 1000, 3)


def connect() -> None:
    """Any number of times."""
    signals.bind_extra_request_metadata.connect(_begun)
    for ended in (
        signals.bind_extra_request_finished_metadata,
        signals.bind_extra_request_failed_metadata,
    ):
        ended.connect(_ended)
