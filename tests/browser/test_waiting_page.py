"""A question in line on the chat page: its place, "Answer now", a broken line, the maintenance
banner. Headless Chromium, the echo backend."""

from __future__ import annotations

import json
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

LOOKS: dict[str, dict[str, Any]] = {
    "light": {},
    "dark": {"color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True},
}
#: Nobody waits for its end; the router gives it up after five seconds.
LONG = "/echo queue=3 place=3 when are you open"
NO_SOCKETS = "window.WebSocket = class { constructor() { throw new Error('blocked'); } };"


def caption(chat: Chat) -> Any:
    return chat.message.locator(".why")


# --- The place -----------------------------------------------------------------------------------


def test_the_place_counts_down_and_is_gone_with_the_first_word(chat: Chat) -> None:
    chat.ask("/echo queue=2 place=0.7 hello")
    words = chat.message.locator(".queue-words")
    expect(words).to_have_text("You are number 2, about 2 s.")
    expect(chat.page.locator("#announce")).to_have_text("You are number 2, about 2 s.")
    assert chat.page.locator("#announce").get_attribute("aria-live") == "polite"
    expect(chat.message.get_by_role("button", name="Answer now")).to_be_hidden()
    expect(words).to_have_text("You are number 1, about 1 s.")
    expect(chat.answer).to_have_text("hello")
    expect(chat.message.locator(".queue")).to_be_hidden()


@pytest.mark.parametrize("line", ["socket", "blocked"])
def test_answer_now_gives_what_is_known(open_chat: Callable[..., Chat], line: str) -> None:
    chat = open_chat(script=NO_SOCKETS if line == "blocked" else "")
    chat.ask(LONG)
    button = chat.message.get_by_role("button", name="Answer now")
    expect(chat.message.locator(".queue-words")).to_have_text("You are number 3, about 9 s.")
    button.click()
    expect(chat.answer).to_contain_text("from Monday to Friday", timeout=3_000)
    expect(caption(chat)).to_have_text("Rule · not waited for")
    expect(button).to_be_hidden()
    expect(chat.field).to_be_focused()


def test_the_button_is_pressed_once_and_stays_under_the_finger(chat: Chat) -> None:
    lines: list[Any] = []
    sent: list[str] = []

    def through(line: Any) -> None:
        server = line.connect_to_server()
        lines.append(line)

        def forward(frame: str) -> None:
            sent.append(json.loads(frame)["type"])
            if sent[-1] != "message.hurry":
                server.send(frame)

        line.on_message(forward)

    chat.page.route_web_socket("**/ws/chat/**", through)
    chat.ask(LONG)
    button = chat.message.get_by_role("button", name="Answer now")
    button.wait_for()
    identity = chat.message.get_attribute("data-id")
    place(lines[-1], identity, 2, 1_000)
    expect(chat.message.locator(".queue-words")).to_have_text("You are number 2, about 1 s.")
    expect(button).to_be_enabled()
    button.focus()
    chat.page.keyboard.press("Enter")
    expect(button).to_be_disabled()
    place(lines[-1], identity, 1, 900)
    expect(chat.message.locator(".queue-words")).to_have_text("You are number 1, about 1 s.")
    expect(button).to_be_disabled()
    assert sent.count("message.hurry") == 1


def place(line: Any, identity: str | None, position: int, eta_ms: int) -> None:
    frame = {"type": "status", "id": identity, "state": "queued"}
    line.send(json.dumps({**frame, "position": position, "eta_ms": eta_ms}))


# --- A broken line -------------------------------------------------------------------------------


def test_a_question_whose_line_broke_is_not_asked_twice(chat: Chat) -> None:
    """Its frame arrives, but late: after the page has given the words back."""
    frames: list[dict[str, Any]] = []
    late: list[Callable[[], None]] = []

    def through(line: Any) -> None:
        server = line.connect_to_server()

        def forward(frame: str) -> None:
            frames.append(json.loads(frame))
            first = frames[-1]["type"] == "message.create" and not late
            if first:
                late.append(lambda: server.send(frame))
                line.close(code=1011)
            else:
                server.send(frame)

        line.on_message(forward)
        server.on_message(lambda frame: line.send(frame))

    chat.page.route_web_socket("**/ws/chat/**", through)
    chat.ask("hello there")
    expect(chat.field).to_have_value("hello there")
    chat.field.press("Enter")
    chat.ended()
    created = [frame for frame in frames if frame["type"] == "message.create"]
    assert len(created) == 2 and created[0]["idempotency_key"]
    assert created[0]["idempotency_key"] == created[1]["idempotency_key"]
    chat.answered("hello there")
    again = [frame for frame in frames if frame["type"] == "message.create"][-1]
    assert again["idempotency_key"] != created[0]["idempotency_key"], "a new question, same words"
    expect(chat.messages).to_have_count(4)


def test_an_event_stream_names_its_question_too(open_chat: Callable[..., Chat]) -> None:
    chat = open_chat(script=NO_SOCKETS)
    with chat.page.expect_request(lambda request: request.url.endswith("/messages/")) as asked:
        chat.answered("hello")
    assert len(asked.value.headers.get("idempotency-key", "")) > 8
    chat.message.get_by_role("button", name="Another answer").hover()
    with chat.page.expect_request("**/regenerate/") as again:
        chat.message.get_by_role("button", name="Another answer").click()
    key = again.value.headers.get("idempotency-key", "")
    assert key and key != asked.value.headers["idempotency-key"]


# --- Maintenance ---------------------------------------------------------------------------------


def test_an_open_page_hears_of_maintenance_and_of_its_end(chat: Chat) -> None:
    lines: list[Any] = []

    def through(line: Any) -> None:
        lines.append(line)
        server = line.connect_to_server()
        server.on_message(lambda frame: line.send(frame))

    chat.page.route_web_socket("**/ws/chat/**", through)
    chat.answered("hello")
    banner = chat.page.locator("#maintenance")
    expect(banner).to_be_hidden()
    lines[-1].send(json.dumps({"type": "pong", "notice": "Back at <b>noon</b>."}))
    expect(banner).to_have_text("Back at <b>noon</b>.")
    expect(chat.page.locator("body[data-maintenance]")).to_have_count(1)
    expect(chat.page.locator("#announce")).to_have_text("Back at <b>noon</b>.")
    lines[-1].send(json.dumps({"type": "pong"}))
    expect(banner).to_be_hidden()
    expect(chat.page.locator("body[data-maintenance]")).to_have_count(0)


def force(staff: Chat, press: str, note: str = "") -> None:
    """As staff does it, in the admin."""
    staff.open("/admin/fallback/policychange/")
    row = staff.page.locator("tr", has=staff.page.locator('input[value="model"]'))
    row.locator("input[name=note]").fill(note)
    row.get_by_role("button", name=press, exact=True).click()
    staff.page.locator(".messagelist .success").wait_for()


@pytest.mark.parametrize("look", LOOKS)
def test_a_page_that_loads_under_maintenance_says_so(
    open_chat: Callable[..., Chat], tmp_path: Path, look: str
) -> None:
    staff = open_chat().sign_in("sam")
    force(staff, "Off", "host 7 is full; public: Back at <i>noon</i>.")
    try:
        chat = open_chat(**LOOKS[look])
        expect(chat.page.locator("#maintenance")).to_have_text("Back at <i>noon</i>.")
        chat.page.screenshot(path=tmp_path / f"maintenance-{look}.png")
        force(staff, "Off")
        chat.page.reload()
        expect(chat.page.locator("#maintenance")).to_contain_text("off for maintenance")
        assert contrast(chat, "#maintenance-text", "#maintenance") >= 4.5
    finally:
        force(staff, "By itself")
    chat.page.reload()
    chat.field.wait_for()
    expect(chat.page.locator("body[data-maintenance]")).to_have_count(0)
    expect(chat.page.locator("#maintenance")).to_be_hidden()


# --- Looked at -----------------------------------------------------------------------------------


@pytest.mark.parametrize("look", LOOKS)
def test_waiting_and_maintenance_fit_the_page(
    open_chat: Callable[..., Chat], tmp_path: Path, look: str
) -> None:
    chat = open_chat(**LOOKS[look])
    chat.answered("How do I cancel my order?")
    chat.page.evaluate(
        """() => { const body = document.body; body.dataset.maintenance = "x";
        document.getElementById("maintenance").hidden = false;
        document.getElementById("maintenance-text").textContent =
          "We are giving the assistant a bigger machine until noon. Answers come from prepared " +
          "texts until then."; }"""
    )
    chat.ask(LONG)
    button = chat.message.get_by_role("button", name="Answer now")
    button.wait_for()
    chat.page.screenshot(path=tmp_path / f"waiting-{look}.png")
    wide = chat.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"{wide} px too wide"
    assert contrast(chat, "#maintenance-text", "#maintenance") >= 4.5
    assert contrast(chat, ".message.last .queue-words", "body") >= 4.5
    head, banner = (chat.page.locator(name).bounding_box() for name in (".head", "#maintenance"))
    assert banner["y"] >= head["y"] + head["height"] - 1, "below the head, over nothing"
    if look == "phone":
        assert button.bounding_box()["height"] >= 32


def contrast(chat: Chat, text: str, ground: str) -> float:
    """Of an element's ink on another's background (WCAG 2)."""
    colours = chat.page.evaluate(
        """([text, ground]) => [getComputedStyle(document.querySelector(text)).color,
        getComputedStyle(document.querySelector(ground)).backgroundColor].map((colour) => {
          const canvas = new OffscreenCanvas(1, 1).getContext("2d");
          canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
          return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
        })""",
        [text, ground],
    )
    light, dark = sorted((luminance(*colour) for colour in colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(*rgb: int) -> float:
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
