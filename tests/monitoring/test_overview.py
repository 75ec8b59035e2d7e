"""The staff's page of figures: what it shows, what is behind each number, who may look."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from html import unescape
from typing import Any
from xml.etree import ElementTree

import pytest
from django.contrib.auth.models import Permission, User
from django.db import DatabaseError
from django.test import Client
from django.utils import timezone

from conversations.models import Conversation, Message
from monitoring import plots, rollups
from monitoring.figures import RANGES, Window
from monitoring.models import Rollup
from monitoring.overview import overview
from monitoring.plots import Series, Sheet
from tests.monitoring.shop_year import fill

PAGE = "/admin/monitoring/"


@pytest.fixture
def client(sam: User) -> Client:
    sam.is_superuser = True
    sam.save()
    client = Client()
    client.force_login(sam)
    return client


def put(ana: User, ago: timedelta, count: int = 1, **values: Any) -> None:
    talk = Conversation.objects.create(user=ana)
    told = {"role": "assistant", "route": "model", "model": "m@1", "text": "so", **values}
    at = timezone.now() - ago
    Message.objects.bulk_create(
        Message(conversation=talk, seq=number, created_at=at, **told) for number in range(count)
    )


def tile(html: str, key: str) -> tuple[str, str, str]:
    """Value, address and change of a tile."""
    part = html.split(f'id="tile-{key}"')[1].split("</li>")[0]
    found = re.search(r'<a class="value" href="([^"]*)">([^<]*)<', part)
    assert found is not None, part
    change = re.search(r'class="change[^>]*>([^<]*)', part)
    assert change is not None
    return found[2], unescape(found[1]), unescape(change[1]).strip()


# --- What it shows -------------------------------------------------------------------------------


def test_an_empty_product_says_what_to_do(client: Client) -> None:
    shown = client.get(PAGE).content.decode()
    assert "Nothing is counted yet" in shown
    assert "manage.py evaluate" in shown
    assert "<svg viewBox" not in shown


def test_tiles_show_the_figures_and_their_change(client: Client, ana: User) -> None:
    put(ana, timedelta(minutes=30), 30, ttft_ms=20.0, duration_ms=120.0, output_tokens=51)
    put(ana, timedelta(minutes=30), 10, route="rules", degraded_reason="overload")
    put(ana, timedelta(minutes=90), 20, ttft_ms=40.0, duration_ms=140.0, output_tokens=51)
    put(ana, timedelta(minutes=180), 1)
    shown = client.get(PAGE + "?range=1h").content.decode()
    value, _, change = tile(shown, "asked")
    assert value == "40"
    assert 95 <= int(change.split()[0]) <= 125  # the hour that runs is some minutes longer
    assert tile(shown, "speed")[0] == "500"
    assert tile(shown, "degraded")[::2] == ("25 %", "+25.0 points")
    assert tile(shown, "first_0.5")[2].startswith("-")
    assert tile(shown, "errors")[0] == "0 %"


def test_no_change_is_shown_against_a_time_that_was_not_counted(client: Client, ana: User) -> None:
    put(ana, timedelta(minutes=90), 5)
    put(ana, timedelta(minutes=30), 5)
    assert tile(client.get(PAGE + "?range=1h").content.decode(), "asked")[2] == ""


def test_every_number_leads_to_as_many_rows(client: Client, ana: User) -> None:
    put(ana, timedelta(minutes=30), 7, ttft_ms=20.0)
    put(ana, timedelta(minutes=30), 3, route="rules", degraded_reason="overload", model="")
    put(ana, timedelta(minutes=30), 2, status="failed", error_code="timeout", route="")
    put(ana, timedelta(hours=3), 5)
    shown = client.get(PAGE + "?range=1h").content.decode()

    def rows(href: str) -> int:
        listed = client.get(href)
        assert listed.status_code == 200, href
        return int(listed.context["cl"].result_count)

    assert rows(tile(shown, "asked")[1]) == 12
    assert rows(tile(shown, "errors")[1]) == 2
    assert rows(tile(shown, "degraded")[1]) == 3
    legend = dict(re.findall(r'</svg><a href="([^"]*)">([^<]*)</a></li>', shown))
    by_name = {name: rows(unescape(href)) for href, name in legend.items()}
    assert by_name["model"] == 7
    assert by_name["rules"] == by_name["overload"] == 3
    assert by_name["nobody"] == by_name["timeout"] == 2
    hrefs = set(re.findall(r'href="(/admin/[^"?]+/\?[^"]+)"', shown))
    assert len(hrefs) > 20
    assert all(rows(unescape(href)) >= 0 for href in hrefs)


@pytest.mark.slow
@pytest.mark.parametrize("key", [*RANGES, "", "nonsense"])
def test_each_range_of_a_full_shop_is_a_valid_page(client: Client, ana: User, key: str) -> None:
    fill(days=2, messages=300)
    # At night nobody may have asked for an hour, and then only these have.
    put(ana, timedelta(minutes=30), 7, ttft_ms=20.0, duration_ms=90.0, confidence=0.9)
    reply = client.get(PAGE, {"range": key})
    shown = reply.content.decode()
    assert 'style="' not in shown and "<script>" not in shown
    pictures = re.findall(r"<svg viewBox=.*?</svg>", shown, re.S)
    assert len(pictures) >= {"1h": 4, "7d": 9, "30d": 9, "1y": 9}.get(key, 6)
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.find("title").text and root.find("desc").text
        ids = {child.get("id") for child in root}
        assert set(root.get("aria-labelledby").split()) <= ids
    assert shown.count("<details>") >= len(pictures) - 1
    for section in ("evaluations", "drift", "versions", "changes", "jobs", "breakers", "engines"):
        assert f'id="{section}"' in shown
    assert "support-en@1.1" in shown


def test_a_year_is_shown_fast(client: Client) -> None:
    fill(days=2, messages=1_000)
    client.get(PAGE)
    begun = time.perf_counter()
    assert client.get(PAGE + "?range=1y").status_code == 200
    assert time.perf_counter() - begun < 1.0  # 0.1 s on an idle machine


def test_the_page_takes_few_statements(client: Client, django_assert_max_num_queries: Any) -> None:
    fill(days=2, messages=200)
    client.get(PAGE)
    with django_assert_max_num_queries(45):
        client.get(PAGE + "?range=30d")


def test_figures_stay_when_conversations_go(client: Client, ana: User) -> None:
    put(ana, timedelta(minutes=30), 7)
    client.get(PAGE)
    Conversation.objects.all().delete()
    assert tile(client.get(PAGE).content.decode(), "asked")[0] == "7"


def test_a_database_that_takes_no_writes_still_shows_what_was_counted(
    client: Client, ana: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(ana, timedelta(minutes=30), 7)
    client.get(PAGE)

    def locked(*_: object, **__: object) -> None:
        raise DatabaseError("locked")

    monkeypatch.setattr(rollups, "roll_up", locked)
    shown = client.get(PAGE).content.decode()
    assert tile(shown, "asked")[0] == "7"
    assert "has not caught up" in shown


def test_names_from_rows_are_shown_as_text(client: Client, ana: User) -> None:
    put(ana, timedelta(minutes=30), 3, model="<b>x</b>", confidence=0.5)
    assert b"<b>x</b>" not in client.get(PAGE).content


# --- Who may look --------------------------------------------------------------------------------


def test_only_staff_with_the_permission_see_figures(sam: User, ana: User) -> None:
    client = Client()
    assert client.get(PAGE).status_code == 302
    client.force_login(ana)
    assert client.get(PAGE).status_code == 302
    client.force_login(sam)
    assert client.get(PAGE).status_code == 404  # nothing of this app is theirs
    assert b"monitoring-link" not in client.get("/admin/").content
    sam.user_permissions.add(Permission.objects.get(codename="view_job"))
    assert b'class="tiles"' not in client.get(PAGE).content
    sam.user_permissions.add(Permission.objects.get(codename="view_rollup"))
    assert b'class="tiles"' in client.get(PAGE).content
    assert b'<a href="/admin/monitoring/">Monitoring: ' in client.get("/admin/").content
    assert client.post(PAGE).status_code == 405


# --- Pure parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key", RANGES)
def test_each_moment_of_a_window_has_a_column(key: str) -> None:
    window = Window.until(rollups.floor(timezone.now(), 300), RANGES[key])
    columns = len(window.starts())
    assert 12 <= columns <= 60
    assert window.column(window.begin) == 0
    assert window.column(window.end - timedelta(seconds=1)) == columns - 1


def sheet(**more: Any) -> Sheet:
    return Sheet("k", "Title", "About.", "Empty.", ["a", "b", "c"], lambda v: f"{v:g}", **more)


def test_lines_break_where_there_is_nothing_and_a_lone_value_is_a_dot() -> None:
    plot = plots.lines(sheet(), [Series("one", [1.0, None, 2.0]), Series("two", [1.0, 2.0, None])])
    lone, line = plot.drawn
    assert len(lone.dots) == 2
    assert (line.path[0], line.path.count("L"), line.dots) == ("M", 1, ())
    assert [(row.name, row.cells) for row in plot.rows] == [
        ("a", ("1", "1")), ("b", ("", "2")), ("c", ("2", "")),
    ]  # fmt: skip


def test_columns_stand_upon_each_other() -> None:
    low, high = plots.columns(sheet(), [Series("l", [2, 0, 0]), Series("h", [3, 0, 0])]).drawn
    bottom = float(low.path.split("V")[1].split("h")[0])
    assert high.path.split("h")[0].endswith(f" {bottom:g}")


def test_what_has_no_value_is_no_picture() -> None:
    plot = plots.lines(sheet(), [Series("one", [None, None, None])])
    assert (plot.drawn, plot.rows, plot.empty) == ((), (), "Empty.")


def test_counting_behind_is_said_and_goes_on_with_each_look(
    ana: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    for hours in (5, 3, 1):
        put(ana, timedelta(hours=hours), 4)
    monkeypatch.setattr("monitoring.overview.MOST_COUNTED", 4)
    looks = [overview().behind for _ in range(5)]
    assert (looks[:2], looks[-1]) == ([True, True], False)
    assert Rollup.objects.count() == 3
