"""Embeddings through the backends: what each promises, then what only the model in process does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from assistant.backends.base import Backend, Vector
from assistant.backends.echo import EchoBackend
from assistant.backends.onnx import OnnxBackend, Options
from assistant.backends.openai import OpenAIBackend
from assistant.backends.openai import Options as Upstream
from assistant.engine import EngineCrashed
from assistant.errors import (
    ContextTooLong,
    GenerationFailed,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
)
from assistant.facts import mask
from tests.conftest import ROOT

BUNDLED = ROOT / "assistant/bundled/support-en"
TEXTS = [
    "How do I cancel my order?",
    "where is my refund",
    "a",
    "",
    "\ud800 \0 🙂 {{Order Number}}",
]


@pytest.fixture(scope="module")
def bundled() -> Iterator[OnnxBackend]:
    backend = OnnxBackend("model", Options(str(BUNDLED), threads=1))
    yield backend
    backend.close()


@pytest.fixture(params=["echo", "onnx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "echo":
        return EchoBackend("echo", EchoBackend.Options())
    found: OnnxBackend = request.getfixturevalue("bundled")
    return found


def cosine(one: Vector, other: Vector) -> float:
    return float(one @ other)


async def test_each_text_has_a_unit_vector_of_the_width_that_was_told(backend: Backend) -> None:
    found = await backend.embed(TEXTS)
    width = backend.embedding_width()
    assert width > 1 and len(found) == len(TEXTS)
    for vector in found:
        assert vector.shape == (width,) and vector.dtype == np.float32
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)
    assert len(await backend.embed([])) == 0


async def test_a_text_has_one_vector_whatever_is_read_beside_it(backend: Backend) -> None:
    (alone,) = await backend.embed(TEXTS[:1])
    together = await backend.embed([*TEXTS[1:], TEXTS[0], "x " * 200])
    assert np.array_equal(together[len(TEXTS) - 1], alone)
    again = await asyncio.gather(*(backend.embed(TEXTS) for _ in range(4)))
    assert all(np.array_equal(vectors[0], alone) for vectors in again)


async def test_more_alike_is_nearer(backend: Backend) -> None:
    same, near, far = await backend.embed(
        ["how do I cancel my order", "how can I cancel my order", "where is the refund"]
    )
    assert 0.5 < cosine(same, near) < 0.99999 and cosine(same, far) < cosine(same, near)


async def test_a_backend_without_embeddings_says_so() -> None:
    upstream = OpenAIBackend("upstream", Upstream("https://api.example.com/v1", "m", "k"))
    assert upstream.embedding_width() == 0
    with pytest.raises(InvalidRequest, match="has no embeddings"):
        await upstream.embed(["hello"])
    with pytest.raises(InvalidRequest, match="Send texts"):
        upstream.text_of([1, 2])


# -- the model in this process ---------------------------------------------------------------------


async def test_values_do_not_matter_and_are_masked_as_in_a_question(bundled: OnnxBackend) -> None:
    one, other, third = await bundled.embed(
        ["cancel order 48213377", "cancel order 99887766", "cancel my order"]
    )
    assert np.array_equal(one, other) and not np.array_equal(one, third)


async def test_they_are_what_near_matches_were_judged_on(bundled: OnnxBackend) -> None:
    from assistant.modelkit.finish import _states

    texts = ["How do I cancel my order?", "refund $350 please", "where is order 48213377"]
    judged, _ = _states(BUNDLED, mask, texts)
    assert np.abs(np.stack(await bundled.embed(texts)) - judged).max() < 1e-6


async def test_texts_that_mean_the_same_are_near(bundled: OnnxBackend) -> None:
    cancel, reworded, person = await bundled.embed(
        ["How do I cancel my order?", "how to cancel a purchase", "let me talk to a person"]
    )
    assert cosine(cancel, reworded) > 0.8 > 0.5 > cosine(cancel, person)


def test_token_ids_become_their_text(bundled: OnnxBackend) -> None:
    codec = bundled._ready().codec
    for text in ("hello there, cancel order", "Ünïcode 🙂"):
        assert bundled.text_of(codec.encode(text)) == text
    for wrong in (-1, 6144, 10**30):
        with pytest.raises(InvalidRequest, match="vocabulary"):
            bundled.text_of([5000, wrong])
    with pytest.raises(InvalidRequest, match="controls the model"):
        bundled.text_of([5000, min(codec.control_ids)])


async def test_what_is_too_long_is_refused_as_such(bundled: OnnxBackend) -> None:
    with pytest.raises(ContextTooLong, match="at most 1024"):
        await bundled.embed(["hello", "zebra zoo " * 1000])


async def test_whoever_stops_waiting_stops_the_work(bundled: OnnxBackend) -> None:
    engine = bundled.engine
    before = engine.stats().embedded_tokens
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.15):
            await bundled.embed([f"where is my order, number {n}?" for n in range(3000)])
    await bundled.embed(["hello"])
    assert engine.stats().embedded_tokens - before < 20_000


async def test_troubles_of_the_engine_are_ours(tiny_model: Path) -> None:
    backend = OnnxBackend("own", Options(str(tiny_model), threads=1))
    worker = backend.engine._worker
    assert worker is not None
    worker.embeddings.tokens = 65_536  # as if so much waited
    with pytest.raises(Overloaded) as busy:
        await backend.embed(["hello"])
    assert busy.value.retry_after_s and busy.value.retry_after_s >= 1
    worker.embeddings.tokens = 0

    def broken(batch: object) -> None:
        raise RuntimeError("kernel")

    worker.loaded.runner.pool = broken  # type: ignore[assignment, method-assign]
    with pytest.raises(GenerationFailed) as failed:
        await backend.embed(["hello"])
    assert isinstance(failed.value.__cause__, EngineCrashed)
    assert len(await backend.embed(["hello"])) == 1, "it is started again"
    backend.close()
    with pytest.raises(ModelUnavailable):
        await OnnxBackend("gone", Options(str(tiny_model / "nothing"))).embed(["hello"])
