"""The model's life as a story: whatever is worse stops at its gate, what drifted is learned."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings as current
from django.contrib.auth.models import User

from assistant import backends, registry
from assistant.backends.onnx import OnnxBackend
from assistant.engine.manifest import Manifest, describe_files
from assistant.models import ModelVersion
from conversations.limits import Caller
from conversations.turn import Turn
from monitoring import evaluation, jobs, loop, promotion, retraining, shadow, shadowing, tasks
from monitoring.gates import Gate
from monitoring.models import EvaluationRun, ShadowPair
from tests.monitoring.test_retraining import correction, drifted

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.filterwarnings("default")]

BUNDLED = Path(current.BASE_DIR) / "assistant" / "bundled" / "support-en"
QUESTIONS = [
    row["query"]
    for row in map(json.loads, (evaluation.GOLDEN / "support-en.jsonl").read_text().splitlines())
    if "query" in row
]


@pytest.fixture
def shop(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The product as it ships, but for kept and reviewed answers."""
    own = {**settings.ASSISTANT["SHADOW"], "SHARE": 1.0, "PAIRS": 20}
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["model", "rules", "human"], "SHADOW": own}
    settings.ASSISTANT_RATE = None
    settings.DATA_DIR = tmp_path
    monkeypatch.setattr(tasks.run_job, "apply_async", lambda *_, **__: None)
    return tmp_path


@pytest.fixture
def candidate(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the bundled model under another version, to be made worse."""

    def copy(version: str) -> Path:
        folder = Path(shutil.copytree(BUNDLED, tmp_path / version))
        manifest = Manifest.load(folder)
        fitted = replace(manifest.calibration, answer_from=manifest.calibration.answer_from + 0.01)
        replace(manifest, version=version, calibration=fitted).write(folder)
        return folder

    return copy


def judged(version: ModelVersion) -> Gate:
    loop.golden_gate(version)  # the first look may only open jobs
    return loop.golden_gate(version)


@pytest.mark.train
def test_a_model_of_shuffled_labels_stops_at_the_golden_gate(
    shop: Path, candidate: Callable[[str], Path]
) -> None:
    from assistant import facts
    from assistant.modelkit import corpus, wide

    folder = candidate("1000.0")
    rng = random.Random(0)
    rows = wide.examples(corpus.own(), facts.mask)[::4]
    intents = [one.intent for one in rows]
    rng.shuffle(intents)
    told = [replace(one, intent=intent) for one, intent in zip(rows, intents, strict=True)]
    wide.shared(wide.fit(told, epochs=3), 3.0).save(folder)
    _signed(folder)

    version = registry.register(folder)
    after = promotion.advance(version, by=None, why="a try")
    version.refresh_from_db()
    assert version.state == ModelVersion.State.REJECTED, after
    gate = judged(version)
    assert gate.passed is False and "intents" in gate.why
    assert version.changes.latest("at").by is None
    assert EvaluationRun.objects.filter(version=version).exists()


def _signed(folder: Path) -> None:
    """The manifest of changed files: whoever trains a model says what it holds."""
    data = json.loads((folder / "model.json").read_text())
    names = data["files"]
    data["files"] = {
        name: {"sha256": entry.sha256, "bytes": entry.bytes}
        for name, entry in describe_files(folder, names).items()
    }
    (folder / "model.json").write_text(json.dumps(data))


@pytest.mark.slow
async def test_a_model_as_good_but_slow_stops_in_shadow(
    shop: Path, candidate: Callable[[str], Path], ana: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(OnnxBackend):
        def __init__(self, alias: str, options: Any) -> None:
            super().__init__(alias, replace(options, reading_tokens_per_s=60.0))

    await asyncio.to_thread(backends.get("model").check)
    monkeypatch.setattr("assistant.backends.onnx.OnnxBackend", Slow)
    register = sync_to_async(registry.register)
    version = await register(candidate("1000.0"))
    why = "as good on the golden set: it has the same weights"
    await sync_to_async(registry.move)(version, ModelVersion.State.SHADOW, why=why)
    await asyncio.to_thread(shadowing.shadowing.forget)
    caller = Caller(ana.pk, address="192.0.2.1")
    asked = 0
    while await ShadowPair.objects.acount() < 20:
        turn = await sync_to_async(Turn.open)(caller, None, QUESTIONS[asked % len(QUESTIONS)])
        await turn.result()
        await asyncio.sleep(1.0)
        asked += 1
        assert asked < 90, await sync_to_async(shadow.figures)(version)
    await asyncio.to_thread(shadowing.shadowing.stop)
    await sync_to_async(promotion.advance)(version, by=None, why="enough pairs")
    await version.arefresh_from_db()
    assert version.state == ModelVersion.State.REJECTED
    assert "times as long as the live model" in version.gates["shadow"]["why"]
    await asyncio.to_thread(backends.reset)


@pytest.mark.train
def test_a_drifted_stream_ends_in_a_candidate_that_knows_it(
    shop: Path, ana: User, ben: User, sam: User
) -> None:
    """New words for known things: wrong before, right in the candidate, and nothing is lost."""
    new = {
        "no more zorbo pass for me, undo it": "cancel_order",
        "the zorbo pass, where is it now": "track_order",
        "bin the zorbo pass i booked": "cancel_order",
        "zorbo pass charged me double": "payment_issue",
        "my zorbo pass money, when is it back": "track_refund",
        "my zorbo pass has not turned up": "track_order",
    }
    for at, (text, intent) in enumerate(new.items()):
        correction((ana, ben, sam)[at % 3], text, intent=intent)
    drifted()
    job = retraining.consider()
    assert job is not None and job.state == "proposed" and "rift" in job.why
    jobs.approve(job, sam)
    assert jobs.run(job.pk)
    job.refresh_from_db()
    assert job.state == "done", f"{job.error}\n{job.log}"
    version = job.version
    assert version is not None and job.result["passed"] is True, job.result
    found = Manifest.load(Path(version.folder)).quality["corrections"]
    assert found["after"]["right"] == 1.0 and found["after"]["right"] > found["before"]["right"]
    assert version.state == ModelVersion.State.CANDIDATE
    assert promotion.follow() == [version.label], "the timetable lets it write beside the live one"
    version.refresh_from_db()
    assert version.state == ModelVersion.State.SHADOW
