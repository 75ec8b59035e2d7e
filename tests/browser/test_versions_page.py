"""Versions on the chat page: another answer, a question put differently, the way back, a place in
the queue, saving a conversation; and the page "Your data". Headless Chromium, the echo backend."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, Chat

sync_api = pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")
expect = sync_api.expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

PHONE = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
SLOW = "/echo delay=0.05 words=400 one two three four"


def edit(chat: Chat, question: Any, text: str) -> None:
    question.hover()
    question.get_by_role("button", name="Edit the question").click()
    chat.page.get_by_label("Edit your question").fill(text)
    chat.page.get_by_role("button", name="Ask again").click()


def texts(chat: Chat) -> list[str]:
    return [text.strip() for text in chat.page.locator(".message .text").all_text_contents()]


# --- Answers -------------------------------------------------------------------------------------


def test_another_answer_is_written_and_the_arrows_lead_back_to_the_first(chat: Chat) -> None:
    chat.answered("hello there")
    first = chat.message.get_attribute("data-id")
    expect(chat.message.locator(".versions")).to_be_hidden()
    chat.message.get_by_role("button", name="Another answer").click()
    chat.page.locator(f'.message[data-id="{first}"]').wait_for(state="detached")
    chat.ended()
    expect(chat.messages).to_have_count(2)
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    assert chat.message.get_attribute("data-id") != first
    expect(chat.message.get_by_role("button", name="Newer version")).to_be_disabled()
    chat.message.get_by_role("button", name="Older version").click()
    expect(chat.message).to_have_attribute("data-id", str(first))
    expect(chat.message.locator(".place")).to_have_text("1 / 2")
    expect(chat.page.locator("#earlier")).to_be_visible()
    expect(chat.message.get_by_role("button", name="Another answer")).to_be_hidden()
    expect(chat.message.get_by_role("button", name="Newer version")).to_be_focused()
    expect(chat.page.locator("#announce")).to_have_text("Version 1 of 2: hello there")
    chat.page.keyboard.press("Enter")
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    expect(chat.page.locator("#earlier")).to_be_hidden()


def test_versions_are_there_after_a_reload_and_are_judged_each_for_itself(chat: Chat) -> None:
    chat.answered("hello")
    chat.message.get_by_role("button", name="Another answer").click()
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    chat.ended()
    chat.page.reload()
    chat.message.get_by_role("button", name="Older version").click()
    expect(chat.message.locator(".place")).to_have_text("1 / 2")
    good = chat.message.get_by_role("button", name="Good answer")
    with chat.page.expect_response("**/feedback/"):
        good.click()
    expect(good).to_have_attribute("aria-pressed", "true")
    expect(chat.messages).to_have_count(2)
    chat.page.get_by_role("button", name="Back to the newest").click()
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    expect(good).to_have_attribute("aria-pressed", "false")


def test_another_answer_is_stopped_like_any_other(chat: Chat) -> None:
    chat.ask("/echo delay=0.05 words=60 again")
    chat.ended()
    chat.message.get_by_role("button", name="Another answer").click()
    expect(chat.message).to_have_attribute("data-status", "streaming")
    expect(chat.answer).to_contain_text("again again")
    chat.page.keyboard.press("Escape")
    chat.ended()
    expect(chat.message).to_have_attribute("data-status", "stopped")
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    expect(chat.field).to_be_focused()


# --- Questions -----------------------------------------------------------------------------------


def test_an_edited_question_is_answered_anew_and_what_followed_can_be_read(chat: Chat) -> None:
    for text in ("one", "two", "three"):
        chat.answered(text)
    chat.field.fill("typed meanwhile")
    edit(chat, chat.messages.nth(2), "TWO")
    expect(chat.messages).to_have_count(4)
    chat.ended()
    assert texts(chat) == ["one", "one", "TWO", "TWO"]
    expect(chat.field).to_have_value("typed meanwhile")
    question = chat.messages.nth(2)
    expect(question.locator(".place")).to_have_text("2 / 2")
    question.get_by_role("button", name="Older version").click()
    expect(chat.messages).to_have_count(6)
    assert texts(chat) == ["one", "one", "two", "two", "three", "three"]
    chat.page.keyboard.press("Escape")
    expect(chat.messages).to_have_count(4)


def test_a_question_asked_beside_an_earlier_version_goes_on_from_the_newest(chat: Chat) -> None:
    chat.answered("one")
    edit(chat, chat.messages.nth(0), "ONE")
    expect(chat.answer).to_have_text("ONE")
    chat.messages.nth(0).get_by_role("button", name="Older version").click()
    expect(chat.answer).to_have_text("one")
    chat.answered("two")
    assert texts(chat) == ["ONE", "ONE", "two", "two"]
    expect(chat.page.locator("#earlier")).to_be_hidden()


def test_editing_is_left_with_escape_and_begun_with_arrow_up(chat: Chat) -> None:
    chat.answered("one")
    chat.answered("two")
    chat.field.press("ArrowUp")
    box = chat.page.get_by_label("Edit your question")
    expect(box).to_be_focused()
    expect(box).to_have_value("two")
    expect(chat.page.locator(".editor-note")).to_be_hidden()
    box.fill("never sent")
    box.press("Escape")
    expect(box).to_have_count(0)
    assert texts(chat) == ["one", "one", "two", "two"]
    expect(chat.messages.nth(2).get_by_role("button", name="Edit the question")).to_be_focused()
    chat.field.press("ArrowUp")
    box.fill("TWO")
    box.press("Enter")
    expect(chat.answer).to_have_text("TWO")


def test_a_refused_edit_loses_no_word(chat: Chat) -> None:
    chat.answered("one")
    error = {"code": "rate_limited", "message": "x"}
    chat.page.route(
        "**/edit/",
        lambda route: route.fulfill(
            status=429,
            headers={"Retry-After": "1"},
            content_type="application/problem+json",
            body=json.dumps({"detail": "x", "error": error}),
        ),
    )
    edit(chat, chat.messages.nth(0), "my better words")
    expect(chat.page.locator("#notice")).to_contain_text("a lot of questions")
    assert chat.page.get_by_label("Edit your question").input_value() == "my better words"
    chat.page.unroute("**/edit/")
    chat.page.get_by_role("button", name="Ask again").click()
    expect(chat.answer).to_have_text("my better words")
    expect(chat.messages).to_have_count(2)


def test_a_line_that_breaks_under_another_answer_is_made_up_for(chat: Chat) -> None:
    chat.answered("hello")
    first = chat.message.get_attribute("data-id")
    chat.page.route("**/regenerate/", lambda route: route.abort())
    chat.message.get_by_role("button", name="Another answer").click()
    expect(chat.page.locator("#notice")).to_contain_text("cannot be reached")
    expect(chat.message).to_have_attribute("data-id", str(first))
    chat.page.unroute("**/regenerate/")
    chat.message.get_by_role("button", name="Another answer").click()
    expect(chat.message.locator(".place")).to_have_text("2 / 2")


def test_nothing_can_be_replaced_while_an_answer_is_written(chat: Chat) -> None:
    chat.answered("one")
    chat.ask(SLOW)
    expect(chat.answer).to_contain_text("one two")
    chat.messages.nth(0).hover()
    expect(chat.messages.nth(0).locator(".edit")).to_be_hidden()
    chat.field.press("ArrowUp")
    expect(chat.page.get_by_label("Edit your question")).to_have_count(0)
    chat.page.keyboard.press("Escape")
    chat.ended()
    expect(chat.messages.nth(0).locator(".edit")).to_be_visible()


def test_versions_fit_a_phone(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark", **PHONE)
    chat.answered("/echo confidence=0.94 " + "W" * 200)
    chat.message.get_by_role("button", name="Another answer").tap()
    expect(chat.message.locator(".place")).to_have_text("2 / 2")
    chat.messages.nth(0).get_by_role("button", name="Edit the question").tap()
    chat.page.get_by_label("Edit your question").fill("short")
    chat.page.get_by_role("button", name="Ask again").tap()
    expect(chat.answer).to_have_text("short")
    for name in ("Older version", "Newer version", "Edit the question"):
        box = chat.messages.nth(0).get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, name
        assert round(min(box["width"], box["height"]), 1) >= 36, name
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360


# --- Waiting -------------------------------------------------------------------------------------


def test_a_question_that_waits_shows_its_place_and_says_it_once(chat: Chat) -> None:
    lines: list[Any] = []

    def through(line: Any) -> None:
        server = line.connect_to_server()
        lines.append(line)
        server.on_message(lambda frame: line.send(frame) if _early(frame) else None)

    chat.page.route_web_socket("**/ws/chat/**", through)
    chat.ask("hello")
    expect(chat.message).to_have_attribute("data-id", re.compile("^[0-9a-f]{8}-"))  # created
    _place(lines[-1], 3, 8_400)
    expect(chat.message.locator(".queue-words")).to_have_text("You are number 3, about 9 s.")
    expect(chat.page.locator("#announce")).to_have_text("You are number 3, about 9 s.")
    _place(lines[-1], 1, None)
    expect(chat.message.locator(".queue-words")).to_have_text("You are number 1.")
    expect(chat.page.locator("#announce")).to_have_text("You are number 3, about 9 s.")
    identity = chat.message.get_attribute("data-id")
    lines[-1].send(json.dumps({"type": "message.delta", "seq": 9, "id": identity, "text": "Hi"}))
    expect(chat.answer).to_have_text("Hi")
    expect(chat.message.locator(".queue")).to_be_hidden()


def _early(frame: str) -> bool:
    return "message.created" in frame


def _place(line: Any, position: int, eta_ms: int | None) -> None:
    frame = {"type": "status", "state": "queued", "position": position, "eta_ms": eta_ms}
    line.send(json.dumps(frame))


# --- Help and saving -----------------------------------------------------------------------------


def test_shortcuts_are_listed_under_a_question_mark_but_not_while_typing(chat: Chat) -> None:
    listed = chat.page.get_by_role("dialog", name="Keyboard shortcuts")
    chat.field.press("?")
    expect(chat.field).to_have_value("?")
    expect(listed).to_be_hidden()
    chat.page.locator("#scroller").focus()
    chat.page.keyboard.press("?")
    expect(listed).to_contain_text("Search your messages")
    chat.page.keyboard.press("Escape")
    expect(listed).to_be_hidden()
    chat.page.get_by_role("button", name="Keyboard shortcuts").click()
    expect(listed).to_be_visible()


@pytest.mark.parametrize(("name", "kind"), [("Save as Markdown", "md"), ("Save as JSON", "json")])
def test_a_conversation_is_saved_from_its_menu(
    chat: Chat, tmp_path: Path, name: str, kind: str
) -> None:
    chat.answered("keep this")
    item = chat.page.locator(".item")
    item.hover()
    item.get_by_role("button", name="Menu for").click()
    chat.page.keyboard.press("ArrowDown")
    expect(chat.page.get_by_role("link", name="Save as Markdown")).to_be_focused()
    with chat.page.expect_download() as saved:
        chat.page.get_by_role("link", name=name).click()
    saved.value.save_as(tmp_path / "saved")
    assert saved.value.suggested_filename.endswith(f".{kind}")
    text = (tmp_path / "saved").read_text()
    assert text.count("keep this") >= 2
    if kind == "json":
        assert [row["role"] for row in json.loads(text)["messages"]] == ["user", "assistant"]


# --- Your data -----------------------------------------------------------------------------------


def test_everything_is_exported_and_then_erased_after_writing_the_phrase(
    open_chat: Callable[..., Chat], tmp_path: Path
) -> None:
    chat = open_chat(color_scheme="dark", **PHONE)
    chat.answered("my secret")
    chat.field.fill("a draft")
    chat.page.get_by_role("button", name="Conversations").tap()
    chat.page.get_by_role("button", name="Visitor's menu").tap()
    chat.page.get_by_role("link", name="Your data").tap()
    expect(chat.page.get_by_role("heading", name="Your data")).to_be_visible()
    expect(chat.page.get_by_role("list", name="What is kept")).to_contain_text("1conversation")
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
    with chat.page.expect_download() as saved:
        chat.page.get_by_role("link", name="Export everything").tap()
    saved.value.save_as(tmp_path / "saved")
    assert "my secret" in (tmp_path / "saved").read_text()
    phrase = chat.page.get_by_label("To be sure, write erase my data")
    phrase.fill("yes")
    chat.page.get_by_role("button", name="Erase everything").tap()
    expect(chat.page.get_by_role("alert")).to_contain_text("Nothing was erased")
    phrase.fill("erase my data")
    chat.page.get_by_role("button", name="Erase everything").tap()
    expect(chat.page.get_by_role("status")).to_contain_text("Erased: 1 conversation, 2 messages")
    expect(chat.page.get_by_role("button", name="Erase everything")).to_have_count(0)
    chat.page.wait_for_function("() => sessionStorage.length === 0")
    chat.page.get_by_role("link", name="Back to the chat").tap()
    expect(chat.page.locator(".item")).to_have_count(0)
    expect(chat.field).to_have_value("")


# --- Other things an answer may carry ------------------------------------------------------------


def test_quick_replies_and_the_person_who_was_asked_for_are_shown(chat: Chat) -> None:
    extra = {
        "author": "Anna",
        "hand_over": {"status": "taken", "by": "Anna"},
        "buttons": [{"label": "Opening <b>hours</b>", "text": "opening hours please"}],
    }

    def with_extra(route: Any) -> None:
        page = route.fetch().json()
        if page["results"]:
            page["results"][-1] |= extra
        route.fulfill(json=page)

    chat.page.route("**/messages/", lambda r: with_extra(r) if r.request.method == "GET" else None)
    chat.answered("hello")
    chat.page.reload()
    expect(chat.message.locator(".why")).to_have_text("A person: Anna")
    expect(chat.message.locator(".person")).to_have_text("Being looked at by Anna.")
    chat.field.fill("a draft")
    chat.message.get_by_role("button", name="Opening <b>hours</b>").click()
    expect(chat.messages).to_have_count(4)
    chat.ended()
    expect(chat.messages.nth(2).locator(".text")).to_have_text("opening hours please")
    expect(chat.messages.nth(1).locator(".replies")).to_be_hidden()
    expect(chat.field).to_have_value("a draft")
