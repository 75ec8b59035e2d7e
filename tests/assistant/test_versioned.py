"""The swap of the model under load, the canary's share, and what a broken version may not break."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from django.db import connection

from assistant import backends, registry
from assistant.backends import versioned
from assistant.backends.onnx import OnnxBackend, Options
from assistant.backends.versioned import VersionedBackend
from assistant.engine.manifest import Manifest, ManifestError, describe_files
from assistant.errors import GenerationFailed, ModelUnavailable
from assistant.modelkit.build import build_random
from assistant.models import ModelVersion
from assistant.types import Delta, Event, Finished, Message, Params, Started
from fallback import router
from fallback.answers import Known
from fallback.rules import RuleText
from monitoring import metrics, reading

pytestmark = pytest.mark.django_db(transaction=True)

QUESTION = [Message("user", "how do I cancel my order?")]
PATIENCE_S = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three tiny models with weights of their own, called tiny@0, tiny@1 and tiny@2."""
    root = tmp_path_factory.mktemp("versions")
    for seed in range(3):
        folder = root / str(seed)
        build_random("tiny", folder, quant="row8", seed=seed)
        told = json.loads((folder / "model.json").read_text())
        told |= {"name": "tiny", "version": str(seed)}
        (folder / "model.json").write_text(json.dumps(told))
    return {str(seed): root / str(seed) for seed in range(3)}


@pytest.fixture
def backend(
    folders: dict[str, Path], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[VersionedBackend]:
    """On tiny@0 of the settings; looks at the registry ten times a second, to keep tests short."""
    monkeypatch.setattr(versioned, "LOOK_EVERY_S", 0.1)
    options = {"model_dir": str(folders["0"]), "threads": 1, "max_batch": 8, "max_queue": 256}
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "ROUTE": ["model", "rules", "human"],
        "BACKENDS": {
            "model": {"BACKEND": settings.ASSISTANT["BACKENDS"]["model"]["BACKEND"],
                      "OPTIONS": options},
        },
    }  # fmt: skip
    yield backends.get("model")  # type: ignore[misc]
    backends.reset()


def activate(folder: Path) -> ModelVersion:
    """Whatever it takes: registered, and active in one move or back from retirement."""
    version = registry.register(folder)
    if version.state == "retired":
        return registry.roll_back(to=version, why="test")
    return registry.move(version, "active", why="test", forced=True)


def begin_canary(folder: Path, percent: int) -> ModelVersion:
    version = registry.register(folder)
    return registry.move(version, "canary", why="test", forced=True, canary_percent=percent)


async def answer(backend: VersionedBackend, sticky: str = "", **params: Any) -> list[Event]:
    wanted = Params(**{"max_new_tokens": 12, "sticky": sticky, **params})
    return [event async for event in backend.stream(QUESTION, wanted)]


async def model_of(backend: VersionedBackend, sticky: str = "") -> str:
    """The one version that this answer names."""
    started, *deltas, finished = await answer(backend, sticky)
    assert isinstance(started, Started) and isinstance(finished, Finished)
    assert all(isinstance(delta, Delta) for delta in deltas)
    return started.model


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - it is another thread's figure
            await asyncio.sleep(0.01)


def shown(backend: VersionedBackend) -> tuple[str, str]:
    """Active and canary of this process."""
    now = backend._now
    return tuple(m.name if m is not None else "" for m in (now.active, now.canary))  # type: ignore[return-value]


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    def closing() -> Any:
        try:
            return function(*args)
        finally:
            connection.close()

    return await asyncio.to_thread(closing)


# -- who answers -----------------------------------------------------------------------------------


async def test_without_an_active_version_the_model_of_the_settings_answers(backend) -> None:
    assert await model_of(backend) == "tiny@0"


async def test_a_process_that_starts_loads_the_active_version_and_no_other(
    backend, folders, caplog
) -> None:
    caplog.set_level("INFO", logger="assistant")
    await in_thread(activate, folders["1"])
    assert await model_of(backend) == "tiny@1"
    assert len(backend.engines()) == 1
    loaded = [record for record in caplog.records if record.message == "model_loaded"]
    assert [record.model for record in loaded] == ["tiny@1"] and loaded[0].duration_ms > 0


async def test_a_move_is_noticed_within_two_seconds_of_the_usual_pace(
    backend, folders, monkeypatch
) -> None:
    monkeypatch.setattr(versioned, "LOOK_EVERY_S", 1.0)
    assert await model_of(backend) == "tiny@0"
    await in_thread(activate, folders["1"])
    began = time.monotonic()
    await until(lambda: shown(backend)[0] == "tiny@1")
    assert time.monotonic() - began < 2 + 1.5  # to notice, and to load
    assert await model_of(backend) == "tiny@1"


@pytest.mark.slow
async def test_two_hundred_turns_outlive_five_swaps_and_each_names_one_version(
    backend, folders
) -> None:
    """Every turn has the words of exactly the version it names: none is a mixture."""
    whole = {}
    for number in ("0", "1", "2"):
        alone = OnnxBackend("alone", Options(str(folders[number]), threads=1))
        *events, _ = [e async for e in alone.stream(QUESTION, Params(max_new_tokens=40))]
        whole[f"tiny@{number}"] = [e.text for e in events if isinstance(e, Delta)]
        alone.close()
    assert await model_of(backend) == "tiny@0"
    done: Counter[str] = Counter()
    swapping = True

    async def turn(at: int) -> None:
        events = await answer(backend, f"c{at}", max_new_tokens=40)
        started = events[0]
        assert isinstance(started, Started) and isinstance(events[-1], Finished)
        text = "".join(e.text for e in events if isinstance(e, Delta))
        assert text == "".join(whole[started.model])
        done[started.model] += 1

    async def user(number: int) -> None:
        for at in range(25):
            await turn(number * 25 + at)
            await asyncio.sleep(0.05)
        while swapping:
            await turn(number)

    async def swaps() -> None:
        nonlocal swapping
        try:
            for number in ("1", "2", "0", "1", "2"):
                await in_thread(activate, folders[number])
                await until(lambda wanted=f"tiny@{number}": shown(backend)[0] == wanted)
                await asyncio.sleep(0.2)
        finally:
            swapping = False

    await asyncio.gather(swaps(), *(user(number) for number in range(8)))
    assert sum(done.values()) >= 200 and set(done) == set(whole)
    await until(lambda: not backend._gone)
    assert len(backend.engines()) == 1
    assert sum(t.name.startswith("inhouse-engine") for t in threading.enumerate()) <= 1


async def test_a_turn_that_runs_ends_on_its_own_version_which_then_is_closed(
    backend, folders
) -> None:
    stream = backend.stream(QUESTION, Params(max_new_tokens=200))
    events = [await anext(stream)]
    (old,) = backend.engines()
    await in_thread(activate, folders["1"])
    await until(lambda: shown(backend)[0] == "tiny@1")
    assert await model_of(backend) == "tiny@1"
    assert old.stats().state == "running"
    events += [event async for event in stream]
    assert events[0].model == "tiny@0" and isinstance(events[-1], Finished)
    await until(lambda: old.stats().state == "closed")


async def test_a_version_that_cannot_be_loaded_changes_nothing_but_what_is_told(
    backend, folders, tmp_path, caplog
) -> None:
    assert await model_of(backend) == "tiny@0"
    folder = shutil.copytree(folders["1"], tmp_path / "broken")
    await in_thread(registry.register, folder)
    shutil.rmtree(folder)
    version = await in_thread(registry.find, "tiny@1")
    await in_thread(lambda: registry.move(version, "active", why="test", forced=True))
    await until(lambda: bool(backend.problem()))
    assert "tiny@1" in backend.problem() and "model.json" in backend.problem()
    assert await model_of(backend) == "tiny@0"
    await asyncio.sleep(0.5)  # several looks
    assert sum("tiny@1 cannot be loaded" in r.message for r in caplog.records) == 1
    await in_thread(lambda: registry.roll_back(why="it does not load"))
    await until(lambda: not backend.problem())


def truncated(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-100])


def with_a_bit_flipped(folder: Path) -> None:
    raw = bytearray((folder / "model.onnx").read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / "model.onnx").write_bytes(raw)


def emptied(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")


def of_another_opset(folder: Path) -> None:
    """With a manifest that vouches for it."""
    model = onnx.load(folder / "model.onnx")
    for opset in model.opset_import:
        opset.version = 99
    onnx.save(model, folder / "model.onnx")
    told = json.loads((folder / "model.json").read_text())
    files = describe_files(folder, tuple(told["files"]))
    told["files"] = {name: asdict(entry) for name, entry in files.items()}
    (folder / "model.json").write_text(json.dumps(told))


def without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


DAMAGES = (truncated, with_a_bit_flipped, emptied, of_another_opset, without_a_tokenizer)


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_version_is_refused_and_told_and_the_one_before_answers(
    backend, folders, tmp_path, damage
) -> None:
    """Fault F15, under a server that runs."""
    assert await model_of(backend) == "tiny@0"
    folder = shutil.copytree(folders["1"], tmp_path / "damaged")
    version = await in_thread(registry.register, folder)
    damage(folder)
    await in_thread(lambda: registry.move(version, "active", why="test", forced=True))
    await until(lambda: "tiny@1" in backend.problem())
    assert await model_of(backend) == "tiny@0"
    reading.read()
    assert metrics.MODEL_PROBLEM.labels("model")._value.get() == 1


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_server_whose_only_model_is_damaged_answers_by_rules_and_tries_seldom(
    backend, folders, tmp_path, damage, monkeypatch
) -> None:
    """Fault F15, at start-up: no loop, no error for the user."""
    folder = shutil.copytree(folders["1"], tmp_path / "damaged")
    damage(folder)
    backend.options = replace(backend.options, model_dir=str(folder))
    tries: list[float] = []
    ready = OnnxBackend._ready
    monkeypatch.setattr(
        OnnxBackend, "_ready", lambda self: tries.append(time.monotonic()) or ready(self)
    )
    rule = RuleText("cancel", ("cancel my order",), "Open My Orders.")
    ask = router.Ask(tuple(QUESTION), Params(), Known((rule,), {}))
    for _ in range(10):
        events = [event async for event in router.route(ask)]
        assert [event.text for event in events if isinstance(event, Delta)] == ["Open My Orders."]
        assert events[0] == router.Routed("rules", events[0].reason)
        assert events[0].reason in ("error", "breaker_open")
    assert len(tries) <= 5, "the breaker opens, and nothing is loaded for every question"


@pytest.mark.load
def test_a_file_is_refused_by_its_hash_within_two_seconds_a_gigabyte(folders, tmp_path) -> None:
    """Fault F15, with a file of an eighth of that; the fastest of three, beside whatever runs."""
    folder = shutil.copytree(folders["1"], tmp_path / "large")
    (folder / "model.onnx").write_bytes(os.urandom(1 << 20) * 128)
    files = describe_files(folder, ("model.onnx", "tokenizer.json"))
    told = json.loads((folder / "model.json").read_text())
    told["files"] = {name: asdict(entry) for name, entry in files.items()}
    (folder / "model.json").write_text(json.dumps(told))
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    took: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(ManifestError, match="was altered"):
            Manifest.load(folder)
        took.append(time.perf_counter() - began)
    assert min(took) < 2.0 / 8


async def test_a_folder_that_holds_another_model_than_was_registered_is_refused(
    backend, folders, tmp_path
) -> None:
    assert await model_of(backend) == "tiny@0"
    folder = shutil.copytree(folders["1"], tmp_path / "changed")
    version = await in_thread(registry.register, folder)
    shutil.rmtree(folder)
    shutil.copytree(folders["2"], folder)
    await in_thread(lambda: registry.move(version, "active", why="test", forced=True))
    await until(lambda: "another model" in backend.problem())
    assert await model_of(backend) == "tiny@0"


async def test_a_process_whose_active_version_is_gone_starts_with_that_of_the_settings(
    backend, folders, tmp_path
) -> None:
    folder = shutil.copytree(folders["1"], tmp_path / "gone")
    await in_thread(activate, folder)
    shutil.rmtree(folder)
    assert await model_of(backend) == "tiny@0"
    assert "tiny@1" in backend.problem()


async def test_without_the_registry_answers_go_on(backend, folders, monkeypatch) -> None:
    def away() -> Any:
        raise OSError("no database")

    monkeypatch.setattr(registry, "plan", away)
    assert await model_of(backend) == "tiny@0"
    monkeypatch.undo()
    await in_thread(activate, folders["1"])
    await until(lambda: shown(backend)[0] == "tiny@1")


async def test_with_no_model_at_all_it_is_said_so_and_tried_again(
    backend, folders, tmp_path
) -> None:
    backend.options = Options(str(tmp_path / "later"), threads=1)
    with pytest.raises(ModelUnavailable, match=r"model\.json"):
        await answer(backend)
    shutil.copytree(folders["0"], tmp_path / "later")
    assert await model_of(backend) == "tiny@0"


async def test_a_closed_backend_can_be_used_again(backend) -> None:
    assert await model_of(backend) == "tiny@0"
    await asyncio.to_thread(backend.close)
    assert backend.engines() == () and backend.version() == ""
    assert not any(t.name == "model-versions" for t in threading.enumerate())
    assert await model_of(backend) == "tiny@0"


# -- the canary ------------------------------------------------------------------------------------


async def test_the_canary_gets_its_share_and_keeps_its_conversations(backend, folders) -> None:
    assert await model_of(backend) == "tiny@0"
    canary = await in_thread(begin_canary, folders["1"], 30)
    await until(lambda: shown(backend)[1] == "tiny@1")
    keys = [f"conversation-{i}" for i in range(150)]
    first = [await model_of(backend, key) for key in keys]
    assert first == [await model_of(backend, key) for key in keys]
    assert first == [
        "tiny@1" if registry.gets_canary(key, canary.sha256, 30) else "tiny@0" for key in keys
    ]
    expected, spread = 150 * 0.3, (150 * 0.3 * 0.7) ** 0.5
    assert abs(first.count("tiny@1") - expected) < 4 * spread
    assert await model_of(backend) == "tiny@0"  # nobody in particular


async def test_the_version_is_that_of_who_will_answer(backend, folders) -> None:
    await model_of(backend)
    await in_thread(begin_canary, folders["1"], 100)
    await until(lambda: shown(backend)[1] == "tiny@1")
    assert backend.version(Params(sticky="c")).startswith("tiny@1:")
    assert backend.version(Params()).startswith("tiny@0:")
    assert backend.version().startswith("tiny@0:")


async def test_a_canary_that_is_promoted_is_not_loaded_a_second_time(backend, folders) -> None:
    await model_of(backend)
    canary = await in_thread(begin_canary, folders["1"], 50)
    await until(lambda: shown(backend)[1] == "tiny@1")
    engine = backend._now.canary.backend.engine
    await in_thread(lambda: registry.move(canary, "active", why="good"))
    await until(lambda: shown(backend) == ("tiny@1", ""))
    assert backend.loaded() is engine
    await until(lambda: not backend._gone)


async def test_a_canary_that_is_rejected_answers_nobody_any_more(backend, folders) -> None:
    await model_of(backend)
    canary = await in_thread(begin_canary, folders["1"], 100)
    await until(lambda: shown(backend)[1] == "tiny@1")
    assert await model_of(backend, "c") == "tiny@1"
    await in_thread(lambda: registry.move(canary, "rejected", why="bad"))
    await until(lambda: shown(backend) == ("tiny@0", ""))
    assert await model_of(backend, "c") == "tiny@0"
    await until(lambda: len(backend.engines()) == 1 and not backend._gone)


async def test_a_canary_that_breaks_before_its_first_words_is_replaced_in_the_same_turn(
    backend, folders, monkeypatch
) -> None:
    await model_of(backend)
    await in_thread(begin_canary, folders["1"], 100)
    await until(lambda: shown(backend)[1] == "tiny@1")
    canary = backend._now.canary.backend

    async def breaks(messages: Any, params: Any) -> Any:
        yield Started("tiny@1")
        raise GenerationFailed("as if")

    monkeypatch.setattr(canary, "stream", breaks)
    assert await model_of(backend, "c") == "tiny@0"


async def test_a_canary_that_breaks_after_its_first_words_is_not_papered_over(
    backend, folders, monkeypatch
) -> None:
    await model_of(backend)
    await in_thread(begin_canary, folders["1"], 100)
    await until(lambda: shown(backend)[1] == "tiny@1")

    async def breaks(messages: Any, params: Any) -> Any:
        yield Started("tiny@1")
        yield Delta("Hello")
        raise GenerationFailed("as if")

    monkeypatch.setattr(backend._now.canary.backend, "stream", breaks)
    seen = []
    with pytest.raises(GenerationFailed):
        async for event in backend.stream(QUESTION, Params(sticky="c")):
            seen.append(event)
    assert seen == [Started("tiny@1"), Delta("Hello")]


async def test_a_canary_that_cannot_be_loaded_is_told_and_nobody_waits_for_it(
    backend, folders, tmp_path, monkeypatch
) -> None:
    await model_of(backend)
    folder = shutil.copytree(folders["1"], tmp_path / "broken")
    await in_thread(registry.register, folder)
    held = (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    version = await in_thread(registry.find, "tiny@1")
    await in_thread(
        lambda: registry.move(version, "canary", why="t", forced=True, canary_percent=100)
    )
    await until(lambda: "tiny@1" in backend.problem())
    assert await model_of(backend, "c") == "tiny@0"
    monkeypatch.setattr(versioned, "RETRY_S", 0.0)
    held.rename(folder / "tokenizer.json")
    await until(lambda: not backend.problem())
    assert await model_of(backend, "c") == "tiny@1"


async def test_at_most_two_models_are_loaded_while_a_new_one_comes_beside_a_canary(
    backend, folders, monkeypatch
) -> None:
    most = 0
    real = VersionedBackend._load

    def counted(self: Any, wanted: Any) -> Any:
        nonlocal most
        found = real(self, wanted)
        kept = {id(m) for m in (*self._now.models(), *self._gone, found)}
        most = max(most, len(kept))
        return found

    monkeypatch.setattr(VersionedBackend, "_load", counted)
    await model_of(backend)
    await in_thread(begin_canary, folders["1"], 50)
    await until(lambda: shown(backend)[1] == "tiny@1")
    await in_thread(activate, folders["2"])
    await until(lambda: shown(backend) == ("tiny@2", "tiny@1"))
    assert most == 2
