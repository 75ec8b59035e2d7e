"""The chat page as a person meets it: headless Chromium on a real server with the echo backend."""

from __future__ import annotations

import json
import re
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
SLOW = "/echo delay=0.05 words=400 one two three four"


# --- Asking and stopping -------------------------------------------------------------------------


def test_text_grows_while_it_is_written_until_stop_is_pressed(chat: Chat) -> None:
    chat.ask(SLOW)
    expect(chat.answer).to_contain_text("one two")
    early = len(chat.answer.text_content())
    chat.page.wait_for_function(
        "early => document.querySelector('.message.last .text').textContent.length > early + 20",
        arg=early,
    )
    expect(chat.message).to_have_attribute("aria-busy", "true")
    chat.page.get_by_role("button", name="Stop the answer").click()
    chat.ended()
    expect(chat.message).to_have_attribute("aria-busy", "false")
    expect(chat.message.locator(".why")).to_have_text("Assistant's model · stopped")
    assert 20 < len(chat.answer.text_content()) < 1500


def test_escape_stops_and_the_focus_is_in_the_field(chat: Chat) -> None:
    chat.ask(SLOW)
    expect(chat.answer).to_contain_text("one two")
    chat.page.keyboard.press("Escape")
    chat.ended()
    expect(chat.message).to_have_attribute("data-status", "stopped")
    expect(chat.field).to_be_focused()


def test_a_stopped_answer_can_be_written_again_in_its_place(chat: Chat) -> None:
    chat.ask("/echo delay=0.02 words=40 again")
    expect(chat.answer).to_contain_text("again again")
    chat.page.keyboard.press("Escape")
    chat.ended()
    chat.message.get_by_role("button", name="Try again").click()
    expect(chat.message).to_have_attribute("data-status", "complete")
    expect(chat.answer).to_have_text(" ".join(["again"] * 40))
    expect(chat.messages).to_have_count(2)


def test_a_broken_answer_goes_on_marked_with_what_is_sure(chat: Chat) -> None:
    chat.answered("/echo error=3 one two three four five")
    expect(chat.message).to_have_attribute("data-status", "complete")
    expect(chat.answer).to_contain_text("one two three")
    expect(chat.answer.locator("em")).to_have_text(
        "The answer was interrupted; here is what I can say for sure:"
    )
    expect(chat.answer).to_contain_text("a person should")


def test_a_reload_finds_the_conversation_and_its_running_answer(chat: Chat) -> None:
    chat.ask("/echo delay=0.03 words=60 still here")
    expect(chat.answer).to_contain_text("still here")
    chat.page.reload()
    chat.ended()
    expect(chat.message).to_have_attribute("data-status", "complete")
    expect(chat.answer).to_have_text(" ".join(["still here"] * 30))
    assert re.search(r"/c/[0-9a-f-]{36}/$", chat.page.url)


def test_a_lost_connection_comes_back_and_the_answer_goes_on(chat: Chat) -> None:
    lines: list[Any] = []

    def through(line: Any) -> None:
        line.connect_to_server()
        lines.append(line)

    chat.page.route_web_socket("**/ws/chat/**", through)
    chat.ask("/echo delay=0.03 words=90 no gap")
    expect(chat.answer).to_contain_text("no gap")
    lines[0].close(code=1012, reason="restarting")
    expect(chat.message).to_have_attribute("data-status", "complete", timeout=10_000)
    expect(chat.answer).to_have_text(" ".join(["no gap"] * 45))
    assert len(lines) >= 2


def test_where_sockets_are_blocked_the_answer_streams_over_http(
    open_chat: Callable[..., Chat],
) -> None:
    chat = open_chat(script="WebSocket = class { constructor() { throw new Error('blocked'); } };")
    chat.ask("/echo delay=0.03 words=40 by http")
    expect(chat.answer).to_contain_text("by http")
    expect(chat.message).to_have_attribute("data-status", "streaming")
    chat.ended()
    expect(chat.answer).to_have_text(" ".join(["by http"] * 20))
    chat.ask(SLOW)
    expect(chat.answer).to_contain_text("one two")
    chat.page.keyboard.press("Escape")
    chat.ended()
    expect(chat.message).to_have_attribute("data-status", "stopped")


def test_a_refused_question_comes_back_to_the_field_with_a_countdown(chat: Chat) -> None:
    def refusing(line: Any) -> None:
        def answer(frame: str) -> None:
            ref = re.search(r'"ref":"([^"]+)"', frame)
            assert ref
            error = {"code": "rate_limited", "message": "x", "retry_after_s": 2}
            line.send(json.dumps({"type": "error", "ref": ref.group(1), "error": error}))

        line.on_message(answer)

    chat.page.route_web_socket("**/ws/chat/**", refusing)
    chat.ask("my precious words")
    expect(chat.page.locator("#notice")).to_contain_text(re.compile(r"go on in [12] s"))
    expect(chat.field).to_have_value("my precious words")
    expect(chat.messages).to_have_count(0)
    send = chat.page.get_by_role("button", name="Send")
    expect(send).to_be_disabled()
    expect(send).to_be_enabled()
    expect(chat.page.locator("#notice")).to_be_hidden()


def test_an_answer_goes_on_while_another_conversation_is_looked_at(chat: Chat) -> None:
    chat.answered("the first")
    chat.page.keyboard.press("Control+k")
    chat.ask("/echo delay=0.03 words=45 in the background")
    expect(chat.answer).to_contain_text("in the background")
    second = chat.page.url
    chat.page.get_by_role("link", name="the first", exact=True).click()
    expect(chat.answer).to_have_text("the first")
    chat.page.go_back()
    expect(chat.page).to_have_url(second)
    chat.ended()
    expect(chat.message).to_have_attribute("data-status", "complete")
    expect(chat.answer).to_have_text(" ".join(["in the background"] * 15))


# --- What an answer says of itself ---------------------------------------------------------------


def test_an_example_asks_itself_and_the_caption_names_the_origin(chat: Chat) -> None:
    chat.page.get_by_role("button", name="How do I cancel my order?").click()
    expect(chat.answer.locator("ol li")).to_have_count(3)
    expect(chat.message.locator(".why")).to_have_text("Reviewed answer")
    expect(chat.message.locator(".tip")).to_contain_text("member of staff")
    expect(chat.page).to_have_title("How do I cancel my order? · Support assistant")


def test_confidence_and_the_reason_of_a_lesser_answer_are_shown(chat: Chat) -> None:
    chat.answered("/echo confidence=0.94 yes")
    expect(chat.message.locator(".why")).to_have_text("Assistant's model · 94 % sure")
    chat.answered("/echo confidence=0.1 opening hours")
    expect(chat.message.locator(".why")).to_have_text("Rule · model unsure")
    chat.message.locator(".why").focus()
    expect(chat.message.locator(".tip")).to_be_visible()
    expect(chat.message.locator(".tip")).to_contain_text("not sure enough of its own answer")


def test_markup_in_a_question_or_an_answer_is_shown_and_never_run(chat: Chat) -> None:
    attack = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    chat.answered(f"/echo delay=0.01 {attack}")
    expect(chat.answer).to_contain_text(attack)
    expect(chat.messages.first.locator(".text")).to_have_text(f"/echo delay=0.01 {attack}")
    chat.page.reload()
    expect(chat.answer).to_contain_text(attack)
    assert chat.page.locator(".log img, .log script, .list img").count() == 0
    assert chat.page.title() != "owned"


def test_a_page_may_not_run_scripts_of_its_own(chat: Chat) -> None:
    policy = chat.page.request.get(chat.url + "/").headers["content-security-policy"]
    assert "'unsafe-inline'" not in policy and "'unsafe-eval'" not in policy
    assert (
        chat.page.locator("script:not([src]), style, [style]:not(textarea), [onclick]").count() == 0
    )


# --- Conversations -------------------------------------------------------------------------------


def test_a_conversation_is_renamed_and_deleted_only_after_a_question(chat: Chat) -> None:
    chat.answered("to be renamed")
    item = chat.page.locator(".item")
    item.get_by_role("link").dblclick()
    chat.page.get_by_label("Title of the conversation").fill("A better title")
    chat.page.keyboard.press("Enter")
    expect(item.get_by_role("link")).to_have_text("A better title")
    expect(chat.page).to_have_title("A better title · Support assistant")

    def ask_to_delete() -> None:
        item.hover()
        item.get_by_role("button", name="Menu for").click()
        chat.page.locator("#menu-delete").click()

    ask_to_delete()
    expect(chat.page.get_by_role("dialog")).to_contain_text("A better title")
    chat.page.get_by_role("button", name="Keep it").click()
    expect(item).to_have_count(1)
    address = chat.page.url
    ask_to_delete()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(item).to_have_count(0)
    expect(chat.page).to_have_url(chat.url + "/")
    expect(chat.page.get_by_role("heading", name="How can I help?")).to_be_visible()
    assert chat.page.request.get(address).status == 404


def test_back_and_forward_move_between_conversations(chat: Chat) -> None:
    chat.answered("the first")
    chat.page.get_by_role("button", name="New chat").click()
    chat.answered("the second")
    chat.page.go_back()
    expect(chat.page.get_by_role("heading", name="How can I help?")).to_be_visible()
    chat.page.go_back()
    expect(chat.answer).to_have_text("the first")
    chat.page.go_forward()
    chat.page.go_forward()
    expect(chat.answer).to_have_text("the second")


def test_what_was_typed_outlives_a_reload_and_a_look_elsewhere(chat: Chat) -> None:
    chat.answered("the first")
    chat.field.fill("not sent yet")
    chat.page.reload()
    expect(chat.field).to_have_value("not sent yet")
    chat.page.keyboard.press("Control+k")
    expect(chat.field).to_have_value("")
    chat.page.get_by_role("link", name="the first", exact=True).click()
    expect(chat.field).to_have_value("not sent yet")


def test_signing_in_shows_who_is_there_and_staff_the_way_to_the_admin(chat: Chat) -> None:
    expect(chat.page.get_by_role("link", name="Sign in")).to_be_visible()
    chat.sign_in("sam")
    chat.page.get_by_role("button", name="Account of sam").click()
    expect(chat.page.get_by_role("link", name="Admin")).to_have_attribute("href", "/admin/")
    tokens = chat.page.get_by_role("link", name="API tokens")
    expect(tokens).to_have_attribute("href", "/accounts/tokens/")
    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page.get_by_role("link", name="Sign in")).to_be_visible()
    chat.sign_in("ana")
    chat.page.get_by_role("button", name="Account of ana").click()
    expect(chat.page.get_by_role("link", name="Your data")).to_be_visible()
    expect(chat.page.get_by_role("link", name="Admin")).to_have_count(0)


# --- Keyboard, reading aids, size, colour --------------------------------------------------------


def test_enter_sends_and_shift_enter_makes_a_new_line(chat: Chat) -> None:
    chat.field.fill("one")
    chat.field.press("Shift+Enter")
    chat.page.keyboard.type("two")
    expect(chat.field).to_have_value("one\ntwo")
    expect(chat.messages).to_have_count(0)
    chat.field.press("Enter")
    expect(chat.messages.first.locator(".text")).to_have_text("one\ntwo")
    expect(chat.field).to_have_value("")
    expect(chat.field).to_be_focused()


def test_a_long_question_is_counted_and_a_too_long_one_is_not_sent(chat: Chat) -> None:
    expect(chat.page.locator("#counter")).to_have_text("")
    chat.field.fill("x" * 3_900)
    expect(chat.page.locator("#counter")).to_have_text("3,900 / 4,000")
    chat.field.fill("x" * 4_001)
    expect(chat.page.get_by_role("button", name="Send")).to_be_disabled()
    chat.field.press("Enter")
    expect(chat.messages).to_have_count(0)


def test_tokens_are_not_read_out_but_the_finished_answer_is_once(chat: Chat) -> None:
    log = chat.page.get_by_role("log")
    live = chat.page.locator("[aria-live=polite], [role=status], [role=alert]")
    expect(live).to_have_count(1)
    chat.ask("/echo delay=0.05 words=20 spoken")
    expect(chat.answer).to_contain_text("spoken")
    expect(log).to_have_attribute("aria-live", "off")
    assert live.text_content() == ""
    chat.ended()
    expect(live).to_have_text("Support assistant: " + " ".join(["spoken"] * 20))


def test_the_first_tab_stop_leads_to_the_field_and_focus_can_be_seen(chat: Chat) -> None:
    chat.page.evaluate("document.body.tabIndex = -1, document.body.focus()")
    chat.page.keyboard.press("Tab")
    skip = chat.page.get_by_role("link", name="Skip to the question field")
    expect(skip).to_be_focused()
    assert skip.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    chat.page.keyboard.press("Enter")
    expect(chat.field).to_be_focused()


def test_a_reader_who_scrolled_up_is_left_alone_and_can_jump_back(
    open_chat: Callable[..., Chat],
) -> None:
    chat = open_chat(viewport={"width": 900, "height": 420})
    chat.ask("/echo delay=0.01 words=500 many words to fill the page with")
    top = "document.getElementById('scroller').scrollTop"
    chat.page.wait_for_function(f"() => {top} > 150")
    chat.page.locator("#scroller").hover()
    chat.page.mouse.wheel(0, -2000)
    jump = chat.page.get_by_role("button", name="Jump to latest")
    expect(jump).to_be_visible()
    chat.page.wait_for_timeout(300)
    assert chat.page.evaluate(top) < 60
    jump.click()
    chat.page.wait_for_function(f"() => {top} > 150")
    expect(jump).to_be_hidden()
    chat.page.keyboard.press("Escape")


def test_a_phone_shows_everything_without_scrolling_sideways(
    open_chat: Callable[..., Chat],
) -> None:
    chat = open_chat(**PHONE)
    chat.answered("/echo " + "W" * 300 + " and `" + "code" * 60 + "`")
    chat.ask("/echo delay=0.05 words=60 one")
    chat.page.keyboard.press("Escape")
    chat.ended()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
    for part in (".head", ".log", ".foot", ".message.last .bubble"):
        box = chat.page.locator(part).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, part
    chat.page.get_by_role("button", name="Conversations").tap()
    expect(chat.page.get_by_role("link", name="Sign in")).to_be_in_viewport()
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator(".sidebar")).to_be_hidden()


def test_dark_follows_the_system_until_a_theme_is_chosen(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark")

    def dark() -> bool:
        colour = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return all(int(part) < 60 for part in re.findall(r"\d+", colour)[:3])

    assert dark()
    chat.page.get_by_role("button", name="Switch to the light theme").click()
    assert not dark()
    chat.page.reload()
    assert not dark()
    chat.page.emulate_media(color_scheme="light")
    chat.page.get_by_role("button", name="Switch to the dark theme").click()
    assert dark()


def test_an_answer_is_judged_by_keyboard_and_the_verdict_outlives_a_reload(chat: Chat) -> None:
    chat.answered("hello there")
    good = chat.message.get_by_role("button", name="Good answer")
    bad = chat.message.get_by_role("button", name="Bad answer")
    expect(good).to_have_attribute("aria-pressed", "false")
    good.focus()
    with chat.page.expect_response("**/feedback/"):
        chat.page.keyboard.press("Enter")
    expect(good).to_have_attribute("aria-pressed", "true")
    with chat.page.expect_response("**/feedback/"):
        bad.click()
    chat.page.reload()
    expect(bad).to_have_attribute("aria-pressed", "true")
    expect(good).to_have_attribute("aria-pressed", "false")
    with chat.page.expect_response("**/feedback/"):
        bad.click()
    expect(bad).to_have_attribute("aria-pressed", "false")


def test_thumbs_are_on_the_screen_of_a_phone_in_the_dark(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark", **PHONE)
    chat.answered("hello")
    for name in ("Good answer", "Bad answer"):
        box = chat.message.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert round(min(box["width"], box["height"]), 1) >= 36
    chat.message.get_by_role("button", name="Good answer").tap()
    pressed = chat.page.locator('.thumb[aria-pressed="true"]')
    expect(pressed).to_have_count(1)
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_reference_opens_offline_and_under_the_policy(chat: Chat) -> None:
    chat.sign_in("ana").open("/api/docs/")
    expect(chat.page.get_by_text("Ask; the answer as JSON or as events")).to_be_visible()


def test_a_token_is_made_on_a_phone_and_shown_once(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(color_scheme="dark", **PHONE)
    chat.sign_in("ana").open("/accounts/tokens/")
    chat.page.get_by_label("Name").fill("ci")
    chat.page.get_by_role("button", name="Make a token").click()
    made = chat.page.get_by_label("Your new token")
    assert len(made.input_value()) > 40
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 360
    chat.page.get_by_role("button", name="Revoke ci").click()
    expect(chat.page.get_by_text("You have no tokens.")).to_be_visible()


def test_an_unknown_address_is_a_friendly_page(chat: Chat) -> None:
    chat.open("/c/00000000-0000-0000-0000-000000000000/")
    expect(chat.page.get_by_role("heading", name="This page does not exist")).to_be_visible()
    chat.page.get_by_role("link", name="Back to the chat").click()
    expect(chat.field).to_be_focused()
