"""From "a person, please" to that person's answer in the same chat: rows, staff, sockets, hooks."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from asgiref.sync import sync_to_async
from celery.exceptions import Retry
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core import mail
from django.core.cache import caches
from django.db import IntegrityError, connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from assistant.errors import Conflict, InvalidRequest, NotFound
from conversations import handover, hooks, news, opening, tasks
from conversations.limits import Caller
from conversations.models import Conversation, HandOver, Message
from conversations.turn import Turn
from fallback.models import Rule
from tests.conversations.test_socket import Chat

pytestmark = pytest.mark.django_db(transaction=True)

QUEUE = "/admin/conversations/handover/"


@pytest.fixture
def desk(sam: User) -> User:
    """Sam, who may answer, and is called so."""
    names = ("view_handover", "change_handover")
    sam.user_permissions.set(Permission.objects.filter(codename__in=names))
    sam.first_name = "Sam"
    sam.save()
    return User.objects.get(pk=sam.pk)


@pytest.fixture
def staff(desk: User) -> Client:
    client = Client()
    client.force_login(desk)
    return client


@pytest.fixture
def conversation(ana: User) -> Conversation:
    return Conversation.objects.create(user=ana)


@pytest.fixture(autouse=True)
def rules(settings: Any, db: None) -> None:
    """One rule that asks for a person and offers buttons; the model breaks when told to."""
    Rule.objects.create(
        name="A person",
        patterns=["talk to a person"],
        answer="I have asked a colleague.",
        buttons=[{"label": "Opening hours", "text": "When are you open?"}],
        hand_over=True,
    )
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["rules", "echo", "human"]}


@pytest.fixture
def ask(ana: User, conversation: Conversation) -> Any:
    caller = Caller(ana.pk, address="192.0.2.1")

    async def asked(text: str = "I want to talk to a person") -> Message:
        turn = await sync_to_async(Turn.open)(caller, conversation, text)
        return await turn.result()

    return asked


@pytest.fixture
def waiting(conversation: Conversation) -> HandOver:
    """A hand-over as a turn leaves it."""
    question = Message.objects.create(conversation=conversation, seq=1, role="user", text="help me")
    answer = Message.objects.create(
        conversation=conversation, seq=2, parent=question, role="assistant", text="a person comes"
    )
    return HandOver.objects.create(conversation=conversation, message=answer)


# --- A turn asks ---------------------------------------------------------------------------------


async def test_a_rule_with_hand_over_opens_one_and_its_buttons_come_along(ask, conversation):
    message = await ask()
    asked = await HandOver.objects.aget(conversation=conversation)
    assert (asked.message_id, asked.status, asked.reason) == (message.pk, "waiting", "")
    assert message.buttons == [{"label": "Opening hours", "text": "When are you open?"}]
    stored = await Message.objects.aget(pk=message.pk)
    assert stored.buttons == message.buttons


async def test_a_model_that_broke_opens_one_with_the_reason(ask, conversation):
    message = await ask("/echo error=0 nothing")
    assert message.route == "human"
    asked = await HandOver.objects.aget(conversation=conversation)
    assert asked.reason == message.degraded_reason == "error"


async def test_an_answer_that_asks_for_nobody_opens_none(ask):
    message = await ask("one two")
    assert message.route == "model" and message.buttons == []
    assert not await HandOver.objects.aexists()


async def test_one_is_open_at_a_time_and_after_it_ended_there_may_be_another(ask, conversation):
    first = await ask()
    await ask()
    assert await HandOver.objects.acount() == 1
    await sync_to_async(handover.close)((await HandOver.objects.aget()).pk)
    third = await ask()
    opened = [asked.message_id async for asked in HandOver.objects.order_by("pk")]
    assert opened == [first.pk, third.pk]


def test_the_database_itself_refuses_a_second_open_one(waiting, conversation):
    another = Message.objects.create(conversation=conversation, seq=3, role="assistant")
    with pytest.raises(IntegrityError), transaction.atomic():
        HandOver.objects.create(conversation=conversation, message=another, status="taken")
    HandOver.objects.create(conversation=conversation, message=another, status="closed")


async def test_off_means_that_nobody_is_asked(ask, settings):
    settings.ASSISTANT_HAND_OVER = False
    assert (await ask()).buttons
    assert not await HandOver.objects.aexists()


async def test_whoever_says_stop_wants_nobody(ana, conversation, settings):
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["echo", "human"]}
    caller = Caller(ana.pk, address="192.0.2.1")
    for ending, opened in (("stopped", 0), ("interrupted", 1)):
        turn = await sync_to_async(Turn.open)(caller, conversation, "/echo words=2 word")
        turn._progress.hand_over = True
        turn._progress.route = "human"
        await sync_to_async(turn._store)(ending, None)
        assert await HandOver.objects.acount() == opened, ending
        from conversations.running import running

        running.remove(turn)


def test_passing_turns_open_none(api):
    body = {"model": "local", "messages": [{"role": "user", "content": "talk to a person"}]}
    reply = api("POST", "/v1/chat/completions", body)
    assert reply.status_code == 200 and reply.json()["route"] == "rules"
    assert not HandOver.objects.exists()


async def test_a_question_put_differently_keeps_the_hand_over_in_sight(ask, ana, conversation):
    first = await ask()
    question = await conversation.messages.aget(role="user")
    caller = Caller(ana.pk, address="192.0.2.1")
    text = "please let me talk to a person"
    turn = await sync_to_async(Turn.edit)(caller, question.pk, text)
    second = await turn.result()
    asked = await HandOver.objects.aget()
    assert first.pk != second.pk == asked.message_id
    assert asked.status == "waiting"


async def test_an_answer_written_again_asks_again_if_what_it_asked_for_had_ended(ask, ana):
    message = await ask()
    asked = await HandOver.objects.aget()
    await sync_to_async(handover.close)(asked.pk)
    await HandOver.objects.aupdate(mailed_at=timezone.now())
    await Message.objects.filter(pk=message.pk).aupdate(status="interrupted")
    caller = Caller(ana.pk, address="192.0.2.1")
    turn = await sync_to_async(Turn.retry)(caller, message.pk)
    await turn.result()
    again = await HandOver.objects.aget()
    assert (again.pk, again.status) == (asked.pk, "waiting")
    assert again.created_at > asked.created_at and again.mailed_at is None


# --- Staff ---------------------------------------------------------------------------------------


def test_the_answer_is_a_message_of_a_person_in_the_branch_that_is_shown(waiting, desk):
    old = Message.objects.create(
        conversation=waiting.conversation, seq=3, role="assistant", text="old", shown=False
    )
    message = handover.reply(waiting.pk, desk, "Hello, I am *here*.", seen=2)
    assert (message.seq, message.parent_id) == (4, waiting.message_id)
    assert message.parent_id != old.pk
    assert (message.role, message.status, message.route) == ("assistant", "complete", "human")
    assert (message.model, message.author) == ("", "Sam")
    assert message.html == "<p>Hello, I am <em>here</em>.</p>\n"
    waiting.refresh_from_db()
    assert (waiting.status, waiting.taken_by) == ("answered", desk)
    assert waiting.answered_at == message.created_at


def test_without_a_first_name_it_is_our_team(waiting, sam):
    assert handover.reply(waiting.pk, sam, "hello", seen=2).author == "our team"


def test_of_two_answers_at_once_the_second_is_refused_and_a_third_that_knows_is_not(waiting, desk):
    first = handover.reply(waiting.pk, desk, "one", seen=2)
    with pytest.raises(Conflict, match="colleague answered"):
        handover.reply(waiting.pk, desk, "two", seen=2)
    handover.reply(waiting.pk, desk, "three", seen=first.seq)
    assert list(Message.objects.exclude(author="").values_list("text", flat=True)) == [
        *("one", "three")
    ]


@pytest.mark.parametrize("text", ["", "  ", "x" * (handover.MAX_REPLY_CHARS + 1), "a\x00b"])
def test_an_answer_that_is_no_text_is_refused(waiting, desk, text):
    with pytest.raises(InvalidRequest):
        handover.reply(waiting.pk, desk, text, seen=2)
    assert Message.objects.count() == 2


def test_what_was_closed_or_deleted_gets_no_answer(waiting, desk):
    assert handover.close(waiting.pk) and not handover.close(waiting.pk)
    with pytest.raises(Conflict, match="closed"):
        handover.reply(waiting.pk, desk, "hello", seen=2)
    waiting.conversation.delete()
    with pytest.raises(NotFound):
        handover.reply(waiting.pk, desk, "hello", seen=2)


def test_only_one_takes_it(waiting, desk, ben):
    assert handover.take(waiting.pk, desk)
    assert not handover.take(waiting.pk, ben)
    waiting.refresh_from_db()
    assert (waiting.status, waiting.taken_by) == ("taken", desk)


async def test_an_answer_may_come_while_one_is_being_written(ana, conversation, waiting, desk):
    caller = Caller(ana.pk, address="192.0.2.1")
    turn = await sync_to_async(Turn.open)(caller, conversation, "/echo delay=0.02 words=20 word")
    writing = asyncio.create_task(turn.result())
    await asyncio.sleep(0.1)
    reply = await sync_to_async(handover.reply)(waiting.pk, desk, "I am here", seen=4)
    answer = await writing
    assert (answer.status, answer.text) == ("complete", " ".join(["word"] * 20))
    assert (answer.seq, reply.seq, reply.parent_id) == (4, 5, answer.pk)
    after = await sync_to_async(Turn.open)(caller, conversation, "thanks")
    assert (await after.result()).parent_id is not None
    question = await Message.objects.aget(text="thanks", role="user")
    assert question.parent_id == reply.pk


def test_the_model_reads_what_the_person_said(waiting, desk):
    handover.reply(waiting.pk, desk, "It comes on Monday.", seen=2)
    ((question, answer),) = opening._pairs(opening._recent(waiting.conversation))
    assert question.text == "help me"
    assert answer.text == "a person comes\n\nIt comes on Monday."


def test_what_a_person_wrote_cannot_be_written_again(waiting, desk, api):
    message = handover.reply(waiting.pk, desk, "hello", seen=2)
    reply = api("POST", f"/api/v1/messages/{message.pk}/regenerate/", {})
    assert reply.status_code == 400 and "A person wrote this" in reply.json()["detail"]


# --- The admin -----------------------------------------------------------------------------------


def test_the_queue_shows_who_waits_longest_first(staff, ana, waiting, desk):
    def another(status: str, minutes: int) -> HandOver:
        held = Conversation.objects.create(user=ana)
        text = f"{status} {minutes}"
        Message.objects.create(conversation=held, seq=1, role="user", text=text)
        answer = Message.objects.create(conversation=held, seq=2, role="assistant")
        at = timezone.now() - timedelta(minutes=minutes)
        return HandOver.objects.create(
            conversation=held, message=answer, status=status, created_at=at
        )

    another("answered", 50)
    another("taken", 40)
    another("waiting", 5)
    another("closed", 1)
    page = staff.get(QUEUE).content.decode()
    questions = re.findall(r'class="field-last_question">([^<]*)<', page)
    assert questions == ["waiting 5", "help me", "taken 40", "closed 1", "answered 50"]
    assert "5\xa0minutes" in page


def test_take_and_close_are_actions_and_are_written_down(staff, waiting, desk):
    for action, status in (("take", "taken"), ("close", "closed")):
        staff.post(QUEUE, {"action": action, "_selected_action": [waiting.pk]})
        waiting.refresh_from_db()
        assert waiting.status == status
    assert waiting.taken_by == desk
    told = LogEntry.objects.order_by("pk").values_list("change_message", "user_id")
    assert list(told) == [("Taken.", desk.pk), ("Closed.", desk.pk)]


def test_the_page_shows_the_conversation_and_sends_the_answer(staff, waiting, desk):
    page = staff.get(f"{QUEUE}{waiting.pk}/change/").content.decode()
    assert "help me" in page and "a person comes" in page
    seen = re.search(r'name="seen" value="(\d+)"', page)[1]
    sent = staff.post(f"{QUEUE}{waiting.pk}/change/", {"text": "On my way", "seen": seen})
    assert sent.status_code == 302 and sent["Location"] == QUEUE
    assert Message.objects.get(author="Sam").text == "On my way"
    entry = LogEntry.objects.get()
    assert entry.user == desk and entry.change_message == "Answered."
    assert "On my way" not in entry.object_repr


def test_what_could_not_be_sent_stays_in_the_box_and_goes_the_second_time(staff, waiting, desk):
    handover.reply(waiting.pk, desk, "I was faster", seen=2)
    path = f"{QUEUE}{waiting.pk}/change/"
    refused = staff.post(path, {"text": "my <own> words", "seen": "2"})
    page = refused.content.decode()
    assert refused.status_code == 400
    assert "A colleague answered meanwhile" in page and "my &lt;own&gt; words" in page
    assert not LogEntry.objects.exists()
    seen = re.search(r'name="seen" value="(\d+)"', page)[1]
    assert staff.post(path, {"text": "my own words", "seen": seen}).status_code == 302
    empty = staff.post(path, {"text": " ", "seen": seen})
    assert empty.status_code == 400 and "This field is required" in empty.content.decode()


def test_who_may_only_look_can_neither_answer_nor_take(staff, waiting, desk):
    desk.user_permissions.set(Permission.objects.filter(codename="view_handover"))
    page = staff.get(f"{QUEUE}{waiting.pk}/change/").content.decode()
    assert "help me" in page and 'name="text"' not in page
    assert 'value="take"' not in staff.get(QUEUE).content.decode()
    path = f"{QUEUE}{waiting.pk}/change/"
    for body in ({"text": "hello", "seen": "2"}, {"take": "1"}, {"close": "1"}):
        assert staff.post(path, body).status_code == 403
    staff.post(QUEUE, {"action": "take", "_selected_action": [waiting.pk]})
    waiting.refresh_from_db()
    assert waiting.status == "waiting" and Message.objects.count() == 2


def test_who_may_not_look_sees_nothing(staff, waiting, desk, ana):
    desk.user_permissions.clear()
    customer = Client()
    customer.force_login(ana)
    for client, codes in ((staff, {403}), (customer, {302}), (Client(), {302})):
        for path in (QUEUE, f"{QUEUE}{waiting.pk}/change/", f"{QUEUE}{waiting.pk}/history/"):
            assert client.get(path).status_code in codes, path


def test_one_that_is_gone_leads_back_to_the_queue(staff, waiting):
    for pk in ("999999", "nonsense"):
        reply = staff.get(f"{QUEUE}{pk}/change/")
        assert reply.status_code == 302 and reply["Location"] == QUEUE


# --- The user is told ----------------------------------------------------------------------------


def test_pollers_see_state_and_answer_by_their_etag(api, waiting, desk):
    path = f"/api/v1/conversations/{waiting.conversation_id}/messages/"

    def look(etag: str) -> tuple[int, str, list[Any]]:
        reply = api.client.get(path, headers={**api.headers, "If-None-Match": etag})
        rows = reply.json()["results"] if reply.status_code == 200 else []
        return reply.status_code, reply["ETag"], rows

    _, etag, rows = look("")
    assert [row["hand_over"] and row["hand_over"]["status"] for row in rows] == [None, "waiting"]
    assert look(etag)[0] == 304
    handover.take(waiting.pk, desk)
    code, etag, rows = look(etag)
    assert code == 200
    told = rows[1]["hand_over"]
    assert (told["status"], told["by"], told["answered_at"]) == ("taken", "Sam", None)
    handover.reply(waiting.pk, desk, "Here I am", seen=2)
    code, _, rows = look(etag)
    assert code == 200 and len(rows) == 3
    assert (rows[2]["text"], rows[2]["author"], rows[2]["route"]) == ("Here I am", "Sam", "human")
    assert rows[1]["hand_over"]["status"] == "answered" and rows[1]["author"] is None


async def test_the_turns_own_end_says_that_a_person_was_asked(ana, cookie_of, conversation):
    cookie = await sync_to_async(cookie_of)(ana)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="message.create", text="talk to a person")
        *_, ended = await chat.until("message.completed", "message.failed", "error")
    assert ended["message"]["hand_over"]["status"] == "waiting"
    assert ended["message"]["buttons"] == [{"label": "Opening hours", "text": "When are you open?"}]


async def test_every_open_socket_of_the_conversation_gets_the_answer_at_once(
    ana, ben, cookie_of, conversation, waiting, desk, staff
):
    cookie = await sync_to_async(cookie_of)(ana)
    elsewhere = await Conversation.objects.acreate(user=ana)
    async with (
        Chat(conversation, cookie) as one,
        Chat(conversation, cookie) as two,
        Chat(elsewhere, cookie) as other,
    ):
        for chat in (one, two, other):
            await chat.send(type="ping")
            assert (await chat.next())["type"] == "pong"
        body = {"text": "Good day", "seen": "2"}
        began = asyncio.get_running_loop().time()
        await sync_to_async(staff.post)(f"{QUEUE}{waiting.pk}/change/", body)
        for chat in (one, two):
            asked, answer = await chat.next(), await chat.next()
            assert asked["type"] == answer["type"] == "message.completed"
            assert asked["message"]["hand_over"]["status"] == "answered"
            assert (answer["message"]["text"], answer["message"]["author"]) == ("Good day", "Sam")
        assert asyncio.get_running_loop().time() - began < 1
        assert await other.socket.receive_nothing(0.2)


async def test_a_login_that_ended_hears_nothing_more(ana, cookie_of, conversation, waiting, desk):
    cookie = await sync_to_async(cookie_of)(ana)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        await User.objects.filter(pk=ana.pk).aupdate(is_active=False)
        await sync_to_async(handover.reply)(waiting.pk, desk, "Good day", seen=2)
        assert await chat.socket.receive_nothing(0.3)


async def test_a_layer_that_is_away_costs_nobody_anything(
    monkeypatch, caplog, ana, cookie_of, conversation, waiting, desk
):
    class Away:
        async def new_channel(self) -> str:
            raise ConnectionError

        async def group_send(self, *args: Any) -> None:
            await asyncio.sleep(60)

    monkeypatch.setattr(news, "get_channel_layer", Away)
    monkeypatch.setattr(news, "TELL_WITHIN_S", 0.1)
    monkeypatch.setattr(news, "AGAIN_S", 0.05)
    cookie = await sync_to_async(cookie_of)(ana)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        assert await chat.next() == {"type": "pong"}
        await asyncio.sleep(0.2)
        reply = await sync_to_async(handover.reply)(waiting.pk, desk, "Good day", seen=2)
        assert await Message.objects.filter(pk=reply.pk).aexists()
        told = [record.message for record in caplog.records if "news" in record.message]
        assert told == [
            "news cannot be heard: ConnectionError",
            "news of a conversation were not told: TimeoutError",
        ]
        monkeypatch.undo()
        await asyncio.sleep(0.2)
        await sync_to_async(handover.close)(waiting.pk)
        assert (await chat.next())["message"]["hand_over"]["status"] == "closed"


async def test_the_last_socket_to_leave_ends_the_listening(ana, cookie_of, conversation):
    cookie = await sync_to_async(cookie_of)(ana)
    async with Chat(conversation, cookie) as chat:
        await chat.send(type="ping")
        await chat.next()
        task = news.ears()._task
        assert task is not None and not task.done()
    await asyncio.sleep(0.05)
    assert task.cancelled() and news.ears()._ears == {}


def test_the_events_of_a_persons_answer_name_no_question(waiting, desk, api):
    message = handover.reply(waiting.pk, desk, "hello", seen=2)
    reply = api("GET", f"/api/v1/messages/{message.pk}/events/")
    frames = [
        json.loads(line.removeprefix("data: "))
        for line in b"".join(_read(reply)).decode().splitlines()
        if line.startswith("data: ")
    ]
    assert [frame["type"] for frame in frames] == [
        *("message.created", "message.delta", "message.completed")
    ]
    assert frames[0]["user_message"] is None
    assert frames[-1]["message"]["author"] == "Sam"


def _read(reply: Any) -> list[bytes]:
    async def all_of() -> list[bytes]:
        return [part async for part in reply.streaming_content]

    return asyncio.run(all_of())


# --- Hooks ---------------------------------------------------------------------------------------

SECRET = "a secret of some length"


@pytest.fixture
def hooked(settings: Any) -> None:
    settings.ASSISTANT_HAND_OVER_WEBHOOK = "https://desk.example.com/hook"
    settings.ASSISTANT_HAND_OVER_WEBHOOK_SECRET = SECRET
    settings.ASSISTANT_HAND_OVER_EMAIL = ["desk@example.com"]


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    seen: list[Any] = []

    def queued(task: Any, *args: Any) -> bool:
        seen.append((task.name, *args))
        return True

    monkeypatch.setattr(tasks, "_queued", queued)
    yield seen


async def test_a_new_hand_over_queues_both_hooks_once(ask, hooked, queued):
    await ask()
    await ask()
    pk = (await HandOver.objects.aget()).pk
    async with asyncio.timeout(5):  # staff are called behind the answer
        while (await HandOver.objects.aget()).announced_at is None:  # noqa: ASYNC110 - a row
            await asyncio.sleep(0.01)
    assert queued == [
        ("conversations.tasks.post_hand_over", pk),
        ("conversations.tasks.mail_hand_over", pk),
    ]


def test_what_its_turn_could_not_announce_is_announced_later_once(
    waiting, hooked, settings, monkeypatch
):
    names: list[str] = []
    answers = [False, True, True, True]

    def queued(task: Any, *args: Any) -> bool:
        names.append(task.__name__)
        return answers.pop(0)

    monkeypatch.setattr(tasks, "_queued", queued)
    assert tasks.announce_hand_overs() == 0  # its turn may still be at it
    HandOver.objects.update(created_at=timezone.now() - timedelta(minutes=2))
    assert tasks.announce_hand_overs() == 1  # the broker took only one of the two
    assert tasks.announce_hand_overs() == 1
    assert tasks.announce_hand_overs() == 0
    assert names == ["post_hand_over", "mail_hand_over"] * 2
    HandOver.objects.update(announced_at=None, created_at=timezone.now() - timedelta(days=2))
    assert tasks.announce_hand_overs() == 0


def test_a_webhook_whose_task_was_lost_with_its_queue_is_sent_after_all(
    waiting, hooked, queued, monkeypatch
):
    tasks.announce(waiting)
    queued.clear()  # the broker forgot both, or their worker died
    assert tasks.announce_hand_overs() == 0, "they may still be tried"
    HandOver.objects.update(announced_at=timezone.now() - tasks.LOST_AFTER - timedelta(seconds=1))
    assert tasks.announce_hand_overs() == 1
    assert ("conversations.tasks.post_hand_over", waiting.pk) in queued
    assert tasks.announce_hand_overs() == 0
    monkeypatch.setattr(hooks, "post", lambda asked: None)
    tasks.post_hand_over.run(waiting.pk)
    HandOver.objects.update(announced_at=timezone.now() - tasks.LOST_AFTER - timedelta(seconds=1))
    assert tasks.announce_hand_overs() == 0, "it arrived"


async def test_without_hooks_nothing_is_queued(ask, queued):
    await ask()
    assert await HandOver.objects.aexists() and queued == []


def test_the_webhook_is_signed_and_says_nothing_of_what_was_said(waiting, hooked):
    seen: list[httpx2.Request] = []

    def receive(request: httpx2.Request) -> httpx2.Response:
        seen.append(request)
        return httpx2.Response(204)

    hooks.post(waiting, transport=httpx2.MockTransport(receive))
    (request,) = seen
    body = request.read()
    at, digest = re.fullmatch(
        r"t=(\d+),v1=([0-9a-f]{64})", request.headers[hooks.SIGNATURE]
    ).groups()
    assert abs(int(at) - timezone.now().timestamp()) < 10
    signed = hmac.new(SECRET.encode(), f"{at}.".encode() + body, hashlib.sha256)
    assert hmac.compare_digest(signed.hexdigest(), digest)
    told = json.loads(body)
    assert told["event"] == "hand_over.opened" and told["reason"] == "asked"
    assert told["conversation"] == str(waiting.conversation_id)
    assert told["admin_path"] == f"{QUEUE}{waiting.pk}/change/"
    assert "help me" not in body.decode() and "question" not in told


def test_the_question_goes_along_only_if_allowed_and_without_personal_values(waiting, settings):
    settings.ASSISTANT_HAND_OVER_TEXT = True
    Message.objects.filter(role="user").update(text="Where is order 48213377? I am Ana Lopez")
    told = hooks.payload(waiting)["question"]
    assert told.startswith("Where is order {{Order Number}}?")
    assert "48213377" not in told and "Lopez" not in told


def test_a_value_at_the_cut_does_not_leave_in_half(waiting, settings):
    settings.ASSISTANT_HAND_OVER_TEXT = True
    begin = "so " * 160
    text = f"{begin}my card is 4111 1111 1111 1111 thanks"
    assert len(begin) < hooks.MAX_QUESTION_CHARS < text.index(" thanks")
    Message.objects.filter(role="user").update(text=text)
    told = hooks.payload(waiting)["question"]
    assert "4111" not in told and len(told) <= hooks.MAX_QUESTION_CHARS


def test_a_value_that_only_the_product_knows_does_not_leave(waiting, settings):
    settings.ASSISTANT_HAND_OVER_TEXT = True
    facts = [f"{__name__}.knows"]
    settings.ASSISTANT = {**settings.ASSISTANT, "FACT_FUNCTIONS": facts}
    Message.objects.filter(role="user").update(text="the blue house of ana is locked")
    assert hooks.payload(waiting)["question"] == "the blue house of {{Client Name}} is locked"


def knows(user: Any) -> dict[str, str]:
    return {"Client Name": user.username} if user is not None else {}


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, hooks.NotDelivered),
        (429, hooks.NotDelivered),
        (404, hooks.Refused),
        (302, hooks.Refused),
    ],
)
def test_what_the_receiver_says_decides_whether_it_is_tried_again(waiting, hooked, status, error):
    def receive(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, headers={"Location": "https://elsewhere.example.com/"})

    with pytest.raises(error, match=str(status)):
        hooks.post(waiting, transport=httpx2.MockTransport(receive))


def test_a_receiver_that_is_away_is_tried_again_so_often_and_no_more(
    waiting, hooked, monkeypatch, caplog
):
    def away(asked: HandOver) -> None:
        raise hooks.NotDelivered("ConnectError")

    monkeypatch.setattr(hooks, "post", away)
    pauses: list[float] = []

    def retry(*, countdown: float) -> Retry:
        pauses.append(countdown)
        return Retry()

    task = tasks.post_hand_over
    monkeypatch.setattr(task, "retry", retry)
    for tries in range(len(tasks.HOOK_PAUSES_S)):
        task.push_request(retries=tries)
        with pytest.raises(Retry):
            task.run(waiting.pk)
        task.pop_request()
    assert tuple(pauses) == tasks.HOOK_PAUSES_S
    task.push_request(retries=len(tasks.HOOK_PAUSES_S))
    task.run(waiting.pk)
    task.pop_request()
    assert len(pauses) == len(tasks.HOOK_PAUSES_S)
    assert "was given up" in caplog.records[-1].message


def test_a_refusal_or_a_hand_over_that_ended_is_not_tried_again(waiting, hooked, monkeypatch):
    calls: list[int] = []

    def refused(asked: HandOver) -> None:
        calls.append(asked.pk)
        raise hooks.Refused("status 404")

    monkeypatch.setattr(hooks, "post", refused)
    tasks.post_hand_over(waiting.pk)
    handover.close(waiting.pk)
    tasks.post_hand_over(waiting.pk)
    tasks.post_hand_over(999_999)
    assert calls == [waiting.pk]


def test_the_mail_leads_to_the_admin_and_says_nothing_of_what_was_said(waiting, hooked):
    tasks.mail_hand_over(waiting.pk)
    (letter,) = mail.outbox
    assert letter.to == ["desk@example.com"] and letter.subject == "A person was asked for"
    assert f"{QUEUE}{waiting.pk}/change/" in letter.body and "help me" not in letter.body


def test_a_mail_server_that_is_away_is_tried_again(waiting, hooked, settings):
    settings.EMAIL_BACKEND = "django.core.mail.backends.smtp.EmailBackend"
    settings.EMAIL_HOST, settings.EMAIL_PORT = "127.0.0.1", 1
    with pytest.raises(hooks.NotDelivered, match="ConnectionRefusedError"):
        hooks.mail(waiting)


# --- Many mails ----------------------------------------------------------------------------------


@pytest.fixture
def crowd(ana: User, hooked: None, settings: Any) -> Callable[[int], list[HandOver]]:
    """So many more users who ask for a person, three mails an hour."""
    settings.ASSISTANT_HAND_OVER_MAILS_PER_HOUR = 3

    def come(count: int) -> list[HandOver]:
        return [_asked(Conversation.objects.create(user=ana)) for _ in range(count)]

    return come


def _asked(conversation: Conversation) -> HandOver:
    answer = Message.objects.create(conversation=conversation, seq=2, role="assistant")
    return HandOver.objects.create(conversation=conversation, message=answer)


def _minutes_pass(minutes: int) -> None:
    for row in HandOver.objects.all():
        row.created_at -= timedelta(minutes=minutes)
        row.save()


def test_a_crowd_gets_so_many_mails_an_hour_and_the_rest_are_told_of_in_one(crowd):
    for asked in crowd(20):
        tasks.mail_hand_over(asked.pk)
    assert [letter.subject for letter in mail.outbox] == ["A person was asked for"] * 2
    assert tasks.mail_hand_overs_together() == 0  # more may come
    _minutes_pass(6)
    assert tasks.mail_hand_overs_together() == 18
    (letter,) = mail.outbox[2:]
    assert letter.subject == "18 users asked for a person" and QUEUE in letter.body
    assert tasks.mail_hand_overs_together() == 0 and len(mail.outbox) == 3


def test_nothing_more_is_mailed_within_the_hour_and_nobody_is_forgotten(crowd):
    for asked in crowd(4):
        tasks.mail_hand_over(asked.pk)
    _minutes_pass(6)
    tasks.mail_hand_overs_together()
    for asked in crowd(5):
        tasks.mail_hand_over(asked.pk)
    _minutes_pass(6)
    assert tasks.mail_hand_overs_together() == 0 and len(mail.outbox) == 3
    for cache in caches.all():  # all counts are of an hour, and it is over
        cache.clear()
    assert tasks.mail_hand_overs_together() == 5 and len(mail.outbox) == 4


def test_who_got_an_answer_meanwhile_is_not_told_of(crowd):
    for asked in crowd(5):
        tasks.mail_hand_over(asked.pk)
    held_back = HandOver.objects.filter(mailed_at=None)
    for asked in held_back[1:]:
        handover.close(asked.pk)
    _minutes_pass(6)
    assert tasks.mail_hand_overs_together() == 1
    assert mail.outbox[-1].subject == "A person was asked for"


def test_a_mail_that_did_not_arrive_takes_no_place_and_is_sent_later(crowd, monkeypatch):
    def away(letter: Any) -> None:
        raise ConnectionRefusedError

    (asked,) = crowd(1)
    with monkeypatch.context() as broken:
        broken.setattr(hooks.EmailMessage, "send", away)
        for _ in range(5):
            with pytest.raises(hooks.NotDelivered):
                hooks.mail(asked)
        _minutes_pass(6)
        assert tasks.mail_hand_overs_together() == 0
    assert hooks._mails_left() == 3
    assert tasks.mail_hand_overs_together() == 1
    tasks.mail_hand_over(asked.pk)  # its own next try
    assert len(mail.outbox) == 1


def test_without_an_address_nobody_is_mailed_together(crowd, settings):
    settings.ASSISTANT_HAND_OVER_EMAIL = []
    crowd(2)
    _minutes_pass(6)
    assert tasks.mail_hand_overs_together() == 0 and mail.outbox == []


def test_a_broker_that_is_away_harms_nobody(caplog):
    class Broken:
        name = "some.task"

        def apply_async(self, *args: Any, **kwargs: Any) -> None:
            raise ConnectionError

    assert tasks._queued(Broken(), 1) is False
    assert caplog.records[-1].message == "some.task was not queued: ConnectionError"


# --- Export and erasure --------------------------------------------------------------------------


def test_an_export_tells_of_it_and_an_erasure_takes_it_along(waiting, desk, api):
    handover.reply(waiting.pk, desk, "hello", seen=2)
    path = f"/api/v1/conversations/{waiting.conversation_id}/export/"
    exported = json.loads(b"".join(_read(api("GET", path))))
    assert exported["messages"][1]["hand_over"]["status"] == "answered"
    assert exported["messages"][2]["author"] == "Sam"
    markdown = b"".join(_read(api("GET", f"{path}?format=md"))).decode()
    assert "## Sam, " in markdown
    erased = api("DELETE", "/api/v1/me/data/", {"confirm": "erase my data"}).json()["erased"]
    assert erased["messages"] == 3 and not HandOver.objects.exists()


def test_a_colleague_who_leaves_takes_no_conversation_along(waiting, desk, api):
    handover.reply(waiting.pk, desk, "hello", seen=2)
    desk.delete()
    waiting.refresh_from_db()
    assert waiting.taken_by is None and Message.objects.get(author="Sam").text == "hello"


def test_a_list_takes_as_many_statements_with_hand_overs_as_without(
    waiting, desk, api, django_assert_num_queries
):
    path = f"/api/v1/conversations/{waiting.conversation_id}/messages/"
    handover.take(waiting.pk, desk)
    api("GET", path)  # the first use of a token is noted
    with CaptureQueriesContext(connection) as one:
        api("GET", path)
    for seq in range(3, 13):
        answer = Message.objects.create(
            conversation=waiting.conversation, seq=seq, role="assistant"
        )
        HandOver.objects.create(
            conversation=waiting.conversation, message=answer, status="closed", taken_by=desk
        )
    with django_assert_num_queries(len(one)):
        assert len(api("GET", path).json()["results"]) == 12
