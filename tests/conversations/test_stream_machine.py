"""Whatever people do in whatever order: tabs that open, ask, stop, leave, come back.

Hypothesis chooses; everything goes through the real consumer. After each step every answer's
events, asked for again from the first, say what a fresh GET says, and have one end or none yet.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest
from asgiref.sync import sync_to_async
from channels.testing import WebsocketCommunicator
from django.contrib.auth.models import User
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from assistant.threads import in_thread
from config.asgi import application
from conversations.models import Conversation
from conversations.running import running
from fallback import breaker
from tests.conversations.conftest import API, Api

pytestmark = pytest.mark.django_db(transaction=True)

T = TypeVar("T")
ENDS = {"message.completed", "message.failed"}
PATIENCE_S = 5.0


class Tab:
    """A browser's tab: what it was sent so far, and nothing is awaited for longer than needed."""

    def __init__(self, conversation: Conversation, token: str) -> None:
        headers = [(b"host", b"testserver"), (b"authorization", f"Bearer {token}".encode())]
        path = f"/ws/chat/{conversation.pk}/"
        self._socket = WebsocketCommunicator(application, path, headers=headers)
        self.frames: list[dict[str, Any]] = []

    async def open(self) -> Tab:
        connected, _ = await self._socket.connect(PATIENCE_S)
        assert connected
        return self

    async def close(self) -> None:
        await self._socket.disconnect(timeout=PATIENCE_S)

    async def send(self, **frame: Any) -> None:
        await self._socket.send_to(text_data=json.dumps(frame))

    async def next(self) -> dict[str, Any]:
        self.frames.append(json.loads(await self._socket.receive_from(PATIENCE_S)))
        return self.frames[-1]

    async def until(self, *types: str, ref: str = "") -> dict[str, Any]:
        """The first frame from now on of one of these types (and with that ref)."""
        while (frame := await self.next())["type"] not in types or ref not in (
            "",
            frame.get("ref"),
        ):
            pass
        return frame

    async def caught_up(self) -> None:
        """Take what has come."""
        await self.send(type="ping")
        await self.until("pong")


class Streams(RuleBasedStateMachine):
    """One person's conversation in several tabs; the model is who follows the running answer."""

    tabs: Bundle[Tab] = Bundle("tabs")
    #: Set by the test.
    user: User
    token: str
    loop: asyncio.Runner

    @initialize()
    def begin(self) -> None:
        self.conversation = self.run(_conversation(self.user))
        self.api = Api(self.token)
        self.open: list[Tab] = []
        self.followers: set[Tab] = set()
        self.answers: list[str] = []
        self.left_alone: set[str] = set()
        self.stopped: set[str] = set()
        self.sound: set[str] = set()
        self.asked = 0
        breaker.reset()  # echoes that were told to fail

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    @property
    def writing(self) -> str:
        """The answer that is being written now, if any."""
        turn = running.get(self.conversation.pk)
        return str(turn.message.pk) if turn is not None else ""

    # -- what people do

    @rule(target=tabs)
    @precondition(lambda self: len(self.open) < 4)
    def another_tab(self) -> Tab:
        tab = self.run(Tab(self.conversation, self.token).open())
        self.open.append(tab)
        return tab

    @rule(tab=tabs, words=st.integers(0, 40), manner=st.sampled_from(["", "error=3", "fail=any"]))
    def send(self, tab: Tab, words: int, manner: str) -> None:
        busy, self.asked = self.writing, self.asked + 1
        ref = f"r{self.asked}"
        text = f"/echo delay=0.005 words={words} {manner} w{self.asked}"
        self.run(tab.send(type="message.create", text=text, ref=ref))
        told = self.run(tab.until("message.created", "error", ref=ref))
        if told["type"] == "error":
            assert busy and told["error"]["code"] == "conflict"
            return
        self.answers.append(told["message"]["id"])
        self.followers = {tab}

    @rule(pause_s=st.floats(0, 0.1))
    def read_on(self, pause_s: float) -> None:
        self.run(asyncio.sleep(pause_s))

    @rule(tab=tabs)
    def stop(self, tab: Tab) -> None:
        self.stopped |= {self.writing}
        self.run(tab.send(type="message.cancel"))
        self.run(tab.caught_up())
        self.run(self._ended())

    @rule(tab=consumes(tabs))
    def disconnect(self, tab: Tab) -> None:
        self.open.remove(tab)
        self._leaves(tab)
        self.run(tab.close())

    @rule(tab=tabs, back=st.integers(0, 2), share=st.floats(0, 1))
    def resume(self, tab: Tab, back: int, share: float) -> None:
        """An answer that was seen to some place, in this tab or in another one."""
        if not self.answers:
            return
        named = self.answers[-1 - back % len(self.answers)]
        after = int(share * self._length(named))
        if named == self.writing:
            self.followers.add(tab)
        else:
            self._leaves(tab)
        before = len(tab.frames)
        owed = after + 1 if named != self.writing or after < self._length(named) else 0
        self.run(tab.send(type="message.resume", id=named, after_seq=after, ref="resumed"))
        self.run(tab.caught_up())
        while owed and owed not in [frame.get("seq") for frame in tab.frames[before:]]:
            self.run(tab.next())
        assert all(frame["type"] != "error" for frame in tab.frames[before:])

    @rule()
    def wait_for_the_end(self) -> None:
        self.run(self._ended())

    def _leaves(self, tab: Tab) -> None:
        """If nobody follows the answer any more, it may end for that."""
        self.followers.discard(tab)
        if not self.followers:
            self.left_alone |= {self.writing}

    def _length(self, answer: str) -> int:
        turn = running.get(self.conversation.pk)
        if turn is not None and str(turn.message.pk) == answer:
            return turn.log.length
        return 0

    async def _ended(self) -> None:
        until = time.monotonic() + PATIENCE_S
        while self.writing:
            assert time.monotonic() < until, "an answer never ended"
            await asyncio.sleep(0.005)

    # -- what always holds

    @invariant()
    def told_again_is_what_a_get_says(self) -> None:
        if not getattr(self, "answers", []):
            return
        for answer in self.answers[-2:]:
            if answer not in self.sound:
                self.run(self._is_consistent(answer))

    async def _is_consistent(self, answer: str) -> None:
        writing = answer == self.writing
        if writing and not self.followers:  # our look would keep it alive
            await self._ended()
        frames = await self._again(answer)
        stored = await self._get(answer)
        _check_sequence(frames)
        text = "".join(frame["text"] for frame in frames if frame["type"] == "message.delta")
        if frames[-1]["type"] not in ENDS:
            assert writing
            return
        ended = frames[-1]["message"]
        assert text == ended["text"]
        if stored["status"] != "streaming":  # it ended between the two looks otherwise
            assert {**ended, "siblings": stored["siblings"]} == stored
        self._ended_for_a_reason(ended)
        self.sound.add(answer)

    def _ended_for_a_reason(self, ended: dict[str, Any]) -> None:
        status, answer = ended["status"], ended["id"]
        assert status in {"complete", "stopped", "interrupted"}
        assert status != "interrupted" or answer in self.left_alone
        assert status != "stopped" or answer in self.stopped
        assert status != "complete" or ended["text"]

    async def _again(self, answer: str) -> list[dict[str, Any]]:
        """Its events from the first, as far as there are any, in a tab of their own."""
        tab = await Tab(self.conversation, self.token).open()
        await tab.send(type="message.resume", id=answer, after_seq=0)
        await tab.until("message.created")
        if answer != self.writing:
            while tab.frames[-1]["type"] not in ENDS:
                await tab.next()
        await tab.caught_up()
        await tab.close()
        return [frame for frame in tab.frames if frame["type"] != "pong"]

    async def _get(self, answer: str) -> dict[str, Any]:
        reply = await in_thread(self.api, "GET", f"{API}{self.conversation.pk}/messages/")
        (found,) = [one for one in reply.json()["results"] if one["id"] == answer]
        return found

    def teardown(self) -> None:
        """Everybody leaves; no answer goes on, and each tab was told each end once at most."""
        for tab in getattr(self, "open", []):
            self._leaves(tab)
            self.run(tab.close())
        if hasattr(self, "answers"):
            self.run(self._ended())
            for answer in self.answers:
                self.run(self._is_consistent(answer))


def _check_sequence(frames: list[dict[str, Any]]) -> None:
    """Created, deltas, at most one end, and it last; numbered without a gap."""
    kinds = [frame["type"] for frame in frames]
    assert [frame["seq"] for frame in frames] == list(range(1, len(frames) + 1))
    assert kinds[0] == "message.created"
    assert set(kinds[1:-1]) <= {"message.delta"}
    assert kinds[-1] in {*ENDS, "message.delta", "message.created"}


@sync_to_async
def _conversation(user: User) -> Conversation:
    return Conversation.objects.create(user=user)


def test_any_order_of_asking_stopping_leaving_and_coming_back_tells_one_story(
    ana: User, token_of: Any
) -> None:
    with asyncio.Runner() as loop:
        Streams.user, Streams.token, Streams.loop = ana, token_of(ana), loop
        run_state_machine_as_test(
            Streams,
            settings=settings(
                max_examples=12,
                stateful_step_count=10,
                deadline=None,
                phases=[Phase.generate],  # times differ from run to run: nothing shrinks
                suppress_health_check=list(HealthCheck),
            ),
        )
