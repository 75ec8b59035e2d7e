"""Where a request's ``Caller`` comes from: a bearer token, a login, or a visitor's session.

Also what guards the API before any view runs: the JSON parser's bounds and the request's id. Views
and the consumer build callers only here; what a caller may do is decided in ``limits``.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from hmac import compare_digest
from importlib import import_module
from inspect import iscoroutinefunction
from types import SimpleNamespace
from typing import Any, cast

from django.conf import settings
from django.contrib.auth import get_user
from django.contrib.auth.models import AnonymousUser
from django.http import HttpRequest, HttpResponseBase
from django.utils import timezone
from django.utils.decorators import sync_and_async_middleware
from django.utils.translation.trans_real import parse_accept_lang_header
from knox.auth import TokenAuthentication as KnoxAuthentication
from knox.crypto import hash_token
from knox.models import AuthToken
from knox.settings import CONSTANTS
from rest_framework import exceptions
from rest_framework.authentication import SessionAuthentication
from rest_framework.negotiation import DefaultContentNegotiation
from rest_framework.parsers import JSONParser
from rest_framework.permissions import SAFE_METHODS, BasePermission
from rest_framework.request import Request

from conversations.compiled import Compiled
from conversations.limits import Caller, client_address, request_id, traceparent
from conversations.models import ApiToken

#: Key inside the session; its value owns a visitor's conversations, across a new cookie at login.
VISITOR = "visitor"
#: A question of 4,000 characters, each written as two \\uXXXX escapes, takes 48,000 bytes.
MAX_BODY_BYTES = 65_536
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


_tokens_named = Compiled(
    lambda name: AuthToken.objects.filter(token_key=name).select_related("user", "grant"),
    AuthToken._meta.get_field("token_key"),
)


class TokenAuthentication(KnoxAuthentication):  # type: ignore[misc]
    """Knox's, in one statement, and for keys that are not even text (its own answer to those is a
    500). Knox looks through the user's other tokens at every request; here once a minute."""

    def authenticate_credentials(self, token: bytes) -> tuple[Any, Any]:
        if not re.fullmatch(rb"[0-9A-Za-z_-]{16,200}", token):
            raise exceptions.AuthenticationFailed("Invalid token.")
        digest = hash_token(token.decode("ascii"))
        for found in _tokens_named(token[: CONSTANTS.TOKEN_KEY_LENGTH].decode("ascii")):
            if compare_digest(digest, found.digest) and not self._cleanup_token(found):
                user, _ = self.validate_user(found)
                found.scopes = ApiToken.objects.use(found)
                return user, found
        raise exceptions.AuthenticationFailed("Invalid token.")

    def _cleanup_token(self, found: Any) -> bool:
        """Whether it has expired and is deleted, as the user's others are when a use is noted."""
        expired = found.expiry is not None and found.expiry < timezone.now()
        if not expired and not ApiToken.objects.to_be_noted(found):
            return False
        return bool(super()._cleanup_token(found))


class VisitorAuthentication(SessionAuthentication):
    """A login, or a visitor the chat page has given an id; both with CSRF protection."""

    def authenticate(self, request: Request) -> tuple[Any, Any] | None:
        signed_in = super().authenticate(request)
        if signed_in is not None or not settings.ASSISTANT_ANONYMOUS:
            return signed_in
        visitor = request._request.session.get(VISITOR)
        if not visitor:
            return None
        self.enforce_csrf(request)
        return AnonymousUser(), str(visitor)


class HasCaller(BasePermission):
    """A signed-in user, or a visitor where visitors are welcome."""

    def has_permission(self, request: Request, view: Any) -> bool:
        return bool(request.user.is_authenticated or isinstance(request.auth, str))


class HasScope(BasePermission):
    """A token does what it was made for: ``read`` to look, ``chat`` for all else.

    A view may ask for another by its attribute ``scope``. Logins have CSRF instead of scopes.
    """

    def has_permission(self, request: Request, view: Any) -> bool:
        held = getattr(request.auth, "scopes", None)
        if held is None:
            return True
        usual = "read" if request.method in SAFE_METHODS else "chat"
        needed = getattr(view, "scope", usual)
        self.message = f'This token does not have the scope "{needed}". Make one that has.'
        return needed in held


def caller_of(request: Request) -> Caller:
    """The caller of an API request that ``HasCaller`` let through."""
    address = address_of(request)
    languages = _languages(request.headers)
    if request.user.is_authenticated:
        return Caller(request.user.pk, address=address, languages=languages)
    return Caller(None, str(request.auth), address, languages)


def caller_of_page(request: HttpRequest) -> Caller | None:
    """The caller of a page; a visitor gets an id, unless visitors are not welcome."""
    address = address_of(request)
    if request.user.is_authenticated:
        return Caller(request.user.pk, address=address)
    if not settings.ASSISTANT_ANONYMOUS:
        return None
    visitor = request.session.setdefault(VISITOR, uuid.uuid4().hex)
    return Caller(None, visitor, address)


@dataclass(frozen=True, slots=True)
class Credential:
    """What a socket or a stream showed to come in; no part of it is ever logged."""

    #: As in the header: ``Bearer ...``.
    authorization: str = field(default="", repr=False)
    session_key: str = field(default="", repr=False)

    @property
    def token_digest(self) -> str:
        """Under which a token is stored; nothing for a login or what cannot be a token."""
        key = self.authorization.partition(" ")[2].strip()
        return str(hash_token(key)) if key.isascii() and key else ""


def credential_of_socket(scope: Mapping[str, Any]) -> Credential | None:
    """What came with the handshake; None: it is still to be said, in the first frame."""
    header = _headers_of(scope).get("authorization")
    if header is not None:
        return Credential(authorization=header)
    session_key = scope.get("cookies", {}).get(settings.SESSION_COOKIE_NAME)
    return Credential(session_key=str(session_key)) if session_key else None


def credential_of(request: Request) -> Credential:
    """What let a request of the API in; a proxy may have added a password of its own to it."""
    if hasattr(request.auth, "scopes"):
        return Credential(authorization=request.headers["authorization"])
    return Credential(session_key=request.COOKIES.get(settings.SESSION_COOKIE_NAME, ""))


def caller_of_socket(scope: Mapping[str, Any], said: Credential | None = None) -> Caller | None:
    """The caller of a socket as of now: a login that has ended since is nobody. Sync.

    ``said``: what came in a frame, if the handshake brought nothing.
    """
    shown = said or credential_of_socket(scope)
    if shown is None:
        return None
    caller = caller_by(shown, "chat", address_of_socket(scope))  # a socket is for chatting
    return caller and replace(caller, languages=_languages(_headers_of(scope)))


def caller_by(shown: Credential, needed: str, address: str = "") -> Caller | None:
    """Whose that is as of now, if it is good for that scope. Sync."""
    if shown.authorization:
        return _caller_by_token(shown.authorization, needed, address)
    session = import_module(settings.SESSION_ENGINE).SessionStore(shown.session_key)
    user = get_user(cast(HttpRequest, SimpleNamespace(session=session)))
    if user.is_authenticated:
        return Caller(user.pk, address=address)
    visitor = session.get(VISITOR) if settings.ASSISTANT_ANONYMOUS else None
    return Caller(None, str(visitor), address) if visitor else None


def address_of(request: HttpRequest | Request) -> str:
    """The network a request comes from, whoever it belongs to."""
    return _address(request.META.get("REMOTE_ADDR", ""), request.headers)


def address_of_socket(scope: Mapping[str, Any]) -> str:
    """The same of a socket."""
    return _address((scope.get("client") or [""])[0], _headers_of(scope))


def _headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """Headers by name; one that was sent several times is a list, as over HTTP.

    A name with an underscore is not the one with a hyphen: the latter is what our proxy sets.
    """
    found: dict[str, list[str]] = {}
    for key, value in scope["headers"]:
        found.setdefault(key.decode("latin-1"), []).append(value.decode("latin-1"))
    return {key: ",".join(values) for key, values in found.items()}


def _caller_by_token(header: str, needed: str, address: str) -> Caller | None:
    scheme, _, key = header.partition(" ")
    if scheme.lower() != "bearer":
        return None
    try:
        user, token = TokenAuthentication().authenticate_credentials(key.strip().encode())
    except exceptions.AuthenticationFailed:
        return None
    if needed not in token.scopes:
        return None
    return Caller(user.pk, address=address)


def _address(peer: str, headers: Mapping[str, str]) -> str:
    return client_address(peer, headers.get("x-forwarded-for", ""))


def _languages(headers: Mapping[str, str]) -> tuple[str, ...]:
    """What they read, the most welcome first; nothing where the header is malformed."""
    said = parse_accept_lang_header(headers.get("accept-language", ""))
    return tuple(language for language, _ in said if language != "*")


class BodyTooLarge(exceptions.APIException):
    status_code = 413
    default_detail = f"The body is larger than {MAX_BODY_BYTES:,} bytes."
    default_code = "invalid_request"


class BoundedJSONParser(JSONParser):
    """JSON of bounded size: UTF-8, no NaN, no bomb of brackets; everything else is the caller's
    mistake and never ours."""

    def parse(
        self,
        stream: Any,
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        raw = stream.read(MAX_BODY_BYTES + 1)
        if len(raw) > MAX_BODY_BYTES:
            raise BodyTooLarge
        try:
            return loads(raw.decode("utf-8"))
        except ValueError as error:
            raise exceptions.ParseError("The body is not valid JSON in UTF-8.") from error


def loads(text: str) -> Any:
    """Strict JSON. Raises: ValueError, also for what would exhaust the parser's stack."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


class OneFormat(DefaultContentNegotiation):
    """Always JSON: asking for an event stream must not make an error a 406."""

    def select_renderer(
        self, request: Request, renderers: Any, format_suffix: str | None = None
    ) -> Any:
        return renderers[0], renderers[0].media_type


def identified(given: str, trace: str) -> str:
    """The id of what is served from here on: the client's own if it is a plain one."""
    name = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
    request_id.set(name)
    traceparent.set(trace)
    return name


@sync_and_async_middleware
def request_id_middleware(get_response: Callable[[HttpRequest], Any]) -> Callable[..., Any]:
    """Gives every request an id, the client's own if it is a plain one, and sends it back."""

    def begin(request: HttpRequest) -> str:
        name = identified(
            request.headers.get("x-request-id", ""), request.headers.get("traceparent", "")
        )
        request.request_id = name  # type: ignore[attr-defined]
        return name

    if iscoroutinefunction(get_response):

        async def middleware(request: HttpRequest) -> HttpResponseBase:
            name = begin(request)
            response = await cast(Awaitable[HttpResponseBase], get_response(request))
            response["X-Request-ID"] = name
            return response

        return middleware

    def sync_middleware(request: HttpRequest) -> HttpResponseBase:
        name = begin(request)
        response = cast(HttpResponseBase, get_response(request))
        response["X-Request-ID"] = name
        return response

    return sync_middleware
