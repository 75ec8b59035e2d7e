"""A person answers in the chat: the user's tab and the staff's admin, side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, Chat, manage
from tests.conftest import PASSWORD, Server, serving

sync_api = pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")
expect = sync_api.expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

RULE = """
from django.contrib.auth.models import User
from fallback.models import Rule
Rule.objects.create(
    name="A person",
    patterns=["talk to a person"],
    answer="I have asked a colleague.",
    buttons=[{"label": "Opening hours", "text": "opening hours"}],
    hand_over=True,
)
User.objects.filter(username="sam").update(first_name="Sam")
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    """Rules first, so that asking for a person is answered by the rule."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(cast, folder / "db.sqlite3")
    policy = "from fallback.models import PolicyChange\n"
    policy += "PolicyChange.objects.create(steps=['rules', 'echo'], active=True)\n"
    manage(folder, "shell", "-v0", stdin=RULE + policy)
    with serving("uvicorn", folder / "db.sqlite3", folder) as running:
        yield running


def test_a_person_answers_in_the_same_chat_without_a_reload(
    open_chat: Callable[..., Chat], new_context: Any
) -> None:
    chat = open_chat()
    chat.answered("let me talk to a person")
    asking = chat.message
    expect(asking.locator(".text")).to_have_text("I have asked a colleague.")
    line = chat.page.locator(".person").nth(1)
    expect(line).to_have_text("A person from our team was asked. You can go on writing.")
    chat.message.get_by_role("button", name="Opening hours").click()
    expect(chat.messages).to_have_count(4)
    chat.ended()
    expect(chat.answer).to_contain_text("Monday to Friday")
    chat.page.evaluate("window.neverReloaded = true")

    desk = new_context().new_page()
    desk.set_default_timeout(8_000)
    desk.goto(chat.url + "/admin/login/?next=/admin/conversations/handover/")
    desk.get_by_label("Username").fill("sam")
    desk.get_by_label("Password").fill(PASSWORD)
    desk.get_by_role("button", name="Log in").click()
    desk.locator("tr", has_text="opening hours").locator("th a").click()
    expect(desk.locator("#said")).to_contain_text("let me talk to a person")
    desk.get_by_role("button", name="Take").click()
    expect(line).to_have_text("Being looked at by Sam.")
    desk.get_by_label("Your answer").fill("Hello, **Sam** here.")
    desk.get_by_role("button", name="Send the answer").click()
    expect(desk.locator(".messagelist")).to_contain_text("Sent.")

    expect(chat.answer).to_have_text("Hello, Sam here.")
    expect(chat.answer.locator("strong")).to_have_text("Sam")
    expect(chat.message.locator(".why")).to_have_text("A person: Sam")
    expect(chat.message.get_by_role("button", name="Another answer")).to_be_hidden()
    expect(line).to_have_text("")
    expect(chat.page.locator("#announce")).to_have_text("Sam: Hello, Sam here.")
    assert chat.page.evaluate("window.neverReloaded") is True
    chat.page.reload()
    expect(chat.answer).to_have_text("Hello, Sam here.")
    chat.answered("one two thank you")
    expect(chat.messages).to_have_count(7)


def test_an_answer_from_a_process_that_cannot_tell_is_found_all_the_same(
    open_chat: Callable[..., Chat],
) -> None:
    script = "WebSocket = class { constructor() { throw new Error('blocked'); } };"
    script += "const every = window.setInterval;"
    script += "window.setInterval = (f, ms) => every(f, ms === 15000 ? 300 : ms);"
    chat = open_chat(script=script)
    chat.answered("let me talk to a person")
    done = {"status": "answered", "by": "Sam"}

    def with_answer(route: Any) -> None:
        page = route.fetch().json()
        last = page["results"][-1]
        last["hand_over"] |= done
        reply = {**last, "id": "11111111-2222-4333-8444-555555555555", "seq": last["seq"] + 1}
        reply |= {"text": "I am here", "html": "<p>I am here</p>", "author": "Sam", "buttons": []}
        page["results"].append({**reply, "hand_over": None, "parent": last["id"]})
        route.fulfill(json=page)

    chat.page.route(
        "**/messages/", lambda r: with_answer(r) if r.request.method == "GET" else r.continue_()
    )
    expect(chat.answer).to_have_text("I am here")
    expect(chat.page.locator("#announce")).to_have_text("Sam: I am here")
    expect(chat.page.locator(".person").nth(1)).to_have_text("")
