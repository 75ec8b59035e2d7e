"""A real server on the echo backend, a real Chromium, and one handle to drive the chat page.

Playwright's fixtures live for a module here, not for the session: its synchronous API leaves an
event loop running in this thread, which tests of other folders must not find.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings

from tests.conftest import PASSWORD, ROOT, Server, serving

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)

CAST = f"""
from django.contrib.auth.models import User
from fallback.models import ReviewedAnswer, Rule
for name in ("ana", "ben"):
    User.objects.create_user(name, f"{{name}}@example.com", {PASSWORD!r})
User.objects.create_superuser("sam", "sam@example.com", {PASSWORD!r})
ReviewedAnswer.objects.create(
    question="How do I cancel my order?",
    answer="You can cancel until the order is shipped:\\n\\n1. Sign in and open **My Orders**.\\n"
    "2. Pick the order and choose **Cancel order**.\\n3. Confirm, and watch for the e-mail that "
    "says it is cancelled.\\n\\nYour money goes back to the original payment method.",
)
Rule.objects.create(
    name="Opening hours",
    patterns=["when are you open", "opening hours"],
    answer="We are open from Monday to Friday, **9:00 to 17:00**.",
)
"""


def manage(folder: Path, *arguments: str, stdin: str = "") -> None:
    """One management command on that folder's own database."""
    subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env={**os.environ, **_own(folder)},
        input=stdin.encode(),
        check=True,
        capture_output=True,
    )


def _own(folder: Path) -> dict[str, str]:
    return {
        "ASSISTANT_DATA_DIR": str(folder),
        "DATABASE_URL": f"sqlite:///{folder / 'db.sqlite3'}",
        "SECRET_KEY": django_settings.SECRET_KEY,
    }


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database, to be copied."""
    folder = tmp_path_factory.mktemp("migrated")
    manage(folder, "migrate", "-v0")
    return folder / "db.sqlite3"


@pytest.fixture(scope="session")
def cast(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Path:
    """A database with ``CAST``, to be copied."""
    folder = tmp_path_factory.mktemp("cast")
    shutil.copyfile(migrated, folder / "db.sqlite3")
    manage(folder, "shell", "-v0", stdin=CAST)
    return folder / "db.sqlite3"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    """The product, answering; an answer nobody reads goes on long enough to come back to it."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(cast, folder / "db.sqlite3")
    with serving(
        "uvicorn", folder / "db.sqlite3", folder, ASSISTANT_ABANDON_GRACE_S="4"
    ) as running:
        yield running


# --- The browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser_type_launch_args() -> dict[str, Any]:
    return {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}


@pytest.fixture(scope="session")
def browser_context_args() -> dict[str, Any]:
    return {"locale": "en-US"}


@pytest.fixture(scope="module")
def playwright() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser_type(playwright: Any) -> Any:
    return playwright.chromium


@pytest.fixture(scope="module")
def launch_browser(
    browser_type: Any, browser_type_launch_args: dict[str, Any]
) -> Callable[..., Any]:
    return lambda **more: browser_type.launch(**{**browser_type_launch_args, **more})


@pytest.fixture(scope="module")
def browser(launch_browser: Callable[..., Any]) -> Iterator[Any]:
    opened = launch_browser()
    yield opened
    opened.close()


@dataclass
class Chat:
    """The chat page in one tab, in the words of its user."""

    page: Any
    url: str

    def open(self, path: str = "/") -> Chat:
        self.page.goto(self.url + path)
        return self

    def sign_in(self, name: str) -> Chat:
        self.open("/accounts/login/")
        self.page.get_by_label("User name").fill(name)
        self.page.get_by_label("Password").fill(PASSWORD)
        self.page.get_by_role("button", name="Sign in").click()
        self.field.wait_for()
        return self

    @property
    def field(self) -> Any:
        return self.page.get_by_label("Your question")

    @property
    def answer(self) -> Any:
        """The last answer's bubble."""
        return self.page.locator(".message.assistant .text").last

    @property
    def message(self) -> Any:
        return self.page.locator(".message").last

    @property
    def messages(self) -> Any:
        return self.page.locator(".message")

    def ask(self, text: str) -> Chat:
        self.field.fill(text)
        self.field.press("Enter")
        return self

    def answered(self, text: str) -> Chat:
        """Ask, and wait until the answer has ended."""
        before = self.messages.count()
        self.ask(text)
        self.messages.nth(before + 1).wait_for()
        self.ended()
        return self

    def ended(self) -> None:
        self.page.locator('.message.last:not([data-status="streaming"])').wait_for()


@pytest.fixture
def open_chat(site: Server, new_context: Any) -> Iterator[Callable[..., Chat]]:
    """Opens the page in a fresh browser; nothing the page does may end in an error of its own."""
    errors: list[str] = []

    def opened(path: str = "/", *, script: str = "", **kwargs: Any) -> Chat:
        kwargs.setdefault("viewport", {"width": 1280, "height": 800})
        page = new_context(**kwargs).new_page()
        page.set_default_timeout(8_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if _policy(said.text) else None)
        if script:
            page.add_init_script(script)
        return Chat(page, site.http).open(path)

    yield opened
    assert errors == []


def _policy(text: str) -> bool:
    return "Content Security Policy" in text


@pytest.fixture
def chat(open_chat: Callable[..., Chat]) -> Chat:
    """The page of a visitor who has asked nothing yet."""
    return open_chat()
