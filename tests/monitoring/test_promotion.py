"""From candidate to active and back: gates, force, commands, and a worse canary end to end."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from assistant import backends, registry
from assistant.backends import versioned
from assistant.backends.onnx import OnnxBackend
from assistant.errors import GenerationFailed
from assistant.modelkit.build import build_random
from assistant.models import ModelVersion
from assistant.registry import RegistryError
from conversations.limits import Caller
from conversations.models import Conversation, Message
from conversations.turn import Turn
from monitoring import canary, promotion
from monitoring.gates import Gate
from monitoring.models import Job

pytestmark = pytest.mark.django_db(transaction=True)


def version(state: str = "candidate", number: int = 1) -> ModelVersion:
    return ModelVersion.objects.create(
        name="m", version=str(number), sha256=f"{number:064x}", folder="/nowhere", state=state
    )


@pytest.fixture(autouse=True)
def no_settings_model(settings: Any, tmp_path: Path) -> None:
    model = settings.ASSISTANT["BACKENDS"]["model"]
    options = {"model_dir": str(tmp_path / "none"), "threads": 1, "max_batch": 8}
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BACKENDS": {**settings.ASSISTANT["BACKENDS"], "model": {**model, "OPTIONS": options}},
    }


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool | None]:
    """What each gate says; each says its name."""
    said: dict[str, bool | None] = {"golden": True, "shadow": True, "canary": True}
    places = {path: name for name, path, _ in promotion.STEPS.values()}

    def found(path: str) -> Any:
        name = places[path]
        return lambda asked: Gate(said[name], f"{name} says so", {"turns": 7})

    monkeypatch.setattr(promotion, "import_string", found)
    return said


def trail(row: ModelVersion) -> list[tuple[str, bool, Any]]:
    """Its moves, oldest first: to where, forced, by whom."""
    rows = row.changes.order_by("id").select_related("by")
    return [(change.to_state, change.forced, change.by) for change in rows]


# -- without a person ------------------------------------------------------------------------------


@pytest.fixture
def up_to(settings: Any) -> Any:
    return lambda stage: setattr(settings, "ASSISTANT_PROMOTE_UP_TO", stage)


def retrained(number: int = 1, **golden: Any) -> ModelVersion:
    """A candidate as a retraining leaves it."""
    row = version(number=number)
    Job.objects.create(kind="retrain", key=f"r{number}", state="done", version=row)
    registry.note_gate(row, "golden", Gate(**{"passed": True, "why": "Fine.", **golden}).kept())
    return row


def state_of(row: ModelVersion) -> str:
    row.refresh_from_db()
    return row.state


def followed(row: ModelVersion, times: int = 1) -> str:
    for _ in range(times):
        promotion.follow()
    return state_of(row)


REACHED = {
    "candidate": ["candidate"] * 4,
    "shadow": ["shadow"] * 4,
    "canary": ["shadow", "canary", "canary", "canary"],
    "active": ["shadow", "canary", "active", "active"],
}


@pytest.mark.parametrize("stage", REACHED)
def test_a_retrained_model_goes_as_far_as_settings_let_it(gates, up_to, stage, monkeypatch) -> None:
    up_to(stage)
    monkeypatch.setattr("monitoring.canary.gate", lambda row: Gate(True, "No worse."))
    row, reached = retrained(), []
    for _ in range(4):
        canary.watch()  # as the timetable does
        reached.append(followed(row))
    assert reached == REACHED[stage]
    assert all(by is None and not forced for _, forced, by in trail(row))


@pytest.mark.parametrize(
    ("said", "state"), [(False, "rejected"), (None, "shadow"), (True, "shadow")]
)
def test_the_shadow_gate_stops_it_keeps_it_or_leaves_it_to_a_person(gates, said, state) -> None:
    row, gates["shadow"] = retrained(), said
    assert followed(row) == "shadow"
    assert followed(row) == state
    assert row.gates["shadow"]["passed"] is said


def test_one_that_failed_or_was_not_judged_stays(gates) -> None:
    failed, unjudged = retrained(1, passed=False), retrained(2, passed=None)
    assert followed(failed) == followed(unjudged) == "candidate"


def test_what_a_person_registered_is_left_to_that_person(gates, up_to) -> None:
    up_to("active")
    row = version()
    registry.note_gate(row, "golden", Gate(True, "Fine.").kept())
    assert followed(row, 2) == "candidate"


def test_what_a_person_took_back_stays_back(gates, sam) -> None:
    row = retrained()
    followed(row)
    ModelVersion.objects.update(changed_at=timezone.now() - timedelta(hours=1))
    row.refresh_from_db()
    registry.move(row, "candidate", by=sam, why="not now")
    kept = {**row.gates["golden"], "at": (timezone.now() - timedelta(minutes=1)).isoformat()}
    registry.note_gate(row, "golden", kept)
    assert followed(row, 2) == "candidate"


def test_a_gate_passed_beside_another_model_than_the_active_one_does_not_count(gates) -> None:
    row = retrained()
    version("active", 9)
    ModelVersion.objects.filter(state="active").update(
        changed_at=timezone.now() + timedelta(minutes=1)
    )
    assert followed(row, 2) == "candidate"


def test_a_second_one_waits_until_the_first_has_left_the_shadow(gates) -> None:
    first, second = retrained(1), retrained(2)
    assert followed(first, 2) == "shadow" and state_of(second) == "candidate"
    registry.move(first, "rejected", why="worse")
    assert followed(second) == "shadow"


def test_a_person_who_is_faster_is_no_error(gates, monkeypatch, caplog) -> None:
    row = retrained()

    def taken(*_: Any, **__: Any) -> None:
        raise RegistryError("somebody moved it just now")

    monkeypatch.setattr(registry, "move", taken)
    caplog.set_level("INFO", logger="monitoring.promotion")
    assert promotion.follow() == [] and "somebody moved it" in caplog.text
    assert state_of(row) == "candidate"


# -- steps -----------------------------------------------------------------------------------------


def test_every_gate_is_there_under_the_name_it_is_asked_by() -> None:
    from django.utils.module_loading import import_string

    assert all(callable(import_string(path)) for _, path, _ in promotion.STEPS.values())


def test_a_version_goes_up_a_gate_at_a_time_and_every_figure_is_kept(gates, sam) -> None:
    row = version()
    for was, to in (("candidate", "shadow"), ("shadow", "canary"), ("canary", "active")):
        step = promotion.advance(row, by=sam, why="good")
        assert step.moved == (was, to)
    row.refresh_from_db()
    assert trail(row) == [("shadow", False, sam), ("canary", False, sam), ("active", False, sam)]
    assert set(row.gates) == {"golden", "shadow", "canary"}
    assert row.gates["golden"]["figures"] == {"turns": 7} and row.gates["golden"]["at"]
    assert "good: golden says so" in row.changes.order_by("id").first().why
    with pytest.raises(RegistryError, match="is active"):
        promotion.advance(row, why="more")


@pytest.mark.parametrize("share", [10, 35])
def test_a_canary_gets_the_share_of_the_settings(gates, settings, share: int) -> None:
    settings.ASSISTANT["CANARY"] = {**settings.ASSISTANT["CANARY"], "PERCENT": share}
    row = version("shadow")
    promotion.advance(row, why="x")
    assert row.canary_percent == share


@pytest.mark.parametrize(
    ("state", "gate"), [("candidate", "golden"), ("shadow", "shadow"), ("canary", "canary")]
)
def test_a_gate_that_fails_rejects_and_one_that_is_open_changes_nothing(gates, state, gate) -> None:
    row = version(state)
    gates[gate] = None
    assert promotion.advance(row, why="x").moved == (state, state)
    assert row.gates[gate]["passed"] is None and not row.changes.exists()
    gates[gate] = False
    assert promotion.advance(row, why="x").moved == (state, "rejected")
    assert f"stopped at the {gate} gate: {gate} says so" in row.changes.get().why


def test_a_gate_that_breaks_moves_nothing(gates, monkeypatch) -> None:
    def breaks(path: str) -> Any:
        raise ImportError(path)

    monkeypatch.setattr(promotion, "import_string", breaks)
    row = version()
    with pytest.raises(ImportError):
        promotion.advance(row, why="x")
    row.refresh_from_db()
    assert row.state == "candidate" and not row.changes.exists()


def test_promoting_stops_where_a_gate_stops_it(gates) -> None:
    gates["canary"] = None
    row, heard = version(), []
    step = promotion.promote(row, why="x", told=lambda step: heard.append(step.moved))
    assert heard == [("candidate", "shadow"), ("shadow", "canary"), ("canary", "canary")]
    assert step.gate is not None and step.gate.passed is None
    with pytest.raises(RegistryError, match="no way up to shadow"):
        promotion.promote(row, "shadow", why="x")


def test_who_forces_asks_no_gate_and_is_written_down(gates, sam) -> None:
    gates.update(golden=False, shadow=False, canary=False)
    row = version()
    promotion.promote(row, by=sam, why="hotfix", force=True)
    assert trail(row) == [("active", True, sam)] and row.gates == {}
    other = version(number=2)
    promotion.advance(other, by=sam, why="hotfix", force=True)
    assert trail(other) == [("shadow", True, sam)] and other.gates == {}


# -- commands --------------------------------------------------------------------------------------


def said(*arguments: Any, **options: Any) -> str:
    out = StringIO()
    call_command(*arguments, stdout=out, **options)
    return out.getvalue()


def test_the_registry_on_one_screen(gates) -> None:
    assert "No version is active" in said("models")
    row = version()
    promotion.promote(row, why="June's corrections", told=lambda step: None)
    text = said("models")
    assert "m@1" in text and "June's corrections" in text and text.count("passed") == 3
    assert "No version is active" not in text
    (told,) = json.loads(said("models", "--json"))
    assert told["state"] == "active" and told["gates"]["shadow"]["passed"] is True


def test_a_folder_is_registered_and_promoted(gates, tmp_path) -> None:
    gates["shadow"] = None
    build_random("tiny", tmp_path / "model", quant="row8", seed=5)
    assert "candidate" in said("models", "--register", tmp_path / "model")
    text = said("promote_model", str(tmp_path / "model"))
    assert "candidate -> shadow. golden says so" in text and "stays shadow. shadow says so" in text
    with pytest.raises(CommandError, match="Not registered"):
        said("models", "--register", tmp_path)


def test_promoting_by_command_says_what_happened(gates) -> None:
    row = version()
    assert "candidate -> shadow" in said("promote_model", "m@1", "--to", "shadow")
    gates["shadow"] = False
    with pytest.raises(CommandError, match="m@1 was rejected"):
        said("promote_model", "m@1")
    row.refresh_from_db()
    assert row.state == "rejected"
    with pytest.raises(CommandError, match="There is no version 'm@7'"):
        said("promote_model", "m@7")


def test_forcing_by_command_needs_a_yes(gates, monkeypatch) -> None:
    gates["golden"] = False
    row = version()
    monkeypatch.setattr("sys.stdin", StringIO())
    with pytest.raises(CommandError, match="Add --yes"):
        said("promote_model", "m@1", "--force")
    assert not row.changes.exists()
    text = said("promote_model", "m@1", "--to", "canary", "--force", "--yes", "--why", "hotfix")
    assert "no gate was asked" in text
    assert trail(row) == [("canary", True, None)]


def test_rolling_back_by_command(gates) -> None:
    first, second = version(), version(number=2)
    with pytest.raises(CommandError, match="nothing to roll back to"):
        said("rollback_model")
    for row in (first, second):
        promotion.promote(row, why="x", force=True)
    assert said("rollback_model", "--why", "wrong refunds") == "m@1 is active.\n"
    assert said("rollback_model", "--to", "m@2") == "m@2 is active.\n"
    with pytest.raises(CommandError, match="There is no canary"):
        said("rollback_model", "--canary")
    third = version("shadow", 3)
    promotion.advance(third, why="x")
    assert said("rollback_model", "--canary") == "m@3 is rejected.\n"


# -- end to end: real turns, tiny models -----------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in range(2):
        build_random("tiny", root / str(seed), quant="row8", seed=seed)
        told = json.loads((root / str(seed) / "model.json").read_text())
        told |= {"name": "tiny", "version": str(seed)}
        (root / str(seed) / "model.json").write_text(json.dumps(told))
    return [root / "0", root / "1"]


@pytest.fixture
def product(settings: Any, folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend behind ``model``, which is tiny@0 of the settings and answers everything."""
    monkeypatch.setattr(versioned, "LOOK_EVERY_S", 0.1)
    settings.ASSISTANT_MAX_TURNS_PER_CALLER = 100
    options = {"model_dir": str(folders[0]), "threads": 1, "max_batch": 8}
    model = settings.ASSISTANT["BACKENDS"]["model"]
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "ROUTE": ["model", "rules", "human"],
        "MAX_NEW_TOKENS": 8,
        "BACKENDS": {"model": {**model, "OPTIONS": options}},
    }
    yield backends.get("model")
    backends.reset()


async def in_thread(function: Any, *args: Any, **kwargs: Any) -> Any:
    def closing() -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            connection.close()

    return await asyncio.to_thread(closing)


async def answered(caller: Caller, conversation: Conversation | None = None) -> Message:
    opened = sync_to_async(lambda: Turn.open(caller, conversation, "where is my order"))
    return await (await opened()).result()


async def until(condition: Any) -> None:
    async with asyncio.timeout(20):
        while not await in_thread(condition):  # noqa: ASYNC110 - other threads' figures
            await asyncio.sleep(0.02)


def canary_name(backend: Any) -> str:
    return backend._now.canary.name if backend._now.canary is not None else ""


async def test_a_worse_canary_is_taken_back_and_no_user_sees_an_error(
    product, folders, ana: User, monkeypatch
) -> None:
    """Its failures are covered by the active version in the same turn, and count against it."""
    monkeypatch.setattr(canary, "SETTLE", timedelta(0))
    caller, draw = Caller(ana.pk), random.Random(7)
    real = OnnxBackend.stream

    async def subtly_worse(self: Any, messages: Any, params: Any) -> Any:
        if self.options.model_dir.endswith("/1") and draw.random() < 0.5:
            raise GenerationFailed("as if")
        async for event in real(self, messages, params):
            yield event

    monkeypatch.setattr(OnnxBackend, "stream", subtly_worse)
    assert (await answered(caller)).model == "tiny@0"
    row = await in_thread(registry.register, folders[1])
    await in_thread(registry.move, row, "canary", why="test", forced=True, canary_percent=50)
    await until(lambda: canary_name(product) == "tiny@1")
    seen: Counter[str] = Counter()
    for _ in range(20):
        for message in await asyncio.gather(*(answered(caller) for _ in range(10))):
            assert (message.status, message.route) == ("complete", "model"), message.error_message
            seen[message.model] += 1
        if (gate := await in_thread(canary.watch)) is not None and gate.passed is False:
            break
    assert set(seen) == {"tiny@0", "tiny@1"}
    await in_thread(row.refresh_from_db)
    assert row.state == "rejected"
    assert "errors" in (await in_thread(lambda: row.changes.first())).why
    await until(lambda: canary_name(product) == "")
    after = await asyncio.gather(*(answered(caller) for _ in range(10)))
    assert {message.model for message in after} == {"tiny@0"}


async def test_a_conversation_stays_with_its_version_over_all_its_turns(
    product, folders, ana: User
) -> None:
    caller = Caller(ana.pk)
    await answered(caller)
    row = await in_thread(registry.register, folders[1])
    await in_thread(registry.move, row, "canary", why="t", forced=True, canary_percent=50)
    await until(lambda: canary_name(product) == "tiny@1")
    models = set()
    for _ in range(12):
        first = await answered(caller)
        conversation = await Conversation.objects.aget(pk=first.conversation_id)
        said = {first.model} | {(await answered(caller, conversation)).model for _ in range(2)}
        assert len(said) == 1
        mine = registry.gets_canary(str(conversation.pk), row.sha256, 50)
        assert said == {"tiny@1" if mine else "tiny@0"}
        models |= said
    assert models == {"tiny@0", "tiny@1"}


async def test_a_turn_asks_the_registry_nothing(product, ana: User) -> None:
    caller = Caller(ana.pk)
    await answered(caller)

    def statements() -> list[str]:
        with CaptureQueriesContext(connection) as asked:
            Turn.open(caller, None, "where is my order").close()
        return [query["sql"] for query in asked.captured_queries]

    found = await sync_to_async(statements)()
    assert found and not [sql for sql in found if "modelversion" in sql]


@pytest.mark.slow
async def test_turns_outlive_a_swap_and_each_row_names_one_version(
    product, folders, ana: User
) -> None:
    caller = Caller(ana.pk)
    await answered(caller)
    rows = [await in_thread(registry.register, folder) for folder in folders]
    swapped = threading.Event()

    async def user() -> list[Message]:
        found = []
        while not swapped.is_set() or len(found) < 25:
            found.append(await answered(caller))
        return found

    async def swaps() -> None:
        await in_thread(registry.move, rows[1], "active", why="1", forced=True)
        for at in (0, 1, 0, 1):
            await until(lambda: product._now.active.name != f"tiny@{at}")  # noqa: B023
            row = await in_thread(ModelVersion.objects.get, pk=rows[at].pk)
            await in_thread(registry.roll_back, to=row, why="again")
        await until(lambda: product._now.active.name == "tiny@1")
        swapped.set()

    done, *_ = await asyncio.gather(asyncio.gather(*(user() for _ in range(8))), swaps())
    messages = [message for found in done for message in found]
    assert len(messages) >= 200
    assert {(m.status, m.route) for m in messages} == {("complete", "model")}
    assert {m.model for m in messages} == {"tiny@0", "tiny@1"}
