"""``manage.py doctor``: one line for each thing the product stands on, and how to mend it."""

from __future__ import annotations

import argparse
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.management.base import BaseCommand, CommandParser

State = Literal["ok", "note", "broken"]


@dataclass(frozen=True, slots=True)
class Finding:
    """``mend`` says what to do; empty where nothing needs doing."""

    what: str
    state: State
    detail: str
    mend: str = ""


class Command(BaseCommand):
    help = (
        "Check settings, model files, Redis, database, migrations, the larger model if one is set, "
        "and the port. Exit 1 if broken."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = "examples:\n  manage.py doctor\n  manage.py doctor --port 9000"
        parser.add_argument("--port", type=int, default=8000, help="the port to serve on")

    def handle(self, *args: Any, **options: Any) -> None:
        broken = 0
        for finding in findings(options["port"]):
            broken += finding.state == "broken"
            self.stdout.write(self._line(finding))
        if broken:
            self.stdout.write(f"\n{broken} thing(s) broken.")
            raise SystemExit(1)
        self.stdout.write("\nEverything needed is in place.")

    def _line(self, finding: Finding) -> str:
        style = {"ok": self.style.SUCCESS, "note": self.style.WARNING, "broken": self.style.ERROR}
        mark = style[finding.state](finding.state.ljust(7))
        mend = f"\n{'':27}-> {finding.mend}" if finding.mend else ""
        return f"{mark} {finding.what.ljust(18)} {finding.detail}{mend}"


def findings(port: int) -> Iterator[Finding]:
    """Each check in turn; one that raises is reported as broken, and the rest still run."""
    checks: tuple[tuple[str, Callable[[], Finding]], ...] = (
        ("settings", _settings),
        ("data folder", _data_folder),
        ("database", _database),
        ("migrations", _migrations),
        ("cache", _cache),
        ("model", _model),
        ("upstream", _upstream),
        ("port", lambda: _port(port)),
    )
    for what, check in checks:
        try:
            yield check()
        except Exception as error:
            yield Finding(what, "broken", f"{type(error).__name__}: {error}", _MEND.get(what, ""))


_MEND = {
    "database": "Is the server running? DATABASE_URL unset means SQLite in the data folder.",
    "migrations": "python manage.py migrate",
    "upstream": "See OPENAI_BASE_URL, OPENAI_API_KEY and ASSISTANT_UPSTREAM_MODEL.",
    "cache": "Is Redis running at REDIS_URL? Unset it to use the memory of one process.",
}


def _settings() -> Finding:
    from django.core import checks

    found = [m for m in checks.run_checks() if m.level >= checks.WARNING and not m.is_silenced()]
    if any(message.level >= checks.ERROR for message in found):
        return Finding("settings", "broken", found[0].msg, found[0].hint or "manage.py check")
    if settings.DEBUG:
        return Finding("settings", "note", "DEBUG is on", "Unset DEBUG before production.")
    if found:
        return Finding("settings", "note", found[0].msg, found[0].hint or "manage.py check")
    return Finding("settings", "ok", "system checks pass")


def _data_folder() -> Finding:
    folder = Path(settings.DATA_DIR)
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        return Finding(
            "data folder", "broken", f"{folder}: {error.strerror}",
            "Make it writable, or set ASSISTANT_DATA_DIR.",
        )  # fmt: skip
    return Finding("data folder", "ok", str(folder))


def _database() -> Finding:
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    return Finding("database", "ok", connection.display_name)


def _migrations() -> Finding:
    from django.db import connection
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    waiting = executor.migration_plan(executor.loader.graph.leaf_nodes())
    if waiting:
        return Finding("migrations", "broken", f"{len(waiting)} to apply", _MEND["migrations"])
    return Finding("migrations", "ok", "all applied")


def _cache() -> Finding:
    from django.core.cache import cache

    if not settings.REDIS_URL:
        return Finding("cache", "ok", "memory of this process (one process only)")
    began = time.perf_counter()
    cache.set("assistant:doctor", "here", 5)
    if cache.get("assistant:doctor") != "here":
        return Finding("cache", "broken", "Redis does not keep what is written", _MEND["cache"])
    return Finding("cache", "ok", f"Redis, {(time.perf_counter() - began) * 1000:.0f} ms")


def _model() -> Finding:
    from assistant.backends.onnx import OnnxBackend, Options
    from assistant.errors import ModelUnavailable

    options = settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]
    folder, mend = _folder(options["model_dir"])
    backend = OnnxBackend("doctor", Options(**{**options, "model_dir": folder, "max_batch": 1}))
    began = time.perf_counter()
    try:
        manifest = backend.engine.manifest
    except ModelUnavailable as error:
        return Finding("model", "broken", str(error), mend)
    finally:
        backend.close()
    assert manifest is not None
    size = sum(entry.bytes for entry in manifest.files.values()) / 1e6
    took = time.perf_counter() - began
    if manifest.runner == "plain":
        return Finding(
            "model", "note", f"{manifest.name} runs on the plain runner, the slow one",
            "a Llama, Mistral or Qwen checkpoint can be built for speed: manage.py build_model",
        )  # fmt: skip
    return Finding(
        "model", "ok",
        f"{manifest.name} {manifest.version}, {manifest.quant}, {size:.1f} MB, "
        f"checked and started in {took:.1f} s",
    )  # fmt: skip


def _upstream() -> Finding:
    """Whether the larger model's server can be reached and knows the model; no words are sent."""
    from assistant import backends
    from assistant.backends.openai import OpenAIBackend

    if "upstream" not in settings.ASSISTANT["BACKENDS"]:
        return Finding("upstream", "ok", "no larger model is set")
    backend = backends.get("upstream")
    assert isinstance(backend, OpenAIBackend)
    began, wanted = time.perf_counter(), backend.options.model
    names = async_to_sync(backend.models)()
    took = f"{(time.perf_counter() - began) * 1000:.0f} ms"
    if wanted in names:
        return Finding("upstream", "ok", f"{wanted}, {took}")
    if names:
        return Finding(
            "upstream", "note", f"the server does not list {wanted}, {took}",
            f"It has {', '.join(names[:5])}: set ASSISTANT_UPSTREAM_MODEL, unless it is an alias.",
        )  # fmt: skip
    return Finding("upstream", "ok", f"reached, {took}; it does not tell which models it has")


def _folder(of_settings: str) -> tuple[str, str]:
    """The folder of the version that should answer, and what to do if it cannot."""
    from django.db import DatabaseError

    from assistant import registry

    try:
        active = registry.active()
    except DatabaseError:  # another line of the report tells that
        active = None
    if active is None:
        return of_settings, ""
    return active.folder, f"{active.label} is active: manage.py rollback_model"


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return Finding(
                "port", "note", f"{port} is taken",
                "Stop the other server, or use another port: manage.py demo --port 8001",
            )  # fmt: skip
    return Finding("port", "ok", f"{port} is free")
