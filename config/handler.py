"""Django's ASGI handler, with every request in one worker thread.

Django changes threads twice for each middleware that is not a coroutine, which all of ours are but
one: 14 changes a request, three of its six milliseconds. Here the middleware and the view, which
are all synchronous, run behind one change. Static files need no thread and come before it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.exception import convert_exception_to_response
from django.db import close_old_connections
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from servestatic.middleware import ServeStaticMiddleware

#: Requests at a time; more wait. One that waits for its whole answer holds a thread meanwhile, so
#: this is well above what the engine's queue lets in.
MOST_REQUESTS = 256

#: Threads are kept, and with them SQLite's connections.
_threads = ThreadPoolExecutor(MOST_REQUESTS, thread_name_prefix="request")


class OneThreadHandler(ASGIHandler):
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Without Django's thread of its own for each request: what is left for one (signals, and
        closing a response) takes microseconds, starting a thread a third of a millisecond."""
        if scope["type"] != "http":
            raise ValueError(f"This handles HTTP only, not {scope['type']}.")
        await self.handle(scope, receive, send)

    def load_middleware(self, is_async: bool = False) -> None:
        """``settings.MIDDLEWARE`` as one synchronous chain, behind the static files."""
        super().load_middleware(is_async=False)
        chain: Callable[[HttpRequest], HttpResponseBase] = self._middleware_chain  # type: ignore[has-type]

        def respond(request: HttpRequest) -> HttpResponseBase:
            close_old_connections()  # Django's signals do this, in a thread of their own
            try:
                return chain(request)
            finally:
                close_old_connections()

        threaded = sync_to_async(respond, thread_sensitive=False, executor=_threads)
        self._middleware_chain = convert_exception_to_response(ServeStaticMiddleware(threaded))
