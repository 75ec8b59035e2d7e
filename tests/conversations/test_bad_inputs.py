"""Bad input over REST and event streams: a 4xx that says why, no trace, nothing stored, and the
next good request is answered.

The dialect's own are in ``test_openai_requests``, sockets' in ``test_socket``.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.contrib.auth.models import User

from conversations.models import Conversation, Message
from tests.conftest import Server
from tests.conversations.conftest import API

pytestmark = pytest.mark.django_db(transaction=True)

DEEP = b"[" * 30_000 + b"]" * 30_000
#: Bodies that are no question, whoever reads them.
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"5",
    "NaN": b'{"text": NaN}',
    "infinity": b'{"text": "a", "stream": Infinity}',
    "1e400": b'{"text": 1e400}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"text": "a"}',
    "no UTF-8": b'{"text": "\xff"}',
    "a lone surrogate": b'{"text": "\\ud800"}',
    "NUL": b'{"text": "a\\u0000"}',
    "an escape": b'{"text": "\\u001b[31m"}',
    "deep": b'{"text": ' + DEEP + b"}",
    "a deep open end": b'{"text": ' + b"[" * 60_000,
    "a long key": b'{"' + b"k" * 60_000 + b'": 1}',
    "many keys": b"{" + b",".join(b'"k%d":1' % n for n in range(5_000)) + b"}",
    "a long number": b'{"text": ' + b"9" * 10_000 + b"}",
    "no field": b"{}",
    "another type": b'{"text": 5}',
    "text as list": b'{"text": ["a"]}',
    "text as object": b'{"text": {"a": 1}}',
    "only spaces": b'{"text": " \\t\\r\\n\\u2003"}',
    "too long": json.dumps({"text": "x" * 4_001}).encode(),
    "10 MB": b'{"text": "' + b"x" * 10_000_000 + b'"}',
    "a role": b'{"text": "a", "role": "system"}',
    "a user": b'{"text": "a", "user": 1}',
    "a model": b'{"text": "a", "model": "../../x"}',
    "an address": b'{"text": "a", "api_base": "http://169.254.169.254"}',
    "messages": b'{"text": "a", "messages": []}',
    "is_staff": b'{"text": "a", "is_staff": true}',
    "an id": b'{"text": "a", "id": "00000000-0000-4000-8000-000000000000"}',
    "stream as text": b'{"text": "a", "stream": "yes"}',
    "stream as 1": b'{"text": "a", "stream": 1}',
}
IDS = [
    *("5", "x", "..", "%2e%2e%2f", "%00", "x" * 10_000, "00000000-0000-4000-8000-000000000000"),
    *("00000000-0000-1000-8000-000000000000", "00000000000040008000000000000000"),
]
QUERIES = [
    *("ordering=user__password", "ordering=-", f"search={'x' * 5_000}", "search=%00"),
    *("created_after=yesterday", "created_before=9999-99-99", "cursor=x", "cursor=bz0tMQ%3D%3D"),
    *("cursor=cD0yMDI2LTAxLTAx", "cursor=cD14", "ordering=title&cursor=cD0A", "search=%1b"),
    # The first and the last hour there is, in zones where UTC has none.
    "cursor=cD0wMDAxLTAxLTAxVDAwJTNBMDAlM0EwMCUyQjE0JTNBMDA%3D",
    "cursor=cD05OTk5LTEyLTMxVDIzJTNBNTklM0E1OS0xNCUzQTAw",
]
IGNORED = [
    "cursor=%00",
    "page=-1",
    "page_size=-1",
    f"page_size={10**9}",
    "page_size=x",
    "id__in=1",
    "user=1",
]


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana, title="kept")


def stored() -> list[Any]:
    return [*Conversation.objects.values("id", "title"), *Message.objects.values("id")]


def refused(reply: Any, caplog: Any) -> None:
    assert 400 <= reply.status_code < 500, reply.content[:500]
    assert reply["Content-Type"] == "application/problem+json"
    body = reply.json()
    assert body["error"]["code"] and body["detail"] and len(reply.content) < 4_000
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
@pytest.mark.parametrize("raw", BODIES.values(), ids=BODIES)
def test_a_bad_question(raw, accept, api, conversation, caplog):
    before = stored()
    api.headers["Accept"] = accept
    refused(api("POST", f"{API}{conversation.pk}/messages/", raw=raw), caplog)
    assert stored() == before
    api.headers["Accept"] = "application/json"
    good = api("POST", f"{API}{conversation.pk}/messages/", {"text": "hello"})
    assert good.status_code == 200 and good.json()["text"] == "hello"


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"title": ""}', b'{"title": null}', DEEP])
def test_a_bad_title_and_a_word_that_does_not_erase(raw, api, conversation, caplog):
    before = stored()
    for method, path in (("PATCH", f"{API}{conversation.pk}/"), ("DELETE", "/api/v1/me/data/")):
        refused(api(method, path, raw=raw), caplog)
    assert stored() == before


def test_another_verb_and_one_that_is_smuggled_in(api, conversation):
    assert api("PUT", f"{API}{conversation.pk}/", {"title": "x"}).status_code == 405
    api.headers["X-HTTP-Method-Override"] = "DELETE"
    assert api("GET", f"{API}{conversation.pk}/").status_code == 200
    assert Conversation.objects.filter(pk=conversation.pk, title="kept").exists()


@pytest.mark.parametrize("name", IDS, ids=lambda name: name[:20])
def test_a_bad_id(name, api, ben, caplog):
    theirs = Conversation.objects.create(user=ben)
    for path in (API, "/api/v1/messages/"):
        for at in (name, str(theirs.pk), str(theirs.pk).upper(), theirs.pk.hex):
            reply = api("POST", f"{path}{at}/cancel/")
            assert reply.status_code == 404
            refused(reply, caplog)
            assert api("GET", f"{API}{at}/").status_code == 404


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query[:24])
def test_a_bad_query(query, api, conversation, caplog):
    refused(api("GET", f"{API}?{query}"), caplog)


@pytest.mark.parametrize("query", IGNORED)
def test_a_query_that_means_nothing_is_ignored(query, api, conversation):
    body = api("GET", f"{API}?{query}").json()
    assert [row["title"] for row in body["results"]] == ["kept"]


@pytest.mark.parametrize(
    "text",
    [
        *("x", "x" * 4_000, "e" + "\u0301" * 3_000, "👩\u200d👩\u200d👧\u200d👦" * 100),
        *("\u202eevil\u202c", "\ue000\U000e0001"),
        *("<|im_start|>system", "</s>", "[INST]", "<|endoftext|>", "{{7*7}}", "%s%n"),
        *("{% for i in range(10**9) %}", "{0.__class__}", "\u2028data: x", "a\n\ndata: b"),
    ],
    ids=ascii,
)  # fmt: skip
def test_odd_text_is_text(text, api, conversation):
    """It comes back as it is, in JSON and as events that nothing in it can forge."""
    path = f"{API}{conversation.pk}/messages/"
    reply = api("POST", path, {"text": text})
    assert reply.status_code == 200, reply.content
    shown = api("GET", path).json()["results"]
    assert shown[0]["text"] == text
    assert reply.json()["text"].split() == text.split()


# --- On real servers -----------------------------------------------------------------------------


@pytest.fixture
def wire_(server: Server) -> Iterator[socket.socket]:
    address = urlsplit(server.http)
    with socket.create_connection((address.hostname, address.port), timeout=20) as opened:
        yield opened


def status_of(opened: socket.socket) -> int:
    """Of the reply; 0 if the connection was closed instead."""
    got = b""
    while b"\r\n" not in got:
        try:
            more = opened.recv(4_096)
        except ConnectionResetError:
            return 0
        if not more:
            return 0
        got += more
    return int(got.split()[1])


def request(token: str, *headers: bytes, body: bytes = b"", version: bytes = b"1.1") -> bytes:
    lines = [
        b"POST " + API.encode() + b" HTTP/" + version,
        *(headers or (b"Host: localhost",)),
        b"Authorization: Bearer " + token.encode(),
        b"Content-Type: application/json",
        b"Content-Length: %d" % len(body),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


BOMB = b"\x1f\x8b\x08\x00" + b"\x00" * 100
HEADERS: dict[str, tuple[bytes, ...]] = {
    "another host": (b"Host: evil.example",),
    "two hosts": (b"Host: localhost", b"Host: evil.example"),
    "a thousand headers": (b"Host: localhost", *[b"X-A: b"] * 1_000),
    "a long header": (b"Host: localhost", b"X-A: " + b"b" * 60_000),
    "gzip": (b"Host: localhost", b"Content-Encoding: gzip"),
    "a control character": (b"Host: localhost", b"X-A: a\x00b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS)
def test_bad_headers_are_refused_and_the_server_lives(headers, wire_, server, ana, token_of):
    token = token_of(ana)
    wire_.sendall(request(token, *headers, body=BOMB if b"gzip" in headers[-1] else b"{}"))
    assert status_of(wire_) in {0, *range(400, 500)}
    assert not Conversation.objects.exists()
    assert still_answers(server, token)


@pytest.mark.parametrize(
    "forged", [b"1.2.3.4, 5.6.7.8", b"text", b"fe80::1%eth0", b"1.2.3.4:80", b",,,", b"\xff"]
)
def test_a_forged_address_changes_nothing(forged, wire_, ana, token_of):
    header = b"X-Forwarded-For: " + forged
    wire_.sendall(request(token_of(ana), b"Host: localhost", header, body=b"{}"))
    assert status_of(wire_) == 201


def still_answers(server: Server, token: str) -> bool:
    connection = http.client.HTTPConnection(urlsplit(server.http).netloc, timeout=20)
    connection.request("GET", API, headers={"Authorization": f"Bearer {token}"})
    status = connection.getresponse().status
    connection.close()
    return status == 200


def stream(
    token: str, path: str, *, version: str = "1.1", text: str = "x", verb: str = "POST"
) -> bytes:
    body = json.dumps({"text": text}).encode()
    return (
        f"{verb} {path} HTTP/{version}\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        f"Accept: text/event-stream\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


LONG = "/echo delay=0.05 words=400 word"


def ended() -> bool:
    return not Message.objects.filter(status="streaming").exists()


def test_a_reader_who_leaves_after_the_headers_frees_the_conversation(
    wire_, server, ana, token_of, conversation
):
    token, path = token_of(ana), f"{API}{conversation.pk}/messages/"
    wire_.sendall(stream(token, path, text=LONG))
    assert status_of(wire_) == 200
    wire_.close()
    until = time.monotonic() + 15
    while not ended() and time.monotonic() < until:
        time.sleep(0.05)
    assert ended() and still_answers(server, token)


def test_an_old_client_and_one_that_asks_for_headers_only(wire_, ana, token_of, conversation):
    token, path = token_of(ana), f"{API}{conversation.pk}/messages/"
    wire_.sendall(stream(token, path, verb="HEAD"))
    assert status_of(wire_) in {200, 405}
    assert not Message.objects.exists()


def test_http_1_0_is_answered(wire_, ana, token_of, conversation):
    path = f"{API}{conversation.pk}/messages/"
    wire_.sendall(stream(token_of(ana), path, version="1.0", text="hello"))
    got = b""
    while more := wire_.recv(65_536):
        got += more
        if b"message.completed" in got:
            break
    assert b"200" in got.split(b"\r\n")[0] and b"event: message.completed" in got


def test_fifty_streams_of_one_user_are_not_fifty_answers(server, ana, token_of):
    token = token_of(ana)
    address = urlsplit(server.http)
    talks = [Conversation.objects.create(user=ana) for _ in range(50)]
    opened = [socket.create_connection((address.hostname, address.port), 30) for _ in talks]
    for one, talk in zip(opened, talks, strict=True):
        one.sendall(stream(token, f"{API}{talk.pk}/messages/", text=LONG))
    statuses = [status_of(one) for one in opened]
    for one in opened:
        one.close()
    # On a slow machine the last of them find no room at all.
    assert {200, 429} <= set(statuses) <= {200, 429, 503} and statuses.count(200) == 4
    assert still_answers(server, token)
