"""HTTP and the one WebSocket consumer; who may open a socket from which page is decided here.

A socket with a session cookie must come from a page of this origin, or any site could chat in its
visitor's name. A socket with a bearer token carries no cookie, so it needs no origin; nor does one
that has neither cookie nor origin, as no browser's has, and says its token in its first frame.

What is loaded by now stays, so the garbage collector passes it by, and looks at the rest less
often: under load it took 4 % of the interpreter and stopped every answer for up to a fifth of a
second. Source: Instagram Engineering, "Copy-on-write friendly Python garbage collection", 2017.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Sequence
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
django.setup(set_prefix=False)  # what follows needs the apps

from channels.routing import (  # type: ignore[import-untyped]  # noqa: E402
    ProtocolTypeRouter,
    URLRouter,
)
from channels.security.websocket import (  # type: ignore[import-untyped]  # noqa: E402
    WebsocketDenier,
)
from channels.sessions import CookieMiddleware  # type: ignore[import-untyped]  # noqa: E402
from django.conf import settings  # noqa: E402
from django.http.request import split_domain_port, validate_host  # noqa: E402

from config.handler import CLOSED, OneThreadHandler, send_problem  # noqa: E402
from conversations.urls import websocket_urlpatterns  # noqa: E402

#: A browser sends twenty headers and, with the cookies of a whole product, some kilobytes.
MAX_HEADERS, MAX_HEADERS_BYTES = 100, 32_768
#: What no header may hold (RFC 9110, 5.5), and some HTTP parsers let through.
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def same_origin(scope: dict[str, Any]) -> bool:
    """Whether exactly one Origin was sent and it is this server's, or one trusted in settings."""
    origins = _headers(scope, b"origin")
    hosts = _headers(scope, b"host")
    if len(origins) != 1 or len(hosts) != 1:
        return False
    if origins[0] in settings.CSRF_TRUSTED_ORIGINS:
        return True
    if not validate_host(split_domain_port(hosts[0])[0], settings.ALLOWED_HOSTS):
        return False
    return origins[0] == f"{'https' if _secure(scope) else 'http'}://{hosts[0]}"


def _secure(scope: dict[str, Any]) -> bool:
    forwarded = _headers(scope, b"x-forwarded-proto")
    if settings.ASSISTANT_TRUSTED_PROXIES and len(forwarded) == 1:
        return forwarded[0] == "https"
    return bool(scope.get("scheme") == "wss")


def _headers(scope: dict[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


class Doorkeeper:
    """Sends a socket on with its cookies, or with its token, or not at all.

    Whose session it is, the consumer asks again for every message: a login may end meanwhile.
    """

    def __init__(self, chat: Any) -> None:
        self._by_token = chat
        self._by_session = CookieMiddleware(chat)
        self._denied = WebsocketDenier.as_asgi()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> Any:
        if _headers(scope, b"authorization") or _no_browser(scope):
            return await self._by_token(scope, receive, send)
        inner = self._by_session if same_origin(scope) else self._denied
        return await inner(scope, receive, send)


def _no_browser(scope: dict[str, Any]) -> bool:
    """Browsers always say from which page they come, and the rest of them has a cookie."""
    return not _headers(scope, b"origin") and not _headers(scope, b"cookie")


class Bounded:
    """Refuses headers that are more than anybody's or that two readers read in two ways.

    Servers differ in what they let through; the answer closes the connection.
    """

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> Any:
        if (refusal := _refusal(scope)) is None:
            return await self._inner(scope, receive, send)
        if scope["type"] == "websocket":
            return await WebsocketDenier.as_asgi()(scope, receive, send)
        status, told = refusal
        await send_problem(scope, send, "invalid_request", status, told, CLOSED)


def _refusal(scope: dict[str, Any]) -> tuple[int, str] | None:
    """Status and reason, if these headers or this address are refused."""
    headers: Sequence[tuple[bytes, bytes]] = scope.get("headers", ())
    names = {name for name, _ in headers}
    whole = b"".join(name + value for name, value in headers)
    if len(headers) > MAX_HEADERS or len(whole) > MAX_HEADERS_BYTES:
        most = f"{MAX_HEADERS_BYTES:,} bytes, or over {MAX_HEADERS}"
        return 431, f"The headers are larger than {most}."
    if {b"content-length", b"transfer-encoding"} <= names:
        return 400, "Content-Length and Transfer-Encoding were both sent. Send one of them."
    if _CONTROL.search(whole):
        return 400, "A header holds a control character."
    if not _is_utf8(scope.get("query_string", b"")):  # Django logs a trace for it
        return 400, "The query of the address is not UTF-8."
    return None


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


application = Bounded(
    ProtocolTypeRouter(
        {"http": OneThreadHandler(), "websocket": Doorkeeper(URLRouter(websocket_urlpatterns))}
    )
)

gc.collect()
gc.freeze()
gc.set_threshold(10_000, 10, 10)
