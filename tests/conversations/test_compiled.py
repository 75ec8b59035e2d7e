"""Compiled queries give what the queries themselves give, for any values and in any thread."""

from __future__ import annotations

import threading
import uuid

import pytest
from django.contrib.auth.models import User
from django.db import connection

from conversations.compiled import Compiled
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.tokens import issue


def own() -> Compiled[Conversation]:
    return Compiled(
        lambda user_id, pk: Conversation.objects.filter(user_id=user_id).filter(pk=pk),
        Conversation._meta.get_field("user"),
        Conversation._meta.get_field("id"),
    )


@pytest.mark.django_db
def test_each_call_has_its_own_values_and_fresh_rows(ana: User, ben: User) -> None:
    query = own()
    mine, theirs = (Conversation.objects.create(user=user, title="a") for user in (ana, ben))
    assert query(ana.pk, mine.pk) == [mine] and query(ben.pk, theirs.pk) == [theirs]
    assert query(ana.pk, theirs.pk) == [] == query(ana.pk, uuid.uuid4())
    Conversation.objects.update(title="b")
    (found,) = query(ana.pk, mine.pk)
    assert (found.title, found.created_at, found.pk) == ("b", mine.created_at, mine.pk)


@pytest.mark.django_db
def test_one_caller_never_finds_the_conversation_of_another(ana: User, ben: User) -> None:
    visitors = Caller(None, "visitor"), Caller(None, "another"), Caller(None)
    callers = [Caller(ana.pk), Caller(ben.pk), *visitors]
    rows = [
        Conversation.objects.create(user_id=caller.user_id, session_key=caller.session_key)
        for caller in callers[:4]
    ]
    for caller in callers:
        found = [row for row in rows if Conversation.objects.own(caller, row.pk)]
        assert found == [row for row in rows if rows.index(row) == callers.index(caller)]


@pytest.mark.django_db
def test_rows_beside_it_and_columns_left_out_are_as_in_the_query(
    ana: User, django_assert_num_queries: object
) -> None:
    from knox.models import AuthToken

    from conversations import opening
    from conversations.access import _tokens_named

    issue(ana, "x", ["read"])
    bare = AuthToken.objects.create(ana)[0]
    token = AuthToken.objects.get(grant__name="x")
    with django_assert_num_queries(2):  # type: ignore[operator]
        (found,), (other,) = _tokens_named(token.token_key), _tokens_named(bare.token_key)
        assert (found.user, found.grant.name) == (ana, "x")
        assert not hasattr(other, "grant")
    held = Conversation.objects.create(user=ana)
    for seq in range(1, 5):
        held.messages.create(seq=seq, role="user", text=f"{seq}", shown=seq != 2)
    assert [row.text for row in opening._recent(held)] == ["4", "3", "1"]
    assert [row.text for row in opening._recent(held, before=4)] == ["3", "1"]


@pytest.mark.django_db
@pytest.mark.parametrize("swapped", [False, True])
def test_a_query_that_compares_other_values_is_refused(ana: User, swapped: bool) -> None:
    fields = Message._meta.get_field("conversation"), Message._meta.get_field("seq")
    query = Compiled(
        lambda pk, seq: (
            Message.objects.filter(role="user").filter(conversation=pk, seq=seq)
            if not swapped
            else Message.objects.filter(seq=seq).filter(conversation=pk)
        ),
        *fields,
    )
    with pytest.raises(TypeError):
        query(uuid.uuid4(), 1)


@pytest.mark.django_db(transaction=True)
def test_threads_share_the_text_and_nothing_else(ana: User) -> None:
    query, rows = own(), [Conversation.objects.create(user=ana) for _ in range(8)]
    found: dict[uuid.UUID, bool] = {}

    def ask(row: Conversation) -> None:
        try:
            found[row.pk] = all(query(ana.pk, row.pk) == [row] for _ in range(20))
        finally:
            connection.close()

    threads = [threading.Thread(target=ask, args=(row,)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {row.pk: True for row in rows}
