"""References that make themselves: days and weeks are no drift, nobody is too much of one, and a
version that became active gets its own."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from django.contrib.auth.models import User
from django.urls import reverse

from assistant.models import ModelVersion
from conversations.models import Message
from monitoring import drift, drift_figures, drift_scale, references, windows
from monitoring.drift_figures import Fitted, Turns
from monitoring.models import DriftReference
from monitoring.references import LEAST, SETTLE
from tests.monitoring.test_drift import NOW, World, breached, part, store

ASKED = [(f"where is my parcel number {at % 7} please", "track_order") for at in range(1_000)]
DAY = timedelta(days=1)


# --- Days and weeks ------------------------------------------------------------------------------


class Shop(World):
    """What is asked, and how sure and how often out of scope, turns with the hour and the day of
    the week: at its hour an intent is three times as frequent as twelve hours later."""

    def __init__(self, seed: int, pace: float) -> None:
        super().__init__(seed)
        self.pace = pace
        self.hour = self.chance.uniform(0, 24, self.INTENTS)
        self.sunday = self.chance.choice([-0.3, 0.3], self.INTENTS)

    def times(self, begin: float, number: int) -> Any:
        """Sorted hours: many by day, few at night and at weekends."""
        at = begin + np.sort(self.chance.uniform(0, 5 * number / self.pace, 5 * number))
        busy = (1 + 0.85 * np.sin((at - 9) / 12 * np.pi)) * np.where(_weekend(at), 0.6, 1.16)
        return at[self.chance.random(len(at)) < busy / 2.2][:number]

    def at(self, hours: Any, mix: Any = None) -> Turns:
        """Turns of then; ``mix``: the spread over the intents, whatever the hour."""
        turns, number = self.turns(len(hours)), len(hours)
        if mix is None:
            daily = 1 + 0.5 * np.cos((hours[:, None] - self.hour) / 12 * np.pi)
            mix = self.mix * daily * (1 + _weekend(hours)[:, None] * self.sunday)
        edges = np.broadcast_to(mix / mix.sum(-1, keepdims=True), (number, self.INTENTS)).cumsum(1)
        which = (edges < self.chance.random((number, 1))).sum(1).clip(0, self.INTENTS - 1)
        first = which[np.searchsorted(turns.users, turns.users)]
        which = np.where(self.chance.random(number) < 0.5, first, which)
        night = 1 + 0.5 * np.cos((hours - 3) / 12 * np.pi)
        told = {
            "intents": [f"intent {one}" for one in which], "hours": hours,
            "confidence": self.chance.beta(6 - night / 2, 1.2),
            "outside": self.chance.random(number) < 0.06 * night,
            "vectors": self.centres[which] + self.chance.normal(0, 0.2, (number, self.WIDTH)),
        }  # fmt: skip
        return Turns(**{**{name: getattr(turns, name) for name in Turns.__slots__}, **told})


def _weekend(hours: Any) -> Any:
    return (hours // 24 + 3) % 7 >= 5


def reference_of_a_week(shop: Shop) -> Fitted:
    week = shop.at(shop.times(0, int(shop.pace * 168)))
    kept = windows._runs(range(len(week)), references.MOST)
    rows = Turns(**{
        name: [values[at] for at in kept] if isinstance(values, list) else values[kept]
        for name in Turns.__slots__ if (values := getattr(week, name)) is not None
    })  # fmt: skip
    return drift_figures.fit(rows, pace=shop.pace)


@pytest.mark.slow
@pytest.mark.parametrize("pace", [8, 40, 200])
def test_a_quiet_month_with_days_and_weeks_raises_no_alarm(pace: float) -> None:
    """A look an hour at the newest 500 turns. Without hours, most at 200 an hour are alarms."""
    shop = Shop(1, pace)
    fitted = reference_of_a_week(shop)
    month = shop.at(shop.times(168, int(pace * 720)))
    looks = np.unique(np.searchsorted(month.hours, 168 + np.arange(1, 721)))
    alarms = [breached(fitted, part(month, max(0, end - 500), end)) for end in looks if end >= 100]
    assert len(alarms) > 400 and not any(alarms), [names for names in alarms if names]


@pytest.mark.parametrize("pace", [8, 40, 200])
def test_what_changes_is_found_within_500_turns_all_the_same(pace: float) -> None:
    shop = Shop(2, pace)
    fitted, hours = reference_of_a_week(shop), shop.times(168, 500)
    mix = shop.mix / 2
    mix[np.argsort(shop.mix)[10]] += 0.5
    assert breached(fitted, shop.at(hours, mix)) & {"intents", "embedding"}
    window = shop.at(hours)
    window.confidence[:] *= 0.6
    window.words[::3] = [np.append(words, 9_999) for words in window.words[::3]]
    window.down[:] |= shop.chance.random(500) < 0.15
    assert {"confidence", "new_subject", "feedback"} <= breached(fitted, window)


def test_hours_nobody_knows_are_all_hours() -> None:
    turns = World(1).turns(400)
    assert len(drift_scale.stretches(turns, 100, 0.0)) == 1
    assert len(drift_scale.stretches(turns, 500, 1.0)) == 1, "three weeks are every hour"
    parts = drift_scale.stretches(turns, 100, 200.0)
    assert parts[0].all() and len(parts) > 1
    assert all(part.sum() >= drift_scale.LEAST_STRETCH for part in parts)


# --- Nobody is too much of one -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "most", "bound"),
    [
        ([1_000] * 20, 300, 15),
        ([1_000] * 60, 300, 5),
        ([1_000] * 30, 300, 10),
        ([1_000] * 19, 300, 5),
        ([100_000] + [3] * 40, 300, 6),
        ([], 300, 5),
    ],
)
def test_few_users_count_for_more_but_for_one_in_twenty_at_most(
    asked: list[int], most: int, bound: int
) -> None:
    assert drift_scale.bound_of(asked, most) == bound


def test_nobody_is_more_than_five_turns_or_a_twentieth() -> None:
    dice = random.Random(1)
    for _ in range(300):
        asked = [int(dice.paretovariate(0.7)) for _ in range(dice.randint(1, 200))]
        bound = drift_scale.bound_of(asked, most := dice.choice([100, 300, 500, 2_000]))
        total = min(most, sum(min(each, bound) for each in asked))
        assert bound == 5 or bound <= 0.05 * total


@pytest.mark.django_db
def test_twenty_users_have_a_reference_and_one_of_them_cannot_shape_it() -> None:
    people = [User.objects.create(username=f"user {at}") for at in range(20)]
    for at, user in enumerate(people):
        store(ASKED[:20], NOW - 3 * DAY + timedelta(minutes=at), user=user, minutes=40)
    store([("zzz qqq", "complaint")] * 900, NOW - 2 * DAY, user=people[0], minutes=0.5)
    made = references.reference(None, None)
    assert made.turns >= LEAST
    rows = windows.newest(None, None, references.MOST)
    mine = sum(row["conversation__user_id"] == people[0].pk for row in rows)
    assert 5 < mine <= 0.05 * len(rows)


# --- By itself -----------------------------------------------------------------------------------


def _activate(label: str, at: Any) -> None:
    name, _, version = label.partition("@")
    ModelVersion.objects.filter(state="active").update(state="retired")
    ModelVersion.objects.create(
        name=name, version=version, sha256=version * 64, folder="/x", state="active", changed_at=at
    )


@pytest.fixture
def old() -> DriftReference:
    """The reference of the version before, chosen ten days ago."""
    store(ASKED[:400], NOW - 12 * DAY)
    made = references.reference(None, None)
    DriftReference.objects.update(created_at=NOW - 10 * DAY)
    made.refresh_from_db()
    return made


@pytest.mark.django_db(transaction=True)
def test_a_version_that_became_active_collects_its_own_reference(
    old: DriftReference, client: Any, admin_user: Any
) -> None:
    _activate("m@2", NOW - 2 * DAY)
    store(ASKED[:120], NOW - 2 * DAY + 2 * SETTLE, model="m@2", minutes=10)
    assert str(references.collecting()) == "collecting: 120 of 300 turns of m@2"
    report = drift.look()
    assert report is not None and report.reference == old
    assert set(report.features) == drift.OF_USERS, "the rest depends on the model"
    client.force_login(admin_user)
    shown = client.get(reverse("admin:monitoring_driftreport_changelist")).content.decode()
    assert "collecting: 120 of 300 turns of m@2" in shown

    store(ASKED[:200], NOW - DAY + timedelta(hours=8), model="m@2", minutes=1)
    assert drift.look() is None, "nothing was asked since the reference"
    made = references.current()
    assert made is not None and (made.model, made.turns) == ("m@2", 320)
    assert references.collecting() is None and made.from_at > NOW - 2 * DAY


@pytest.mark.django_db
def test_three_hundred_turns_of_one_hour_are_no_reference_yet(old: DriftReference) -> None:
    _activate("m@2", NOW - DAY / 2)
    store(ASKED[:400], NOW - DAY / 4, model="m@2", minutes=0.5)
    assert references.renew() is None and references.current() == old
    assert str(references.collecting()) == "collecting: 3 of 24 hours of m@2"


@pytest.mark.django_db
def test_a_reference_of_a_day_is_made_anew_when_there_is_a_week(old: DriftReference) -> None:
    _activate("m@2", NOW - 8 * DAY)
    store(ASKED[:400], NOW - 8 * DAY + 2 * SETTLE, model="m@2", minutes=5)
    young = references.renew()
    assert young is not None and young.data["grows"]
    store(ASKED[:400], NOW - 6 * DAY, model="m@2", minutes=20)
    grown = references.renew()
    assert grown is not None and grown.turns == 800 and not grown.data["grows"]
    assert grown.data["limits"]["feedback"][0] < young.data["limits"]["feedback"][0]
    assert references.renew() is None


@pytest.mark.django_db
def test_what_staff_chose_since_stays(old: DriftReference) -> None:
    _activate("m@2", NOW - 9 * DAY)
    store(ASKED[:900], NOW - 9 * DAY + 2 * SETTLE, model="m@2", minutes=14)
    chosen = references.reference(NOW - 4 * DAY, None)
    assert references.renew() is None and references.current() == chosen
    assert not references.owed()


@pytest.mark.django_db
def test_a_long_time_is_read_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "RUN", 10)
    store(ASKED, NOW - 10 * DAY, minutes=14)
    rows, pace = windows.spread(NOW - 11 * DAY, None, 100)
    assert len(rows) == 100 and pace == pytest.approx(60 / 14, 0.01)
    first, last = rows[-1]["created_at"], rows[0]["created_at"]
    assert last - first > 9 * DAY
    assert Message.objects.filter(role="assistant").count() == 1_000
