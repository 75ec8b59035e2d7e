"""Search in one's own messages on the chat page: headless Chromium, the echo backend."""

from __future__ import annotations

from collections.abc import Callable
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
MARKS = (
    "[...(CSS.highlights.get('found') ?? [])].map(range => range.startContainer.data.slice("
    "range.startOffset, range.endOffset))"
)


@pytest.fixture
def searched(chat: Chat) -> Chat:
    """Two conversations, the second shown: parcels in one, gifts in the other."""
    chat.answered("Where is my parcel?")
    chat.page.keyboard.press("Control+k")
    chat.answered("Do you wrap gifts?")
    return chat


def field(chat: Chat) -> Any:
    return chat.page.get_by_role("searchbox", name="Search your messages")


def hits(chat: Chat) -> Any:
    return chat.page.get_by_role("list", name="Search results").get_by_role("link")


def test_a_word_is_found_marked_and_opened_by_keyboard_alone(searched: Chat) -> None:
    chat = searched
    chat.page.locator("#scroller").focus()
    chat.page.keyboard.press("/")
    expect(field(chat)).to_be_focused()
    chat.page.keyboard.type("parcel")
    expect(hits(chat)).to_have_count(3)  # the title, the question and its answer
    expect(hits(chat).nth(1)).to_contain_text("Support assistant")
    assert set(chat.page.locator(".hit mark").all_text_contents()) == {"parcel"}
    expect(chat.page.locator("#list")).to_be_hidden()
    expect(chat.page.locator("#announce")).to_have_text("3 places found. Arrow down reads them.")
    for expected in (0, 1, 2):
        chat.page.keyboard.press("ArrowDown")
        expect(hits(chat).nth(expected)).to_be_focused()
    chat.page.keyboard.press("Enter")
    question = chat.page.locator(".message.user")
    expect(question).to_have_class("message user found")
    expect(question).to_be_focused()
    expect(question.locator(".text")).to_have_text("Where is my parcel?")
    assert chat.page.evaluate(MARKS) == ["parcel"]
    chat.page.keyboard.press("Escape")
    expect(chat.field).to_be_focused()
    expect(question).to_have_class("message user")


def test_enter_in_the_field_opens_the_first_and_escape_closes(searched: Chat) -> None:
    chat = searched
    field(chat).fill("parcel")
    expect(hits(chat)).to_have_count(3)
    field(chat).press("Enter")
    expect(chat.answer).to_have_text("Where is my parcel?")
    field(chat).press("Escape")
    expect(hits(chat)).to_have_count(0)
    expect(field(chat)).to_have_value("")
    expect(chat.page.locator(".item")).to_have_count(2)
    field(chat).press("Escape")
    expect(chat.field).to_be_focused()


def test_nothing_found_is_said_kindly_and_markup_is_only_text(searched: Chat) -> None:
    chat = searched
    field(chat).fill("<img src=x onerror=alert(1)>")
    expect(chat.page.locator("#hits")).to_contain_text("Nothing has the words “<img")
    expect(chat.page.locator("#announce")).to_have_text("Nothing found.")
    assert chat.page.locator("#hits img").count() == 0
    field(chat).fill("")
    expect(chat.page.locator(".item")).to_have_count(2)


def test_what_stands_in_an_earlier_version_is_found_and_shown(chat: Chat) -> None:
    chat.answered("an unusual wombat")
    chat.field.press("ArrowUp")
    chat.page.get_by_label("Edit your question").fill("something else")
    chat.page.keyboard.press("Enter")
    expect(chat.answer).to_have_text("something else")
    chat.page.keyboard.press("Control+k")
    field(chat).fill("wombat")
    old = hits(chat).filter(has_text="earlier version").last
    expect(old).to_contain_text("You, earlier version")
    old.click()
    expect(chat.page.locator(".message.user .text")).to_have_text("an unusual wombat")
    expect(chat.page.locator("#earlier")).to_be_visible()
    assert chat.page.evaluate(MARKS) == ["wombat"]


def test_a_place_far_up_is_scrolled_to_and_a_link_to_it_works_in_another_tab(
    open_chat: Callable[..., Chat],
) -> None:
    chat = open_chat(viewport={"width": 900, "height": 420})
    chat.answered("the needle")
    for _ in range(3):
        chat.answered("/echo words=150 hay")
    chat.page.reload()
    expect(chat.messages).to_have_count(8)
    field(chat).fill("needle")
    chat.page.locator(".hit", has_text="You").click()
    expect(chat.messages.first).to_be_in_viewport()
    chat.page.wait_for_timeout(300)  # nothing scrolls away again
    expect(chat.messages.first).to_be_in_viewport()
    expect(chat.page.get_by_role("button", name="Jump to latest")).to_be_visible()
    chat.open(chat.page.locator(".hit", has_text="You").get_attribute("href"))
    expect(chat.messages.first).to_have_class("message user found")
    expect(chat.messages.first).to_be_in_viewport()


def test_a_server_that_cannot_be_reached_is_told_in_the_place_of_results(searched: Chat) -> None:
    chat = searched
    chat.page.route("**/api/v1/messages/?search=*", lambda route: route.abort())
    field(chat).fill("parcel")
    expect(chat.page.locator("#hits")).to_contain_text("The server cannot be reached")
    chat.page.unroute("**/api/v1/messages/?search=*")
    field(chat).press("Enter")
    expect(hits(chat)).to_have_count(3)


def test_only_the_last_of_what_was_typed_is_shown(searched: Chat) -> None:
    chat = searched
    slow: list[Any] = []
    chat.page.route("**/api/v1/messages/?search=gift*", lambda route: slow.append(route))
    field(chat).fill("gift")
    with chat.page.expect_request("**/api/v1/messages/?search=gift*"):
        pass
    field(chat).fill("parcel")
    expect(hits(chat)).to_have_count(3)
    for one in slow:
        one.abort()
    chat.page.wait_for_timeout(100)
    expect(hits(chat)).to_have_count(3)
    expect(hits(chat).first).to_contain_text("parcel")


def test_nobody_finds_the_words_of_somebody_else(
    searched: Chat, open_chat: Callable[..., Chat]
) -> None:
    other = open_chat()
    field(other).fill("parcel")
    expect(other.page.locator("#hits")).to_contain_text("Nothing has the words")


def test_the_search_of_a_phone_is_in_its_drawer(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark", **PHONE)
    chat.answered("Where is my parcel?")
    chat.page.get_by_role("button", name="Conversations").tap()
    field(chat).fill("parcel")
    box = hits(chat).first.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360
    hits(chat).last.tap()
    expect(chat.page.locator(".sidebar")).to_be_hidden()
    expect(chat.page.locator(".message.user")).to_have_class("message user found")
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
