"""From candidate to active, a gate at a time, and back: what staff, commands and jobs call.

``registry`` moves, the gates judge, this asks the right gate for the next step and keeps what it
said. ``follow`` does the same for retrained models, as far as settings let them go by themselves.
Knows neither how a gate judges nor who serves.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.conf import settings
from django.utils.module_loading import import_string

from assistant import registry
from assistant.models import ModelVersion
from assistant.registry import RegistryError, State
from monitoring.gates import Gate
from monitoring.models import Job

log = logging.getLogger(__name__)

#: Of each state, the gate out of it, by where it is, and the state behind it.
STEPS: dict[str, tuple[str, str, str]] = {
    State.CANDIDATE: ("golden", "monitoring.loop.golden_gate", State.SHADOW),
    State.SHADOW: ("shadow", "monitoring.shadow.gate", State.CANARY),
    State.CANARY: ("canary", "monitoring.canary.gate", State.ACTIVE),
}

#: The way up.
ORDER = [*map(str, STEPS), str(State.ACTIVE)]


@dataclass(frozen=True, slots=True)
class Step:
    """What became of one step: ``moved`` is the state before and after, equal if it stayed."""

    version: ModelVersion
    gate: Gate | None
    moved: tuple[str, str]


def advance(version: ModelVersion, *, by: Any = None, why: str, force: bool = False) -> Step:
    """One step on, if the gate lets it: a failed gate rejects the version, an open one keeps it.

    ``force``: whatever the gate says; noted as such. A gate may take minutes.
    Raises: RegistryError, for a version that has no next step or was moved meanwhile.
    """
    was = version.state
    name, path, to_state = _step_of(version)
    gate = None if force else _asked(version, name, path)
    if gate is not None and gate.passed is None:
        return Step(version, gate, (was, was))
    if gate is not None and not gate.passed:
        _stop(version, name, gate)
    else:
        said = f"{name} gate skipped" if gate is None else gate.why
        _move(version, to_state, by=by, why=f"{why}: {said}", forced=force)
    return Step(version, gate, (was, version.state))


def promote(
    version: ModelVersion, to_state: str = State.ACTIVE, *, by: Any = None, why: str,
    force: bool = False, told: Callable[[Step], None] = lambda step: None,
) -> Step:  # fmt: skip
    """Steps on until ``to_state``, or until a gate stops or keeps it; ``told`` hears each.

    Forced, it goes there at once. Raises: RegistryError.
    """
    if force:
        step = _forced(version, to_state, by=by, why=why)
        told(step)
        return step
    if version.state not in STEPS or to_state not in ORDER[ORDER.index(version.state) + 1 :]:
        raise RegistryError(
            f"{version.label} is {version.state}: there is no way up to {to_state}."
        )
    while True:
        step = advance(version, by=by, why=why)
        told(step)
        if step.moved[0] == step.moved[1] or step.moved[1] in {to_state, State.REJECTED}:
            return step


def roll_back(*, by: Any = None, why: str, to: ModelVersion | None = None) -> ModelVersion:
    """The version that answers again. Raises: RegistryError."""
    return registry.roll_back(by=by, why=why, to=to)


def reject(version: ModelVersion, *, by: Any = None, why: str) -> ModelVersion:
    """A version that was not active, taken out; a canary answers nobody any more.

    Raises: RegistryError.
    """
    return registry.move(version, State.REJECTED, by=by, why=why)


# -- without a person ------------------------------------------------------------------------------


def follow() -> list[str]:
    """One step of every retrained model that may go on without a person; the labels of those moved.

    For the timetable: asks no gate that takes longer than a few statements.
    """
    retrained = Job.objects.filter(kind=Job.Kind.RETRAIN, state=Job.State.DONE)
    rows = ModelVersion.objects.filter(state__in=STEPS, pk__in=retrained.values("version"))
    moved = []
    for version in rows.order_by("pk"):
        was = version.state
        try:
            _follow(version)
        except RegistryError as error:  # a person was faster, or the place is taken
            log.info("%s stays %s: %s", version.label, was, error)
        moved += [version.label] if version.state != was else []
    return moved


def _follow(version: ModelVersion) -> None:
    name, path, to_state = STEPS[version.state]
    if version.state == State.SHADOW:
        gate = _asked(version, name, path)
        if gate.passed is False:
            _stop(version, name, gate)
            return
    kept = version.gates.get(name) or {}  # of its job, or of who watches the canary
    if kept.get("passed") and _may_reach(to_state) and _holds(version, kept):
        _move(version, to_state, why=f"by itself, as it was retrained: {kept['why']}")


def _may_reach(state: str) -> bool:
    """Whether settings let it, and nobody else is there who would have to go first."""
    if ORDER.index(state) > ORDER.index(settings.ASSISTANT_PROMOTE_UP_TO):
        return False
    return state == State.ACTIVE or not ModelVersion.objects.filter(state=state).exists()


def _holds(version: ModelVersion, kept: dict[str, Any]) -> bool:
    """Whether it was said of the version where it is, beside the model that is active now: nobody
    has moved either since."""
    moved = [row.changed_at for row in (version, registry.active()) if row is not None]
    return datetime.fromisoformat(kept["at"]) >= max(moved).replace(microsecond=0)


# -- one step --------------------------------------------------------------------------------------


def _move(version: ModelVersion, to_state: str, **more: Any) -> None:
    """With the share of conversations that settings give a canary. Raises: RegistryError."""
    share = settings.ASSISTANT["CANARY"]["PERCENT"] if to_state == State.CANARY else 0
    registry.move(version, to_state, canary_percent=share, **more)


def _forced(version: ModelVersion, to_state: str, *, by: Any, why: str) -> Step:
    was = version.state
    _move(version, to_state, by=by, why=f"{why}: no gate was asked", forced=True)
    return Step(version, None, (was, version.state))


def _step_of(version: ModelVersion) -> tuple[str, str, str]:
    if version.state not in STEPS:
        raise RegistryError(
            f"{version.label} is {version.state}; only a candidate, a shadow or a canary goes on. "
            "What was active before comes back with rollback_model."
        )
    return STEPS[version.state]


def _asked(version: ModelVersion, name: str, path: str) -> Gate:
    """What the gate says, kept with the version."""
    function: Callable[[ModelVersion], Gate] = import_string(path)
    gate = function(version)
    registry.note_gate(version, name, gate.kept())
    return gate


def _stop(version: ModelVersion, name: str, gate: Gate) -> None:
    """By nobody: the gate did, whoever asked it."""
    registry.move(version, State.REJECTED, why=f"stopped at the {name} gate: {gate.why}")
