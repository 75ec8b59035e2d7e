"""Drift: quiet months stay quiet, and what really changes is found within 500 turns."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from assistant.modelkit.jsonlines import objects
from conversations.models import Conversation, Feedback, Message
from monitoring import drift, drift_figures, metrics, reading, references, windows
from monitoring.drift_figures import Fitted, Turns
from monitoring.models import DriftReference, DriftReport
from tests.conftest import ROOT

NOW = timezone.now()


# --- Streams of numbers --------------------------------------------------------------------------


class World:
    """Users with habits, intents with words, embeddings around each intent; seeded."""

    INTENTS, WORDS, WIDTH = 20, 2_000, 16

    def __init__(self, seed: int) -> None:
        self.chance = np.random.default_rng(seed)
        self.mix = self.chance.dirichlet(np.full(self.INTENTS, 0.6))
        self.centres = self.chance.normal(0, 0.3, (self.INTENTS, self.WIDTH))
        rank = 1 / np.arange(1, self.WORDS + 1)
        self.usual = rank / rank.sum()

    def turns(self, number: int) -> Turns:
        chance = self.chance
        users = np.repeat(np.arange(number), 1 + chance.poisson(1, number).clip(0, 4))[:number]
        usual, drawn = chance.choice(self.INTENTS, (2, number), p=self.mix)
        # Half of what a user asks is about what that user always asks.
        habit = np.where(chance.random(number) < 0.5, usual[users], drawn)
        lengths = chance.integers(3, 15, number)
        spoken = chance.choice(self.WORDS, lengths.sum(), p=self.usual)
        vectors = self.centres[habit] + chance.normal(0, 0.2, (number, self.WIDTH))
        return Turns(
            users=users,
            intents=[f"intent {which}" for which in habit],
            confidence=chance.beta(6, 1.2, number),
            outside=chance.random(number) < 0.06,
            degraded=chance.random(number) < 0.04,
            down=chance.random(number) < 0.02,
            words=np.split(spoken, np.cumsum(lengths)[:-1]),
            tokens=np.round(lengths * 1.3 + chance.normal(0, 1, number)).clip(1),
            chars=lengths * 5.0,
            vectors=vectors,
            hours=np.arange(number) / 20,
        )


def part(turns: Turns, begin: int, end: int) -> Turns:
    return Turns(**{name: getattr(turns, name)[begin:end] for name in Turns.__slots__})


def breached(fitted: Fitted, window: Turns) -> set[str]:
    return {name for name, score in drift_figures.compare(fitted, window).items() if score.breached}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_quiet_month_raises_less_than_one_false_alarm(seed: int) -> None:
    """720 looks at windows that have no turn in common; every feature is looked at."""
    world = World(seed)
    fitted, month = drift_figures.fit(world.turns(2_000)), world.turns(720 * 500)
    assert set(fitted.limits) == set(drift_figures.NAMES)
    alarms = [breached(fitted, part(month, at, at + 500)) for at in range(0, len(month), 500)]
    assert len(alarms) == 720 and not any(alarms)


@pytest.mark.parametrize("size", [100, 170, 500])
def test_windows_of_every_size_are_judged_by_their_own_limits(size: int) -> None:
    world = World(3)
    fitted = drift_figures.fit(world.turns(1_500))
    ratios = [
        max(score.ratio for score in drift_figures.compare(fitted, world.turns(size)).values())
        for _ in range(60)
    ]
    assert 0.2 < np.median(ratios) < 0.9 and max(ratios) < 1.2


def test_a_reference_survives_being_stored() -> None:
    world = World(4)
    fitted, window = drift_figures.fit(world.turns(600)), world.turns(200)
    again = Fitted.from_json(json.loads(json.dumps(fitted.as_json())))
    for name, score in drift_figures.compare(fitted, window).items():
        assert drift_figures.compare(again, window)[name].score == pytest.approx(score.score, 1e-3)
    with pytest.raises(ValueError, match="do not fit"):
        Fitted.from_json({**fitted.as_json(), "sums": [1.0]})


@pytest.mark.parametrize("name", ["outside", "degraded", "down"])
def test_each_share_that_rises_is_found_and_told(name: str) -> None:
    world = World(5)
    fitted, window = drift_figures.fit(world.turns(2_000)), world.turns(500)
    getattr(window, name)[:100] = True
    found = drift_figures.compare(fitted, window)
    feature = {"outside": "out_of_scope", "down": "feedback"}.get(name, name)
    assert {n for n, score in found.items() if score.breached} == {feature}
    assert found[feature].now > 0.2 > found[feature].before > 0


def test_what_never_happened_in_the_reference_may_happen_once() -> None:
    world = World(6)
    quiet = world.turns(1_000)
    quiet.degraded[:] = False
    fitted, window = drift_figures.fit(quiet), world.turns(500)
    window.degraded[:] = False
    window.degraded[:3] = True
    assert "degraded" not in breached(fitted, window)
    window.degraded[:30] = True
    assert "degraded" in breached(fitted, window)


def test_what_nobody_measured_is_left_out() -> None:
    world = World(7)
    reference, window = world.turns(600), world.turns(200)
    blind = Turns(**{
        **{field: getattr(reference, field) for field in Turns.__slots__},
        "vectors": None, "chars": np.zeros(600), "intents": [""] * 600,
        "confidence": np.full(600, np.nan),
    })  # fmt: skip
    names = {"out_of_scope", "degraded", "feedback", "new_words", "new_subject"}
    assert set(drift_figures.compare(drift_figures.fit(blind), window)) == names
    assert "embedding" not in drift_figures.compare(drift_figures.fit(reference), blind)


def test_the_index_is_the_textbook_one() -> None:
    p, q = np.array([[50.0, 50.0]]), np.array([[80.0, 20.0]])
    expected = (50.5 - 80.5) / 101 * np.log(50.5 / 80.5) + (50.5 - 20.5) / 101 * np.log(50.5 / 20.5)
    assert drift_figures.psi(p, q)[0] == pytest.approx(expected)
    assert drift_figures.psi(p, p)[0] == 0


# --- Streams of real questions -------------------------------------------------------------------

GERMAN = (
    "Wo bleibt meine Bestellung, ich warte seit zwei Wochen",
    "Ich möchte meine Bestellung stornieren, bitte",
    "Wie kann ich mein Passwort zurücksetzen",
    "Das Geld ist noch nicht auf meinem Konto angekommen",
    "Kann ich die Lieferadresse noch ändern",
    "Welche Zahlungsarten werden angeboten",
    "Ich brauche eine Rechnung für meine Firma",
    "Bitte löschen Sie mein Kundenkonto sofort",
    "Der Artikel kam kaputt an, was nun",
    "Ich will mit einem Menschen sprechen",
)
PRODUCTS = ("zephyron", "lumisphere", "quantabrew", "aerolith", "nimbuscope")


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, str]]:
    """(text, intent) of the project's own written questions, shuffled."""
    folder = ROOT / "assistant" / "modelkit" / "written"
    rows = [
        (row["text"], row["intent"])
        for path in sorted(folder.glob("natural_[a-d].jsonl"))
        for _, row in objects(path, ValueError, most_lines=5_000, line_bytes=10_000)
    ]
    random.Random(0).shuffle(rows)
    assert len(rows) > 3_000
    return rows


def rows_of(asked: Sequence[tuple[str, str]], seed: int = 0) -> list[dict[str, Any]]:
    """As ``windows.newest`` reads them: two turns a user, a model that is rather sure."""
    chance = np.random.default_rng(seed)
    return [
        {
            "created_at": NOW - timedelta(minutes=at),
            "conversation_id": at,
            "conversation__user_id": at // 2 + 1,
            "conversation__session_key": "",
            "parent__text": text,
            "intent": intent,
            "confidence": float(chance.beta(6, 1.2)),
            "degraded_reason": "caution" if chance.random() < 0.1 else "",
            "feedback__value": None,
        }
        for at, (text, intent) in enumerate(asked)
    ]


def with_products(asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every third is about a product that is new."""
    named = [
        (
            f"{text} it is about the {PRODUCTS[at % 5]} {PRODUCTS[at % 3]}"
            if at % 3 == 0
            else text,
            i,
        )
        for at, (text, i) in enumerate(asked)
    ]
    return rows_of(named, 1)


def in_german(asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Every fourth is German; the model, which knows none, answers whatever."""
    return rows_of(
        [(GERMAN[at % len(GERMAN)] if at % 4 == 0 else q, i) for at, (q, i) in enumerate(asked)], 1
    )


def of_another_mix(asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """Half of all ask for money back."""
    refunds = [row for row in asked if "refund" in row[1]]
    others = [row for row in asked if "refund" not in row[1]]
    return rows_of((refunds * 3)[:250] + others[:250], 1)


def by_another_model(asked: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """As if it had been trained on shuffled labels."""
    chance = random.Random(1)
    names = sorted({intent for _, intent in asked})
    rows = rows_of([(text, chance.choice(names)) for text, _ in asked], 1)
    return [{**row, "confidence": 0.4 + row["confidence"] / 4} for row in rows]


@pytest.fixture(scope="module")
def usual(questions: list[tuple[str, str]]) -> drift_figures.Fitted:
    import django.test

    with django.test.override_settings(ASSISTANT=_echoing()):
        return drift_figures.fit(windows.window_of(rows_of(questions[:1_500])).turns)


def _echoing() -> dict[str, Any]:
    from django.conf import settings

    return {**settings.ASSISTANT, "ROUTE": ["echo", "human"]}


def test_more_of_the_same_is_no_drift(usual: Any, questions: Any) -> None:
    for at in (1_500, 2_000, 2_500):
        window = windows.window_of(rows_of(questions[at : at + 500], at)).turns
        assert breached(usual, window) == set()


@pytest.mark.parametrize(
    ("drifted", "by"),
    [
        (of_another_mix, {"intents"}),
        (with_products, {"new_subject"}),
        (in_german, {"new_words", "embedding"}),
        (by_another_model, {"confidence"}),
    ],
)
def test_what_changes_is_found_within_500_turns(
    usual: Any, questions: Any, drifted: Any, by: set[str]
) -> None:
    rows = drifted(questions[1_500:2_000])
    assert len(rows) <= 500
    assert by <= breached(usual, windows.window_of(rows).turns)


# --- Stored turns --------------------------------------------------------------------------------

stored = pytest.mark.django_db(transaction=True)


def store(
    asked: Sequence[tuple[str, str]],
    since: datetime,
    *,
    user: Any = None,
    minutes: float = 1.0,
    **answer: Any,
) -> None:
    """Each question in a conversation of its own, a minute apart."""
    count = len(asked)
    held = Conversation.objects.bulk_create(
        Conversation(user=user, session_key="" if user else f"visitor {at}") for at in range(count)
    )
    values = {"role": "assistant", "route": "model", "model": "old@1", "confidence": 0.9, **answer}
    at = [since + timedelta(minutes=number * minutes) for number in range(count)]
    questions = [
        Message(conversation=c, seq=1, role="user", text=text, created_at=when)
        for c, (text, _), when in zip(held, asked, at, strict=True)
    ]
    Message.objects.bulk_create(questions)
    Message.objects.bulk_create(
        Message(conversation=q.conversation, seq=2, parent=q, intent=intent, text="An answer.",
                created_at=q.created_at, **values)
        for q, (_, intent) in zip(questions, asked, strict=True)
    )  # fmt: skip


@pytest.fixture
def considered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []
    monkeypatch.setattr("monitoring.retraining.consider", lambda: calls.append(1), raising=False)
    yield calls


@stored
def test_a_look_makes_a_report_and_a_breach_is_told(questions: Any, considered: Any) -> None:
    store(questions[:400], NOW - timedelta(days=3))
    made = references.reference(None, None)
    assert (made.turns, made.active, made.model) == (400, True, "old@1")
    assert drift.look() is None, "nothing was asked since"
    store(questions[400:600], NOW - timedelta(days=1))
    report = drift.look()
    assert report is not None and report.turns == 200 and not report.breached, report.features
    assert set(report.features) == set(drift_figures.NAMES) and not considered
    assert drift.look() == report, "no new turn, no new report"

    store([(text, "track_order") for text, _ in questions[600:1_000]], NOW - timedelta(hours=8))
    again = drift.look()
    assert again is not None and again.breached and again.turns == 500 and considered == [1]
    assert again.features["intents"]["breached"]
    gauges = {found.labels["feature"]: found.value for found in drift.readings()}
    assert set(gauges) == set(drift_figures.NAMES)
    assert gauges["intents"] > 1 > gauges["feedback"] and reading.SOURCES["drift"] == drift.readings


@stored
def test_one_user_moves_nothing(ana: Any, questions: Any) -> None:
    """A thousand hostile turns are five."""
    store(questions[:400], NOW - timedelta(days=3))
    references.reference(None, None)
    store(questions[400:500], NOW - timedelta(days=1))
    store([("zzz qqq xxx", "complaint")] * 1_000, NOW - timedelta(hours=9), user=ana, minutes=0.5)
    report = drift.look()
    assert report is not None and report.turns == 100 + drift_figures.TURNS_OF_ONE
    assert not report.breached, report.features


@stored
def test_nobody_asks_without_end(ana: Any, django_assert_max_num_queries: Any) -> None:
    store([("again", "complaint")] * 50, NOW, user=ana)
    with django_assert_max_num_queries(1):
        assert len(windows.newest(None, None, 1)) == 1
    assert len(windows.newest(None, None, 2)) == 2
    assert len(windows.newest(None, None, 30)) == drift_figures.TURNS_OF_ONE


@stored
def test_feedback_and_reasons_are_read(questions: Any) -> None:
    store(questions[:5], NOW, degraded_reason="out_of_scope")
    store(questions[5:10], NOW + timedelta(hours=1), degraded_reason="timeout", confidence=None)
    Feedback.objects.create(message=Message.objects.filter(role="assistant").first(), value="down")
    turns = windows.window_of(windows.newest(None, None, 100)).turns
    assert (turns.outside.sum(), turns.degraded.sum(), turns.down.sum()) == (5, 5, 1)
    assert np.isnan(turns.confidence).sum() == 5


@stored
def test_a_reference_holds_no_word_of_anybody(questions: Any) -> None:
    store([(f"where is order 48213377, {text}", i) for text, i in questions[:300]], NOW)
    made = json.dumps(references.reference(None, None).data)
    assert "48213377" not in made and "order" not in made.replace('order"', "")
    one = set(windows.word_numbers("Where is it").tolist())
    assert one == set(windows.word_numbers("where IS it").tolist())


def test_words_are_keyed(settings: Any) -> None:
    before = windows.word_numbers("refund").tolist()
    settings.SECRET_KEY = "another key"
    assert windows.word_numbers("refund").tolist() != before


@stored
def test_a_second_reference_replaces_the_first(questions: Any) -> None:
    store(questions[:300], NOW - timedelta(days=9))
    first = references.reference(None, None)
    store(questions[300:600], NOW - timedelta(days=1))
    second = references.reference(NOW - timedelta(days=5), None)
    assert references.current() == second and second.turns == 300
    first.refresh_from_db()
    assert not first.active


@stored
def test_too_few_turns_are_no_reference(questions: Any) -> None:
    store(questions[:50], NOW)
    with pytest.raises(references.DriftError, match="needs 300 turns and there are 50"):
        references.reference(None, None)
    assert drift.look() is None and not DriftReference.objects.exists()


@stored
def test_the_first_reference_makes_itself(questions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "LEAST", 320)
    store(questions[:319], NOW - timedelta(days=1))
    assert drift.look() is None and references.current() is None
    store(questions[319:320], NOW)
    assert drift.look() is None
    made = references.current()
    assert made is not None and made.turns == 320


@stored
def test_without_a_model_the_rest_is_compared(questions: Any, settings: Any) -> None:
    store(questions[:300], NOW - timedelta(days=3))
    references.reference(None, None)
    store(questions[300:420], NOW - timedelta(days=1))
    folder = {"BACKEND": "assistant.backends.onnx.OnnxBackend", "OPTIONS": {"model_dir": "/none"}}
    broken = {**settings.ASSISTANT["BACKENDS"], "model": folder}
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["model"], "BACKENDS": broken}
    report = drift.look()
    assert report is not None
    assert set(report.features) == set(drift_figures.NAMES) - {"embedding", "language"}


@stored
def test_another_models_embeddings_are_not_compared(questions: Any) -> None:
    store(questions[:300], NOW - timedelta(days=3))
    made = references.reference(None, None)
    made.data["space"] = "another@1:abc"
    made.save()
    store(questions[300:420], NOW - timedelta(days=1))
    report = drift.look()
    assert report is not None and not {"embedding", "language"} & set(report.features)


@stored
def test_a_retraining_that_breaks_harms_no_report(
    questions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitoring.retraining.consider", lambda: 1 / 0, raising=False)
    store(questions[:300], NOW - timedelta(days=3))
    references.reference(None, None)
    store([(text, "complaint") for text, _ in questions[300:500]], NOW - timedelta(days=1))
    report = drift.look()
    assert report is not None and report.breached


@stored
def test_a_reference_that_was_spoilt_says_what_to_do(questions: Any) -> None:
    store(questions[:300], NOW - timedelta(days=3))
    made = references.reference(None, None)
    DriftReference.objects.filter(pk=made.pk).update(data={"sums": 3})
    store(questions[300:420], NOW - timedelta(days=1))
    with pytest.raises(references.DriftError, match="Make a new one"):
        drift.look()


@stored
def test_the_command(questions: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandError, match="drift --reference"):
        call_command("drift")
    with pytest.raises(CommandError, match="needs 300 turns"):
        call_command("drift", "--reference")
    store(questions[:300], NOW - timedelta(days=3))
    call_command("drift", "--reference", "--json")
    assert json.loads(capsys.readouterr().out)["turns"] == 300
    with pytest.raises(CommandError, match="Fewer than 100 turns"):
        call_command("drift")
    with pytest.raises(CommandError, match="1 to 3650"):
        call_command("drift", "--reference", "--days", "0")
    store(questions[300:420], NOW - timedelta(days=1))
    call_command("drift")
    told = capsys.readouterr().out
    assert "120 turns" in told and "no drift" in told and "out_of_scope" in told
    call_command("drift", "--json")
    assert json.loads(capsys.readouterr().out)["breached"] is False
    assert DriftReport.objects.count() == 1


@stored
def test_a_drift_that_breaks_harms_no_page_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reading.SOURCES, "drift", lambda: 1 / 0)
    before = metrics.READ_ERRORS.labels("drift")._value.get()
    reading.read()
    assert metrics.READ_ERRORS.labels("drift")._value.get() == before + 1


def test_the_written_questions_are_there() -> None:
    assert Path(ROOT / "assistant/modelkit/written/natural_a.jsonl").is_file()
