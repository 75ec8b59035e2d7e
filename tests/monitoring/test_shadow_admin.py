"""Pairs of answers in the admin: who sees what, and what is written down."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.urls import reverse

from monitoring.models import ShadowPair
from tests.monitoring.test_shadow import talk, version

pytestmark = pytest.mark.django_db
LIST = "admin:monitoring_shadowpair_changelist"


@pytest.fixture
def pair() -> ShadowPair:
    (answer,) = talk(("where is <b>my</b> money", "It is <i>on its way</i>."))
    return ShadowPair.objects.create(
        version=version(), message=answer, agreed=False, differs="intent", live_model="old@1",
        live_intent="track_refund", intent="get_refund", text="You <u>get</u> it back.",
        similarity=0.21, live_ms=30.4, ms=41.6,
    )  # fmt: skip


def allow(user: User, *names: str) -> User:
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return User.objects.get(pk=user.pk)


def page(pair: ShadowPair) -> str:
    return reverse("admin:monitoring_shadowpair_change", args=[pair.pk])


def said(user: User) -> list[str]:
    return [entry.get_change_message() for entry in LogEntry.objects.filter(user=user)]


def test_the_list_tells_how_the_candidate_does(client: Any, admin_user: Any, pair: Any) -> None:
    client.force_login(admin_user)
    shown = client.get(reverse(LIST)).content.decode()
    assert "new@2" in shown and "1 of 200 pairs so far" in shown and "differ in intent" in shown
    assert "30 / 42" in shown and "21%" in shown
    assert "my money" not in shown and "on its way" not in shown
    for query in ("agreed__exact=1", "differs=text", "verdict__exact=live"):
        assert "differ in intent" not in client.get(f"{reverse(LIST)}?{query}").content.decode()


def test_without_a_candidate_the_list_says_what_to_do(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    assert "promote_model" in client.get(reverse(LIST)).content.decode()


def test_reading_is_a_permission_of_its_own_and_written_down(
    client: Any, sam: Any, pair: Any
) -> None:
    client.force_login(sam)
    assert client.get(page(pair)).status_code == 403
    client.force_login(allow(sam, "view_shadowpair"))
    shown = client.get(page(pair)).content.decode()
    assert "track_refund" in shown and "get_refund" in shown
    assert "money" not in shown and "on its way" not in shown and "back" not in shown
    assert said(sam) == []
    client.force_login(allow(sam, "view_shadowpair", "view_conversation"))
    shown = client.get(page(pair)).content.decode()
    assert "where is &lt;b&gt;my&lt;/b&gt; money" in shown and "&lt;u&gt;get&lt;/u&gt;" in shown
    assert "<i>on its way" not in shown
    assert said(sam) == ["Read the question and both answers."]


def test_judging_is_too(client: Any, sam: Any, pair: Any) -> None:
    client.force_login(allow(sam, "view_shadowpair"))
    assert client.post(page(pair), {"verdict": "live"}).status_code == 403
    action = {"action": "judge_live", "_selected_action": [pair.pk]}
    client.post(reverse(LIST), action)
    pair.refresh_from_db()
    assert pair.verdict == ""
    client.force_login(allow(sam, "view_shadowpair", "change_shadowpair"))
    assert client.post(page(pair), {"verdict": "candidate"}).status_code == 302
    pair.refresh_from_db()
    assert (pair.verdict, pair.judged_by, pair.judged_at is not None) == ("candidate", sam, True)
    assert said(sam) == ["Judged: the candidate's is better."]


@pytest.mark.parametrize("verdict", ["", "nobody", "LIVE"])
def test_a_verdict_nobody_knows_changes_nothing(
    client: Any, admin_user: Any, pair: Any, verdict: str
) -> None:
    client.force_login(admin_user)
    reply = client.post(page(pair), {"verdict": verdict}, follow=True)
    assert "one of the three" in reply.content.decode()
    pair.refresh_from_db()
    assert pair.verdict == ""


def test_the_next_unjudged_one_follows(client: Any, admin_user: Any, pair: Any) -> None:
    (answer,) = talk(("another", "An answer."))
    newer = ShadowPair.objects.create(
        version=pair.version, message=answer, agreed=False, differs="text", live_model="old@1"
    )
    client.force_login(admin_user)
    assert client.post(page(newer), {"verdict": "agree"}).url == page(pair)
    assert client.post(page(pair), {"verdict": "agree"}).url == reverse(LIST)


def test_many_are_judged_at_once(client: Any, admin_user: Any, pair: Any) -> None:
    client.force_login(admin_user)
    reply = client.post(
        reverse(LIST), {"action": "judge_agree", "_selected_action": [pair.pk]}, follow=True
    )
    assert "Judged 1." in reply.content.decode()
    assert ShadowPair.objects.get().verdict == "agree"


@pytest.mark.parametrize("key", ["999999", "x", "1" * 30, "%00"])
def test_a_pair_that_is_gone(client: Any, admin_user: Any, key: str) -> None:
    client.force_login(admin_user)
    address = reverse("admin:monitoring_shadowpair_change", args=["1"]).replace("1", key)
    assert "was deleted" in client.get(address, follow=True).content.decode()


def test_nobody_adds_changes_or_deletes_pairs(client: Any, admin_user: Any, pair: Any) -> None:
    client.force_login(admin_user)
    for name, args in (("add", []), ("delete", [pair.pk])):
        address = reverse(f"admin:monitoring_shadowpair_{name}", args=args)
        assert client.get(address).status_code == 403
