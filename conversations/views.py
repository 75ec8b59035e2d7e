"""REST, event streams and pages. A view builds the caller, calls one function and shapes the reply.

Rows are fetched through ``visible_to`` only, so another user's id is a 404 like any unknown one.
"""

from __future__ import annotations

import re
import uuid
from contextlib import suppress
from datetime import UTC
from functools import partial
from typing import Any

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
from django.utils.dateparse import parse_datetime
from django.utils.decorators import method_decorator
from django.views import csrf, defaults
from django.views.decorators.cache import never_cache
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import conditional_page
from rest_framework import exceptions
from rest_framework.pagination import CursorPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from assistant import backends
from assistant.errors import AssistantError, Conflict, InvalidRequest, NotFound
from assistant.threads import waited
from conversations import wire
from conversations.access import VISITOR, caller_of, caller_of_page
from conversations.idempotency import Once, run_once
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
from conversations.limits import Caller, take_conversation
from conversations.log import Completed, Failed, TurnEvent
from conversations.logins import WhileSignedIn
from conversations.models import Conversation, Feedback, Message, note_siblings
from conversations.opening import RESULT_FIELDS
from conversations.resume import MAX_SEQ, Stored, reader_of
from conversations.running import hurry, running, stop
from conversations.signing_in import GuardedLogin
from conversations.turn import Turn
from fallback import answers, breaker

# --- REST ----------------------------------------------------------------------------------------


class RecentFirst(CursorPagination):
    page_size, max_page_size, page_size_query_param = 50, 200, "page_size"
    ordering = ("-updated_at", "-id")
    #: Of rows that are equal in that order, such as those without a title; after DRF's thousand the
    #: same page would follow for ever.
    offset_cutoff = 1_000_000
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

    def decode_cursor(self, request: Request) -> Any:
        """DRF's; a position that was made up is not handed to the database."""
        cursor = super().decode_cursor(request)
        if (
            cursor is not None
            and cursor.position is not None
            and not self._fits(str(cursor.position))
        ):
            raise exceptions.NotFound(self.invalid_cursor_message)
        return cursor

    def _fits(self, position: str) -> bool:
        match self.ordering[0].removeprefix("-"):
            case "seq":
                return bool(re.fullmatch(r"[0-9]{1,9}", position))
            case "title":
                return "\0" not in position
        with suppress(ValueError, OverflowError):  # the latter at both ends of the calendar
            moment = parse_datetime(position)
            return moment is not None and bool(moment.tzinfo and moment.astimezone(UTC))
        return False


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
        take_conversation(caller)
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
        caller, text, once = caller_of(request), data["text"], _once(request, "create", None, data)
        begin = partial(Turn.open, caller, conversation, text, transport=transport, once=once)
        return _answered(request, run_once(pk, once, begin), transport)


def _transport(request: Request, data: dict[str, Any]) -> str:
    streams = data["stream"] or "text/event-stream" in request.headers.get("accept", "")
    return "sse" if streams else "rest"


def _once(
    request: Request, kind: str, about: uuid.UUID | None, data: dict[str, Any]
) -> Once | None:
    """The request's name, if it has one, as a frame of that type would have it."""
    key = request.headers.get("idempotency-key")
    return Once.of(key, f"message.{kind}", about, data.get("text", ""))


def _conversation_of(caller: Caller, message_id: uuid.UUID) -> uuid.UUID:
    found = Message.objects.visible_to(caller).filter(pk=message_id)
    conversation: uuid.UUID | None = found.values_list("conversation_id", flat=True).first()
    if conversation is None:
        raise NotFound("There is no such message.")
    return conversation


def _answered(request: Request, begun: Turn | Message, transport: str) -> HttpResponseBase:
    """The turn's answer when it is complete, or its events while it is written."""
    if isinstance(begun, Message):
        return _answered_again(request, begun, transport)
    limits = wire.limit_headers(begun.caller.standings, "")
    if transport == "sse":
        return _streamed(request, begun.read(), limits)
    message = waited(begun.result)
    headers = {"X-Assistant-Route": message.route, **limits}
    return Response(wire.message_json(message), headers=headers)


def _answered_again(request: Request, message: Message, transport: str) -> HttpResponseBase:
    """The same to a request that came before: from where its answer is being written, or kept."""
    again = {"Idempotent-Replayed": "true"}
    if transport == "sse":
        return _streamed(request, reader_of(message, 0) or Stored(message, 0), again)
    turn = running.get(message.conversation_id)
    if turn is not None and turn.message.pk == message.pk:
        message = waited(turn.result)
    else:
        message.refresh_from_db(fields=list(RESULT_FIELDS))  # it may have ended a moment ago
        note_siblings([message])
    headers = {"X-Assistant-Route": message.route, **again}
    return Response(wire.message_json(message), headers=headers)


def _streamed(
    request: Request, reader: wire.Readable, headers: dict[str, str]
) -> StreamingHttpResponse:
    write = _sse_of_row if isinstance(reader, Stored) else wire.sse
    return StreamingHttpResponse(
        wire.EventStream(WhileSignedIn(reader, request), write),
        content_type="text/event-stream",
        headers={**wire.SSE_HEADERS, **headers},
    )


def _sse_of_row(event: TurnEvent) -> bytes:
    """Its end is known as the last there can be, or a browser would ask for what follows it, get
    the end once more under the next number, and ask again."""
    return wire.sse(event, MAX_SEQ if isinstance(event, Completed | Failed) else None)


def _listed(rows: QuerySet[Message], pages: RecentFirst, view: APIView) -> Response:
    rows = rows.select_related(*Message.BESIDE)
    page = pages.paginate_queryset(rows, view.request, view=view) or []
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
        data, caller = valid(AgainBody(data=request.data)), caller_of(request)
        transport, once = _transport(request, data), _once(request, "regenerate", pk, data)
        begin = partial(Turn.regenerate, caller, pk, transport=transport, once=once)
        begun = run_once(_conversation_of(caller, pk), once, begin)
        return _answered(request, begun, transport)


class MessageEdit(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """The answer to that question put differently; what followed it is kept, not shown."""
        data, caller = valid(QuestionBody(data=request.data)), caller_of(request)
        transport, once = _transport(request, data), _once(request, "edit", pk, data)
        begin = partial(Turn.edit, caller, pk, data["text"], transport=transport, once=once)
        begun = run_once(_conversation_of(caller, pk), once, begin)
        return _answered(request, begun, transport)


class MessageEvents(APIView):
    def get(self, request: Request, pk: uuid.UUID) -> HttpResponseBase:
        """An answer's events, while it is written or later, after the one named in
        ``Last-Event-ID``. 204: there are no more, which ends a browser's ``EventSource``."""
        rows = Message.objects.visible_to(caller_of(request))
        related = rows.select_related("conversation", "parent", *Message.BESIDE)
        message = related.filter(pk=pk, role=Message.Role.ASSISTANT).first()
        if message is None:
            raise NotFound("There is no such answer.")
        reader = reader_of(message, _last_event(request))
        return Response(status=204) if reader is None else _streamed(request, reader, {})


def _last_event(request: Request) -> int:
    """The number of the event that the client saw last. Raises: InvalidRequest."""
    given = request.headers.get("last-event-id", "0")
    if not re.fullmatch(r"[0-9]{1,6}", given) or int(given) > MAX_SEQ:
        raise InvalidRequest(
            f"Last-Event-ID must be the id of an event, a whole number up to {MAX_SEQ:,}."
        )
    return int(given)


class MessageCancel(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> Response:
        """202 if the answer is being stopped, 200 if it had ended before."""
        stopping = stop(_message(request, pk))
        return Response(wire.message_json(_message(request, pk)), status=202 if stopping else 200)


class MessageHurry(APIView):
    def post(self, request: Request, pk: uuid.UUID) -> Response:
        """202 if what is known answers now instead of who was waited for; 200 if its first words
        were there before."""
        hurrying = hurry(_message(request, pk))
        return Response(wire.message_json(_message(request, pk)), status=202 if hurrying else 200)


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
    rows = Message.objects.visible_to(caller_of(request)).select_related(*Message.BESIDE)
    found = rows.filter(pk=pk).first()
    if found is None:
        raise NotFound("There is no such message.")
    note_siblings([found])
    return found


def own_conversation(request: Request, pk: uuid.UUID) -> Conversation:
    found = Conversation.objects.own(caller_of(request), pk)
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
    answers.known()  # the rules learn from their sentences for a second: not on a first question
    shown = problem if settings.DEBUG or getattr(request.user, "is_staff", False) else ""
    return render(
        request,
        "conversations/chat.html",
        {
            "conversation_id": pk,
            "assistant_name": settings.ASSISTANT["NAME"],
            "max_text_chars": settings.ASSISTANT_MAX_TEXT_CHARS,
            "model_ready": not problem,
            "maintenance": breaker.notice(),
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
        if form.has_error("__all__", "rate_limited"):
            response.status_code = 429
            response["Retry-After"] = str(getattr(form, "wait_s", 1))
            told = form.errors.get("__all__", [""])[0]
            page = _error_page(self.request, "rate_limited", 429, str(told), response)
            page["Retry-After"] = response["Retry-After"]
            return page
        return response


class LogoutView(auth_views.LogoutView):
    """Django's: POST only."""


# --- Errors outside DRF --------------------------------------------------------------------------


def _error_page(
    request: HttpRequest, code: str, status: int, detail: str, page: HttpResponse
) -> HttpResponse:
    """A problem for programs, and the page for people."""
    accepts = request.headers.get("accept", "")
    program = "json" in accepts and "text/html" not in accepts
    if not program and not request.path.startswith(("/api/", "/v1")):
        return page
    body = wire.problem(code, status, detail, request)
    return JsonResponse(body, status=status, content_type="application/problem+json")


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    page = defaults.bad_request(request, exception)
    return _error_page(request, "invalid_request", 400, "The request is malformed.", page)


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    page = defaults.page_not_found(request, exception)
    return _error_page(request, "not_found", 404, "There is nothing at this address.", page)


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    page = defaults.permission_denied(request, exception)
    return _error_page(request, "permission_denied", 403, "This is not for you.", page)


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    page = csrf.csrf_failure(request, reason)
    told = "The CSRF token is missing or wrong. Load the page again, or use a bearer token."
    return _error_page(request, "permission_denied", 403, told, page)


def server_error(request: HttpRequest) -> HttpResponse:
    page = defaults.server_error(request)
    return _error_page(request, "internal", 500, "Something broke here.", page)
