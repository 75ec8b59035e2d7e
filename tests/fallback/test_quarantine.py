"""Questions that break the model: twice, and then rules answer; nobody else notices."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User

from assistant import backends
from assistant.backends.base import Backend
from assistant.backends.echo import EchoBackend
from assistant.engine import EngineCrashed
from assistant.errors import GenerationFailed
from assistant.types import Delta, Message, Params
from conversations.models import Conversation
from fallback import quarantine
from fallback.answers import Known
from fallback.quarantine import Quarantine, Quarantined, mark_of
from fallback.router import Ask, Routed, route
from tests.conftest import Server, serving

POISON = "tell me of the poison"


@pytest.fixture
def folder(tmp_path: Path, settings: Any) -> Path:
    settings.DATA_DIR = tmp_path
    quarantine.forget()
    return tmp_path / "quarantine"


def mark(text: str) -> str:
    return mark_of([Message("user", text)])


@pytest.fixture
def kept(folder: Path) -> Iterator[Quarantine]:
    made = Quarantine(folder, 1)
    yield made
    made.close()


def refuses(kept: Quarantine, text: str) -> bool:
    try:
        kept.check(mark(text))
    except Quarantined:
        return True
    return False


# --- The book of strikes -------------------------------------------------------------------------


def test_two_crashes_keep_a_question_away_for_an_hour_and_no_other(kept, monkeypatch) -> None:
    kept.strike([mark("bad"), mark("beside")], crashed=True)
    assert not refuses(kept, "bad")
    kept.strike([mark("bad")], crashed=True)
    assert refuses(kept, "bad") and not refuses(kept, "beside")
    later = time.time() + quarantine.KEPT_S
    monkeypatch.setattr(quarantine.time, "time", lambda: later)
    assert not refuses(kept, "bad")


def test_the_same_words_after_another_history_are_another_question() -> None:
    before = (Message("user", "hello"), Message("assistant", "hi"))
    assert mark_of([*before, Message("user", "bad")]) != mark("bad")


def test_another_process_hears_of_it(kept, folder, monkeypatch) -> None:
    other = Quarantine(folder, 2)
    assert not refuses(other, "bad")
    for _ in range(2):
        kept.strike([mark("bad")], crashed=False)
    monkeypatch.setattr(quarantine, "LOOK_EVERY_S", 0)
    assert refuses(other, "bad")
    other.close()


def test_three_crashes_within_minutes_give_the_model_a_rest(kept, monkeypatch) -> None:
    now = time.time()
    for n in range(3):
        assert not refuses(kept, "anything")
        monkeypatch.setattr(quarantine.time, "time", lambda n=n: now + n * 60)
        kept.strike([mark(f"bad {n}")], crashed=True)
    assert refuses(kept, "anything")
    monkeypatch.setattr(quarantine.time, "time", lambda: now + quarantine.DEATHS_WITHIN_S + 1)
    assert not refuses(kept, "anything")


def test_processes_that_die_together_are_one_crash(kept) -> None:
    for n in range(8):
        kept.strike([mark(f"one of eight {n}")], crashed=True)
    assert not refuses(kept, "anything")


DIES = """
import os, signal, sys
from pathlib import Path
import django; django.setup()
from assistant.types import Message
from fallback.quarantine import Quarantine, mark_of
kept = Quarantine(Path(sys.argv[1]), os.getpid())
with kept.asked(mark_of([Message("user", "answered before")])):
    pass
with kept.asked(mark_of([Message("user", "bad")])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_what_a_process_died_over_is_found_by_the_next_one(folder) -> None:
    for deaths in (1, 2):
        done = subprocess.run([sys.executable, "-c", DIES, str(folder)], env=_environment())
        assert done.returncode == -signal.SIGKILL
        found = Quarantine(folder, 1)
        away = refuses(found, "bad"), refuses(found, "answered before")
        found.close()
        assert away == (deaths == 2, False)
    assert not list(folder.glob("*.asked"))
    kept = b"".join(path.read_bytes() for path in folder.iterdir())
    assert kept and b"bad" not in kept


def _environment() -> dict[str, str]:
    secret = {"SECRET_KEY": django_settings.SECRET_KEY, "DJANGO_SETTINGS_MODULE": "config.settings"}
    return {**os.environ, **secret}


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"strikes": 1}'])
def test_a_file_nobody_can_read_keeps_nobody_away(folder, rubbish: str) -> None:
    folder.mkdir()
    (folder / "strikes.json").write_text(rubbish)
    kept = Quarantine(folder, 1)
    assert not refuses(kept, "bad")
    kept.close()


def test_a_folder_that_cannot_be_made_costs_nobody_an_answer(tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    kept = Quarantine(tmp_path / "file", 1)
    with kept.asked(mark("bad")):
        kept.strike([mark("bad")], crashed=True)
    assert not refuses(kept, "bad")


# --- Around a model ------------------------------------------------------------------------------


class Breaking(EchoBackend):
    in_process = True
    asked = 0

    async def stream(self, messages: Any, params: Any) -> Any:
        type(self).asked += 1
        if "poison" in messages[-1].text:
            raise GenerationFailed("The model broke.") from EngineCrashed("its thread died")
        async for event in super().stream(messages, params):
            yield event


@pytest.fixture
def model(folder: Path, monkeypatch: Any) -> Backend:
    made = Breaking("echo", EchoBackend.Options())
    monkeypatch.setattr(Breaking, "asked", 0)
    monkeypatch.setitem(backends._built, "echo", made)
    return made


async def answer(text: str) -> tuple[Routed, str]:
    ask = Ask((Message("user", text),), Params(), Known({}, ()), ("echo", "rules"))
    events = [event async for event in route(ask)]
    routed = [event for event in events if isinstance(event, Routed)][-1]
    return routed, "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_question_that_crashes_the_engine_is_asked_twice_and_not_again(model) -> None:
    for _ in range(4):
        routed, text = await answer(POISON)
        assert (routed.route, routed.reason) == ("human", "error") and text
        assert (await answer("hello there"))[0].route == "model"
    assert Breaking.asked == 2 + 4


async def test_a_question_that_only_failed_is_asked_again(folder, monkeypatch) -> None:
    model = Breaking("echo", EchoBackend.Options())
    monkeypatch.setitem(backends._built, "echo", model)
    monkeypatch.setattr(Breaking, "asked", 0)
    for _ in range(4):
        await answer("/echo fail=any hello")
    assert Breaking.asked == 4


async def test_a_question_over_which_the_model_hangs_is_kept_away(model, settings) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "FIRST_TOKEN_TIMEOUT_S": 0.05}
    backends._built["echo"] = model
    kept = quarantine.own()
    asked = "/echo hang=0 hello"
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await _in_time(model, asked)
    assert refuses(kept, asked)


async def test_a_question_over_which_the_model_falls_silent_is_kept_away(
    model, monkeypatch
) -> None:
    monkeypatch.setattr(model, "idle_s", 0.01)
    backends._built["echo"] = model
    asked = "/echo hang=1 hello there"
    for _ in range(2):
        with pytest.raises(TimeoutError):
            await _in_time(model, asked)
    assert refuses(quarantine.own(), asked)


async def _in_time(model: Backend, text: str) -> None:
    messages = [Message("user", text)]
    async with asyncio.timeout(0.05):
        async for _ in quarantine.watched(model, messages, model.stream(messages, Params())):
            pass


# --- A real server that dies ---------------------------------------------------------------------


def post(server: Server, path: str, token: str, text: str) -> dict[str, Any]:
    asked = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    bearer = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    try:
        asked.request("POST", path, json.dumps({"text": text}), bearer)
        return json.loads(asked.getresponse().read())
    finally:
        asked.close()


@pytest.mark.chaos
@pytest.mark.django_db(transaction=True)
def test_a_question_that_kills_its_process_does_so_twice_and_then_rules_answer(
    ana: User, ben: User, token_of: Any, database_file: Path, tmp_path: Path
) -> None:
    paths = {
        user: f"/api/v1/conversations/{Conversation.objects.create(user=user).pk}/messages/"
        for user in (ana, ben)
    }
    tokens = {user: token_of(user) for user in (ana, ben)}
    sick = {"DJANGO_SETTINGS_MODULE": "tests.fallback.poison_settings"}
    for _ in range(2):
        with serving("uvicorn", database_file, tmp_path, **sick) as server:
            assert post(server, paths[ben], tokens[ben], "hello there")["route"] == "model"
            with pytest.raises((OSError, http.client.HTTPException)):
                post(server, paths[ana], tokens[ana], POISON)
            assert server.process.wait(10) == -signal.SIGSEGV
        time.sleep(8.5)  # the answer that died is given up when it shows no life for eight seconds
    with serving("uvicorn", database_file, tmp_path, **sick) as server:
        found = post(server, paths[ana], tokens[ana], POISON)
        assert found["status"] == "complete" and found["text"], found
        assert (found["route"], found["degraded_reason"]) == ("human", "error")
        assert post(server, paths[ben], tokens[ben], "hello again")["route"] == "model"
        assert server.process.poll() is None
