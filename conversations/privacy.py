"""What people may take with them and what is forgotten: export and erasure of one caller's data.

An export is written page by page while it is sent, so its size is bounded by patience and not by
memory; no query stays open between two pages. Everything is reached through ``visible_to``.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.http import StreamingHttpResponse
from django.utils import timezone
from knox.models import AuthToken
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from assistant.errors import InvalidRequest
from assistant.threads import in_thread
from conversations import wire
from conversations.access import caller_of
from conversations.inputs import EraseBody, valid
from conversations.limits import Caller
from conversations.models import ApiToken, Conversation, Message, note_siblings
from conversations.running import stop_all
from conversations.views import own_conversation

#: Rows in memory at a time; an answer has at most 64,000 characters.
PAGE_ROWS = 100

# --- Taking it along -----------------------------------------------------------------------------


class ConversationExport(APIView):
    """One conversation as a file: JSON with every version, or Markdown as it is shown."""

    def get(self, request: Request, pk: uuid.UUID) -> StreamingHttpResponse:
        conversation = own_conversation(request, pk)
        kind = request.query_params.get("format", "json")
        if kind not in _WRITERS:
            raise InvalidRequest("format must be json or md.")
        media_type, write = _WRITERS[kind]
        return _download(write(conversation), f"conversation-{pk}.{kind}", media_type)


class OwnExport(APIView):
    """Everything that is kept of the caller, as one JSON file."""

    def get(self, request: Request) -> StreamingHttpResponse:
        parts = _everything(caller_of(request))
        return _download(parts, f"export-{timezone.now():%Y-%m-%d}.json", "application/json")


def _everything(caller: Caller) -> Iterator[str]:
    head: dict[str, Any] = {"exported_at": wire.time_json(timezone.now()), "user": _user(caller)}
    head["tokens"] = _tokens(caller)
    yield wire.encode(head).removesuffix("}") + ', "conversations": ['
    comma = ""
    for conversation in _conversations(caller):
        yield comma
        yield from _as_json(conversation)
        comma = ",\n"
    yield "]}\n"


def _as_json(conversation: Conversation) -> Iterator[str]:
    yield wire.encode(wire.conversation_json(conversation)).removesuffix("}") + ', "messages": ['
    comma = "\n"
    for message in _messages(conversation):
        yield comma + wire.encode(wire.message_json(message))
        comma = ",\n"
    yield "]}"


def _as_markdown(conversation: Conversation) -> Iterator[str]:
    title = " ".join(conversation.title.split()) or "Untitled conversation"
    yield f"# {title}\n\n{conversation.created_at:%Y-%m-%d %H:%M} UTC\n"
    names = {"user": "You", "assistant": settings.ASSISTANT["NAME"]}
    for message in _messages(conversation):
        if message.shown:
            who = message.author or names[message.role]
            yield f"\n## {who}, {message.created_at:%Y-%m-%d %H:%M}\n\n{message.text}\n"


_WRITERS: dict[str, tuple[str, Callable[[Conversation], Iterator[str]]]] = {
    "json": ("application/json", _as_json),
    "md": ("text/markdown; charset=utf-8", _as_markdown),
}


def _conversations(caller: Caller) -> Iterator[Conversation]:
    """All of the caller's, in pages; the order of their ids is one that does not move."""
    rows = Conversation.objects.visible_to(caller).order_by("pk")
    page = list(rows[:PAGE_ROWS])
    while page:
        yield from page
        page = list(rows.filter(pk__gt=page[-1].pk)[:PAGE_ROWS])


def _messages(conversation: Conversation) -> Iterator[Message]:
    rows = Message.objects.filter(conversation=conversation).select_related(*Message.BESIDE)
    after = 0
    while page := list(rows.filter(seq__gt=after).order_by("seq")[:PAGE_ROWS]):
        note_siblings(page)
        yield from page
        after = page[-1].seq


def _user(caller: Caller) -> dict[str, Any] | None:
    if caller.user_id is None:
        return None
    user = get_user_model().objects.get(pk=caller.user_id)
    return {
        "id": user.pk,
        "username": user.get_username(),
        "email": getattr(user, "email", ""),
        "joined_at": wire.time_json(user.date_joined),
    }


def _tokens(caller: Caller) -> list[dict[str, Any]]:
    """What is known of the caller's tokens; the tokens themselves are not."""
    return [
        {
            "name": getattr(token, "grant", ApiToken()).name,
            "starts_with": token.token_key,
            "created_at": wire.time_json(token.created),
            "expires_at": wire.time_json(token.expiry) if token.expiry else None,
        }
        for token in AuthToken.objects.filter(user=caller.user_id)
        .select_related("grant")
        .order_by("created")
    ]


# --- Sending it page by page ---------------------------------------------------------------------


def _download(parts: Iterator[str], name: str, media_type: str) -> StreamingHttpResponse:
    headers = {
        "Content-Disposition": f'attachment; filename="{name}"',
        "Cache-Control": "no-store",
        "X-Accel-Buffering": "no",
    }
    return StreamingHttpResponse(Written(parts), content_type=media_type, headers=headers)


class Written:
    """Parts of a file, each batch made in a worker thread; for the event loop to send.

    Not a sync iterator: under ASGI Django would read that to its end before the first byte.
    """

    BATCH_CHARS = 65_536

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts = parts

    def __aiter__(self) -> Written:
        return self

    async def __anext__(self) -> bytes:
        batch = await in_thread(self._batch)
        if not batch:
            raise StopAsyncIteration
        return batch

    def _batch(self) -> bytes:
        batch, chars = [], 0
        for part in self._parts:
            batch.append(part)
            chars += len(part)
            if chars >= self.BATCH_CHARS:
                break
        return "".join(batch).encode("utf-8", "replace")

    def close(self) -> None:
        with suppress(ValueError):  # a batch is being made; it is the last
            self._parts.close()  # type: ignore[attr-defined]


# --- Having it forgotten -------------------------------------------------------------------------


class OwnData(APIView):
    def delete(self, request: Request) -> Response:
        """Erases all that is kept of the caller but the account itself; asks to be sure."""
        valid(EraseBody(data=request.data))
        return Response({"erased": erase(caller_of(request))})


def erase(caller: Caller) -> dict[str, int]:
    """Conversations, messages, feedback and tokens of that caller; how many of each it were.

    Answers that are being written are stopped first, and find no row to be stored in.
    """
    stop_all(caller)
    erased: Counter[str] = Counter()
    mine = Conversation.objects.visible_to(caller)
    while batch := list(mine.values_list("pk", flat=True)[:PAGE_ROWS]):
        erased.update(mine.filter(pk__in=batch).delete()[1])
    if caller.user_id is not None:
        erased.update(AuthToken.objects.filter(user=caller.user_id).delete()[1])
    names = {
        "conversations": "conversations.Conversation",
        "messages": "conversations.Message",
        "feedback": "conversations.Feedback",
        "tokens": "knox.AuthToken",
    }
    return {name: erased[label] for name, label in names.items()}
