"""Backends by alias, as settings name them: built on first use, once per process.

Knows how to find and check them (``ASSISTANT["BACKENDS"]``, like Django's CACHES), not what any
of them does; none is imported before it is asked for.
"""

from __future__ import annotations

import threading
from dataclasses import fields
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error
from django.core.signals import setting_changed
from django.utils.module_loading import import_string

from assistant.backends.base import Backend
from assistant.errors import ModelUnavailable

#: Steps of ``ASSISTANT["ROUTE"]`` that are not backends.
OWN_STEPS = frozenset({"reviewed", "cache", "stale", "rules", "human"})

_built: dict[str, Backend] = {}
_lock = threading.Lock()


def get(alias: str) -> Backend:
    """The backend of that name. Raises: ModelUnavailable if it cannot be built from settings."""
    backend = _built.get(alias)
    if backend is None:
        with _lock:
            backend = _built.get(alias) or _built.setdefault(alias, _build(alias))
    return backend


def answering() -> str | None:
    """The alias of the first backend on the route: whose context the history has to fit."""
    return next((step for step in settings.ASSISTANT["ROUTE"] if step not in OWN_STEPS), None)


def built() -> dict[str, Backend]:
    """The backends that were asked for in this process, by alias. Builds none."""
    return dict(_built)


def reset() -> None:
    """Close and forget every backend, so that the next ``get`` reads settings again."""
    with _lock:
        for backend in _built.values():
            backend.close()
        _built.clear()


def _build(alias: str) -> Backend:
    entry = settings.ASSISTANT["BACKENDS"].get(alias)
    if entry is None:
        raise ModelUnavailable(f"There is no backend {alias!r} in ASSISTANT['BACKENDS'].")
    problems = _problems(alias, entry)
    if problems:
        raise ModelUnavailable(" ".join(problems))
    cls = import_string(entry["BACKEND"])
    backend: Backend = cls(alias, cls.options_class(**entry.get("OPTIONS", {})))
    return backend


def _problems(alias: str, entry: dict[str, Any]) -> list[str]:
    try:
        cls = import_string(entry["BACKEND"])
    except (KeyError, ImportError) as error:
        return [f"Backend {alias!r} cannot be imported: {error}."]
    known = {field.name for field in fields(cls.options_class)}
    return [
        f"Backend {alias!r} has no option {key!r}; it knows {', '.join(sorted(known)) or 'none'}."
        for key in entry.get("OPTIONS", {})
        if key not in known
    ]


def check_settings(**_: Any) -> list[CheckMessage]:
    """``manage.py check``: unknown backends, options and route steps are refused by name."""
    conf = settings.ASSISTANT
    messages = [p for alias, entry in conf["BACKENDS"].items() for p in _problems(alias, entry)]
    messages += [
        f"ASSISTANT['ROUTE'] names {step!r}, which is neither {', '.join(sorted(OWN_STEPS))} nor "
        "a backend."
        for step in conf["ROUTE"]
        if step not in OWN_STEPS and step not in conf["BACKENDS"]
    ]
    return [Error(message, id="assistant.E001") for message in messages]


def _on_setting_changed(*, setting: str, **_: Any) -> None:
    if setting == "ASSISTANT":
        reset()


setting_changed.connect(_on_setting_changed)
