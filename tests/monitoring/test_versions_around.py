"""What stands around the versions: kept answers, health, metrics and the doctor know of them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command

from assistant import backends, registry
from assistant.backends.echo import EchoBackend
from assistant.modelkit.build import build_random
from assistant.models import ModelVersion
from assistant.types import Delta, Finished, Message, Params, Started, Usage
from fallback import router
from fallback.answers import Known
from fallback.router import Ask
from monitoring import health, metrics, reading

pytestmark = pytest.mark.django_db(transaction=True)


class Versions(EchoBackend):
    """Says that it is one version, and lets another write."""

    writes = "m@1"
    problem_ = ""

    def version(self, params: Params | None = None) -> str:
        sticky = params.sticky if params is not None else ""
        return "m@2:abc" if sticky == "canary" else "m@1:abc"

    def problem(self) -> str:
        return self.problem_

    async def stream(self, messages: Any, params: Any) -> Any:
        yield Started(self.writes, "cancel_order", 0.9, 0.9)
        yield Delta(f"{self.writes} says {messages[-1].text}")
        yield Finished("stop", Usage(1, 1))


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Versions:
    backend = Versions("echo", EchoBackend.Options())
    monkeypatch.setattr(backends, "get", lambda alias: backend)
    monkeypatch.setattr(backends, "built", lambda: {"echo": backend})
    return backend


async def said(text: str, sticky: str = "") -> str:
    ask = Ask((Message("user", text),), Params(sticky=sticky), Known((), {}))
    events = [event async for event in router.route(ask)]
    return "".join(event.text for event in events if isinstance(event, Delta))


async def test_a_kept_answer_is_given_only_to_those_whose_version_wrote_it(versions) -> None:
    assert await said("how do I pay?") == "m@1 says how do I pay?"
    versions.writes = "m@2"
    assert await said("how do I pay?") == "m@1 says how do I pay?"
    assert await said("how do I pay?", "canary") == "m@2 says how do I pay?"
    versions.writes = "m@3"
    assert await said("how do I pay?", "canary") == "m@2 says how do I pay?"
    assert await said("how do I pay?", "somebody else") == "m@1 says how do I pay?"


async def test_what_another_version_wrote_in_its_place_is_not_kept(versions) -> None:
    versions.writes = "m@1"  # the canary could not, or a new one took over just then
    assert await said("where is it?", "canary") == "m@1 says where is it?"
    versions.writes = "m@2"
    assert await said("where is it?", "canary") == "m@2 says where is it?"


def test_a_version_that_cannot_be_loaded_degrades_but_is_no_outage(
    versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health._Loader, "problem", lambda self, alias: "")
    assert health.Checker().look().status == "ready"
    versions.problem_ = "Model m@2 cannot be loaded: gone."
    found = health.Checker().look()
    assert found.status == "degraded" and "m@2" in found.problems["version"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    build_random("tiny", folder, quant="row8", seed=3)
    return folder


def test_metrics_show_each_loaded_version_and_no_longer_the_one_that_went(
    tiny: Path, settings: Any
) -> None:
    model = settings.ASSISTANT["BACKENDS"]["model"]
    options = {"model_dir": str(tiny), "threads": 1, "max_batch": 4}
    settings.ASSISTANT = {
        **settings.ASSISTANT, "BACKENDS": {"model": {**model, "OPTIONS": options}}
    }  # fmt: skip
    backend = backends.get("model")
    backend.check()
    (engine,) = backend.engines()
    assert engine.manifest is not None
    label = metrics.model_label(reading._name(engine))
    reading._read_engines()
    (shown,) = reading._loaded
    assert shown[0] == label and metrics.MODEL_INFO.labels(*shown)._value.get() == 1
    backend.close()
    reading._read_engines()
    assert metrics.MODEL_INFO.labels(*shown)._value.get() == 0


def test_the_doctor_looks_at_the_version_that_should_answer(settings: Any, tiny: Path) -> None:
    model = settings.ASSISTANT["BACKENDS"]["model"]
    options = {**model["OPTIONS"], "model_dir": str(tiny), "threads": 1}
    settings.ASSISTANT = {
        **settings.ASSISTANT, "BACKENDS": {"model": {**model, "OPTIONS": options}}
    }  # fmt: skip
    ModelVersion.objects.create(
        name="m", version="9", sha256="9" * 64, folder=str(tiny.parent / "gone"), state="active"
    )
    assert registry.active() is not None
    out = io.StringIO()
    with pytest.raises(SystemExit):
        call_command("doctor", "--port=0", stdout=out, no_color=True)
    assert "gone" in out.getvalue() and "m@9 is active: manage.py rollback_model" in out.getvalue()
