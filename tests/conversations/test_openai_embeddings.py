"""``/v1/embeddings``: what may be asked, how it is told, who pays; and what the official client
makes of it."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import openai
import pytest
from django.contrib.auth.models import User

from assistant import backends
from assistant.backends.base import Vector
from assistant.backends.echo import EchoBackend
from conversations import openai_api
from conversations.models import Conversation, Message
from conversations.openai_request import MAX_INPUTS
from tests.conftest import serving
from tests.conversations.conftest import Api, assert_problem

pytestmark = pytest.mark.django_db(transaction=True)

PATH, WIDTH = "/v1/embeddings", 64
#: what it is -> body, and the parameter that is named
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({}, "input"),
    "null": ({"input": None}, "input"),
    "empty text": ({"input": ""}, "input"),
    "only spaces": ({"input": [" \n"]}, "input[0]"),
    "an empty text among others": ({"input": ["a", ""]}, "input[1]"),
    "an empty list": ({"input": []}, "input"),
    "an empty list of ids": ({"input": [[1], []]}, "input"),
    "a number": ({"input": 5}, "input"),
    "an object": ({"input": {"text": "a"}}, "input"),
    "texts and ids": ({"input": ["a", 5]}, "input"),
    "texts and lists": ({"input": ["a", [5]]}, "input"),
    "ids and lists": ({"input": [5, [5]]}, "input"),
    "ids as true": ({"input": [True]}, "input"),
    "ids below nought": ({"input": [-1]}, "input"),
    "ids of 1.5": ({"input": [1.5]}, "input"),
    "lists in lists": ({"input": [[[1]]]}, "input"),
    "NUL": ({"input": "a\0"}, "input"),
    "lone surrogate": ({"input": ["a", "\ud800"]}, "input[1]"),
    "too many": ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
    "another encoding": ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    "encoding as list": ({"input": "a", "encoding_format": ["float"]}, "encoding_format"),
    "fewer dimensions": ({"input": "a", "dimensions": WIDTH - 1}, "dimensions"),
    "no dimensions": ({"input": "a", "dimensions": 0}, "dimensions"),
    "dimensions as text": ({"input": "a", "dimensions": "64"}, "dimensions"),
    "dimensions as true": ({"input": "a", "dimensions": True}, "dimensions"),
    "model as number": ({"input": "a", "model": 5}, "model"),
    "a model that does not read": ({"input": "a", "model": "rules"}, "model"),
    "a parameter of elsewhere": ({"input": "a", "messages": []}, "messages"),
    "a typing error": ({"input": "a", "dimension": 64}, "dimension"),
}


@pytest.mark.parametrize(("body", "param"), BAD.values(), ids=BAD)
def test_a_bad_request_names_its_parameter(body, param, api, caplog):
    reply = api("POST", PATH, body)
    assert assert_problem(reply, 400, "invalid_request")["error"]["param"] == param
    assert len(reply.content) < 4_000
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b'"x"', b"{", b'{"input": NaN}', b"[" * 999])
def test_a_bad_body_is_the_clients_mistake(raw, api):
    assert_problem(api("POST", PATH, raw=raw), 400, "invalid_request")


def test_an_unknown_model_is_not_found_and_a_large_body_is_refused(api):
    told = assert_problem(api("POST", PATH, {"model": "ada", "input": "a"}), 404, "not_found")
    assert told["error"]["param"] == "model"
    assert_problem(api("POST", PATH, {"input": "x" * 70_000}), 413, "invalid_request")


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("one two", ["one two"]),
        (["one", "two three"], ["one", "two three"]),
        ([7, 8], ["7 8"]),
        ([[7], [8, 9]], ["7", "8 9"]),
    ],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_each_form_of_input_is_read(given, texts, api):
    reply = api("POST", PATH, {"model": "model", "input": given})
    assert reply.status_code == 200, reply.content
    body = reply.json()
    assert (body["object"], body["model"]) == ("list", "model")
    words = sum(len(text.split()) for text in texts)
    assert body["usage"] == {"prompt_tokens": words, "total_tokens": words}
    assert [row["index"] for row in body["data"]] == list(range(len(texts)))
    assert {row["object"] for row in body["data"]} == {"embedding"}
    alone = [api("POST", PATH, {"input": text}).json()["data"][0]["embedding"] for text in texts]
    assert [row["embedding"] for row in body["data"]] == alone
    assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-5) for vector in alone)
    assert not Conversation.objects.exists() and not Message.objects.exists()


def test_both_encodings_say_the_same_and_the_own_width_is_taken(api):
    plain = api("POST", PATH, {"input": "one two", "dimensions": WIDTH, "user": "someone"})
    packed = api("POST", PATH, {"input": "one two", "encoding_format": "base64"})
    numbers = plain.json()["data"][0]["embedding"]
    raw = base64.b64decode(packed.json()["data"][0]["embedding"], validate=True)
    assert len(numbers) == WIDTH and list(struct.unpack(f"<{WIDTH}f", raw)) == numbers


def test_as_many_texts_as_are_allowed_are_read(api):
    assert len(api("POST", PATH, {"input": ["a"] * MAX_INPUTS}).json()["data"]) == MAX_INPUTS


def test_without_a_model_there_are_no_embeddings(api, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["reviewed", "rules", "human"]}
    told = assert_problem(api("POST", PATH, {"input": "a"}), 400, "invalid_request")
    assert told["error"]["param"] == "model"


def test_a_model_that_cannot_be_loaded_is_unavailable(api, settings, tmp_path):
    conf = settings.ASSISTANT
    options = {**conf["BACKENDS"]["model"], "OPTIONS": {"model_dir": str(tmp_path)}}
    settings.ASSISTANT = {
        **conf, "BACKENDS": {**conf["BACKENDS"], "model": options}, "ROUTE": ["model"]
    }  # fmt: skip
    assert_problem(api("POST", PATH, {"input": "a"}), 503, "model_unavailable")


# --- Who pays ------------------------------------------------------------------------------------


def test_a_request_counts_as_one_and_its_tokens_as_tokens(api, settings):
    settings.ASSISTANT_RATE = "3/m"
    settings.ASSISTANT_TOKENS_PER_DAY = 100
    reply = api("POST", PATH, {"input": ["one two"] * 20})
    assert reply["x-ratelimit-remaining-requests"] == "2"
    assert api("POST", PATH, {"input": ["one"] * 59})["x-ratelimit-remaining-tokens"] == "60"
    told = assert_problem(api("POST", PATH, {"input": ["one"] * 50}) and api(
        "POST", PATH, {"input": "one"}
    ), 429, "rate_limited")  # fmt: skip
    assert told["error"]["type"] == "rate_limit_error"


def test_what_is_refused_for_its_form_costs_nothing(api, settings):
    settings.ASSISTANT_RATE = "1/m"
    api("POST", PATH, {"input": ""})
    api("POST", PATH, {"input": "a", "dimensions": 3})
    assert api("POST", PATH, {"input": "a"}).status_code == 200
    refused = api("POST", PATH, {"input": "a"})
    assert_problem(refused, 429, "rate_limited")
    assert int(refused["Retry-After"]) > 0


class Hanging(EchoBackend):
    """Reads until it is let go."""

    begun: ClassVar[threading.Event]
    go: ClassVar[threading.Event]

    async def embed(self, texts: Sequence[str]) -> list[Vector]:
        self.begun.set()
        while not self.go.is_set():  # noqa: ASYNC110 - another thread's event
            await asyncio.sleep(0.005)
        return await super().embed(texts)


@pytest.fixture
def hanging(settings: Any) -> type[Hanging]:
    conf = settings.ASSISTANT
    settings.ASSISTANT = {
        **conf,
        "BACKENDS": {**conf["BACKENDS"], "slow": {"BACKEND": f"{__name__}.Hanging"}},
        "ROUTE": ["slow"],
        "REQUEST_TIMEOUT_S": 0.2,
    }
    backends.reset()
    found: Any = type(backends.get("slow"))
    found.begun, found.go = threading.Event(), threading.Event()
    return found


def test_what_is_not_read_in_time_is_given_up(api, hanging):
    reply = api("POST", PATH, {"input": "a"})
    assert_problem(reply, 503, "overloaded")
    assert reply["Retry-After"] == "5"
    assert not openai_api._reading._held


def test_one_caller_has_only_so_many_read_at_once(api, ben, token_of, hanging, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "REQUEST_TIMEOUT_S": 20}
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 1
    replies: list[Any] = []
    first = threading.Thread(target=lambda: replies.append(api("POST", PATH, {"input": "a"})))
    first.start()
    assert hanging.begun.wait(20)
    assert_problem(api("POST", PATH, {"input": "b"}), 429, "rate_limited")
    hanging.go.set()
    assert Api(token_of(ben))("POST", PATH, {"input": "c"}).status_code == 200
    first.join(20)
    assert replies[0].status_code == 200
    assert api("POST", PATH, {"input": "d"}).status_code == 200


# --- The official client, and the bundled model --------------------------------------------------


def test_the_official_client_reads_the_bundled_models(
    ana: User, token_of: Any, database_file: Path, tmp_path: Path
) -> None:
    texts = ["How do I cancel my order?", "how to cancel a purchase", "where is my refund"]
    with (
        serving("uvicorn", database_file, tmp_path, ASSISTANT_BACKEND="model") as server,
        openai.OpenAI(base_url=f"{server.http}/v1", api_key=token_of(ana), max_retries=0) as client,
    ):
        made = client.embeddings.create(model="local", input=texts)
        plain = client.embeddings.create(model="local", input=texts, encoding_format="float")
        with pytest.raises(openai.BadRequestError, match="320 values") as refused:
            client.embeddings.create(model="local", input=texts, dimensions=64)
        with pytest.raises(openai.BadRequestError, match="vocabulary"):
            client.embeddings.create(model="local", input=[[9_906, 11, 1_917]])
        with pytest.raises(openai.BadRequestError) as long:
            client.embeddings.create(model="local", input="zebra zoo " * 1_000)
    assert refused.value.param == "dimensions" and long.value.code == "context_too_long"
    vectors = np.array([row.embedding for row in made.data])
    assert vectors.shape == (3, 320)
    assert np.allclose(vectors, [row.embedding for row in plain.data])
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.8 and far < 0.5
    assert made.usage.prompt_tokens == made.usage.total_tokens > 12
