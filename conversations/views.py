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
from django.db.models import QuerySet
from django.http import (
    Http404,
    HttpRequest,
    HttpResponse,
    HttpResponseBase,
    JsonResponse,
    StreamingHttpResponse,
)
from django.shortcuts import render
from django.utils import timezone
from django.utils.cache import patch_cache_control, patch_vary_headers
from django.utils.decorators import method_decorator
from django.views import defaults
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import conditional_page
from rest_framework.pagination import CursorPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from assistant import backends
from assistant.errors import AssistantError, Conflict, InvalidRequest, NotFound
from conversations import wire
from conversations.access import VISITOR, GuardedLogin, caller_of, caller_of_page
from conversations.inputs import (
    AgainBody,
    ConversationQuery,
    FeedbackBody,
    MessageQuery,
    NewConversationBody,
    QuestionBody,
    TitleBody,
    valid,
)
from conversations.models import Conversation, Feedback, Message, note_siblings
from conversations.running import running, stop
from conversations.turn import Turn

# --- REST ----------------------------------------------------------------------------------------


class RecentFirst(CursorPagination):
    page_size, max_page_size, page_size_query_param = 50, 200, "page_size"
    ordering = ("-updated_at", "-id")
    #: What ``?ordering=`` may be, with or without a minus.
    fields: tuple[str, ...] = ("updated_at", "created_at", "title")

    def get_ordering(self, request: Request, queryset: Any, view: Any) -> tuple[str, ...]:
        asked = request.query_params.get("ordering")
        if asked is None:
            return self.ordering
        minus = "-" if asked.startswith("-") else ""
        if asked.removeprefix("-") not in self.fields:
            raise InvalidRequest(f"ordering must be one of {', '.join(self.fields)}, or -one.")
        return asked, f"{minus}id"


class InOrder(RecentFirst):
    page_size, ordering, fields = 100, ("seq",), ()  # type: ignore[assignment]

    def get_ordering(self, request: Request, queryset: Any, view: Any) -> tuple[str, ...]:
        return self.ordering


class NewestFirst(RecentFirst):
    ordering, fields = ("-created_at", "-id"), ("created_at",)


class Polled(APIView):
    """A view that may be asked again and again: what has not changed since is a 304."""

    polled = True

    def finalize_response(self, *args: Any, **kwargs: Any) -> HttpResponseBase:  # type: ignore[override]
        response = super().finalize_response(*args, **kwargs)
        if self.request.method == "GET":
            patch_vary_headers(response, ("Authorization", "Cookie"))
            patch_cache_control(response, private=True, no_cache=True)
        return response

    @method_decorator(conditional_page)
    def dispatch(self, *args: Any, **kwargs: Any) -> HttpResponseBase:
        return super().dispatch(*args, **kwargs)


class Conversations(Polled):
    def get(self, request: Request) -> Response:
        mine = Conversation.objects.visible_to(caller_of(request))
        rows = ConversationQuery(data=request.query_params).narrow(mine)
        pages = RecentFirst()
        page = pages.paginate_queryset(rows, request, view=self) or []
        return pages.get_paginated_response([wire.conversation_json(row) for row in page])

    def post(self, request: Request) -> Response:
        data = valid(NewConversationBody(data=request.data))
        caller = caller_of(request)
        created = Conversation.objects.create(
            user_id=caller.user_id, session_key=caller.session_key, title=data.get("title", "")
        )
        return Response(wire.conversation_json(created), status=201)


class ConversationDetail(Polled):
    def get(self, request: Request, pk: uuid.UUID) -> Response:
        return Response(wire.conversation_json(own_conversation(request, pk)))

    def patch(self, request: Request, pk: uuid.UUID) -> Response:
        conversation = own_conversation(request, pk)
        conversation.title = valid(TitleBody(data=request.data))["title"]
        conversation.save(update_fields=["title"])
        return Response(wire.conversation_json(conversation))

    def delete(self, request: Request, pk: uuid.UUID) -> Response:
        conversation = own_conversation(request, pk)
        turn = running.get(pk)
        if turn is not None:
            turn.close("interrupted")
        conversation.delete()
        return Response(status=204)


class Messages(Polled):
    def get(self, request: Request, pk: uuid.UUID) -> Response:
        rows = Message.objects.filter(conversation=own_conversation(request, pk))
        rows.reap()
        if request.query_params.get("siblings") != "1":
            rows = rows.on_the_page()
        return _listed(rows, InOrder(), self)

    def post(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """The answer: as one JSON object when it is complete, or as events while it is written."""
        data = valid(QuestionBody(data=request.data))
        transport = _transport(request, data)
        conversation = own_conversation(request, pk)
        turn = Turn.open(caller_of(request), conversation, data["text"], transport=transport)
        return _answered(turn)


def _transport(request: Request, data: dict[str, Any]) -> str:
    streams = data["stream"] or "text/event-stream" in request.headers.get("accept", "")
    return "sse" if streams else "rest"


def _answered(turn: Turn) -> HttpResponseBase:
    """The turn's answer when it is complete, or its events while it is written."""
    if turn.transport == "sse":
        return StreamingHttpResponse(
            wire.EventStream(turn.read()),
            content_type="text/event-stream",
            headers=wire.SSE_HEADERS,
        )
    message = async_to_sync(turn.result)()
    return Response(wire.message_json(message), headers={"X-Assistant-Route": message.route})


def _listed(rows: QuerySet[Message], pages: RecentFirst, view: APIView) -> Response:
    page = pages.paginate_queryset(rows.select_related("feedback"), view.request, view=view) or []
    note_siblings(page)
    return pages.get_paginated_response([wire.message_json(row) for row in page])


class OwnMessages(Polled):
    def get(self, request: Request) -> Response:
        """The caller's messages of all conversations, newest first; ``?search=`` finds words."""
        mine = Message.objects.visible_to(caller_of(request))
        return _listed(MessageQuery(data=request.query_params).narrow(mine), NewestFirst(), self)


class MessageRegenerate(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """Another answer to the same question; the one before is kept as its sibling."""
        transport = _transport(request, valid(AgainBody(data=request.data)))
        return _answered(Turn.regenerate(caller_of(request), pk, transport=transport))


class MessageEdit(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """The answer to that question put differently; what followed it is kept, not shown."""
        data = valid(QuestionBody(data=request.data))
        transport = _transport(request, data)
        return _answered(Turn.edit(caller_of(request), pk, data["text"], transport=transport))


class MessageCancel(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> Response:
        """202 if the answer is being stopped, 200 if it had ended before."""
        stopping = stop(_message(request, pk))
        return Response(wire.message_json(_message(request, pk)), status=202 if stopping else 200)


class MessageFeedback(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> Response:
        """The answer with what its reader thinks of it; said again, it replaces what was said."""
        data = valid(FeedbackBody(data=request.data))
        message = _message(request, pk)
        if message.role != Message.Role.ASSISTANT:
            raise InvalidRequest("Only answers are judged; this message is a question.")
        if message.status == Message.Status.STREAMING:
            raise Conflict("The answer is still being written.", retry_after_s=1)
        blank = {"reason": "", "text": "", "created_at": timezone.now()}
        Feedback.objects.update_or_create(message=message, defaults={**blank, **data})
        return Response(wire.message_json(_message(request, pk)))

    def delete(self, request: Request, pk: uuid.UUID) -> Response:
        """Takes it back; taking back nothing is fine."""
        Feedback.objects.filter(message=_message(request, pk)).delete()
        return Response(status=204)


def _message(request: Request, pk: uuid.UUID) -> Message:
    rows = Message.objects.visible_to(caller_of(request)).select_related("feedback")
    found = rows.filter(pk=pk).first()
    if found is None:
        raise NotFound("There is no such message.")
    note_siblings([found])
    return found


def own_conversation(request: Request, pk: uuid.UUID) -> Conversation:
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
    authentication_form = GuardedLogin
    redirect_authenticated_user = True
    extra_context = {"assistant_name": settings.ASSISTANT["NAME"]}

    def form_valid(self, form: AuthenticationForm) -> HttpResponse:
        visitor = self.request.session.get(VISITOR)
        if visitor:
            owned = Conversation.objects.filter(user=None, session_key=visitor)
            owned.update(user=form.get_user(), session_key="")
        return super().form_valid(form)

    def form_invalid(self, form: AuthenticationForm) -> HttpResponse:
        response = super().form_invalid(form)
        response.status_code = 429 if form.has_error("__all__", "rate_limited") else 200
        return response


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
