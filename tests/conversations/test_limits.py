"""How often and how much a caller may ask, and how they are told: over every transport."""

from __future__ import annotations

import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.cache import caches
from django.test import Client
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from assistant.errors import RateLimited
from conversations import counting, limits
from conversations.counting import Limit, Recent
from conversations.limits import Caller, TooMany, client_address
from conversations.models import Conversation
from conversations.running import running
from conversations.turn import Turn
from tests.conversations.conftest import API, Api, assert_problem
from tests.conversations.test_socket import Chat

# --- A sliding window ----------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@examples(deadline=None, max_examples=60)
@given(
    gaps=st.lists(st.floats(0, 40, allow_subnormal=False), min_size=1, max_size=80),
    quota=st.integers(1, 6),
    window=st.sampled_from([1, 7, 60]),
)
def test_no_window_wherever_it_begins_holds_more_than_the_limit(gaps, quota, window):
    caches["local"].clear()
    clock = Clock()
    recent, passed = Recent(Limit("chat", quota, window), clock), []
    for gap in gaps:
        clock.now += gap * window / 60
        if not recent.take("user:1").refused:
            passed.append(clock.now)
    for first, last in zip(passed, passed[quota:], strict=False):
        assert last - first >= window


def test_the_wait_that_is_told_is_long_enough_and_not_much_longer():
    clock = Clock()
    recent = Recent(Limit("chat", 2, 60), clock)
    recent.take("user:1")
    clock.now += 30
    recent.take("user:1")
    refused = recent.take("user:1")
    assert refused.refused and refused.left == 0 and 30 <= refused.reset_s <= 32
    clock.now += refused.reset_s
    assert not recent.take("user:1").refused
    assert recent.take("user:1").refused


def test_fifty_at_once_are_let_through_five(settings):
    settings.ASSISTANT_RATE = "5/m"
    gate = threading.Barrier(50)

    def ask(_: int) -> bool:
        gate.wait()
        try:
            limits.admit(Caller(1), "hi")
        except RateLimited:
            return False
        return True

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(ask, range(50))) == 5


def test_the_edge_of_the_shared_window_is_no_way_round(settings, monkeypatch):
    """The cache's windows are fixed: at their edge they alone would let ten through."""
    now = time.time()
    monkeypatch.setattr(counting.time, "time", lambda: now)  # the library's clock too
    settings.ASSISTANT_RATE = "5/m"
    passed = 0
    for _ in range(2):
        for _ in range(10):
            try:
                limits.take(Caller(1))
                passed += 1
            except RateLimited:
                pass
        now += 60
    assert passed == 5


def test_a_refused_request_does_not_make_the_wait_longer(settings):
    settings.ASSISTANT_RATE = "2/h"
    waits = []
    for _ in range(6):
        try:
            limits.take(Caller(1))
        except TooMany as refused:
            waits.append(refused.retry_after_s)
    assert len(waits) == 4 and max(waits) - min(waits) <= 1


@pytest.mark.parametrize("rate", ["20/0m", "0/m", "20/m/h", "-1/m", "20"])
def test_a_rate_that_is_none_is_refused_at_the_start(rate, monkeypatch):
    from django.core.exceptions import ImproperlyConfigured

    from config.settings import ENVIRONMENT, env_rate

    monkeypatch.setitem(ENVIRONMENT, "ASSISTANT_RATE", ENVIRONMENT["ASSISTANT_RATE"])
    monkeypatch.setenv("ASSISTANT_RATE", rate)
    with pytest.raises(ImproperlyConfigured, match="ASSISTANT_RATE"):
        env_rate("ASSISTANT_RATE", "20/m", "Questions.")


# --- Tokens --------------------------------------------------------------------------------------


def left(caller: Caller) -> dict[str, int]:
    return {each.limit.name: each.left for each in caller.standings}


def test_tokens_are_counted_after_a_turn_and_looked_at_before_one(settings):
    settings.ASSISTANT_TOKENS_PER_MINUTE = 100
    settings.ASSISTANT_TOKENS_PER_DAY = 150
    caller = Caller(1)
    limits.take(caller)
    assert left(caller) == {"tokens-minute": 100, "tokens-day": 150}
    limits.spend(caller, 99)
    limits.take(caller)
    assert left(caller) == {"tokens-minute": 1, "tokens-day": 51}
    limits.spend(caller, 70)
    with pytest.raises(TooMany, match=r"150 tokens you have per day") as refused:
        limits.take(caller)
    assert 60 < refused.value.retry_after_s <= 86_400
    limits.take(Caller(2))


def test_one_without_tokens_does_not_use_up_their_questions(settings):
    settings.ASSISTANT_RATE, settings.ASSISTANT_TOKENS_PER_MINUTE = "3/h", 10
    limits.spend(Caller(1), 10)
    for _ in range(5):
        with pytest.raises(TooMany, match="tokens"):
            limits.take(Caller(1))
    settings.ASSISTANT_TOKENS_PER_MINUTE = 0
    for _ in range(3):
        limits.take(Caller(1))


@pytest.mark.django_db(transaction=True)
def test_an_answers_usage_is_counted_before_its_reader_can_ask_again(api, settings):
    settings.ASSISTANT_TOKENS_PER_MINUTE = 2
    path = f"{API}{api('POST', API, {}).json()['id']}/messages/"
    first = api("POST", path, {"text": "one two three"})
    usage = first.json()["usage"]
    assert first.status_code == 200 and usage["input_tokens"] + usage["output_tokens"] >= 2
    assert "RateLimit" not in first.headers, "there is no limit of requests to tell of"
    problem = api("POST", path, {"text": "one two three"})
    assert_problem(problem, 429, "rate_limited")
    assert problem["RateLimit-Policy"] == '"tokens-minute";q=2;w=60'
    assert re.fullmatch(r'"tokens-minute";r=0;t=\d+', problem["RateLimit"])
    assert 1 <= int(problem["Retry-After"]) <= 60


@pytest.mark.django_db(transaction=True)
async def test_an_answer_that_is_stopped_is_not_free(ana, settings):
    settings.ASSISTANT_TOKENS_PER_DAY = 1_000
    caller = Caller(ana.pk)
    opened = await sync_to_async(Turn.open)(caller, None, "/echo delay=0.02 words=200 wordword")
    async for event in opened:
        if event.seq == 3:
            opened.close()
    await sync_to_async(limits.take)(caller)
    assert 980 < left(caller)["tokens-day"] < 1_000


# --- What the reply tells ------------------------------------------------------------------------

POLICY = '"chat";q=20;w=60'


def told(reply: Any) -> tuple[int, int]:
    """What is left and for how long, read strictly as the draft has it."""
    assert reply["RateLimit-Policy"] == POLICY
    found = re.fullmatch(r'"chat";r=(\d+);t=(\d+)', reply["RateLimit"])
    assert found is not None, reply["RateLimit"]
    return int(found[1]), int(found[2])


@pytest.fixture
def twenty(settings: Any) -> None:
    settings.ASSISTANT_RATE = "20/m"


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("twenty")
def test_every_reply_tells_how_much_is_left(api):
    path = f"{API}{api('POST', API, {}).json()['id']}/messages/"
    first = api("POST", path, {"text": "hi"})
    left, reset_s = told(first)
    assert left == 19 and 1 <= reset_s <= 60
    assert not any(name.startswith("x-ratelimit") for name in map(str.lower, first.headers))
    again = api("POST", f"/api/v1/messages/{first.json()['id']}/regenerate/", {})
    assert again.status_code == 200 and told(again)[0] == 18
    stream = api("POST", path, {"text": "hi", "stream": True})
    assert stream.status_code == 200 and told(stream)[0] == 17
    stream.close()
    assert "RateLimit" not in api("GET", path).headers


CHAT = {"model": "local", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("twenty")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True}),
        ("/v1/responses", {"model": "local", "input": "hi"}),
    ],
)
def test_openais_clients_are_told_in_their_own_words(api, path, body):
    reply = api("POST", path, body)
    assert reply.status_code == 200 and told(reply)[0] == 19
    assert reply["x-ratelimit-limit-requests"] == "20"
    assert reply["x-ratelimit-remaining-requests"] == "19"
    assert re.fullmatch(r"\d+s", reply["x-ratelimit-reset-requests"])
    reply.close()


@pytest.mark.django_db(transaction=True)
def test_a_refusal_over_rest_and_the_dialect_says_when_to_come_back(api, settings):
    settings.ASSISTANT_RATE, settings.ASSISTANT_TOKENS_PER_MINUTE = "1/m", 500
    path = f"{API}{api('POST', API, {}).json()['id']}/messages/"
    assert api("POST", path, {"text": "hi"}).status_code == 200
    for at, body in ((path, {"text": "hi"}), ("/v1/chat/completions", CHAT)):
        refused = api("POST", at, body)
        assert_problem(refused, 429, "rate_limited")
        assert refused["RateLimit-Policy"] == '"chat";q=1;w=60'
        wait = int(refused["Retry-After"])
        assert refused["RateLimit"] == f'"chat";r=0;t={wait}' and 1 <= wait <= 61
        assert refused["X-Should-Retry"] == "true"
    assert refused["x-ratelimit-remaining-requests"] == "0"
    assert refused["x-ratelimit-limit-tokens"] == "500"


@pytest.mark.django_db(transaction=True)
def test_the_login_page_says_when_to_come_back(settings):
    settings.ASSISTANT_LOGIN_RATE = "2/5m"
    client = Client()
    form = {"username": "ana", "password": "wrong"}
    codes = [client.post("/accounts/login/", form) for _ in range(3)]
    assert [reply.status_code for reply in codes] == [200, 200, 429]
    assert 1 <= int(codes[-1]["Retry-After"]) <= 305


@pytest.mark.django_db(transaction=True)
async def test_a_socket_is_refused_by_a_frame_that_says_when(ana, cookie_of, settings):
    settings.ASSISTANT_RATE = "1/m"
    conversation = await Conversation.objects.acreate(user=ana)
    async with Chat(conversation, await sync_to_async(cookie_of)(ana)) as chat:
        await chat.send(type="message.create", text="one")
        await chat.until("message.completed")
        await chat.send(type="message.create", text="two", ref="r2")
        frame = await chat.next()
    assert frame["type"] == "error" and frame["ref"] == "r2"
    assert frame["error"]["code"] == "rate_limited"
    assert 1 <= frame["error"]["retry_after_s"] <= 61


@pytest.mark.django_db(transaction=True)
async def test_all_transports_share_one_limit(ana, token_of, cookie_of, settings):
    settings.ASSISTANT_RATE = "3/m"
    conversation = await Conversation.objects.acreate(user=ana)
    api = Api(await sync_to_async(token_of)(ana))
    path = f"{API}{conversation.pk}/messages/"
    assert (await sync_to_async(api)("POST", path, {"text": "hi"})).status_code == 200
    assert (await sync_to_async(api)("POST", "/v1/chat/completions", CHAT)).status_code == 200
    async with Chat(conversation, await sync_to_async(cookie_of)(ana)) as chat:
        await chat.send(type="message.create", text="three")
        await chat.until("message.completed")
        await chat.send(type="message.create", text="four")
        assert (await chat.next())["error"]["code"] == "rate_limited"
    assert (await sync_to_async(api)("POST", path, {"text": "hi"})).status_code == 429


# --- At the same time ----------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
async def test_a_caller_has_so_many_answers_written_and_no_more(ana, token_of, settings):
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 2
    opened = [await sync_to_async(Turn.open)(Caller(ana.pk), None, "hi") for _ in range(2)]
    api = Api(await sync_to_async(token_of)(ana))
    refused = await sync_to_async(api)("POST", "/v1/chat/completions", CHAT)
    assert_problem(refused, 429, "rate_limited")
    assert refused["Retry-After"] == "1" and "RateLimit" not in refused.headers
    for turn in opened:
        await sync_to_async(turn.close)()
    assert running.of(Caller(ana.pk)) == []
    assert (await sync_to_async(api)("POST", "/v1/chat/completions", CHAT)).status_code == 200


@pytest.mark.django_db(transaction=True)
async def test_an_address_may_not_open_sockets_without_end(ana, ben, cookie_of, settings):
    settings.ASSISTANT_MAX_SOCKETS_PER_ADDRESS = 2
    settings.ASSISTANT_TRUSTED_PROXIES = 1

    async def chat(user: User, address: str) -> Chat:
        conversation = await Conversation.objects.acreate(user=user)
        made = Chat(conversation, await sync_to_async(cookie_of)(user))
        made.socket.scope["headers"].append((b"x-forwarded-for", address.encode()))
        return made

    def seats(address: str) -> int:
        return limits._sockets.held(f"address:{address}")

    first, second = await chat(ana, "192.0.2.7"), await chat(ben, "192.0.2.7")
    async with first, second:
        for each in (first, second):
            await each.send(type="ping")
            assert (await each.next())["type"] == "pong"
        async with await chat(ana, "192.0.2.7") as third:
            assert await third.closed() == 4429
        async with await chat(ana, "192.0.2.8") as elsewhere:
            await elsewhere.send(type="ping")
            assert (await elsewhere.next())["type"] == "pong"
        assert seats("192.0.2.7") == 2
    assert seats("192.0.2.7") == seats("192.0.2.8") == limits._sockets.held(f"user:{ana.pk}") == 0


def test_a_peer_without_an_address_is_not_everybody_elses_neighbour(settings):
    settings.ASSISTANT_MAX_SOCKETS_PER_ADDRESS = 1
    seats = [limits.Seat(client_address("", "")) for _ in range(3)]
    for seat in seats:
        seat.leave()
    held = limits.Seat("192.0.2.9")
    with pytest.raises(TooMany):
        limits.Seat("192.0.2.9")
    held.leave()
    held.leave()
    limits.Seat("192.0.2.9").leave()


# --- Whose it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3::4", "2001:db8:1:2::"),
        ("", "unknown"),
        ("/run/socket", "unknown"),
    ],
)
def test_what_a_peer_is_counted_as(peer, address):
    assert client_address(peer, "") == address


ODD_HEADERS = [
    "",
    ",",
    ",,,,",
    "1.2.3.4:443",
    "[2001:db8::1]:443",
    "2001:db8::1%eth0",
    "fe80::1%25\x7f",
    "999.1.1.1",
    "1.2.3",
    "0x7f.1",
    "unknown",
    "_hidden",
    '"for=1.2.3.4"',
    "१.२.३.४",
    "\x0b1.2.3.4",
    "1.2.3.4\x85",
    "1.2.3.4\x00",
    "x" * 60_000,
    "1.1.1.1," * 10_000,
    "2001:db8::/64",
    "-1",
    str(2**128),
]


@pytest.mark.django_db
def test_no_header_chooses_whose_tries_are_counted_or_breaks_anything(settings):
    """Three headers at once, every odd value, one proxy of ours: five tries, then nobody."""
    settings.ASSISTANT_LOGIN_RATE, settings.ASSISTANT_TRUSTED_PROXIES = "5/h", 1
    client = Client(raise_request_exception=False)
    codes = []
    for odd in [*ODD_HEADERS, *(f"10.0.0.{n}" for n in range(40))]:
        reply = client.post(
            "/accounts/login/",
            {"username": "ana", "password": "wrong"},
            headers={
                "X-Forwarded-For": f"{odd}, 198.51.100.7",
                "X-Real-IP": odd,
                "Forwarded": f"for={odd}",
            },
        )
        codes.append(reply.status_code)
    assert codes == [200] * 5 + [429] * (len(codes) - 5)


@pytest.mark.parametrize("odd", ODD_HEADERS, ids=range(len(ODD_HEADERS)))
def test_what_is_no_address_counts_as_the_peers(odd, settings):
    settings.ASSISTANT_TRUSTED_PROXIES = 1
    zoned = {"2001:db8::1%eth0": "2001:db8::", "fe80::1%25\x7f": "fe80::"}
    assert client_address("192.0.2.1", odd) == zoned.get(odd, "192.0.2.1")


def test_a_header_sent_twice_is_one_list_on_a_socket_too(settings):
    from conversations.access import address_of_socket

    settings.ASSISTANT_TRUSTED_PROXIES = 2
    headers = [
        (b"x-forwarded-for", b"9.9.9.9"),
        (b"x_forwarded_for", b"8.8.8.8"),
        (b"x-forwarded-for", b"1.2.3.4, 5.6.7.8"),
    ]
    assert address_of_socket({"client": ["192.0.2.1", 1], "headers": headers}) == "1.2.3.4"
    assert address_of_socket({"client": None, "headers": []}) == "unknown"


def test_thousand_forged_headers_are_five_requests(settings):
    settings.ASSISTANT_RATE, settings.ASSISTANT_TRUSTED_PROXIES = "5/h", 1
    passed = 0
    for n in range(1_000):
        address = client_address("192.0.2.1", f"10.{n % 256}.{n // 256}.1, 198.51.100.7")
        try:
            limits.take(Caller(None, f"visitor{n}", address))
            passed += 1
        except RateLimited:
            pass
    assert passed == 5


def test_the_standing_is_the_callers_own_and_no_part_of_who_they_are():
    one, two = Caller(1), Caller(1)
    one.standings.append(counting.Standing(Limit("chat", 1, 1), 1, 1, 1, False))
    assert one == two and hash(one) == hash(two) and two.standings == []
    assert "standings" not in repr(one)
    assert json.dumps(one.key)


@pytest.mark.django_db(transaction=True)
def test_new_conversations_are_counted_apart_from_questions(api, settings):
    settings.ASSISTANT_RATE = "2/h"
    first, second = (api("POST", API, {}) for _ in range(2))
    assert [first.status_code, second.status_code] == [201, 201]
    refused = api("POST", API, {})
    assert_problem(refused, 429, "rate_limited")
    assert int(refused.headers["Retry-After"]) > 0
    assert "new conversations: at most 2 per hour" in refused.json()["detail"]
    assert Conversation.objects.count() == 2
    asked = api("POST", f"{API}{first.json()['id']}/messages/", {"text": "hello"})
    assert asked.status_code == 200
    settings.ASSISTANT_RATE = None
    assert api("POST", API, {}).status_code == 201
