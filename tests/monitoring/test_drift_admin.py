"""Drift in the admin: pictures, a look now, a new reference."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.urls import reverse
from django.utils import timezone

from monitoring import admin_drift, drift_scale
from monitoring.models import DriftReference, DriftReport
from tests.monitoring.test_drift import store

pytestmark = pytest.mark.django_db
LIST, LOOK, REFER = (
    f"admin:monitoring_{name}" for name in ("driftreport_changelist", "drift_look", "drift_refer")
)
NOW = timezone.now()


def reported(*scores: float, breached: bool = False) -> list[DriftReport]:
    span = {"from_at": NOW - timedelta(days=9), "to_at": NOW - timedelta(days=8)}
    against = DriftReference.objects.create(model="old@1", turns=400, data={}, **span)
    return [
        DriftReport.objects.create(
            reference=against,
            turns=500,
            features={
                name: {"score": score, "threshold": 0.5, "breached": score > 0.5, "now": 0.25}
                for name in drift_scale.NAMES
            },
            breached=breached,
            from_at=NOW - timedelta(hours=2),
            to_at=NOW + timedelta(hours=at),
        )
        for at, score in enumerate(scores)
    ]


def allow(user: User, *names: str) -> User:
    user.user_permissions.set(Permission.objects.filter(codename__in=names))
    return User.objects.get(pk=user.pk)


def test_each_feature_has_a_picture_with_its_threshold(client: Any, admin_user: Any) -> None:
    reported(0.1, 0.4, 0.9, breached=True)
    client.force_login(admin_user)
    shown = client.get(reverse(LIST)).content.decode()
    for name in drift_scale.NAMES:
        picture = shown.split(f'id="drift-{name}"')[1].split("</section>")[0]
        assert len(re.findall(r'<path class="line', picture)) == 2, "score and threshold"
        assert "0.900" in picture and "0.500" in picture
    assert "400 turns" in shown and "answered by old@1" in shown
    assert "style=" not in shown.split('id="reference"')[1].split("</form>")[0]


def test_a_score_below_nothing_stays_in_the_picture() -> None:
    (report,) = reported(-0.2)
    picture = admin_drift.feature_plots([report])[0]
    numbers = [float(at) for one in picture.drawn for _, at in one.dots]
    assert all(0 <= number <= picture.height for number in numbers)


def test_one_report_tells_every_feature(client: Any, admin_user: Any) -> None:
    report = reported(0.9, breached=True)[0]
    client.force_login(admin_user)
    address = reverse("admin:monitoring_driftreport_change", args=[report.pk])
    shown = client.get(address).content.decode()
    for title, _ in admin_drift.TITLES.values():
        assert title in shown
    assert shown.count("<strong>drifts</strong>") == len(drift_scale.NAMES)
    assert "180 %" in shown and "25 %" in shown


def test_without_a_reference_the_page_says_so(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    assert "There is none yet" in client.get(reverse(LIST)).content.decode()
    reply = client.post(reverse(REFER), follow=True).content.decode()
    assert "A reference needs 300 turns and there are 0" in reply
    assert "Too few turns" in client.post(reverse(LOOK), follow=True).content.decode()


def test_a_reference_and_a_look_by_button_are_written_down(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    asked = [(f"where is my parcel number {at % 7} please", "track_order") for at in range(300)]
    store(asked, NOW - timedelta(days=2))
    reply = client.post(reverse(REFER), follow=True).content.decode()
    assert "compared to these 300 turns" in reply
    store(asked[:150], NOW - timedelta(days=1))
    reply = client.post(reverse(LOOK), follow=True).content.decode()
    assert "150 turns were compared" in reply
    told = [entry.get_change_message() for entry in LogEntry.objects.order_by("pk")]
    assert told == ["New reference of 300 turns.", "Looked for drift."]


def test_a_report_becomes_the_reference(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    asked = [(f"where is my parcel number {at % 7} please", "track_order") for at in range(300)]
    since = NOW - timedelta(hours=6)
    store(asked, since)
    store(asked, since - timedelta(days=3))
    report = reported(0.1)[0]
    report.from_at, report.to_at = since, since + timedelta(minutes=299)
    report.save()
    client.post(reverse(REFER), {"report": report.pk})
    made = DriftReference.objects.get(active=True)
    assert (made.turns, made.from_at, made.to_at) == (300, report.from_at, report.to_at)
    for gone in ("0", "x", "-1"):
        reply = client.post(reverse(REFER), {"report": gone}, follow=True).content.decode()
        assert "This report is gone" in reply


def test_each_button_is_a_permission(client: Any, sam: Any) -> None:
    reported(0.1)
    client.force_login(sam)
    assert client.get(reverse(LIST)).status_code == 403
    client.force_login(allow(sam, "view_driftreport"))
    shown = client.get(reverse(LIST)).content.decode()
    assert "Look now" not in shown and "Make the newest" not in shown
    for name in (LOOK, REFER):
        assert client.post(reverse(name)).status_code == 403
        assert client.get(reverse(name)).status_code in {403, 405}
    client.force_login(allow(sam, "view_driftreport", "add_driftreport"))
    assert "Look now" in client.get(reverse(LIST)).content.decode()
    assert client.post(reverse(LOOK)).status_code == 302
    assert client.post(reverse(REFER)).status_code == 403


def test_a_report_that_is_gone(client: Any, admin_user: Any) -> None:
    client.force_login(admin_user)
    address = reverse("admin:monitoring_driftreport_change", args=["77777"])
    assert "is gone" in client.get(address, follow=True).content.decode()
    made = DriftReference.objects.create(turns=1, data={}, from_at=NOW, to_at=NOW)
    address = reverse("admin:monitoring_driftreference_change", args=[made.pk])
    assert client.get(address).status_code == 200
