"""A tiny model learns corrections for real: from reviewed answers to a judged candidate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from assistant.engine.manifest import Manifest
from monitoring import jobs, retraining, tasks, trainer
from monitoring.models import EvaluationRun, ReviewItem
from tests.assistant.test_tune import base  # noqa: F401
from tests.monitoring.test_retraining import correction

# torch warns of its own future; its warnings are not ours to mend.
pytestmark = [
    pytest.mark.train,
    pytest.mark.filterwarnings("default"),
    pytest.mark.django_db(transaction=True),
]


def test_reviewed_answers_become_a_trained_and_judged_candidate(
    base: Path,  # noqa: F811
    ana: User,
    ben: User,
    sam: User,
    settings: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("torch")
    model = settings.ASSISTANT["BACKENDS"]["model"]
    options = {**model["OPTIONS"], "model_dir": str(base), "threads": 1}
    known = {**settings.ASSISTANT["BACKENDS"], "model": {**model, "OPTIONS": options}}
    settings.ASSISTANT = {**settings.ASSISTANT, "BACKENDS": known}
    settings.DATA_DIR = tmp_path
    monkeypatch.setattr(
        trainer, "COMMAND", [sys.executable, "-m", "tests.monitoring.quick_trainer"]
    )
    monkeypatch.setattr(tasks.run_job, "apply_async", lambda *_, **__: None)
    correction(ana, "the tin man wants his oil", intent="place_order")
    correction(ben, "hm 48213377", "Yes?", "purple please", intent="change_order")
    correction(sam, "zebra crossing at noon", intent="delivery_period", said="At {{Website}}.")

    job = retraining.retrain_now(sam)
    assert jobs.run(job.pk)
    job.refresh_from_db()
    assert job.state == "done", f"{job.error}\n{job.log}"
    version = job.version
    assert version is not None and version.label == "small@0.1.0+1"
    found = Manifest.load(Path(version.folder)).quality["corrections"]
    assert found["passed"] is True and found["after"]["right"] == 1.0 and found["rows"] == 3
    runs = EvaluationRun.objects.filter(version=version)
    assert runs.count() == 1 and runs.get().rows == 295
    assert isinstance(job.result["passed"], bool) and job.result["why"]
    assert ReviewItem.objects.filter(used_in=job).count() == 3
    assert "corrections 3 of 3 right" in job.log
