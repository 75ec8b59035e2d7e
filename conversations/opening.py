"""The database half of a turn: what is read and stored before the first byte of an answer.

Sync, and all or nothing: a question is stored together with its empty answer, in one order for all
processes, or one of our errors is raised and nothing is. Knows no task, reader or transport.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction
from django.db.models import Value
from django.db.models.functions import Coalesce, NullIf
from django.utils import timezone

from assistant import backends, facts, types
from assistant.errors import AssistantError, Conflict, ContextTooLong, InvalidRequest, NotFound
from conversations import history, limits
from conversations.compiled import Compiled
from conversations.idempotency import Once, claim
from conversations.limits import Caller
from conversations.models import Conversation, Feedback, Message, note_siblings
from fallback import answers
from fallback.router import Ask

#: Both a reason in the row and the name of the model's own intent for it.
OUT_OF_SCOPE = "out_of_scope"
#: Earlier messages looked at; more never fit a context of 1,024 tokens.
MAX_EARLIER = 60
TITLE_CHARS = 80
#: What no conversation has; the column's own bound.
MOST_MESSAGES = 2**31 - 1
#: Another answer to the same question: varied, and still from the words the model is sure of.
AGAIN_TEMPERATURE, AGAIN_TOP_P = 0.7, 0.9
#: The columns that say how an answer ended.
RESULT_FIELDS = (
    *("text", "html", "status", "route", "degraded_reason", "intent", "confidence", "scope"),
    *("model", "input_tokens", "output_tokens", "ttft_ms", "duration_ms", "finish_reason"),
    *("error_code", "error_message", "buttons"),
)
_USABLE = {Message.Status.COMPLETE, Message.Status.STOPPED}
_RETRYABLE = {Message.Status.FAILED, Message.Status.INTERRUPTED, Message.Status.STOPPED}


@dataclass(frozen=True, slots=True)
class Opened:
    """The rows (``question`` is None on a retry) and all the router needs."""

    conversation: Conversation
    question: Message | None
    answer: Message
    ask: Ask
    stored: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """A conversation that the caller brings along: questions with their answers, oldest first.

    ``whole``: refuse what does not fit, instead of leaving out the oldest of it.
    """

    question: str
    earlier: tuple[tuple[types.Message, types.Message], ...] = ()
    system: str = ""
    whole: bool = False


def first_run(
    caller: Caller,
    conversation: Conversation | None,
    text: str,
    params: types.Params | None,
    once: Once | None = None,
) -> Opened:
    """A new question. Raises: AssistantError."""
    rows = _recent(conversation)
    ask = _ask_of(caller, Said(text, tuple(_pairs(rows))), params or _params())
    last = rows[0] if rows else None
    opened = _store_question(caller, conversation, text, ask, once, last)
    return replace(opened, ask=_stuck(ask, opened.conversation))


def another_run(caller: Caller, message_id: uuid.UUID) -> Opened:
    """An answer that broke off, to be written again in its place. Raises: AssistantError."""
    message = _retryable(caller, message_id)
    limits.take(caller)
    asked = _question_of(message)
    ask = _ask(caller, asked, asked.text, _params())
    return _store_retry(message, _stuck(ask, message.conversation))


def passing_run(caller: Caller, said: Said, params: types.Params, steps: tuple[str, ...]) -> Opened:
    """Rows that are never stored, for a conversation the caller brings. Raises: ContextTooLong."""
    ask = replace(_ask_of(caller, said, params), steps=steps)
    conversation = Conversation(user_id=caller.user_id, session_key=caller.session_key)
    answer = Message(conversation=conversation, seq=1, role="assistant", status="streaming")
    return Opened(conversation, None, answer, ask, stored=False)


def new_version(
    caller: Caller, message_id: uuid.UUID, text: str | None, once: Once | None = None
) -> Opened:
    """Another answer (``text`` None, the id an answer's), or the question put differently.

    What was there stays, with all that followed it, and is not shown any more.
    Raises: AssistantError.
    """
    message = _replaceable(caller, message_id, "assistant" if text is None else "user")
    limits.take(caller)
    asked = _question_of(message) if text is None else message
    ask = _ask(caller, asked, text or asked.text, _again(text))
    return _store_version(caller, message, text, _stuck(ask, message.conversation), once)


def _stuck(ask: Ask, conversation: Conversation) -> Ask:
    """All of a conversation is answered by one version of the model, while two are on trial."""
    return replace(ask, params=replace(ask.params, sticky=str(conversation.pk)))


def _again(text: str | None) -> types.Params:
    """The same question once more is meant to be answered differently."""
    params = _params()
    return params if text else replace(params, temperature=AGAIN_TEMPERATURE, top_p=AGAIN_TOP_P)


def _ask(caller: Caller, asked: Message, question: str, params: types.Params) -> Ask:
    """Everything the router needs for ``question`` in the place of that one.

    Raises: ContextTooLong.
    """
    earlier = _pairs(_recent(asked.conversation, asked.seq))
    return _ask_of(caller, Said(question, tuple(earlier)), params)


def _ask_of(caller: Caller, said: Said, params: types.Params) -> Ask:
    """The same, of what was said. Raises: ContextTooLong."""
    known = {**facts.known_facts(_user(caller)), **params.facts}
    params = replace(params, scope=caller.key, sticky=caller.key, facts=known)
    count, budget = _measure(params)
    system = _system(said.system, budget, count)
    budget -= sum(count(message.text) + history.TOKENS_PER_MESSAGE for message in system)
    messages = history.fit(said.earlier, said.question, budget_tokens=budget, count=count)
    if said.whole and len(messages) < 2 * len(said.earlier) + 1:
        raise ContextTooLong("The conversation is too long to be read whole. Shorten it.")
    told = (*system, *messages)
    return Ask(told, params, answers.known(), languages=caller.languages)


def _system(text: str, budget: int, count: Callable[[str], int]) -> list[types.Message]:
    """The system's text as a message, if the answering model was made to read one.

    Raises: ContextTooLong if it leaves no room for a question.
    """
    alias = backends.answering()
    if not text or alias is None:
        return []
    try:
        if not backends.get(alias).reads_system():
            return []
    except AssistantError:
        return []  # no model: rules answer, and they read only the question
    if count(text) + history.TOKENS_PER_MESSAGE >= budget:
        raise ContextTooLong("The system's text leaves no room for a question. Shorten it.")
    return [types.Message("system", text)]


def _params() -> types.Params:
    return types.Params(max_new_tokens=settings.ASSISTANT["MAX_NEW_TOKENS"])


def _user(caller: Caller) -> Any:
    """The signed-in user, read only if a function of the product wants to know facts of them."""
    if caller.user_id is None or not settings.ASSISTANT.get("FACT_FUNCTIONS"):
        return None
    return get_user_model().objects.filter(pk=caller.user_id).first()


def _measure(params: types.Params) -> tuple[Callable[[str], int], int]:
    """How the answering backend counts, and what it can read beside the answer, which gets no more
    than half of its context: a longer one ends where the context does."""
    alias = backends.answering()
    if alias is not None:
        try:
            backend = backends.get(alias)
            room = backend.context_tokens()
            backend.count_tokens("")
            return backend.count_tokens, room - min(params.max_new_tokens, room // 2)
        except AssistantError:
            pass  # no model: rules answer, and they read only the question
    return (lambda text: len(text) // 3 + 1), settings.ASSISTANT_MAX_TEXT_CHARS


def _recent(conversation: Conversation | None, before: int = MOST_MESSAGES) -> list[Message]:
    """What is shown of it, newest first; all that could fit."""
    return [] if conversation is None else _shown_before(conversation.pk, before)


_shown_before = Compiled(
    lambda pk, before: (
        Message.objects.on_the_page()
        .filter(conversation=pk)
        .filter(seq__lt=before)
        .order_by("-seq")
        .only(*("seq", "role", "text", "intent", "degraded_reason", "status", "author"))[
            :MAX_EARLIER
        ]
    ),
    Conversation._meta.get_field("id"),
    Message._meta.get_field("seq"),
)


def _pairs(rows: Sequence[Message]) -> list[tuple[types.Message, types.Message]]:
    """Questions with an answer that people saw, oldest first, of rows that are newest first."""
    pairs: list[tuple[types.Message, types.Message]] = []
    answer: Message | None = None
    added: list[str] = []  # what a person of the staff wrote below the answer
    for row in rows:
        if row.author:
            added.insert(0, row.text)
        elif row.role == Message.Role.ASSISTANT:
            answer = row if row.text and row.status in _USABLE else None
        else:
            if answer is not None:
                text = "\n\n".join([answer.text, *added])
                said = types.Message("assistant", text, _answered_as(answer))
                pairs.append((types.Message("user", row.text), said))
            answer, added = None, []
    return pairs[::-1]


def said_before(answer: Message) -> Said:
    """The question of that answer, which is shown, and what was said before it.

    Raises: NotFound if the question is gone.
    """
    asked = _question_of(answer)
    return Said(asked.text, tuple(_pairs(_recent(answer.conversation, asked.seq))))


def _answered_as(answer: Message) -> str | None:
    """The intent the answer was written under: a polite refusal keeps its question's own beside."""
    return OUT_OF_SCOPE if answer.degraded_reason == OUT_OF_SCOPE else answer.intent or None


def _store_question(
    caller: Caller,
    conversation: Conversation | None,
    question: str,
    ask: Ask,
    once: Once | None,
    last: Message | None,
) -> Opened:
    """Question and empty answer, in order and together. Raises: Conflict, NotFound.

    That ``last``, read with the history, is still the last row and that no other answer is being
    written are constraints, which cost no statement: only when one is hurt is the last row looked
    for again, and a writer that died.
    """
    try:
        rows = _stored_question(caller, conversation, question, once, last)
    except IntegrityError:
        if conversation is None:
            raise _busy() from None
        conversation.messages.reap()
        try:
            rows = _stored_question(caller, conversation, question, once, None)
        except IntegrityError:
            raise _busy() from None
    return Opened(*rows, ask)


def _stored_question(
    caller: Caller,
    conversation: Conversation | None,
    question: str,
    once: Once | None,
    last: Message | None,
) -> tuple[Conversation, Message, Message]:
    """Raises: IntegrityError, Conflict, NotFound; then nothing is stored."""
    with transaction.atomic():
        held = _held(caller, conversation, question)
        before, seq = (last, last.seq) if last is not None else _last(held)
        asked = _question(held, before, question, seq)
        claim(asked, once)
        answer = _empty_answer(asked)
        Message.objects.bulk_create([asked, answer])
    return held, asked, answer


def _last(held: Conversation) -> tuple[Message | None, int]:
    """The last row that is shown, and the number of the last one."""
    columns = ("seq", "shown", "conversation_id")
    last = held.messages.order_by("-seq").only(*columns).first()
    if last is None or last.shown:
        return last, last.seq if last else 0
    return held.messages.on_the_page().order_by("-seq").first(), last.seq


def _question(held: Conversation, after: Message | None, text: str, last: int) -> Message:
    return Message(conversation=held, seq=last + 1, parent=after, role="user", text=text)


def _empty_answer(asked: Message, seq: int | None = None) -> Message:
    return Message(
        conversation=asked.conversation,
        seq=seq or asked.seq + 1,
        parent=asked,
        role="assistant",
        status=Message.Status.STREAMING,
        alive_at=timezone.now(),
    )


def _held(caller: Caller, conversation: Conversation | None, question: str) -> Conversation:
    """The conversation, locked by writing it; a new one if there was none. Raises: NotFound."""
    title = " ".join(question.split())[:TITLE_CHARS]
    if conversation is None:
        return Conversation.objects.create(
            user_id=caller.user_id, session_key=caller.session_key, title=title
        )
    changes: dict[str, Any] = {"updated_at": timezone.now()}
    if not conversation.title:  # unless it was given one since it was read
        changes["title"] = Coalesce(NullIf("title", Value("")), Value(title))
    if not Conversation.objects.filter(pk=conversation.pk).update(**changes):
        raise NotFound("This conversation does not exist any more.")
    conversation.title = conversation.title or title
    conversation.updated_at = changes["updated_at"]
    return conversation


def _busy() -> Conflict:
    return Conflict(
        "An answer is being written in this conversation. Stop it or wait for its end.",
        retry_after_s=1,
    )


def _retryable(caller: Caller, message_id: uuid.UUID) -> Message:
    found = Message.objects.visible_to(caller).on_the_page().select_related("conversation")
    message = found.filter(pk=message_id, role=Message.Role.ASSISTANT).first()
    if message is None:
        raise NotFound("There is no such answer.")
    Message.objects.filter(pk=message.pk).reap()
    message.refresh_from_db(fields=["status"])
    if message.status == Message.Status.STREAMING:
        raise _busy()
    if message.status not in _RETRYABLE:
        raise InvalidRequest("Only an answer that was stopped or broke off can be tried again.")
    return message


def _replaceable(caller: Caller, message_id: uuid.UUID, role: str) -> Message:
    """A message of the branch that is shown, in a conversation where nothing is being written."""
    found = Message.objects.visible_to(caller).select_related("conversation", "parent")
    message = found.filter(pk=message_id).first()
    if message is None:
        raise NotFound("There is no such message.")
    if message.role != role:
        raise InvalidRequest("An answer can be regenerated, a question can be edited.")
    if message.author:
        raise InvalidRequest("A person wrote this, so it cannot be written again. Ask a question.")
    if not message.shown:
        raise InvalidRequest("This message was replaced. Only what is shown can be changed.")
    return message


def _store_version(
    caller: Caller, message: Message, text: str | None, ask: Ask, once: Once | None
) -> Opened:
    """The new version and its answer, after all that is there. Raises: Conflict, NotFound."""
    try:
        with transaction.atomic():
            held = _held(caller, message.conversation, text or "")
            held.messages.reap()
            if held.messages.filter(status=Message.Status.STREAMING).exists():
                raise _busy()
            rows = held.messages.on_the_page().filter(seq__gte=message.seq)
            if not rows.filter(pk=message.pk).exists():
                raise _busy()  # replaced meanwhile, by another tab
            _link(held)
            rows.update(shown=False)
            message.refresh_from_db(fields=["parent"])
            last = held.messages.order_by("-seq").values_list("seq", flat=True)[0]
            new = _question(held, message.parent, text or "", last)
            if text is None:
                new = _empty_answer(_question_of(message), new.seq)
            claim(new, once)
            added = [new] if text is None else [new, _empty_answer(new)]
            Message.objects.bulk_create(added)
            note_siblings(added)
    except IntegrityError:
        raise _busy() from None
    return Opened(held, new if text else None, added[-1], ask)


def _link(held: Conversation) -> None:
    """Rows from elsewhere have no parent: before there are versions, each gets one."""
    rows = list(held.messages.on_the_page().order_by("seq").only("pk", "parent_id"))
    loose = [(before, row) for before, row in pairwise(rows) if row.parent_id is None]
    for before, row in loose:
        row.parent_id = before.pk
    Message.objects.bulk_update([row for _, row in loose], ["parent"])


def _question_of(message: Message) -> Message:
    """What that answers. Rows without a parent are from elsewhere: the question just before it."""
    if message.parent is not None:
        return message.parent
    asked = message.conversation.messages.filter(seq__lt=message.seq, role=Message.Role.USER)
    question = asked.order_by("-seq").first()
    if question is None:
        raise NotFound("The question of this answer does not exist any more.")
    return question


def _store_retry(message: Message, ask: Ask) -> Opened:
    """The same row, empty and running again. Raises: Conflict."""
    blank = Message(status=Message.Status.STREAMING, alive_at=timezone.now())
    values: dict[str, Any] = {name: getattr(blank, name) for name in RESULT_FIELDS}
    try:
        with transaction.atomic():
            row = Message.objects.filter(
                pk=message.pk, attempt=message.attempt, status__in=_RETRYABLE
            )
            if not row.update(**values, alive_at=blank.alive_at, attempt=message.attempt + 1):
                raise _busy()
            Feedback.objects.filter(message=message).delete()  # it was about the old text
    except IntegrityError:
        raise _busy() from None
    fresh = Message.objects.select_related("conversation").get(pk=message.pk)
    return Opened(fresh.conversation, None, fresh, ask)
