"""REST, event streams and pages. A view builds the caller, calls one function and shapes the reply.

Rows are fetched through ``visible_to`` only, so another user's id is a 404 like any unknown one.
"""

from __future__ import annotations

import uuid
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth import views as auth_views
from django.contrib.auth.forms import AuthenticationForm
from django.contrib.auth.views import redirect_to_login
from django.core.cache import caches
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
    StreamingHttpResponse,
)
from django.shortcuts import render
from django.views import defaults
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import ensure_csrf_cookie
from rest_framework import serializers
from rest_framework.pagination import CursorPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from assistant import backends
from assistant.errors import AssistantError, InvalidRequest, NotFound
from conversations import wire
from conversations.access import VISITOR, caller_of, caller_of_page
from conversations.limits import valid_text
from conversations.models import Conversation, Message
from conversations.running import running, stop
from conversations.turn import Turn

# --- What may be sent ----------------------------------------------------------------------------


class Text(serializers.CharField):
    """A string, and nothing that could be made into one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(trim_whitespace=False, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        if not isinstance(data, str):
            self.fail("invalid")
        return super().to_internal_value(data)


class Body(serializers.Serializer[Any]):
    """Refuses fields it does not know: a client that sends ``role`` should hear that it is not."""

    def to_internal_value(self, data: Any) -> Any:
        unknown = set(data) - set(self.fields) if isinstance(data, dict) else ()
        if unknown:
            raise serializers.ValidationError(
                {str(name)[:50]: ["There is no such field."] for name in sorted(unknown)[:10]}
            )
        return super().to_internal_value(data)


class TitleBody(Body):
    title = Text(max_length=200)

    def validate_title(self, title: str) -> str:
        try:
            return valid_text(title, limit=200).strip()
        except InvalidRequest as error:
            raise serializers.ValidationError(error.message) from None


class NewConversationBody(TitleBody):
    title = Text(max_length=200, required=False)


class QuestionBody(Body):
    text = Text(allow_blank=True)  # judged by ``limits``, like on every other transport
    stream = serializers.BooleanField(required=False, default=False)


def _valid(body: Body) -> dict[str, Any]:
    body.is_valid(raise_exception=True)
    data: dict[str, Any] = body.validated_data
    return data


# --- REST ----------------------------------------------------------------------------------------


class RecentFirst(CursorPagination):
    page_size, max_page_size, page_size_query_param = 50, 200, "page_size"
    ordering = ("-updated_at", "-id")


class InOrder(RecentFirst):
    page_size, ordering = 100, ("seq",)  # type: ignore[assignment]


class Conversations(APIView):
    def get(self, request: Request) -> Response:
        pages = RecentFirst()
        rows = Conversation.objects.visible_to(caller_of(request))
        page = pages.paginate_queryset(rows, request, view=self) or []
        return pages.get_paginated_response([wire.conversation_json(row) for row in page])

    def post(self, request: Request) -> Response:
        data = _valid(NewConversationBody(data=request.data))
        caller = caller_of(request)
        created = Conversation.objects.create(
            user_id=caller.user_id, session_key=caller.session_key, title=data.get("title", "")
        )
        return Response(wire.conversation_json(created), status=201)


class ConversationDetail(APIView):
    def get(self, request: Request, pk: uuid.UUID) -> Response:
        return Response(wire.conversation_json(_conversation(request, pk)))

    def patch(self, request: Request, pk: uuid.UUID) -> Response:
        conversation = _conversation(request, pk)
        conversation.title = _valid(TitleBody(data=request.data))["title"]
        conversation.save(update_fields=["title"])
        return Response(wire.conversation_json(conversation))

    def delete(self, request: Request, pk: uuid.UUID) -> Response:
        conversation = _conversation(request, pk)
        turn = running.get(pk)
        if turn is not None:
            turn.close("interrupted")
        conversation.delete()
        return Response(status=204)


class Messages(APIView):
    def get(self, request: Request, pk: uuid.UUID) -> Response:
        rows = Message.objects.filter(conversation=_conversation(request, pk))
        rows.reap()
        pages = InOrder()
        page = pages.paginate_queryset(rows, request, view=self) or []
        return pages.get_paginated_response([wire.message_json(row) for row in page])

    def post(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """The answer: as one JSON object when it is complete, or as events while it is written."""
        data = _valid(QuestionBody(data=request.data))
        streams = data["stream"] or "text/event-stream" in request.headers.get("accept", "")
        conversation = _conversation(request, pk)
        turn = Turn.open(
            caller_of(request), conversation, data["text"], transport="sse" if streams else "rest"
        )
        if streams:
            return StreamingHttpResponse(
                wire.EventStream(turn.read()),
                content_type="text/event-stream",
                headers=wire.SSE_HEADERS,
            )
        message = async_to_sync(turn.result)()
        return Response(wire.message_json(message), headers={"X-Assistant-Route": message.route})


class MessageCancel(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> Response:
        """202 if the answer is being stopped, 200 if it had ended before."""
        message = Message.objects.visible_to(caller_of(request)).filter(pk=pk).first()
        if message is None:
            raise NotFound("There is no such message.")
        stopping = stop(message)
        message.refresh_from_db()
        return Response(wire.message_json(message), status=202 if stopping else 200)


def _conversation(request: Request, pk: uuid.UUID) -> Conversation:
    found = Conversation.objects.visible_to(caller_of(request)).filter(pk=pk).first()
    if found is None:
        raise NotFound("There is no such conversation.")
    return found


# --- Pages ---------------------------------------------------------------------------------------


@never_cache
@ensure_csrf_cookie
def chat(request: HttpRequest, pk: uuid.UUID | None = None) -> HttpResponseBase:
    """The chat page, empty or on one of the caller's conversations."""
    caller = caller_of_page(request)
    if caller is None:
        return redirect_to_login(request.get_full_path())
    if pk is not None and not Conversation.objects.visible_to(caller).filter(pk=pk).exists():
        raise Http404
    problem = _model_problem()
    shown = problem if settings.DEBUG or getattr(request.user, "is_staff", False) else ""
    return render(
        request,
        "conversations/chat.html",
        {
            "conversation_id": pk,
            "assistant_name": settings.ASSISTANT["NAME"],
            "max_text_chars": settings.ASSISTANT_MAX_TEXT_CHARS,
            "model_ready": not problem,
            "model_problem": shown,  # it names files: for those who can mend it
            "examples": settings.ASSISTANT["EXAMPLES"],
            "anonymous": caller.user_id is None,
        },
    )


def _model_problem() -> str:
    """Why the model cannot answer, or nothing. The first call loads it: the page warms it up."""
    cache = caches["local"]
    known: str | None = cache.get("model-problem")
    if known is not None:
        return known
    alias = backends.answering()
    try:
        if alias is not None:
            backends.get(alias).check()
        return ""
    except AssistantError as error:
        cache.set("model-problem", error.message, 15)  # do not hash a broken file for every page
        return error.message


class LoginView(auth_views.LoginView):
    """Django's; what a visitor asked before signing in becomes theirs."""

    template_name = "conversations/login.html"
    redirect_authenticated_user = True
    extra_context = {"assistant_name": settings.ASSISTANT["NAME"]}

    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        visitor = self.request.session.get(VISITOR)
        if visitor:
            owned = Conversation.objects.filter(user=None, session_key=visitor)
            owned.update(user=form.get_user(), session_key="")
        return super().form_valid(form)


class LogoutView(auth_views.LogoutView):
    """Django's: POST only."""


def livez(request: HttpRequest) -> HttpResponse:
    """The process answers; nothing else is asked."""
    return HttpResponse("ok", content_type="text/plain")


# --- Errors outside DRF --------------------------------------------------------------------------


def _error_page(
    request: HttpRequest, code: str, status: int, detail: str, page: HttpResponse
) -> HttpResponse:
    if not request.path.startswith("/api/"):
        return page
    body = wire.problem(code, status, detail, request)
    return JsonResponse(body, status=status, content_type="application/problem+json")


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    page = defaults.bad_request(request, exception)
    return _error_page(request, "invalid_request", 400, "The request is malformed.", page)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    page = defaults.page_not_found(request, exception)
    return _error_page(request, "not_found", 404, "There is nothing at this address.", page)


def server_error(request: HttpRequest) -> HttpResponse:
    page = defaults.server_error(request)
    return _error_page(request, "internal", 500, "Something broke here.", page)
