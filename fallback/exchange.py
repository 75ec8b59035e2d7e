"""Rules as a YAML or JSON text and back: what ``dump_rules`` writes, ``load_rules`` reads.

A file holds a list of rules; a field that is left out has its default. Knows the fields and their
faults, not where a text comes from. Sync: touches the database.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from django.core.exceptions import ValidationError
from django.db import transaction
from django.utils.dateparse import parse_datetime
from django.utils.timezone import is_aware

from fallback.models import Rule

#: Largest file, and most rules in one.
MAX_FILE_BYTES = 5 << 20
MAX_RULES = 5_000
FIELDS = (
    "name",
    "patterns",
    "keywords",
    "examples",
    "intent",
    "knows_intent",
    "answer",
    "buttons",
    "hand_over",
    "language",
    "priority",
    "active",
    "active_from",
    "active_until",
    "must_match",
    "must_not_match",
)


class RuleFileError(ValueError):
    """A file of rules cannot be used; ``faults``: one line each, with the rule and the field."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)


@dataclass(slots=True)
class Changes:
    """What loading did, or would do: names of rules."""

    created: list[str] = field(default_factory=list)
    updated: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)


_DEFAULT = Rule()

# --- Out -----------------------------------------------------------------------------------------


def dump(rules: Iterable[Rule], form: str) -> str:
    """The rules as ``yaml`` or ``json``; fields at their default are left out."""
    rows = [_row(rule) for rule in rules]
    if form == "json":
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    return yaml.dump(rows, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _row(rule: Rule) -> dict[str, Any]:
    row = {}
    for name in FIELDS:
        value = getattr(rule, name)
        if name in ("name", "answer") or value != getattr(_DEFAULT, name):
            row[name] = value.isoformat() if isinstance(value, datetime) else value
    return row


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and a text of several lines as it reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


# --- In ------------------------------------------------------------------------------------------


def read(path: Path) -> list[Rule]:
    """The rules of a file, unsaved and each checked alone. Raises: RuleFileError."""
    rows = _rows(path)
    faults: list[str] = []
    rules = [_rule(row, f"rule {at}", faults) for at, row in enumerate(rows, 1)]
    names = [rule.name for rule in rules]
    faults += [f'"{name}" is there twice.' for name in sorted(set(names)) if names.count(name) > 1]
    if faults:
        raise RuleFileError(faults)
    return rules


def _rows(path: Path) -> list[Any]:
    if path.suffix.lower() not in (".yaml", ".yml", ".json"):
        raise RuleFileError([f"{path} is neither .yaml, .yml nor .json. Rename it."])
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RuleFileError([f"{path} cannot be read: {error.strerror}."]) from error
    if len(data) > MAX_FILE_BYTES:
        raise RuleFileError([f"{path} is over {MAX_FILE_BYTES >> 20} MiB. Split it."])
    try:
        text = data.decode("utf-8-sig")
        is_json = path.suffix.lower() == ".json"
        found = json.loads(text) if is_json else yaml.load(text, _Loader)  # noqa: S506 - it is safe
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise RuleFileError([f"{path} is not valid: {' '.join(str(error).split())}"]) from error
    if not isinstance(found, list) or not found or len(found) > MAX_RULES:
        raise RuleFileError([f"{path} has to hold a list of 1 to {MAX_RULES:,} rules."])
    return found


class _Loader(yaml.SafeLoader):
    """Refuses aliases: a short text of them unfolds into gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def _rule(row: Any, where: str, faults: list[str]) -> Rule:
    """The row as a rule; what is wrong with it is added to ``faults``."""
    if not isinstance(row, dict):
        faults.append(f"{where} is not a mapping of fields.")
        return Rule(name=where)
    where = f'{where} "{row["name"]}"' if isinstance(row.get("name"), str) else where
    unknown = [str(name) for name in row if name not in FIELDS]
    if unknown:
        faults.append(f"{where}: unknown {', '.join(unknown)}. Fields are {', '.join(FIELDS)}.")
    rule = Rule(**{name: row[name] for name in FIELDS if name in row})
    for name in ("active_from", "active_until"):
        if row.get(name) is not None:
            setattr(rule, name, _time(row[name], f"{where}: {name}", faults))
    try:
        rule.full_clean(validate_unique=False, validate_constraints=False)
    except ValidationError as error:
        faults += [f"{where}: {name}: {' '.join(of)}" for name, of in error.message_dict.items()]
    return rule


def _time(value: Any, where: str, faults: list[str]) -> datetime | None:
    found = value if isinstance(value, datetime) else None
    with suppress(ValueError):
        found = parse_datetime(value) if isinstance(value, str) else found
    if found is not None and is_aware(found):
        return found
    faults.append(f"{where}: {value} is not a time with its zone, such as 2026-12-24T18:00:00Z.")
    return None


def load(rules: Sequence[Rule], *, replace: bool = False) -> Changes:
    """Save the rules over those of the same name; ``replace`` deletes all others.

    All or nothing; in a transaction that is rolled back it only tells.
    """
    changes = Changes()
    with transaction.atomic():
        there = {rule.name: rule for rule in Rule.objects.select_for_update()}
        for rule in rules:
            old = there.pop(rule.name, None)
            rule.pk = old.pk if old is not None else None
            same = old is not None and _row(old) == _row(rule)
            into = changes.unchanged if same else changes.updated if old else changes.created
            into.append(rule.name)
            if not same:
                rule.save()
        if replace:
            changes.deleted += sorted(there)
            Rule.objects.filter(name__in=there).delete()
    return changes
