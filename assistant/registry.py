"""Which model versions there are and which of them answers: the only code that changes a state.

Moves are legal, audited and atomic: of two processes that move at once one wins, the other is told.
Knows no gates; whoever calls ``move`` has decided. Loads nothing: a process notices by itself
(``backends.versioned``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import DatabaseError, IntegrityError, transaction
from django.db.models import Min, Q
from django.utils import timezone

from assistant.engine.manifest import Manifest, ManifestError
from assistant.models import ModelVersion, VersionChange

log = logging.getLogger(__name__)

State = ModelVersion.State

#: From which state a version may go where. ``roll_back`` alone makes a retired one active again.
MOVES: dict[str, frozenset[str]] = {
    State.CANDIDATE: frozenset({State.SHADOW, State.REJECTED}),
    State.SHADOW: frozenset({State.CANARY, State.CANDIDATE, State.REJECTED}),
    State.CANARY: frozenset({State.ACTIVE, State.CANDIDATE, State.REJECTED}),
    State.ACTIVE: frozenset(),
    State.RETIRED: frozenset(),
    State.REJECTED: frozenset(),
}
#: What a person may do besides: skip steps, and give a version that was stopped another chance.
FORCED: dict[str, frozenset[str]] = {
    State.CANDIDATE: frozenset({State.CANARY, State.ACTIVE}),
    State.SHADOW: frozenset({State.ACTIVE}),
    State.REJECTED: frozenset({State.CANDIDATE}),
}
#: Held by one version at a time.
SINGLE = frozenset({State.SHADOW, State.CANARY, State.ACTIVE})
MOST_WHY_CHARS = 500


class RegistryError(Exception):
    """A version cannot be registered or moved so. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Who should answer: without ``active`` the model of the settings."""

    active: ModelVersion | None = None
    canary: ModelVersion | None = None


def gets_canary(key: str, canary_sha256: str, percent: int) -> bool:
    """Whether the conversation called ``key`` is answered by that canary; always the same answer.

    Another canary gets other conversations. Nobody in particular (an empty key) gets none.
    """
    if not key or percent <= 0:
        return False
    drawn = hashlib.sha256(f"{canary_sha256}:{key}".encode()).digest()
    return int.from_bytes(drawn[:8]) * 100 < percent << 64


# -- looking ---------------------------------------------------------------------------------------


def active() -> ModelVersion | None:
    return _in(State.ACTIVE)


def canary() -> ModelVersion | None:
    return _in(State.CANARY)


def shadow() -> ModelVersion | None:
    return _in(State.SHADOW)


def plan() -> Plan:
    """Who should answer now, in one statement."""
    rows = ModelVersion.objects.filter(state__in=[State.ACTIVE, State.CANARY])
    found = {row.state: row for row in rows}
    return Plan(found.get(State.ACTIVE), found.get(State.CANARY))


def folder_in_use() -> Path:
    """Of the active version; without one, or without a database, that of the settings."""
    try:
        version = active()
    except DatabaseError:  # a command ahead of any migration
        version = None
    usual = settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]["model_dir"]
    return Path(version.folder if version else usual)


def find(label: str) -> ModelVersion:
    """The version called ``name@version``, or whose digest begins so. Raises: RegistryError.

    A label that was used again after its first bearer was rejected means the newest.
    """
    name, at, version = label.rpartition("@")
    wanted = Q(name=name, version=version) if at else Q(sha256__startswith=label.lower())
    rows = list(ModelVersion.objects.filter(wanted)[:2])
    if not rows or (not at and (len(rows) > 1 or len(label) < 6)):
        raise RegistryError(
            f"There is no version {label!r}, or more than one. `manage.py models` lists them."
        )
    return rows[0]


def _in(state: str) -> ModelVersion | None:
    return ModelVersion.objects.filter(state=state).first()


# -- registering -----------------------------------------------------------------------------------


def register(
    folder: Path, *, parent: ModelVersion | None = None, by: Any = None, why: str = ""
) -> ModelVersion:
    """The version of the model in ``folder``, every file verified; a candidate if it is new.

    Known by the digest of its model.onnx: registering it again changes nothing but the folder, and
    that only where the old one is gone. Raises: RegistryError.
    """
    return _registered(folder, State.CANDIDATE, parent, by, why)


def _registered(
    folder: Path, state: str, parent: ModelVersion | None, by: Any, why: str
) -> ModelVersion:
    folder = Path(folder).expanduser().resolve()
    try:
        manifest = Manifest.load(folder)
    except (ManifestError, OSError) as error:
        raise RegistryError(f"Not registered: {error}") from error
    sha256 = manifest.digest
    known = ModelVersion.objects.filter(sha256=sha256).first()
    if known is None:
        _refuse_unfit(manifest, sha256)
        known = _added(manifest, folder, state, parent, by, why)
    return _found_again(known, folder)


def _added(
    manifest: Manifest, folder: Path, state: str, parent: ModelVersion | None, by: Any, why: str
) -> ModelVersion:
    """The new row and its first change; the other's where two processes register at once."""
    told = {"name": manifest.name, "version": manifest.version, "folder": str(folder),
            "state": state, "parent": parent, "data_sha256": _data(manifest)}  # fmt: skip
    sha256 = manifest.digest
    with transaction.atomic():
        row, made = ModelVersion.objects.get_or_create(sha256=sha256, defaults=told)
        if made:
            _note(row, "", by=by, why=why or "registered", forced=False)
    return row


def _refuse_unfit(manifest: Manifest, sha256: str) -> None:
    """Raises: RegistryError for names that do not fit, or that a version which counts has."""
    for field, most in (("name", 60), ("version", 40)):
        text = getattr(manifest, field)
        if not text or len(text) > most or "@" in text:
            raise RegistryError(
                f"Not registered: the {field} {text[:80]!r} in model.json must have 1 to {most} "
                "characters and no @. Change it there."
            )
    named = ModelVersion.objects.filter(name=manifest.name, version=manifest.version)
    if other := named.exclude(state=State.REJECTED).first():
        raise RegistryError(
            f"Not registered: {other.label} is another model already ({other.sha256[:12]}, this "
            f"is {sha256[:12]}), and turns could not tell them apart. Give this one a version of "
            "its own in model.json, or with `train_model --model-version`."
        )


def _found_again(row: ModelVersion, folder: Path) -> ModelVersion:
    if row.folder != str(folder) and not Path(row.folder).is_dir():
        row.folder = str(folder)
        row.save(update_fields=["folder"])
    return row


def _data(manifest: Manifest) -> str:
    told = manifest.quality.get("data_sha256", "")
    return told if isinstance(told, str) and len(told) <= 64 else ""


# -- moving ----------------------------------------------------------------------------------------


def move(
    version: ModelVersion,
    to_state: str,
    *,
    by: Any = None,
    why: str,
    forced: bool = False,
    canary_percent: int = 0,
) -> ModelVersion:
    """``version`` in its new state; who was active before is retired with it, all or nothing.

    ``version.state`` is what the caller saw: if it is that no more, somebody else was faster.
    *Units*: ``canary_percent`` is the share of conversations, 1 to 100, for a canary only.
    Raises: RegistryError, and then nothing has changed.
    """
    _refuse_illegal(version, to_state, why, forced=forced)
    percent = _percent(to_state, canary_percent)
    if to_state == State.ACTIVE:
        _remember_settings_model(version)
    return _moved(version, to_state, by=by, why=why, forced=forced, percent=percent)


def roll_back(*, by: Any = None, why: str, to: ModelVersion | None = None) -> ModelVersion:
    """The version that answers now: the one that was active before, or ``to``, a retired one.

    Rolled back twice goes back twice, never to the version that was just given up.
    Raises: RegistryError.
    """
    _refuse_empty(why)
    current, target = active(), to
    if target is None:
        target = _before(current) if current is not None else None
    if target is None or target.state != State.RETIRED:
        raise RegistryError(
            "There is nothing to roll back to: no version was active before. "
            "`manage.py models` lists all; `manage.py promote_model` promotes one."
        )
    return _moved(target, State.ACTIVE, by=by, why=why, forced=False, percent=0)


def note_gate(version: ModelVersion, gate: str, figures: dict[str, Any]) -> None:
    """Keep what a gate measured, beside what the others did."""
    with transaction.atomic():
        row = ModelVersion.objects.select_for_update().get(pk=version.pk)
        row.gates = {**row.gates, gate: figures}
        row.save(update_fields=["gates"])
    version.gates = row.gates


def _moved(
    version: ModelVersion, to_state: str, *, by: Any, why: str, forced: bool, percent: int
) -> ModelVersion:
    """Each row is changed only if it still is what was seen. Raises: RegistryError."""
    former = active() if to_state == State.ACTIVE else None
    was, now = version.state, timezone.now()
    try:
        with transaction.atomic():
            if former is not None:
                _set(former, State.RETIRED, now)
                _note(former, State.ACTIVE, by=by, why=f"{version.label} takes over: {why}",
                      forced=forced)  # fmt: skip
            _set(version, to_state, now, percent)
            _note(version, was, by=by, why=why, forced=forced)
    except IntegrityError as error:
        version.state = was
        raise _taken(to_state) from error
    except RegistryError:
        version.state = was
        raise
    log.warning("model %s: %s -> %s%s", version.label, was, to_state, ", forced" if forced else "")
    return version


def _set(version: ModelVersion, state: str, now: Any, percent: int = 0) -> None:
    rows = ModelVersion.objects.filter(pk=version.pk, state=version.state)
    if not rows.update(state=state, canary_percent=percent, changed_at=now):
        raise RegistryError(
            f"{version.label} is not {version.state} any more: somebody moved it just now. "
            "Look again before you move it."
        )
    version.state, version.canary_percent, version.changed_at = state, percent, now


def _note(version: ModelVersion, was: str, *, by: Any, why: str, forced: bool) -> None:
    VersionChange.objects.create(
        version=version, from_state=was, to_state=version.state,
        by=by if getattr(by, "pk", None) else None, forced=forced, why=why[:MOST_WHY_CHARS],
    )  # fmt: skip


def _refuse_illegal(version: ModelVersion, to_state: str, why: str, *, forced: bool) -> None:
    _refuse_empty(why)
    allowed = MOVES.get(version.state, frozenset())
    if forced:
        allowed |= FORCED.get(version.state, frozenset())
    if to_state not in allowed:
        raise RegistryError(
            f"{version.label} is {version.state} and cannot become {to_state}. "
            f"From there it goes to: {_names(allowed) or 'nothing (see rollback_model)'}."
        )


def _refuse_empty(why: str) -> None:
    if not why.strip():
        raise RegistryError("A move needs a reason: say why, for those who read it later.")


def _percent(to_state: str, percent: int) -> int:
    if to_state != State.CANARY:
        return 0
    if not 1 <= percent <= 100:
        raise RegistryError(f"A canary gets 1 to 100 percent of conversations, not {percent}.")
    return percent


def _taken(state: str) -> RegistryError:
    holder = _in(state)
    who = holder.label if holder is not None else "another version, a moment ago,"
    return RegistryError(
        f"There can be one {state} model, and {who} is it. Move that one on, or reject it, first."
    )


def _names(states: Collection[str]) -> str:
    return ", ".join(str(state) for state in State.values if state in states)


# -- going back ------------------------------------------------------------------------------------


def _remember_settings_model(version: ModelVersion) -> None:
    """Before the first promotion: the model that answers from the settings, to roll back to."""
    if active() is not None or VersionChange.objects.filter(to_state=State.ACTIVE).exists():
        return
    options = settings.ASSISTANT["BACKENDS"].get("model", {}).get("OPTIONS", {})
    why = "answered as the model of the settings"
    try:
        found = _registered(Path(options["model_dir"]), State.RETIRED, None, None, why)
    except (KeyError, RegistryError) as error:
        log.warning("before %s nobody answered who could be rolled back to: %s", version, error)
        return
    if found.pk != version.pk and found.state in {State.CANDIDATE, State.REJECTED}:
        _moved(found, State.RETIRED, by=None, why=why, forced=False, percent=0)


def _before(current: ModelVersion) -> ModelVersion | None:
    """Of the retired, the last that became active before ``current`` first did."""
    served = Q(changes__to_state__in=[State.ACTIVE, State.RETIRED])
    rows = ModelVersion.objects.annotate(since=Min("changes__id", filter=served))
    own = rows.get(pk=current.pk).since
    if own is None:  # a row from elsewhere, without a trail
        return None
    return rows.filter(state=State.RETIRED, since__lt=own).order_by("-since").first()
