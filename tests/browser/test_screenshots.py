"""The README's pictures, taken from the running product: ``SCREENSHOTS=1 pytest tests/browser``.

The bundled model answers; without one in the clone, a stored conversation stands in for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, Chat, manage
from tests.conftest import ROOT, Server, serving

pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
    pytest.mark.skipif(not os.environ.get("SCREENSHOTS"), reason="writes docs/: set SCREENSHOTS=1"),
]

DOCS = ROOT / "docs"
HAS_MODEL = (ROOT / "assistant" / "bundled" / "support-en" / "model.json").exists()
QUESTIONS = (
    "How do I cancel my order?",
    "Which payment methods do you accept?",
    "I forgot my password, what can I do?",
)
SUPPORT = {
    "ASSISTANT_SUPPORT_COMPANY": "Example Shop",
    "ASSISTANT_SUPPORT_WEBSITE": "shop.example.com",
    "ASSISTANT_SUPPORT_PHONE": "+1 555 0100",
    "ASSISTANT_SUPPORT_EMAIL": "help@shop.example.com",
    "ASSISTANT_SUPPORT_HOURS": "Monday to Friday, 9:00 to 17:00",
}
STORED = """
from datetime import timedelta
from django.utils import timezone
from django.contrib.auth.models import User
from conversations.markdown import render
from conversations.models import Conversation, Message
from fallback.models import ReviewedAnswer
now = timezone.now()
def talk(user, title, age, *turns):
    at = now - age
    kept = Conversation.objects.create(
        user=User.objects.get(username=user), title=title, created_at=at, updated_at=at)
    for n, (asked, said, result) in enumerate(turns):
        put = dict(conversation=kept, created_at=at)
        Message.objects.create(seq=2 * n + 1, role="user", text=asked, **put)
        Message.objects.create(seq=2 * n + 2, role="assistant", text=said, html=render(said),
            finish_reason="stop", **put, **result)
cards = "You can pay in these ways:\\n\\n- **Cards**: Visa and Mastercard\\n- **Bank transfer**" \\
    "\\n- **Gift cards** of our shop"
sure = {"route": "model", "confidence": 0.94, "model": "support-en", "ttft_ms": 41}
for user in ("ana", "ben", "sam"):
    talk(user, "Change the address", timedelta(hours=3), ("Can I change where it is sent?",
        "Yes, until the order is shipped: open **My Orders** and choose **Change address**.", sure))
    talk(user, "I forgot my password", timedelta(days=1), ("I forgot my password",
        "Choose **Forgot password** on the sign-in page; the link arrives within a minute.", sure))
    talk(user, "Invoice for last month", timedelta(days=4), ("Where is last month's invoice?",
        "Open **My Orders**, pick the order and choose **Download invoice**.", sure))
"""
STAND_IN = """
talk("ana", QUESTIONS[0], timedelta(0),
    (QUESTIONS[0], ReviewedAnswer.objects.get().answer, {"route": "reviewed", "ttft_ms": 3}),
    (QUESTIONS[1], cards, sure),
    (QUESTIONS[2], "Choose **Forgot password** on the sign-in page.", sure))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    """The product with a little history, answered by the bundled model if there is one."""
    folder = tmp_path_factory.mktemp("shop")
    shutil.copyfile(cast, folder / "db.sqlite3")
    rows = STORED + ("" if HAS_MODEL else f"QUESTIONS = {QUESTIONS!r}\n{STAND_IN}")
    manage(folder, "shell", "-v0", "-c", rows)
    backend = "model" if HAS_MODEL else "echo"
    more = {"ASSISTANT_BACKEND": backend, **SUPPORT}
    with serving("uvicorn", folder / "db.sqlite3", folder, **more) as running:
        yield running


def _conversation(page: Any, shop: Server) -> Chat:
    """Signed in as ana, with the conversation of the picture on the screen."""
    page.set_default_timeout(30_000)
    chat = Chat(page, shop.http).open().sign_in("ana")
    page.locator(".item").first.wait_for(state="attached")  # in a drawer on phones
    known = page.locator(".item", has_text=QUESTIONS[0])
    if known.count():
        page.goto(shop.http + known.first.locator("a").get_attribute("href"))
    else:
        for question in QUESTIONS:
            chat.answered(question)
    page.locator(".message").nth(2 * len(QUESTIONS) - 1).wait_for()
    page.wait_for_timeout(400)  # animations
    return chat


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chat_in_its_two_themes(shop: Server, new_context: Any, theme: str) -> None:
    page = new_context(viewport={"width": 1280, "height": 800}, color_scheme=theme).new_page()
    _conversation(page, shop)
    assert _taken(page, f"chat-{theme}.png")


def test_the_chat_on_a_phone(shop: Server, new_context: Any) -> None:
    page = new_context(
        viewport={"width": 390, "height": 844},
        is_mobile=True,
        has_touch=True,
        device_scale_factor=2,
    ).new_page()
    _conversation(page, shop)
    assert _taken(page, "chat-phone.png")


def test_the_admin(shop: Server, new_context: Any) -> None:
    page = new_context(viewport={"width": 1440, "height": 800}).new_page()
    Chat(page, shop.http).open().sign_in("sam")
    page.goto(shop.http + "/admin/conversations/message/?role__exact=assistant")
    page.locator("#changelist, #content").first.wait_for()
    assert _taken(page, "admin.png")


@pytest.fixture(scope="module")
def busy_shop(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    """The product after an imagined year."""
    folder = tmp_path_factory.mktemp("busy")
    shutil.copyfile(cast, folder / "db.sqlite3")
    manage(folder, "shell", "-v0", "-c", "from tests.monitoring.shop_year import fill; fill()")
    with serving("uvicorn", folder / "db.sqlite3", folder, **SUPPORT) as running:
        yield running


def test_the_page_of_figures(busy_shop: Server, new_context: Any) -> None:
    page = new_context(viewport={"width": 1440, "height": 1160}).new_page()
    Chat(page, busy_shop.http).open().sign_in("sam")
    page.goto(busy_shop.http + "/admin/monitoring/?range=7d")
    page.locator(".plots").wait_for()
    assert _taken(page, "monitoring.png")


def _taken(page: Any, name: str) -> bool:
    DOCS.mkdir(exist_ok=True)
    path: Path = DOCS / name
    page.screenshot(path=path)
    return path.stat().st_size > 10_000
