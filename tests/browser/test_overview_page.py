"""The staff's pages of figures and of reviews in a browser: strict policy, phone, dark mode."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, manage
from tests.conftest import PASSWORD, Server, serving

pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
FILL = "from tests.monitoring.shop_year import fill; fill(days=2, messages=300)"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("site")
    shutil.copyfile(cast, folder / "db.sqlite3")
    manage(folder, "shell", "-v0", "-c", FILL)
    with serving("uvicorn", folder / "db.sqlite3", folder) as running:
        yield running


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What a browser complains of."""
    found: list[str] = []
    yield found
    assert found == []


def _open(site: Server, context: Any, path: str, errors: list[str]) -> Any:
    page = context.new_page()
    page.set_default_timeout(8_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text) if "Policy" in said.text else None)
    page.goto(f"{site.http}/admin/login/?next={path}")
    page.get_by_label("Username").fill("sam")
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Log in").click()
    return page


def _colour(page: Any, selector: str, name: str) -> str:
    script = "([s, n]) => getComputedStyle(document.querySelector(s))[n]"
    return str(page.evaluate(script, [selector, name]))


def test_figures_are_drawn_and_lead_to_what_is_behind_them(
    site: Server, new_context: Any, errors: list[str]
) -> None:
    page = _open(site, new_context(), "/admin/", errors)
    page.get_by_role("link", name="Monitoring: how the assistant does").click()
    page.get_by_role("link", name="7 days").click()
    page.get_by_role("link", name="24 hours").click()
    picture = page.get_by_role("img", name="Questions by route")
    assert picture.bounding_box()["height"] > 100
    page.locator("#routes summary").click()
    assert page.locator("#routes tbody tr").count() > 5
    shown = int(page.locator("#tile-asked .value").inner_text().replace(",", ""))
    page.locator("#tile-asked .value").click()
    page.locator("#changelist").wait_for()
    assert f"{shown} messages" in page.locator(".paginator").inner_text()


def test_on_a_phone_nothing_is_wider_than_the_screen(
    site: Server, new_context: Any, errors: list[str]
) -> None:
    context = new_context(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    page = _open(site, context, "/admin/monitoring/?range=30d", errors)
    for path in ("/admin/monitoring/?range=30d", "/admin/monitoring/reviewitem/desk/"):
        page.goto(site.http + path)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 360, path


def test_dark_mode_has_colours_of_its_own(
    site: Server, new_context: Any, errors: list[str]
) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        page = _open(site, new_context(color_scheme=scheme), "/admin/monitoring/", errors)
        page.locator(".plots").wait_for()
        seen[scheme] = [
            _colour(page, "#routes .area", "fill"),
            _colour(page, "#routes .scale", "fill"),
            _colour(page, ".tiles li", "backgroundColor"),
        ]
    assert all(light != dark for light, dark in zip(*seen.values(), strict=True))


def test_an_answer_is_judged_with_the_keyboard_and_the_next_comes(
    site: Server, new_context: Any, errors: list[str]
) -> None:
    page = _open(site, new_context(), "/admin/monitoring/reviewitem/desk/", errors)
    page.locator("section tbody th a").first.click()
    before = page.url
    page.get_by_label("Bad").focus()
    page.keyboard.press("Space")
    page.get_by_label("The question is about").select_option("track_order")
    page.get_by_label("What should have been said").fill("It is on its way.")
    page.get_by_label("As a training example").check()
    page.get_by_role("button", name="Store and show the next").click()
    page.locator(".messagelist .success").wait_for()
    assert page.url != before
    assert "/change/" in page.url
