"""The OpenAI dialect without a server: what may be asked, what is refused and how, who pays for it.

The dialect as clients hear it is tested in ``test_openai``.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from django.test import AsyncClient, Client

from assistant import types
from conversations import turn, wire
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.opening import Said
from conversations.running import running
from conversations.turn import TurnRecord
from tests.conversations.conftest import Api, assert_problem
from tests.conversations.test_stream import Hangup

pytestmark = pytest.mark.django_db(transaction=True)

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
LONG = "/echo delay=0.05 words=400 word"


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def turns(*texts: str) -> list[dict[str, Any]]:
    """A question, its answer, a question, ..."""
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]


def ask(api: Api, text: str = "hello", **more: Any) -> Any:
    return api("POST", CHAT, {"messages": user(text), **more})


# --- What is refused -----------------------------------------------------------------------------

#: what it is -> the body beside or instead of good messages, and the parameter that is named
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": None}, "messages"),
    "empty messages": ({"messages": []}, "messages"),
    "messages as text": ({"messages": "hello"}, "messages"),
    "message as text": ({"messages": ["hello"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0].role"),
    "unknown role": ({"messages": [{"role": "root", "content": "a"}]}, "messages[0].role"),
    "role as list": ({"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content as number": ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    "content as object": ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content"),
    "empty content": ({"messages": user("")}, "messages[0].content"),
    "only spaces": ({"messages": user(" \n\t ")}, "messages[0].content"),
    "NUL": ({"messages": user("a\0b")}, "messages[0].content"),
    "lone surrogate": ({"messages": user("a\ud800")}, "messages[0].content"),
    "NUL in history": ({"messages": turns("a", "b\0", "c")}, "messages[1].content"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    "sound beside text": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "input_audio"}],
                }
            ]
        },
        "messages[0].content[1].type",
    ),
    "a part without text": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    "the kind of a part as object": (
        {"messages": [{"role": "user", "content": [{"type": {}, "text": "a"}]}]},
        "messages[0].content[0].type",
    ),
    "a penalty of false": ({"frequency_penalty": False}, "frequency_penalty"),
    "a part as text": (
        {"messages": [{"role": "user", "content": ["hello"]}]},
        "messages[0].content[0].type",
    ),
    "calls of tools": (
        {
            "messages": [
                *user("a"),
                {"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]},
                {"role": "tool", "content": "b", "tool_call_id": "x"},
            ]
        },
        "messages[1].tool_calls",
    ),
    "nothing asked": ({"messages": turns("a", "b")}, "messages"),
    "only a system's text": ({"messages": [{"role": "system", "content": "a"}]}, "messages"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "functions": ({"functions": [{"name": "x"}]}, "functions"),
    "JSON mode": ({"response_format": {"type": "json_object"}}, "response_format"),
    "sound": ({"modalities": ["text", "audio"]}, "modalities"),
    "logprobs": ({"logprobs": True}, "logprobs"),
    "a penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "a bias": ({"logit_bias": {"5": 1}}, "logit_bias"),
    "n of 0": ({"n": 0}, "n"),
    "n of 5": ({"n": 5}, "n"),
    "n of a billion": ({"n": 10**9}, "n"),
    "n as text": ({"n": "2"}, "n"),
    "n as true": ({"n": True}, "n"),
    "n of 1.5": ({"n": 1.5}, "n"),
    "temperature below": ({"temperature": -0.1}, "temperature"),
    "temperature above": ({"temperature": 2.1}, "temperature"),
    "temperature of 1e308": ({"temperature": 1e308}, "temperature"),
    "temperature as text": ({"temperature": "1"}, "temperature"),
    "temperature as true": ({"temperature": True}, "temperature"),
    "top_p above": ({"top_p": 1.1}, "top_p"),
    "top_p below": ({"top_p": -1}, "top_p"),
    "max_tokens of 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens of -1": ({"max_tokens": -1}, "max_tokens"),
    "max_tokens of 2^31": ({"max_tokens": 2**31}, "max_tokens"),
    "max_tokens of 2^63": ({"max_tokens": 2**63}, "max_tokens"),
    "max_tokens as text": ({"max_tokens": "10"}, "max_tokens"),
    "max_tokens of 1.5": ({"max_tokens": 1.5}, "max_tokens"),
    "max_tokens as true": ({"max_completion_tokens": True}, "max_completion_tokens"),
    "seed as text": ({"seed": "x"}, "seed"),
    "seed of 2^63": ({"seed": 2**63}, "seed"),
    "five stops": ({"stop": list("abcde")}, "stop"),
    "ten thousand stops": ({"stop": ["x"] * 10_000}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "an empty stop in a list": ({"stop": ["a", ""]}, "stop"),
    "a long stop": ({"stop": "x" * 201}, "stop"),
    "stop as number": ({"stop": 5}, "stop"),
    "stops as numbers": ({"stop": [5]}, "stop"),
    "stream as text": ({"stream": "yes"}, "stream"),
    "stream as number": ({"stream": 1}, "stream"),
    "stream_options as list": ({"stream_options": []}, "stream_options"),
    "include_usage as text": (
        {"stream_options": {"include_usage": "yes"}},
        "stream_options.include_usage",
    ),
    "model as number": ({"model": 5}, "model"),
    "model as list": ({"model": ["local"]}, "model"),
    "an address": ({"api_base": "http://169.254.169.254"}, "api_base"),
    "a typing error": ({"temprature": 1}, "temprature"),
    "a parameter of elsewhere": ({"top_k": 10**9}, "top_k"),
}


@pytest.mark.parametrize(("more", "param"), BAD.values(), ids=BAD)
def test_a_bad_request_names_its_parameter(more, param, api, caplog):
    for stream in ({}, {"stream": True}):
        reply = api("POST", CHAT, {"messages": user("hello"), **stream, **more})
        body = assert_problem(reply, 400, "invalid_request")
        assert body["error"]["param"] == param
        assert body["error"]["type"] == "invalid_request_error"
        assert len(reply.content) < 4_000
    assert not [record for record in caplog.records if record.exc_info]


BAD_RESPONSES: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": ""}, "input[0].content"),
    "empty list": ({"input": []}, "input"),
    "input as number": ({"input": 5}, "input"),
    "a call": ({"input": [{"type": "function_call"}]}, "input[0].type"),
    "a reference": ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    "an image": (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input[0].content[0].type",
    ),
    "a bad message after instructions": (
        {"instructions": "a", "input": [{"role": "x", "content": "a"}]},
        "input[0].role",
    ),
    "instructions as number": ({"instructions": 5}, "instructions"),
    "max_output_tokens of 0": ({"max_output_tokens": 0}, "max_output_tokens"),
    "temperature": ({"temperature": 3}, "temperature"),
    "top_p": ({"top_p": "x"}, "top_p"),
    "truncation": ({"truncation": "always"}, "truncation"),
    "truncation as list": ({"truncation": ["auto"]}, "truncation"),
    "metadata": ({"metadata": "x"}, "metadata"),
    "stream_options as list": ({"stream_options": []}, "stream_options"),
    "what was not stored": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "later": ({"background": True}, "background"),
    "JSON": ({"text": {"format": {"type": "json_schema"}}}, "text"),
    "tools": ({"tools": [{"type": "web_search"}]}, "tools"),
    "a stop": ({"stop": "x"}, "stop"),
    "messages": ({"messages": []}, "messages"),
}


@pytest.mark.parametrize(("more", "param"), BAD_RESPONSES.values(), ids=BAD_RESPONSES)
def test_a_bad_response_request_names_its_parameter(more, param, api):
    reply = api("POST", RESPONSES, {"input": "hello", **more})
    body = assert_problem(reply, 400, "invalid_request")
    assert body["error"]["param"] == param


BAD_BODIES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "string": b'"x"',
    "number": b"5",
    "half": b'{"messages": [',
    "NaN": b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "UTF-16": '{"messages": []}'.encode("utf-16"),
    "bad UTF-8": b'{"messages": "\xff"}',
    "deeply nested": b'{"messages": ' + b"[" * 60_000,
    "deeply nested and closed": b'{"messages": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "long number": b'{"n": ' + b"9" * 10_000 + b"}",
    "many keys": b"{" + b",".join(b'"k%d":1' % n for n in range(5_000)) + b"}",
    "long key": b'{"' + b"k" * 60_000 + b'": 1}',
}


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
@pytest.mark.parametrize("raw", BAD_BODIES.values(), ids=BAD_BODIES)
def test_a_bad_body_is_the_clients_mistake(raw, path, api, caplog):
    reply = api("POST", path, raw=raw)
    assert_problem(reply, 400, "invalid_request")
    assert len(reply.content) < 4_000
    assert not [record for record in caplog.records if record.exc_info]


def test_a_large_body_is_refused(api):
    assert_problem(ask(api, "x" * 70_000), 413, "invalid_request")


def test_what_is_too_long_is_named_by_its_code(api, settings):
    assert_problem(ask(api, "x" * 4_001), 400, "context_too_long")  # in characters
    assert_problem(ask(api, "x " * 1_500), 400, "context_too_long")  # in words of the echo
    system = [{"role": "system", "content": "x " * 1_500}, *user("hello")]
    assert_problem(api("POST", CHAT, {"messages": system}), 400, "context_too_long")
    long = {"input": turns("one " * 600, "two " * 600, "three"), "truncation": "disabled"}
    assert_problem(api("POST", RESPONSES, long), 400, "context_too_long")
    assert api("POST", RESPONSES, {**long, "truncation": "auto"}).status_code == 200


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_an_unknown_model_is_not_found(path, api):
    for model in ("gpt-4o", "../../x", "reviewed", "human", "echo", "x" * 10_000):
        body = {"model": model, "messages": user("a")}
        if path == RESPONSES:
            body = {"model": model, "input": "a"}
        told = assert_problem(api("POST", path, body), 404, "not_found")
        assert told["error"]["param"] == "model" and "local, model, rules" in told["detail"]


def test_a_route_without_a_model_lists_none(api, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["reviewed", "rules", "human"]}
    assert [row["id"] for row in api("GET", "/v1/models").json()["data"]] == ["local", "rules"]
    assert_problem(api("GET", "/v1/models/model"), 404, "not_found")
    assert_problem(ask(api, model="model"), 404, "not_found")
    assert ask(api).json()["route"] == "human"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", CHAT, 405),
        ("DELETE", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", f"{CHAT}/", 404),
        ("GET", "/v1/embeddings", 405),
        ("POST", "/v1/embeddings/", 404),
        ("POST", "/v1/completions", 404),
        ("GET", "/v1/responses/resp_1", 404),
        ("DELETE", "/v1/responses/resp_1", 404),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/a/b", 404),
        ("PUT", "/v1/nonsense", 404),
        ("GET", "/v1/", 404),
        ("GET", "/v1", 404),
    ],
)
def test_another_address_or_method_is_refused_in_the_same_shape(method, path, status, api):
    code = "not_found" if status == 404 else "invalid_request"
    assert_problem(api(method, path, {"model": "local"}), status, code)


@pytest.mark.parametrize("authorization", [None, "Bearer", "Bearer x", "Bearer a b", "Bearer \xff"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT), ("POST", RESPONSES), ("GET", "/v1/models"), ("POST", "/v1/embeddings")],
)
def test_without_a_valid_token_the_answer_is_401_and_says_how(method, path, authorization, db):
    headers = {} if authorization is None else {"Authorization": authorization}
    reply = Api(**headers)(method, path, {"messages": user("hello")})
    assert_problem(reply, 401, "unauthenticated")
    assert reply["WWW-Authenticate"] == "Bearer"


def test_another_media_type_is_refused(ana, token_of):
    client = Client(headers={"Authorization": f"Bearer {token_of(ana)}"})
    assert_problem(client.post(CHAT, {"messages": "x"}), 415, "invalid_request")


# --- What is read --------------------------------------------------------------------------------


def test_every_harmless_parameter_is_taken(api):
    reply = ask(
        api,
        model="local",
        user="someone",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        reasoning_effort="low",
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        logprobs=False,
        response_format={"type": "text"},
        tools=[],
        tool_choice="auto",
        stop=None,
        n=None,
        seed=-5,
        temperature=0.7,
        top_p=0,
        max_tokens=2**31 - 1,
        max_completion_tokens=None,
        stream=False,
        stream_options=None,
    )
    assert reply.status_code == 200, reply.content
    assert reply.json()["choices"][0]["message"]["content"] == "hello"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What reached the router."""
    asks: list[Any] = []
    route = turn.route

    def spy(ask: Any) -> Any:
        asks.append(ask)
        return route(ask)

    monkeypatch.setattr(turn, "route", spy)
    return asks


@pytest.mark.parametrize(("tier", "batch"), [("flex", True), ("auto", False), (None, False)])
def test_work_that_nobody_waits_for_is_marked(api, seen, tier, batch):
    assert ask(api, service_tier=tier).status_code == 200
    assert [asked.params.batch for asked in seen] == [batch]


def test_a_tier_that_is_none_is_refused_by_name(api):
    refused = assert_problem(ask(api, service_tier="flx"), 400, "invalid_request")
    assert refused["error"]["param"] == "service_tier"


def read(seen: list[Any]) -> list[tuple[str, str]]:
    return [(message.role, message.text) for message in seen[-1].messages]


def test_the_messages_are_the_history(api, seen):
    messages = [
        {"role": "system", "content": "be kind"},
        {"role": "assistant", "content": "Hello! How can I help?"},
        {"role": "user", "content": "one", "name": "max"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": []},
        {
            "role": "user",
            "content": [{"type": "text", "text": "two"}, {"type": "text", "text": "3"}],
        },
        {"role": "assistant", "content": "four"},
        {"role": "assistant", "content": [{"type": "text", "text": "five"}]},
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": "six"},
        {"role": "tool", "content": "seven", "tool_call_id": "x"},
    ]
    reply = api("POST", CHAT, {"messages": messages})
    assert read(seen) == [
        ("system", "be kind\nbe brief"),
        ("user", "one\ntwo\n3"),
        ("assistant", "four\nfive"),
        ("user", "six\nseven"),
    ]
    assert reply.json()["choices"][0]["message"]["content"] == "six seven"
    assert reply.json()["usage"]["prompt_tokens"] == 4 + 3 + 2 + 2


def test_the_oldest_is_left_out_when_not_all_fits(api, seen):
    messages = [{"role": "system", "content": "s " * 300}]
    messages += turns("one " * 300, "two", "three " * 300, "four", "five")
    assert api("POST", CHAT, {"messages": messages}).status_code == 200
    assert [role for role, _ in read(seen)] == ["system", "user", "assistant", "user"]
    assert read(seen)[-1] == ("user", "five")


def test_a_model_that_reads_no_system_text_is_given_none(api, seen, monkeypatch):
    from assistant.backends.echo import EchoBackend

    monkeypatch.setattr(EchoBackend, "reads_system", lambda self: False)
    messages = [{"role": "system", "content": "x " * 1_500}, *user("hello")]
    assert api("POST", CHAT, {"messages": messages}).status_code == 200
    assert read(seen) == [("user", "hello")]


def test_the_parameters_arrive(api, seen, settings):
    ask(api, temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"], max_tokens=5, n=2)
    first, second = (made.params for made in seen)
    assert (first.temperature, first.top_p, first.stop) == (0.5, 0.9, ("x", "y"))
    assert (first.seed, second.seed, first.max_new_tokens) == (7, 8, 5)
    assert first.scope.startswith("user:")
    ask(api, max_tokens=10**6, top_p=0)
    assert seen[-1].params.max_new_tokens == settings.ASSISTANT["MAX_NEW_TOKENS"]
    assert 0 < seen[-1].params.top_p < 1e-3
    assert seen[-1].params.temperature == 0


def test_what_the_product_knows_of_the_user_is_filled_in(api, seen, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "FACTS": {"Company": "Acme"}}
    settings.ASSISTANT["FACT_FUNCTIONS"] = [f"{__name__}.name_of"]
    ask(api)
    assert seen[-1].params.facts == {"Company": "Acme", "Client Name": "ana"}


def name_of(user: Any) -> dict[str, str]:
    return {"Client Name": user.username}


# --- Limits and leavings -------------------------------------------------------------------------


def test_the_rate_is_everybodys_and_each_choice_counts(api, settings, ben, token_of):
    settings.ASSISTANT_RATE = "3/h"
    assert ask(api).status_code == 200
    assert ask(api, n=2).status_code == 200
    for stream in (False, True):
        reply = ask(api, stream=stream)
        assert_problem(reply, 429, "rate_limited")
        assert 0 < int(reply["Retry-After"]) <= 3_600
        assert reply["X-Should-Retry"] == ("true" if int(reply["Retry-After"]) <= 60 else "false")
    assert_problem(api("POST", "/api/v1/conversations/", {}) and ask(api), 429, "rate_limited")
    assert_problem(api("POST", RESPONSES, {"input": "hello"}), 429, "rate_limited")
    assert ask(Api(token_of(ben))).status_code == 200


def test_a_refused_choice_takes_the_others_with_it(api, settings):
    settings.ASSISTANT_RATE = "2/h"
    assert_problem(ask(api, n=3), 429, "rate_limited")
    assert not running._turns and not running._opening
    settings.ASSISTANT_RATE = None
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 3
    assert_problem(ask(api, n=4), 429, "rate_limited")
    assert ask(api, n=3).status_code == 200
    assert not running._turns


@pytest.fixture
def records() -> Any:
    seen: list[TurnRecord] = []

    def note(record: TurnRecord, **_: Any) -> None:
        seen.append(record)

    turn.turn_finished.connect(note)
    yield seen
    turn.turn_finished.disconnect(note)


async def test_nothing_is_stored_and_observers_are_told_so(ana, token_of, records):
    token = await asyncio.to_thread(token_of, ana)
    headers = {"Authorization": f"Bearer {token}"}
    for text in ("hello there", "/echo error=1 one two", "/echo fail=too_long x"):
        for stream in (True, False):
            body = json.dumps({"messages": user(text), "stream": stream})
            reply = await AsyncClient().post(CHAT, body, "application/json", headers=headers)
            if reply.streaming:
                assert [part async for part in reply.streaming_content]
    assert not await Message.objects.aexists() and not await Conversation.objects.aexists()
    await until(lambda: len(records) == 6)
    assert {record.stored for record in records} == {False}
    assert {record.transport for record in records} == {"openai"}
    # The answer that breaks off is continued; the question that is too long is the caller's fault.
    assert sorted(record.status for record in records) == ["complete"] * 4 + ["failed"] * 2
    assert {record.user_id for record in records} == {ana.pk}


async def test_a_long_answer_gives_no_sign_of_life_to_the_database(ana, monkeypatch):
    saved: list[Any] = []
    monkeypatch.setattr(turn, "ALIVE_EVERY_S", 0.01)
    monkeypatch.setattr(turn.Turn, "_checkpoint", saved.append)

    def made() -> turn.Turn:
        said = Said("/echo delay=0.02 words=10 word")
        return turn.Turn.passing(Caller(ana.pk), said, types.Params(), transport="openai")

    message = await (await asyncio.to_thread(made)).result()
    assert (message.status, len(message.text.split()), saved) == ("complete", 10, [])


async def test_a_quiet_stream_begins_in_time_and_sends_comments(ana, token_of, monkeypatch):
    monkeypatch.setattr(wire, "KEEP_ALIVE_S", 0.1)
    token = await asyncio.to_thread(token_of, ana)
    headers = {"Authorization": f"Bearer {token}"}
    for text, end in (("/echo first=0.5 one", b"[DONE]"), ("/echo first=0.5 error=0 x", b"error")):
        body = json.dumps({"messages": user(text), "stream": True, "model": "model"})
        reply = await AsyncClient().post(CHAT, body, "application/json", headers=headers)
        assert reply.status_code == 200 and "X-Assistant-Route" not in reply
        parts = [part async for part in reply.streaming_content]
        assert parts[0] == b": keep-alive\n\n" and end in parts[-1]


async def until(condition: Any, within_s: float = 2) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - it is another task's doing
            await asyncio.sleep(0.01)


class Leaving(Hangup):
    """The same client on another address."""

    def __init__(self, token: str, path: str, **body: Any) -> None:
        super().__init__(Conversation(), token, "")
        self.body = json.dumps(body).encode()
        self.scope |= {"path": path, "raw_path": path.encode()}
        self.scope["headers"] = [
            *((key, value) for key, value in self.scope["headers"] if key != b"content-length"),
            (b"content-length", str(len(self.body)).encode()),
        ]


#: what -> address, body, and whether something is sent before the client leaves
LEFT: dict[str, tuple[str, dict[str, Any], bool]] = {
    "a stream": (CHAT, {"messages": user(LONG), "stream": True}, True),
    "three at once": (CHAT, {"messages": user(LONG), "stream": True, "n": 3}, True),
    "a response": (RESPONSES, {"input": LONG, "stream": True}, True),
    "whole answers": (CHAT, {"messages": user(LONG), "n": 2}, False),
    "a stream before its first word": (
        CHAT,
        {"messages": user("/echo hang=0 x"), "stream": True, "model": "model"},
        False,
    ),
}


async def left_behind(token: str, path: str, body: dict[str, Any], leave: Any) -> None:
    """A client whose answers run, and who leaves; nothing runs a second later."""
    client = Leaving(token, path, **body)
    client.takes = 2 if leave == "blocked" else None
    task = client.run()
    await until(lambda: len(running._turns) == body.get("n", 1), 5)
    if leave == "blocked":
        await asyncio.wait_for(client.blocked.wait(), 5)
    elif leave == "reading":
        await until(lambda: len(client.sent) > 3, 5)
    client.gone.set()
    await until(lambda: not running._turns, 1)
    await asyncio.wait_for(task, 2)


@pytest.mark.parametrize(("path", "body", "sends"), LEFT.values(), ids=LEFT)
async def test_hanging_up_stops_all_answers_within_a_second(ana, token_of, path, body, sends):
    token = await asyncio.to_thread(token_of, ana)
    for leave in ("reading", "blocked") if sends else ("waiting",):
        await left_behind(token, path, body, leave)
