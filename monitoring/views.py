"""``/livez``, ``/readyz`` and ``/metrics``: for probes, balancers and Prometheus.

Figures and reasons are for insiders: a token, an internal network, or staff who are signed in.
Everybody else learns whether to come back later, and nothing more.
"""

from __future__ import annotations

import ipaddress
import logging
import secrets
import time
from collections.abc import Callable

from django.conf import settings
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, JsonResponse
from django.http.response import Http404
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from conversations.limits import UNKNOWN, client_address
from monitoring import metrics
from monitoring.health import checker
from monitoring.page import page

log = logging.getLogger(__name__)

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@require_safe
def livez(request: HttpRequest) -> HttpResponse:
    """The process answers; nothing else is asked."""
    return HttpResponse("ok", content_type="text/plain")


@never_cache
@require_safe
def readyz(request: HttpRequest) -> HttpResponse:
    """200 while users are welcome here, else 503; the reasons are for insiders."""
    health = checker.look()
    told: dict[str, object] = {"status": health.status}
    if health.problems and is_insider(request):
        told["problems"] = health.problems
    if health.status != "unavailable":
        return JsonResponse(told)
    return JsonResponse(told, status=503, headers={"Retry-After": "1"})


@never_cache
@require_safe
def show_metrics(request: HttpRequest) -> HttpResponse:
    """The page for Prometheus. Strangers: 401 where a token opens it, else 404."""
    if is_insider(request):
        text, kind = page.render(request.headers.get("Accept", ""))
        return HttpResponse(text, content_type=kind)
    if settings.ASSISTANT_METRICS_TOKEN:
        return HttpResponse(
            "The metrics are for those who send their token as a bearer.\n",
            status=401,
            content_type="text/plain",
            headers={"WWW-Authenticate": 'Bearer realm="metrics"'},
        )
    raise Http404


# --- Who may look --------------------------------------------------------------------------------


def is_insider(request: HttpRequest) -> bool:
    return _has_token(request) or _is_near(request) or _is_staff(request)


def _has_token(request: HttpRequest) -> bool:
    kind, _, sent = request.headers.get("Authorization", "").partition(" ")
    token: str = settings.ASSISTANT_METRICS_TOKEN
    if not token or kind.lower() != "bearer":
        return False
    return secrets.compare_digest(sent.strip().encode(), token.encode())


def _is_near(request: HttpRequest) -> bool:
    """Whether the request comes from an internal network.

    One that was passed on by a proxy nobody vouches for does not: that proxy's address says nothing
    of who asks.
    """
    networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network]
    networks = settings.ASSISTANT_INTERNAL_NETWORKS
    forwarded = request.headers.get("X-Forwarded-For", "")
    passed_on = forwarded or request.headers.get("Forwarded") or request.headers.get("X-Real-IP")
    if not networks or (passed_on and not settings.ASSISTANT_TRUSTED_PROXIES):
        return False
    found = client_address(request.META.get("REMOTE_ADDR", ""), forwarded)
    if found == UNKNOWN:
        return False
    address = ipaddress.ip_address(found)
    return any(address in network for network in networks)


def _is_staff(request: HttpRequest) -> bool:
    """Asked last: it reads the session, and a database that is away must not make this a 500."""
    try:
        user = request.user
        return bool(user.is_active and user.is_staff)
    except DatabaseError:
        return False


# --- Every request -------------------------------------------------------------------------------


def http_metrics_middleware(
    respond: Callable[[HttpRequest], HttpResponseBase],
) -> Callable[[HttpRequest], HttpResponseBase]:
    """Counts requests by the name of their view, which is from a closed set."""

    def counted(request: HttpRequest) -> HttpResponseBase:
        began = time.perf_counter()
        response = respond(request)
        try:
            _count(request, response.status_code, time.perf_counter() - began)
        except Exception as error:  # such as a full disk, with several processes
            log.error("a request was not counted: %s", type(error).__name__)
        return response

    return counted


def _count(request: HttpRequest, status: int, seconds: float) -> None:
    view, method = metrics.view_of(request), metrics.known(request.method or "", _METHODS)
    metrics.HTTP_REQUESTS.labels(view, method, str(status)).inc()
    metrics.HTTP_DURATION.labels(view).observe(seconds)
