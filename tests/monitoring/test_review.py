"""The review desk: what is looked at first, what is stored of a judgement, and who may."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.core.exceptions import ValidationError
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone

from assistant import facts
from assistant.modelkit.corrections import read_corrections, redacted
from conversations.models import Conversation, Feedback, Message
from fallback.models import ReviewedAnswer
from monitoring import review
from monitoring.models import ReviewItem
from monitoring.review import Judgement

DESK = "/admin/monitoring/reviewitem/desk/"
Asked = Callable[..., Message]


@pytest.fixture
def asked(ana: User) -> Asked:
    """A question of ana's with its answer, which is returned."""

    def put(question: str = "Where is my stuff?", said: str = "No idea.", **values: Any) -> Message:
        talk = Conversation.objects.create(user=ana)
        first = Message.objects.create(conversation=talk, seq=1, role="user", text=question)
        told = {"route": "model", "intent": "track_order", "confidence": 0.9, **values}
        return Message.objects.create(
            conversation=talk, seq=2, role="assistant", text=said, parent=first, **told
        )

    return put


@pytest.fixture
def desk(sam: User) -> Client:
    for name in ("change_reviewitem", "view_reviewitem", "view_message"):
        sam.user_permissions.add(Permission.objects.get(codename=name))
    client = Client()
    client.force_login(sam)
    return client


def page(answer: Message) -> str:
    return f"/admin/monitoring/reviewitem/{answer.pk}/change/"


def faults(answer: Message, by: User, **said: Any) -> dict[str, list[str]]:
    with pytest.raises(ValidationError) as raised:
        review.judge(answer, Judgement(**{"verdict": "bad", **said}), by)
    assert not ReviewItem.objects.exists()
    assert not ReviewedAnswer.objects.exists()
    return raised.value.message_dict


# --- What to look at -----------------------------------------------------------------------------


def test_queues_hold_what_nobody_has_judged_the_most_telling_first(asked: Asked, sam: User) -> None:
    sure, unsure, disliked, judged = (asked(confidence=c) for c in (0.99, 0.2, 0.8, 0.1))
    for answer in (disliked, judged):
        Feedback.objects.create(message=answer, value="down")
    review.judge(judged, Judgement("bad"), sam)
    assert review.queue("down") == [disliked]
    assert review.queue("unsure") == [unsure, disliked, sure]
    assert {m.pk for m in review.queue("random")} == {sure.pk, unsure.pk, disliked.pk}
    assert review.queue("random") == review.queue("random")
    assert review.following(disliked) == unsure


def test_queues_leave_out_what_is_old_hidden_broken_or_by_a_person(asked: Asked) -> None:
    asked(created_at=timezone.now() - timedelta(days=40))
    asked(shown=False)
    asked(status="failed")
    asked(author="Sam", route="human")
    assert [review.queue(kind) for kind in review.QUEUES] == [[], [], []]


# --- What is stored ------------------------------------------------------------------------------


def test_a_correction_is_stored_without_personal_values(asked: Asked, sam: User, settings: Any):
    settings.ASSISTANT = {
        **settings.ASSISTANT, "FACTS": {"Support Email": "help@shop.example"}
    }  # fmt: skip
    answer = asked("Where is order 48213377? I paid $31.50, ana@example.com")
    text = (
        "Order 48213377 and 99887766 are on their way; $31.50 comes back, posting costs $4.99. "
        "Write to help@shop.example, not to ana@example.com."
    )
    item = review.judge(answer, Judgement("bad", "track_order", text), sam)
    assert item.correction == (
        "Order {{Order Number}} and {{Order Number}} are on their way; {{Amount}} comes back, "
        "posting costs $4.99. Write to {{Support Email}}, not to {{Email}}."
    )


def test_a_value_that_no_answer_can_fill_is_refused(asked: Asked, sam: User) -> None:
    told = faults(asked(), sam, correction="Pay with 4111 1111 1111 1111.")
    assert "Card Number" in told["correction"][0]


def test_ticks_need_what_they_use(asked: Asked, sam: User) -> None:
    answer = asked()
    assert "teaches nothing" in faults(answer, sam, as_example=True)["intent"][0]
    assert "No intent" in faults(answer, sam, intent="make_tea")["intent"][0]
    assert "given again" in faults(answer, sam, as_reviewed=True)["correction"][0]
    assert "good or bad" in faults(answer, sam, verdict="so so")["verdict"][0]


def test_a_reviewed_answer_is_made_once_and_changed_only_by_its_review(
    asked: Asked, sam: User
) -> None:
    first, second = asked("Do you wrap gifts?"), asked("do you wrap gifts")
    said = Judgement("bad", correction="We do.", as_reviewed=True)
    review.judge(first, said, sam)
    review.judge(first, Judgement("bad", correction="Yes, we do.", as_reviewed=True), sam)
    row = ReviewedAnswer.objects.get()
    assert (row.question, row.answer) == ("Do you wrap gifts?", "Yes, we do.")
    with pytest.raises(ValidationError, match="already"):
        review.judge(second, said, sam)
    assert ReviewItem.objects.count() == 1


def test_a_question_with_a_personal_value_is_no_reviewed_answer_until_reworded(
    asked: Asked, sam: User
) -> None:
    answer = asked("Where is order 48213377?")
    said = {"correction": "On its way.", "as_reviewed": True}
    assert "Order Number" in faults(answer, sam, **said)["wording"][0]
    review.judge(answer, Judgement("bad", **said, wording="Where is my order?"), sam)
    assert ReviewedAnswer.objects.get().question == "Where is my order?"


def test_a_good_answer_becomes_a_reviewed_one_as_it_is(asked: Asked, sam: User) -> None:
    review.judge(asked(said="Open My Orders."), Judgement("good", as_reviewed=True), sam)
    assert ReviewedAnswer.objects.get().answer == "Open My Orders."


def test_exported_reviews_are_rows_that_training_reads(
    asked: Asked, sam: User, tmp_path: Path
) -> None:
    answer = asked("where is my stuff, order 48213377")
    said = Judgement("bad", "track_order", "Order 48213377 is on its way.", as_example=True)
    review.judge(answer, said, sam)
    out, told = tmp_path / "rows.jsonl", io.StringIO()
    call_command("export_reviews", out=out, stdout=told)
    assert told.getvalue().startswith("1 corrections in ")
    row = json.loads(out.read_text())
    assert row["query"] == "where is my stuff, order {{Order Number}}"
    (case,) = read_corrections(out, redacted(facts.mask))
    assert (case.intent, case.answer) == ("track_order", "Order {{Order Number}} is on its way.")
    with pytest.raises(CommandError, match="--force"):
        call_command("export_reviews", out=out)
    with pytest.raises(CommandError, match="jsonl"):
        call_command("export_reviews", out=tmp_path / "rows.csv")


# --- In the admin --------------------------------------------------------------------------------


def test_the_desk_shows_its_queues_and_an_answer_with_its_question(
    asked: Asked, desk: Client
) -> None:
    answer = asked("Where is <b>my</b> stuff?", confidence=0.31)
    shown = desk.get(DESK).content.decode()
    assert "Where is &lt;b&gt;my&lt;/b&gt; stuff?" in shown
    assert page(answer) in shown
    opened = desk.get(page(answer))
    assert "No idea." in opened.content.decode()
    assert b"style=" not in opened.content
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.change_message) == (str(answer.pk), "Opened for review.")
    assert "stuff" not in entry.object_repr


def test_staff_judge_an_answer_and_are_shown_the_next(
    asked: Asked, desk: Client, sam: User
) -> None:
    answer, other = asked(confidence=0.1), asked("And mine?", confidence=0.2)
    body = {"verdict": "bad", "intent": "track_order", "correction": "Soon.", "as_example": "on"}
    reply = desk.post(page(answer), {**body, "_next": "1"})
    assert reply.status_code == 302
    assert reply.headers["Location"] == page(other)
    item = ReviewItem.objects.get()
    assert (item.verdict, item.correction, item.as_example, item.by) == ("bad", "Soon.", True, sam)
    assert LogEntry.objects.first().change_message == "Judged bad, example."
    assert b"Soon." in desk.get(page(answer)).content
    assert desk.get("/admin/monitoring/reviewitem/").status_code == 200


def test_what_is_refused_stays_in_the_form(asked: Asked, desk: Client) -> None:
    answer = asked()
    reply = desk.post(page(answer), {"correction": "So it is.", "as_reviewed": "on"})
    assert reply.status_code == 400
    assert b"Say whether the answer is good or bad." in reply.content
    assert b"So it is." in reply.content
    body = {"verdict": "bad", "as_reviewed": "on"}
    assert b"a bad answer is not given again" in desk.post(page(answer), body).content


@pytest.mark.parametrize("missing", ["change_reviewitem", "view_message"])
def test_both_permissions_are_needed(asked: Asked, desk: Client, sam: User, missing: str) -> None:
    sam.user_permissions.remove(Permission.objects.get(codename=missing))
    answer = asked()
    assert desk.get(DESK).status_code == 403
    assert desk.get(page(answer)).status_code == 403
    assert desk.post(page(answer), {"verdict": "good"}).status_code == 403
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize("key", ["nonsense", "00000000-0000-0000-0000-000000000000"])
def test_an_answer_that_is_gone_leads_back_to_the_desk(desk: Client, key: str) -> None:
    reply = desk.get(f"/admin/monitoring/reviewitem/{key}/change/")
    assert reply.headers["Location"] == DESK


def test_a_message_in_the_admin_leads_to_its_review(asked: Asked, desk: Client) -> None:
    answer = asked()
    shown = desk.get(f"/admin/conversations/message/{answer.pk}/change/").content.decode()
    assert page(answer) in shown
    question = desk.get(f"/admin/conversations/message/{answer.parent_id}/change/")
    assert b"/admin/monitoring/reviewitem/" not in question.content.split(b"content-main")[1]
