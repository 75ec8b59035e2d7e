"""A person's answer reaches a socket that another process holds, through Redis and after it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from conversations.news import AGAIN_S
from tests.services.conftest import Redis, Stack, manage, stacked
from tests.services.test_stack import Client

REPLY = """
import sys
from conversations import handover
from conversations.models import Conversation, HandOver, Message
held = Conversation.objects.get(pk={conversation!r})
last = held.messages.order_by("-seq").first()
asked, _ = HandOver.objects.get_or_create(conversation=held, defaults={{"message": last}})
handover.reply(asked.pk, None, {text!r}, seen=last.seq)
"""


def reply_from_elsewhere(
    folder: Path, redis: Redis, stack: Stack, client: Client, text: str
) -> None:
    """As a process of its own would: one that holds no socket."""
    done = manage(
        *("manage.py", "shell", "-v0", "-c", REPLY.format(conversation=client.id, text=text)),
        ASSISTANT_DATA_DIR=str(folder),
        REDIS_URL=redis.url,
        DATABASE_URL=stack.database_url,
    )
    assert done.returncode == 0, done.stderr


def heard(socket: Any, within_s: float) -> list[str]:
    """The texts of a person, as they come."""
    texts: list[str] = []
    deadline = time.monotonic() + within_s
    while not texts and time.monotonic() < deadline:
        try:
            frame = json.loads(socket.recv(max(0.01, deadline - time.monotonic())))
        except TimeoutError:
            break
        message = frame.get("message", {})
        if message.get("author"):
            texts.append(message["text"])
    return texts


@pytest.mark.parametrize("away", [False, True])
def test_a_socket_hears_of_an_answer_from_another_process(
    away: bool, redis: Redis, postgres: str, tmp_path: Path
) -> None:
    """``away``: Redis is gone for a while; the answer of that time is stored, and later ones are
    told again."""
    with (
        stacked(tmp_path, redis, postgres) as stack,
        Client(stack.server.http, stack.token) as client,
    ):
        assert client.rest("hello").status_code == 200
        headers = {"Authorization": f"Bearer {stack.token}"}
        url = f"{stack.server.ws}/ws/chat/{client.id}/"
        with connect(url, additional_headers=headers, open_timeout=20) as socket:
            socket.send(json.dumps({"type": "ping"}))
            assert json.loads(socket.recv(20)) == {"type": "pong"}
            reply_from_elsewhere(tmp_path, redis, stack, client, "first")
            assert heard(socket, 2) == ["first"]
            if not away:
                return
            redis.kill()
            reply_from_elsewhere(tmp_path, redis, stack, client, "second")
            assert heard(socket, 1) == []
            socket.send(json.dumps({"type": "ping"}))
            assert json.loads(socket.recv(20)) == {"type": "pong"}
            texts = [row["text"] for row in client.get(client.path).json()["results"]]
            assert texts == ["hello", "hello", "first", "second"]
            again = Redis.start(redis.folder, redis.port)
            try:
                time.sleep(AGAIN_S + 2)
                reply_from_elsewhere(tmp_path, again, stack, client, "third")
                assert heard(socket, 2) == ["third"]
            finally:
                again.kill()
    assert "Traceback" not in stack.server.log.read_text()
