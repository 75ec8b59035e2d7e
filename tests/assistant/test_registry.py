"""Which version may go where, who is told, and that nothing is half done."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import IntegrityError, OperationalError

from assistant import registry
from assistant.management.commands import train_model
from assistant.models import ModelVersion, VersionChange
from assistant.registry import FORCED, MOVES, RegistryError, State

pytestmark = pytest.mark.django_db(transaction=True)

STATES = list(State.values)


def version(state: str = "candidate", number: int = 0) -> ModelVersion:
    """A row without files: the registry itself never loads a model."""
    number = number or ModelVersion.objects.count() + 1
    return ModelVersion.objects.create(
        name="m", version=str(number), sha256=f"{number:064x}", folder="/nowhere", state=state
    )


@pytest.fixture(autouse=True)
def no_settings_model(settings: Any, tmp_path: Path) -> None:
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "BACKENDS": {"model": {"OPTIONS": {"model_dir": str(tmp_path / "none")}}},
        "ROUTE": ["rules"],
    }


def as_version(folder: Path, to: Path, number: str) -> Path:
    """A copy of a model under another version and with other weights' digest."""
    shutil.copytree(folder, to)
    told = json.loads((to / "model.json").read_text())
    told["version"] = number
    (to / "model.json").write_text(json.dumps(told))
    return to


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize(("was", "to"), list(itertools.product(STATES, STATES)))
def test_every_move_is_made_and_noted_or_refused_and_nothing_changes(
    was: str, to: str, forced: bool, sam: User
) -> None:
    one = version(was)
    legal = to in MOVES[was] or (forced and to in FORCED.get(was, ()))
    share = 10 if to == State.CANARY else 0
    if legal:
        registry.move(one, to, by=sam, why="because", forced=forced, canary_percent=share)
        (change,) = VersionChange.objects.all()
        assert (change.from_state, change.to_state, change.by) == (was, to, sam)
        assert (change.why, change.forced) == ("because", forced)
    else:
        with pytest.raises(RegistryError, match="cannot become"):
            registry.move(one, to, by=sam, why="because", forced=forced, canary_percent=share)
        assert not VersionChange.objects.exists()
    one.refresh_from_db()
    assert (one.state, one.canary_percent) == ((to, share) if legal else (was, 0))


def test_the_table_of_moves_is_the_one_that_was_agreed() -> None:
    """Written out once more: a move that slips into the table is seen."""
    made = {(was, to) for was, all_ in MOVES.items() for to in all_}
    stops = {(was, "rejected") for was in ("candidate", "shadow", "canary")}
    back = {("shadow", "candidate"), ("canary", "candidate")}
    on = {("candidate", "shadow"), ("shadow", "canary"), ("canary", "active")}
    assert made == stops | back | on


def test_a_new_active_model_retires_the_former_one_in_the_same_breath() -> None:
    former, new = version("active"), version("canary")
    registry.move(new, State.ACTIVE, why="better")
    former.refresh_from_db()
    assert (former.state, registry.active(), registry.canary()) == ("retired", new, None)
    assert {(c.version_id, c.to_state) for c in VersionChange.objects.all()} == {
        (former.pk, "retired"),
        (new.pk, "active"),
    }


@pytest.mark.parametrize("state", ["shadow", "canary"])
def test_a_place_that_is_taken_is_refused_by_the_name_of_who_has_it(state: str) -> None:
    holder = version(state)
    other = version("candidate" if state == "shadow" else "shadow")
    with pytest.raises(RegistryError, match=f"{holder.label} is it"):
        registry.move(other, state, why="too", canary_percent=5)
    other.refresh_from_db()
    assert other.state in {"candidate", "shadow"} and not VersionChange.objects.exists()


def test_who_saw_an_older_state_is_told_that_somebody_was_faster() -> None:
    mine = version("candidate")
    theirs = ModelVersion.objects.get(pk=mine.pk)
    registry.move(theirs, State.REJECTED, why="first")
    with pytest.raises(RegistryError, match="not candidate any more"):
        registry.move(mine, State.SHADOW, why="second")
    assert mine.state == State.CANDIDATE and VersionChange.objects.count() == 1


def test_a_former_active_that_was_moved_meanwhile_stops_the_promotion(monkeypatch: Any) -> None:
    stale = version("active")
    newer = version("retired")
    new = version("canary")
    registry.roll_back(why="meanwhile", to=newer)
    assert stale.state == "active"  # as the slower process still sees it
    monkeypatch.setattr(registry, "active", lambda: stale)
    with pytest.raises(RegistryError, match="not active any more"):
        registry.move(new, State.ACTIVE, why="slower")
    new.refresh_from_db()
    assert (new.state, ModelVersion.objects.get(state="active")) == ("canary", newer)


def test_a_move_that_breaks_half_way_leaves_everything_as_it_was(monkeypatch: Any) -> None:
    former, new = version("active"), version("canary")
    real = registry._note

    def breaks(row: ModelVersion, *args: Any, **kwargs: Any) -> None:
        real(row, *args, **kwargs)
        if row.pk == new.pk:
            raise IntegrityError("as if")

    monkeypatch.setattr(registry, "_note", breaks)
    with pytest.raises(RegistryError):
        registry.move(new, State.ACTIVE, why="better")
    assert ModelVersion.objects.get(state="active") == former
    assert new.state == "canary" and not VersionChange.objects.exists()


def test_a_reason_and_a_share_are_asked_for() -> None:
    with pytest.raises(RegistryError, match="reason"):
        registry.move(version("candidate"), State.SHADOW, why="  ")
    for share in (0, 101, -1):
        with pytest.raises(RegistryError, match="1 to 100"):
            registry.move(version("shadow", 9 + share + 1), State.CANARY, why="x",
                          canary_percent=share)  # fmt: skip
        ModelVersion.objects.all().delete()


def test_rolling_back_goes_further_back_each_time_and_never_to_what_was_given_up() -> None:
    chain = [version("canary")]
    registry.move(chain[0], State.ACTIVE, why="first")
    for _ in range(2):
        chain.append(version("canary"))
        registry.move(chain[-1], State.ACTIVE, why="next")
    assert registry.roll_back(why="bad") == chain[1]
    assert registry.roll_back(why="bad too") == chain[0]
    with pytest.raises(RegistryError, match="nothing to roll back to"):
        registry.roll_back(why="and now?")
    assert registry.roll_back(why="it was not so bad", to=chain[2].__class__.objects.get(
        pk=chain[2].pk)) == registry.active()  # fmt: skip
    assert registry.active() == chain[2]


def test_only_what_was_active_can_be_rolled_back_to() -> None:
    version("active")
    for state in ("candidate", "rejected"):
        with pytest.raises(RegistryError, match="nothing to roll back to"):
            registry.roll_back(why="x", to=version(state))


# -- registering -----------------------------------------------------------------------------------


def test_registering_twice_is_registering_once(tiny_model: Path, sam: User) -> None:
    first = registry.register(tiny_model, by=sam, why="trained")
    again = registry.register(tiny_model, why="once more")
    assert first == again and first.state == State.CANDIDATE
    (change,) = VersionChange.objects.all()
    assert (change.from_state, change.to_state, change.why) == ("", "candidate", "trained")


def test_a_folder_that_was_altered_or_is_none_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "altered")
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff\x00\xff")
    with pytest.raises(RegistryError, match=r"Not registered: .*model\.onnx"):
        registry.register(folder)
    with pytest.raises(RegistryError, match="Not registered"):
        registry.register(tmp_path / "nothing")
    assert not ModelVersion.objects.exists()


def test_one_name_is_not_given_to_two_models_that_count(tiny_model: Path) -> None:
    first = registry.register(tiny_model)
    ModelVersion.objects.filter(pk=first.pk).update(sha256="0" * 64, state="retired")
    with pytest.raises(RegistryError, match="is another model already"):
        registry.register(tiny_model)
    ModelVersion.objects.update(state="rejected")
    assert registry.register(tiny_model).label == first.label


def test_the_model_of_the_settings_can_be_rolled_back_to(
    settings: Any, tiny_model: Path, tmp_path: Path
) -> None:
    options = {"model_dir": str(as_version(tiny_model, tmp_path / "before", "0.9"))}
    settings.ASSISTANT = {
        **settings.ASSISTANT, "BACKENDS": {"model": {"OPTIONS": options}}
    }  # fmt: skip
    registry.move(version("canary"), State.ACTIVE, why="the first promotion")
    before = registry.roll_back(why="it is worse")
    assert before.version == "0.9" and registry.active() == before


def test_versions_are_found_by_label_and_by_digest() -> None:
    one = version()
    two = version(number=2**200)
    assert registry.find(one.label) == one
    assert registry.find(two.sha256[:20]) == two
    for label in ("m@9", "0000", "", "@", "000000"):
        with pytest.raises(RegistryError):
            registry.find(label)


def test_commands_find_the_folder_that_answers_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_model._start(Path("active")) == tmp_path / "none"
    assert train_model._start(Path("elsewhere")) == Path("elsewhere")
    version("active")
    assert train_model._start(Path("active")) == registry.folder_in_use() == Path("/nowhere")

    def away() -> None:
        raise OperationalError("no such table")

    monkeypatch.setattr(registry, "active", away)
    assert registry.folder_in_use() == tmp_path / "none"


# -- who gets the canary ---------------------------------------------------------------------------


@pytest.mark.parametrize("percent", [1, 10, 50])
def test_the_share_of_conversations_is_the_one_that_was_asked_for(percent: int) -> None:
    n, share = 20_000, percent / 100
    got = sum(registry.gets_canary(f"conversation-{i}", "ab", percent) for i in range(n))
    assert abs(got - n * share) < 4 * (n * share * (1 - share)) ** 0.5


def test_a_conversation_keeps_its_version_and_another_canary_gets_others() -> None:
    keys = [f"conversation-{i}" for i in range(2_000)]
    first = [registry.gets_canary(key, "ab", 50) for key in keys]
    assert first == [registry.gets_canary(key, "ab", 50) for key in keys]
    other = [registry.gets_canary(key, "cd", 50) for key in keys]
    assert 0.4 < sum(a == b for a, b in zip(first, other, strict=True)) / len(keys) < 0.6
    assert all(registry.gets_canary(key, "ab", 100) for key in keys)
    assert not any(registry.gets_canary(key, "ab", 0) for key in keys)
    assert not registry.gets_canary("", "ab", 100)


def test_more_conversations_are_the_same_and_some() -> None:
    keys = [f"conversation-{i}" for i in range(1_000)]
    assert all(
        registry.gets_canary(key, "ab", 30) for key in keys if registry.gets_canary(key, "ab", 10)
    )
