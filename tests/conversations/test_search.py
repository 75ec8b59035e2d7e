"""Finding conversations and messages: words, filters, orders, pages, and polling without news."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import User

from conversations.models import Conversation
from tests.conversations.conftest import API, Api, assert_problem

pytestmark = pytest.mark.django_db

MESSAGES = "/api/v1/messages/"
START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def archive(ana: User, ben: User) -> list[Conversation]:
    """Three of ana's, a day apart, and one of ben's with the same words."""
    made = []
    for day, (owner, title, text) in enumerate(
        [
            (ana, "Parcel", "where is my LOST parcel"),
            (ana, "Refund 100%", "give me a_b back"),
            (ana, "parcel, again", "one \\ two"),
            (ben, "secret", "my lost parcel and its secret"),
        ]
    ):
        at = START + timedelta(days=day)
        one = Conversation.objects.create(user=owner, title=title, created_at=at, updated_at=at)
        one.messages.create(seq=1, role="user", text=text, created_at=at)
        made.append(one)
    return made


def titles(reply: Any) -> list[str]:
    return [row["title"] for row in reply.json()["results"]]


def texts(reply: Any) -> list[str]:
    return [row["text"] for row in reply.json()["results"]]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("lost", ["Parcel"]),
        ("parcel LOST", ["Parcel"]),
        ("PARCEL", ["parcel, again", "Parcel"]),
        ("lost refund", []),
        ("secret", []),
        ("%25", ["Refund 100%"]),
        ("a_b", ["Refund 100%"]),
        ("axb", []),
        ("%5C", ["parcel, again"]),
        ("'); DROP TABLE x; --", []),
        ("a b c d e f g h i j k l", []),
    ],
)
def test_words_are_found_in_titles_and_messages_of_ones_own(query, found, api, archive):
    assert titles(api("GET", f"{API}?search={query}")) == found


def test_messages_are_found_newest_first_with_their_conversation(api, archive):
    reply = api("GET", f"{MESSAGES}?search=lost").json()
    (row,) = reply["results"]
    assert (row["text"], row["conversation"]) == ("where is my LOST parcel", str(archive[0].pk))
    assert texts(api("GET", MESSAGES)) == [
        *("one \\ two", "give me a_b back", "where is my LOST parcel")
    ]
    assert texts(api("GET", f"{MESSAGES}?conversation={archive[1].pk}")) == ["give me a_b back"]
    assert texts(api("GET", f"{MESSAGES}?conversation={archive[3].pk}")) == []
    assert texts(api("GET", f"{MESSAGES}?role=assistant")) == []


def test_filters_and_orders(api, archive):
    def listed(query: str) -> list[str]:
        return titles(api("GET", f"{API}?{query}"))

    assert listed("ordering=title") == ["Parcel", "Refund 100%", "parcel, again"]
    assert listed("ordering=created_at") == ["Parcel", "Refund 100%", "parcel, again"]
    assert listed("ordering=-created_at&page_size=2") == ["parcel, again", "Refund 100%"]
    assert listed("title=refund") == ["Refund 100%"]
    assert listed("title=100%25") == ["Refund 100%"]
    assert listed("created_after=2026-01-02T00:00:00Z") == ["parcel, again"]
    assert listed("updated_before=2026-01-02T00:00:00Z") == ["Parcel"]


def test_every_order_is_paged_to_its_end(api, ana):
    Conversation.objects.bulk_create(
        Conversation(user=ana, title=f"t{n % 3}", created_at=START) for n in range(25)
    )
    for ordering in ("title", "-title", "created_at", "-updated_at"):
        path, seen = f"{API}?ordering={ordering}&page_size=7&search=t", []
        while path:
            page = api("GET", path).json()
            seen += [row["id"] for row in page["results"]]
            path = page["next"]
        assert len(seen) == len(set(seen)) == 25, ordering


def test_many_without_a_title_are_paged_to_their_end_too(api, ana):
    Conversation.objects.bulk_create(Conversation(user=ana) for _ in range(1_450))
    path, seen = f"{API}?ordering=title&page_size=200", []
    while path and len(seen) < 2_000:
        page = api("GET", path).json()
        seen += [row["id"] for row in page["results"]]
        path = page["next"]
    assert len(seen) == len(set(seen)) == 1_450


@pytest.mark.parametrize(
    "query",
    [
        "search=" + "x" * 201,
        "search=a%00b",
        "search=%20",
        "title=%08",
        "ordering=user__password",
        "ordering=--title",
        "ordering=",
        "created_after=yesterday",
        "created_before=9999-99-99",
        "created_before=0001-01-01T00:00:00%2B14:00",
    ],
)
def test_a_bad_query_is_a_400_that_says_why(query, api, archive):
    assert_problem(api("GET", f"{API}?{query}"), 400, "invalid_request")


@pytest.mark.parametrize("query", ["conversation=5", "role=system", "ordering=seq"])
def test_a_bad_query_for_messages_is_refused_as_well(query, api, archive):
    assert_problem(api("GET", f"{MESSAGES}?{query}"), 400, "invalid_request")


@pytest.mark.parametrize(
    "said",
    [
        *("' OR 1=1 --", "'; DROP TABLE conversations_message; --", '" OR ""="', "1) OR (1=1"),
        *(
            "x' UNION SELECT password FROM auth_user --",
            "%' OR title LIKE '%",
            "\\",
            "\\'",
            "%",
            "_",
        ),
        *("'||(SELECT pg_sleep(5))||'", "$$", "a:*", "!", "a & | b", '"', "(((((", "-", "/*", "*/"),
    ],
)
def test_no_query_is_sql(said, api, ben, archive):
    """Whatever it says, it is words to look for, and finds nothing of others."""
    Conversation.objects.create(user=ben, title=f"theirs {said}")
    began = time.monotonic()
    for path, fields in (
        (API, ("search", "title", "ordering", "created_after", "cursor", "page_size")),
        (MESSAGES, ("search", "conversation", "role", "ordering", "created_before", "cursor")),
    ):
        for field in fields:
            reply = api("GET", f"{path}?{urlencode({field: said})}")
            assert reply.status_code in {200, 400, 404}, (field, reply.content)
            assert "theirs" not in reply.content.decode()
    assert time.monotonic() - began < 12


def test_polling_gets_a_304_until_something_changes(api, ana, archive):
    conversation = archive[0]
    for path, change in [
        (API, lambda: api("POST", API, {})),
        (f"{API}{conversation.pk}/", lambda: api("PATCH", f"{API}{conversation.pk}/", NEW)),
        (f"{API}{conversation.pk}/messages/", lambda: _answer(conversation, 2)),
        (MESSAGES, lambda: _answer(conversation, 3)),
    ]:
        first = api("GET", path)
        assert first["Cache-Control"] == "private, no-cache"
        assert {"Authorization", "Cookie"} <= set(first["Vary"].split(", "))
        api.headers["If-None-Match"] = first["ETag"]
        same = api("GET", path)
        assert (same.status_code, same.content, same["ETag"]) == (304, b"", first["ETag"])
        change()
        changed = api("GET", path)
        assert changed.status_code == 200 and changed["ETag"] != first["ETag"]


NEW = {"title": "New"}


def _answer(conversation: Conversation, seq: int) -> None:
    conversation.messages.create(seq=seq, role="assistant", text="so")


def test_an_etag_of_another_user_says_nothing(api, ben, token_of, archive):
    tag = api("GET", f"{API}{archive[0].pk}/")["ETag"]
    theirs = Api(token_of(ben), **{"If-None-Match": tag})
    assert_problem(theirs("GET", f"{API}{archive[0].pk}/"), 404, "not_found")
    assert titles(theirs("GET", API)) == ["secret"]
