"""The pages of model versions, looked at: light, dark and on a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.conftest import CHROMIUM, Chat, manage
from tests.conftest import Server, serving

pytest.importorskip("playwright.sync_api", reason="pytest-playwright is not installed")

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

ROWS = """
from assistant.models import ModelVersion, VersionChange
from django.contrib.auth.models import User
sam = User.objects.get(username="sam")
def version(number, state, **more):
    return ModelVersion.objects.create(name="support-en", version=number, state=state,
        sha256=number.replace(".", "a") * 12, folder="/srv/models/support-en-" + number, **more)
def gate(passed, why, **figures):
    return {"passed": passed, "why": why, "figures": figures, "at": "2026-01-02T03:04:05+00:00"}
old = version("0.1.0", "retired")
now = version("0.2.0", "active", parent=old)
new = version("0.3.0", "canary", parent=now, canary_percent=10, gates={
    "golden": gate(True, "Not worse than support-en@0.2.0 on 295 cases.",
        intent_accuracy={"active": 0.8703, "candidate": 0.8912}, regressed=["nat-17", "nat-90"]),
    "shadow": gate(True, "It agrees with the live model in 91%.", pairs=212, agreement=0.9104),
    "canary": gate(None, "84 of 200 conversations were answered; nothing is wrong so far.",
        conversations={"active": 761, "canary": 84}, evidence={"all": 0.4, "alarm": 20.0},
        errors={"active": 0.004, "canary": 0.0}, first_word={"active": 21.3, "canary": 22.9})})
for was, to in (("", "candidate"), ("candidate", "shadow"), ("shadow", "canary")):
    VersionChange.objects.create(
        version=new, from_state=was, to_state=to, by=sam, why="June's corrections: they help")
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, cast: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("desk")
    shutil.copyfile(cast, folder / "db.sqlite3")
    manage(folder, "shell", "-v0", stdin=ROWS)
    with serving("uvicorn", folder / "db.sqlite3", folder) as running:
        yield running


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_the_pages_of_a_version(desk: Server, new_context: Any, tmp_path: Path, look: str) -> None:
    size = {"width": 390, "height": 844} if look == "phone" else {"width": 1280, "height": 900}
    page = new_context(viewport=size, color_scheme="dark" if look == "dark" else "light").new_page()
    refused: list[str] = []
    page.on("console", lambda said: refused.append(said.text) if "Policy" in said.text else None)
    Chat(page, desk.http).open().sign_in("sam")
    for name, path in (("list", ""), ("one", "3/change/"), ("sure", "3/do/promote/")):
        page.goto(f"{desk.http}/admin/assistant/modelversion/{path}")
        page.locator("#content").wait_for()
        wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 1, f"{name} is {wide} px too wide on a {look}"
        page.screenshot(path=tmp_path / f"{name}-{look}.png", full_page=True)
    assert refused == []
    page.get_by_label("Why").fill("it is time")
    page.get_by_role("link", name="No, go back").click()
    page.locator("#acts").wait_for()
