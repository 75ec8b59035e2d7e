"""The backend for servers elsewhere, against real ones: llama-cpp-python's, and our own ``/v1``.

    PEERS_PYTHON=/path/to/python pytest -m peers tests/fallback/test_upstream_peers.py

llama-cpp-python may be in this interpreter or in the one named.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from assistant.backends.openai import OpenAIBackend, Options
from assistant.benchmark.peers import EXTRA
from assistant.errors import UpstreamFailed
from assistant.types import Delta, Event, Finished, Message, Params, Started
from tests.conftest import Server, free_port

PYTHON = os.environ.get("PEERS_PYTHON", sys.executable)
QUESTION = [Message("user", "where is order 48213377?")]


async def events_of(backend: OpenAIBackend, **params: Any) -> list[Event]:
    return [event async for event in backend.stream(QUESTION, Params(**params))]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.fixture
def llama(tmp_path: Path) -> Iterator[str]:
    """The address of llama-cpp-python's server with a tiny random model."""
    if subprocess.run(
        [PYTHON, "-c", "import llama_cpp, gguf, uvicorn"], capture_output=True
    ).returncode:
        pytest.skip(f"llama.cpp is not installed: {EXTRA}")
    port, log = free_port(), tmp_path / "llama.log"
    program = Path(__file__).with_name("llama_server.py")
    with log.open("wb") as output:
        process = subprocess.Popen(
            [PYTHON, str(program), str(port)], stdout=output, stderr=output, cwd=tmp_path
        )
    try:
        for _ in range(1_200):
            assert process.poll() is None, log.read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.peers
async def test_llama_cpps_answers_are_understood(llama: str) -> None:
    backend = OpenAIBackend("llama", Options(llama, "tiny", "none", first_byte_s=60, idle_s=60))
    started, *deltas, finished = await events_of(backend, max_new_tokens=12, seed=1)
    assert started == Started("llama:tiny")
    assert isinstance(finished, Finished)
    assert finished.reason == "length" and 0 < finished.usage.output_tokens <= 12
    assert deltas
    again = await events_of(backend, max_new_tokens=12, seed=1)
    assert text_of(again) == text_of([started, *deltas])


@pytest.mark.django_db(transaction=True)
async def test_one_installation_can_be_the_larger_model_of_another(
    server: Server, ana: User, token_of: Callable[[User], str]
) -> None:
    from asgiref.sync import sync_to_async

    key = await sync_to_async(token_of)(ana)
    backend = OpenAIBackend("other", Options(f"{server.http}/v1", "local", key, first_byte_s=20))
    *rest, finished = await events_of(backend)
    assert text_of(rest) == "where is order 48213377?", "masked there, filled in here"
    assert isinstance(finished, Finished) and finished.usage.output_tokens > 0
    with pytest.raises(UpstreamFailed) as refused:
        await events_of(OpenAIBackend("other", Options(f"{server.http}/v1", "local", "wrong")))
    assert refused.value.cause == "refused" and "401" in refused.value.message
    with pytest.raises(UpstreamFailed) as unknown:
        await events_of(OpenAIBackend("other", Options(f"{server.http}/v1", "gpt-9", key)))
    assert unknown.value.cause == "wrong_model"
