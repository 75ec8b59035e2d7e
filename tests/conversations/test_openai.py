"""The OpenAI dialect on real servers, spoken by the official Python client as it is, and by curl.

What is asked of both servers is the contract; the bundled model answers once.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from django.contrib.auth.models import User

from conversations.models import Conversation, Message
from fallback.models import ReviewedAnswer, Rule
from tests.conftest import ROOT, Server, serving

pytestmark = pytest.mark.django_db(transaction=True)

SLOW = "/echo delay=0.02 words=12 one two three"
LONG = "/echo delay=0.05 words=600 word"


@pytest.fixture
def token(ana: User, token_of: Any) -> str:
    return token_of(ana)


@pytest.fixture
def client(server: Server, token: str) -> Iterator[openai.OpenAI]:
    base = f"{server.http}/v1"
    with openai.OpenAI(base_url=base, api_key=token, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
async def aclient(server: Server, token: str) -> AsyncIterator[openai.AsyncOpenAI]:
    base = f"{server.http}/v1"
    async with openai.AsyncOpenAI(base_url=base, api_key=token, max_retries=0, timeout=60) as made:
        yield made


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "local", "messages": user(text), **more})


def text_of(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def assert_nothing_is_stored() -> None:
    assert not Conversation.objects.exists() and not Message.objects.exists()


# --- Chat completions ----------------------------------------------------------------------------


def test_an_answer_is_a_chat_completion(client):
    done = ask(client, "hello there")
    assert re.fullmatch(r"chatcmpl-[0-9a-f]{32}", done.id) and done.object == "chat.completion"
    assert abs(done.created - time.time()) < 60
    assert (done.model, done.system_fingerprint) == ("local", "echo")
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello there")
    assert (choice.finish_reason, choice.index) == ("stop", 0)
    usage = done.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 2, 4)
    assert done.model_extra == {"route": "model", "degraded_reason": ""}
    assert_nothing_is_stored()


def test_a_stream_says_the_same_as_a_whole_answer(client):
    chunks = list(ask(client, SLOW, stream=True))
    whole = ask(client, SLOW)
    assert len(chunks) > 4
    assert text_of(chunks) == whole.choices[0].message.content == " ".join(["one two three"] * 4)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].delta.content is None
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[0].id
    assert {chunk.model for chunk in chunks} == {"local"}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)
    assert {chunk.model_extra["route"] for chunk in chunks} == {"model"}
    assert_nothing_is_stored()


def test_usage_comes_last_and_without_choices(client):
    chunks = list(ask(client, SLOW, stream=True, stream_options={"include_usage": True}))
    *others, last = chunks
    assert all(chunk.choices and chunk.usage is None for chunk in others)
    assert last.choices == [] and last.id == chunks[0].id
    assert last.usage == ask(client, SLOW).usage
    assert last.usage.completion_tokens == 12


def test_the_clients_own_helper_rebuilds_the_answer(client):
    with client.chat.completions.stream(model="local", messages=user(SLOW)) as stream:
        events = [event.type for event in stream]
        done = stream.get_final_completion()
    assert events.count("content.delta") > 2 and events[-1] == "content.done"
    assert done.choices[0].message.content == " ".join(["one two three"] * 4)


def test_headers_say_who_answered_and_which_request_it_was(client):
    raw = client.chat.completions.with_raw_response
    for stream in (False, True):
        headers = {"X-Request-ID": "mine-1"}
        reply = raw.create(
            model="local", messages=user("hello"), stream=stream, extra_headers=headers
        )
        assert reply.headers["x-assistant-route"] == "model"
        assert reply.request_id == "mine-1"
    list(reply.parse())
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["content-type"] == "text/event-stream"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "text"),
    [("three", "one two "), (["o th", "zzz"], "one tw"), (["e t", "two"], "on"), (["zzz"], None)],
    ids=["a word", "over two deltas", "the first of two", "not met"],
)
def test_an_answer_ends_before_its_stop(client, stop, text):
    wanted = " ".join(["one two three"] * 4) if text is None else text
    whole = ask(client, SLOW, stop=stop)
    chunks = list(ask(client, SLOW, stop=stop, stream=True))
    assert text_of(chunks) == whole.choices[0].message.content == wanted
    assert whole.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "stop"
    assert text is None or whole.usage.completion_tokens < 12


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_that_is_cut_says_so(client, name):
    done = ask(client, SLOW, **{name: 2})
    assert done.choices[0].message.content == "one two"
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 2


def test_more_than_one_choice(client):
    done = ask(client, SLOW, n=3)
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in done.choices}) == 1
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (6, 36)
    chunks = list(ask(client, SLOW, n=3, stream=True, stream_options={"include_usage": True}))
    for index in range(3):
        assert text_of(chunks, index) == done.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 36


async def test_the_async_client_gets_the_same(aclient):
    create = aclient.chat.completions.create
    stream = await create(model="local", messages=user(SLOW), stream=True)
    chunks = [chunk async for chunk in stream]
    whole = await create(model="local", messages=user(SLOW))
    assert text_of(chunks) == whole.choices[0].message.content
    assert [model.id async for model in aclient.models.list()] == ["local", "model", "rules"]


async def test_many_at_once_do_not_mix(server, token_of):
    """Two users, three requests each, all at once: nobody reads another's words."""

    async def one(client: openai.AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            model="local", messages=user(f"/echo delay=0.01 words=40 {text}"), stream=True
        )
        return text_of([chunk async for chunk in stream])

    async def three(name: str) -> list[str]:
        person = await User.objects.acreate(username=name)
        key = await asyncio.to_thread(token_of, person)
        async with openai.AsyncOpenAI(base_url=f"{server.http}/v1", api_key=key) as client:
            return await asyncio.gather(*(one(client, f"{name}{at}") for at in range(3)))

    said = dict(zip(("cem", "dee"), await asyncio.gather(three("cem"), three("dee")), strict=True))
    for name, texts in said.items():
        assert texts == [" ".join([f"{name}{at}"] * 40) for at in range(3)]


def test_text_cannot_forge_an_event(client):
    evil = "a\n\ndata:\u00a0[DONE]\n\nevent:\u00a0x\u2028id:\u00a09\r\n\r\n👩‍👩‍👧 end"
    chunks = list(ask(client, evil, stream=True))
    assert text_of(chunks) == " ".join(evil.split())
    assert chunks[-1].choices[0].finish_reason == "stop"


# --- Who answers ---------------------------------------------------------------------------------


def test_the_models_are_names_of_routes(client):
    listed = client.models.list()
    assert listed.object == "list"
    assert [model.id for model in listed.data] == ["local", "model", "rules"]
    assert client.models.retrieve("rules").model_dump() == listed.data[2].model_dump()
    assert {model.owned_by for model in listed.data} == {"inhouse"}
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("gpt-4o")
    assert (unknown.value.code, unknown.value.param) == ("not_found", "model")


@pytest.mark.slow
def test_the_ladder_goes_from_reviewed_to_model_to_rules(client):
    ReviewedAnswer.objects.create(question="Where is it?", answer="With {{Client Name}}.")
    Rule.objects.create(name="cancel", patterns=["cancel my order"], answer="Write. To us.")
    time.sleep(5.2)  # another process keeps what staff wrote for five seconds
    assert ask(client, "where is it").model_extra["route"] == "reviewed"
    assert ask(client, "where is it", model="model").model_extra["route"] == "model"
    unsure = ask(client, "/echo confidence=0.2 cancel my order")
    assert unsure.model_extra == {"route": "rules", "degraded_reason": "low_confidence"}
    assert unsure.choices[0].message.content == "Write. To us."
    assert unsure.usage.total_tokens == 0  # no model was asked to the end
    forced = ask(client, "cancel my order", model="rules")
    assert forced.model_extra == {"route": "rules", "degraded_reason": ""}
    cut = list(ask(client, "cancel my order", model="rules", stop=". T", stream=True))
    assert text_of(cut) == "Write"
    nobody = ask(client, "something else", model="rules")
    assert nobody.model_extra["route"] == "human"


def test_a_model_that_is_asked_for_by_name_is_not_replaced(client):
    unsure = ask(client, "/echo confidence=0.2 one two", model="model")
    assert unsure.choices[0].message.content == "one two"
    assert unsure.model_extra == {"route": "model", "degraded_reason": "low_confidence"}
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as busy:
            ask(client, "/echo fail=overloaded one", model="model", stream=stream)
        assert (busy.value.status_code, busy.value.code) == (503, "overloaded")
        assert busy.value.response.headers["retry-after"] == "2"
        assert busy.value.response.headers["x-should-retry"] == "true"
    with pytest.raises(openai.InternalServerError) as absent:
        ask(client, "/echo fail=unavailable one", model="model")
    assert absent.value.code == "model_unavailable"
    assert absent.value.response.headers["x-should-retry"] == "false"
    instead = ask(client, "/echo fail=overloaded one")
    assert instead.model_extra == {"route": "human", "degraded_reason": "overload"}


@pytest.mark.slow
def test_the_client_tries_again_as_told(server, token, caplog):
    def requests() -> int:
        return sum(record.name == "httpx2" for record in caplog.records)

    caplog.set_level("INFO", logger="httpx2")
    with openai.OpenAI(base_url=f"{server.http}/v1", api_key=token, max_retries=1) as client:
        with pytest.raises(openai.InternalServerError):
            ask(client, "/echo fail=unavailable one", model="model")
        assert requests() == 1
        began = time.monotonic()
        with pytest.raises(openai.InternalServerError):
            ask(client, "/echo fail=overloaded one", model="model")
        assert requests() == 3 and time.monotonic() - began >= 2  # as Retry-After says


# --- What goes wrong -----------------------------------------------------------------------------


def test_a_failure_after_the_first_word_is_an_error_of_the_stream(client):
    text = "/echo delay=0.05 error=3 one two three four"
    stream = ask(client, text, model="model", stream=True)  # alone: "local" would go on
    seen = []
    with pytest.raises(openai.APIError) as broken:
        for chunk in stream:
            seen.append(chunk)
    assert text_of(seen) == "one two three"
    assert broken.value.code == "generation_failed" and broken.value.type == "server_error"
    assert broken.value.message == "The echo was told to fail."
    with pytest.raises(openai.InternalServerError) as whole:
        ask(client, "/echo error=3 one two three four", model="model")
    assert (whole.value.status_code, whole.value.code) == (503, "generation_failed")


def test_a_stream_that_cannot_begin_is_a_plain_error(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as long:
            ask(client, "/echo fail=too_long one", stream=stream)
        assert long.value.code == "context_too_long"
        assert long.value.response.headers["content-type"] == "application/problem+json"
        assert long.value.request_id


@pytest.mark.parametrize("key", ["x" * 64, "not a key"])
def test_a_wrong_token_is_an_authentication_error(server, key):
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key=key, max_retries=0)
    with client, pytest.raises(openai.AuthenticationError) as refused:
        ask(client, "hello")
    assert refused.value.code == "unauthenticated"
    assert refused.value.response.headers["www-authenticate"] == "Bearer"


def test_what_is_not_here_is_not_found_in_the_same_words(client):
    with pytest.raises(openai.NotFoundError) as absent:
        client.files.list()
    assert absent.value.code == "not_found"


async def free_again(client: openai.AsyncOpenAI, within_s: float) -> None:
    """All four answers of one caller can be written again. An answer asked for takes longer."""
    began = time.monotonic()
    while time.monotonic() - began < within_s:
        try:
            await client.chat.completions.create(model="local", messages=user("hello"), n=4)
            return
        except openai.RateLimitError:
            await asyncio.sleep(0.05)
    raise AssertionError("the slots are still taken")


async def test_hanging_up_frees_the_slot(aclient):
    """Four answers are all one caller may have; each is dropped in its first words."""
    for _ in range(2):
        streams = [
            await aclient.chat.completions.create(model="local", messages=user(LONG), stream=True)
            for _ in range(4)
        ]
        for stream in streams:
            await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            await aclient.chat.completions.create(model="local", messages=user("hello"))
        assert full.value.response.headers["x-should-retry"] == "true"
        for stream in streams:
            await stream.close()
        await free_again(aclient, 5)


@pytest.mark.slow
async def test_hanging_up_before_the_first_word_frees_the_slot(aclient):
    impatient = aclient.with_options(timeout=0.5)
    for more in ({"stream": True}, {}, {"n": 3}, {"n": 3, "stream": True}):
        for _ in range(4 // more.get("n", 1)):
            with pytest.raises(openai.APITimeoutError):
                await impatient.chat.completions.create(
                    model="model", messages=user("/echo hang=0 hello"), **more
                )
        await free_again(aclient, 4)


# --- curl ----------------------------------------------------------------------------------------


def curl(server: Server, path: str, *options: str, **body: Any) -> str:
    data = ["-d", json.dumps(body), "-H", "Content-Type: application/json"] if body else []
    command = ["curl", "-sN", "-i", "--max-time", "60", *options, *data, f"{server.http}{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
class TestCurl:
    @pytest.fixture
    def bearer(self, token: str) -> list[str]:
        return ["-H", f"Authorization: Bearer {token}"]

    def test_a_stream_line_by_line(self, server, bearer):
        more = {
            "messages": user("hello"),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reply = curl(server, "/v1/chat/completions", *bearer, **more)
        head, body = re.split(r"\r?\n\r?\n", reply, maxsplit=1)
        assert " 200 " in head.splitlines()[0]
        assert "x-assistant-route: model" in head.lower()
        blocks = body.removesuffix("\n\n").split("\n\n")
        assert blocks.pop() == "data: [DONE]"
        first, text, last, usage = [json.loads(block.removeprefix("data: ")) for block in blocks]
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text["choices"][0]["delta"] == {"content": "hello"}
        assert (last["choices"][0]["delta"], usage["choices"]) == ({}, [])
        assert usage["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        assert set(first) - {"usage"} == {
            *("id", "object", "created", "model", "choices"),
            *("system_fingerprint", "route", "degraded_reason"),
        }

    def test_a_stream_that_breaks_ends_with_its_error_and_nothing_else(self, server, bearer):
        more = {"model": "model", "messages": user("/echo error=1 one two"), "stream": True}
        last = curl(server, "/v1/chat/completions", *bearer, **more).split("data: ")[-1]
        assert json.loads(last) == {
            "error": {
                "message": "The echo was told to fail.",
                "type": "server_error",
                "code": "generation_failed",
                "param": None,
            }
        }

    def test_without_a_token(self, server):
        reply = curl(server, "/v1/models")
        assert " 401 " in reply.splitlines()[0]
        assert "www-authenticate: bearer" in reply.lower()
        assert "application/problem+json" in reply.lower()

    @pytest.mark.slow
    def test_a_hang_up(self, server, bearer):
        for _ in range(8):
            with pytest.raises(subprocess.CalledProcessError) as gone:
                more = {"messages": user(LONG), "stream": True}
                curl(server, "/v1/chat/completions", *bearer, "--max-time", "1", **more)
            assert gone.value.returncode == 28 and '"content": "word"' in gone.value.stdout
        time.sleep(2)
        reply = curl(server, "/v1/chat/completions", *bearer, messages=user("hello"), n=4)
        assert " 200 " in reply.splitlines()[0]

    def test_it_is_said_as_a_session_only_with_the_csrf_token(self, server, ana, cookie_of):
        cookie = ["-b", f"sessionid={cookie_of(ana)}"]
        assert " 200 " in curl(server, "/v1/models", *cookie).splitlines()[0]
        path, more = "/v1/chat/completions", {"messages": user("hello")}
        assert " 403 " in curl(server, path, *cookie, **more).splitlines()[0]
        cookie = ["-b", f"sessionid={cookie_of(ana)}; csrftoken={'a' * 32}"]
        reply = curl(server, path, *cookie, "-H", f"X-CSRFToken: {'a' * 32}", **more)
        assert " 200 " in reply.splitlines()[0]


# --- Responses -----------------------------------------------------------------------------------


def test_a_response_is_one_message(client):
    done = client.responses.create(model="local", input="hello there", metadata={"a": "b"})
    assert done.output_text == "hello there"
    assert (done.object, done.status, done.model) == ("response", "completed", "local")
    assert done.id.startswith("resp_") and done.output[0].id.startswith("msg_")
    usage = done.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (2, 2, 4)
    assert (done.store, done.metadata, done.previous_response_id) == (False, {"a": "b"}, None)
    assert done.model_extra["route"] == "model"
    cut = client.responses.create(model="local", input=SLOW, max_output_tokens=2)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert cut.output_text == "one two"
    assert_nothing_is_stored()


def test_a_response_streams_its_events_in_order(client):
    events = list(client.responses.create(model="local", input=SLOW, stream=True))
    types = [event.type for event in events]
    assert types[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(types[4:-4]) == {"response.output_text.delta"}
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    whole = client.responses.create(model="local", input=SLOW)
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage == whole.usage
    cut = list(client.responses.create(model="local", input=SLOW, stream=True, max_output_tokens=2))
    assert cut[-1].type == "response.incomplete"


def test_the_responses_helper_rebuilds_the_answer(client):
    with client.responses.stream(model="local", input=SLOW) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == " ".join(["one two three"] * 4)


async def test_the_async_responses_helper_does_too(aclient):
    async with aclient.responses.stream(model="local", input=SLOW) as stream:
        done = await stream.get_final_response()
    assert done.output_text == " ".join(["one two three"] * 4)


def test_a_response_that_breaks_raises(client):
    stream = client.responses.create(
        model="model", input="/echo delay=0.05 error=2 one two three", stream=True
    )
    seen = []
    with pytest.raises(openai.APIError) as broken:
        for event in stream:
            seen.append(event)
    assert seen[-1].type == "response.failed" and seen[-1].response.status == "failed"
    assert broken.value.code == "generation_failed"


def test_a_response_reads_a_conversation(client):
    done = client.responses.create(
        model="local",
        instructions="be kind",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "one"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
            {"type": "message", "role": "user", "content": "three four"},
        ],
    )
    assert done.output_text == "three four"
    assert done.usage.input_tokens == 2 + 1 + 1 + 2
    assert done.instructions == "be kind"


# --- The model that ships ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_server(
    django_db_setup: None, database_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("openai-model")
    with serving("uvicorn", database_file, folder, ASSISTANT_BACKEND="model") as running:
        yield running


@pytest.mark.slow
def test_the_bundled_model_answers_like_any_other(model_server, token):
    with openai.OpenAI(base_url=f"{model_server.http}/v1", api_key=token) as client:
        question = "how do I cancel order 48213377?"
        whole = ask(client, question, model="model")
        streaming = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(ask(client, question, model="model", **streaming))
        assert whole.model_extra["route"] == "model"
        assert whole.system_fingerprint.startswith("support-en@")
        assert text_of(chunks) == whole.choices[0].message.content
        assert "{{" not in text_of(chunks)
        usage = chunks[-1].usage
        assert usage == whole.usage and usage.prompt_tokens > 4 and usage.completion_tokens > 8
        with_system = [{"role": "system", "content": "Talk like a pirate."}, *user(question)]
        same = ask(
            client, question, model="model", messages=with_system
        )  # it was never taught to read one
        assert same.choices[0].message.content == whole.choices[0].message.content
        assert same.usage.prompt_tokens == usage.prompt_tokens
        first = whole.choices[0].message.content.split()[3]
        cut = ask(client, question, stop=first)
        assert cut.choices[0].message.content == whole.choices[0].message.content.split(first)[0]
        hot = {"temperature": 1.3, "top_p": 0.95, "seed": 7, "model": "model"}
        one, again = ask(client, question, **hot), ask(client, question, **hot)
        assert one.choices[0].message.content == again.choices[0].message.content
        two = ask(client, question, **hot, n=4)
        assert len({choice.message.content for choice in two.choices}) > 1
        assert two.choices[0].message.content == one.choices[0].message.content


def test_the_snippet_in_the_readme_does_what_it_says(model_server, token):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "openai" in b)
    snippet = snippet.replace("http://127.0.0.1:8000", model_server.http)
    done = subprocess.run(
        [sys.executable, "-c", snippet],
        env={"TOKEN": token, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) > 8
