"""The cast and the stage: three people, the echo backend, a database in a file, real servers.

``ana`` and ``ben`` are customers, ``sam`` is staff. The database is a file because answers are
stored from other threads, and because the servers below are processes of their own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.cache import caches
from django.test import Client

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct horse battery"


#: What drives a browser or starts Redis, PostgreSQL and servers takes its time.
SLOW_FOLDERS = frozenset({"browser", "services"})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not SLOW_FOLDERS.isdisjoint(item.path.relative_to(ROOT).parts):
            item.add_marker("slow")


@pytest.fixture(scope="session")
def database_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("database") / "test.sqlite3"


@pytest.fixture(scope="session")
def django_db_modify_db_settings(database_file: Path) -> None:
    default = django_settings.DATABASES["default"]
    if default["ENGINE"].endswith("sqlite3"):
        default.setdefault("TEST", {})["NAME"] = str(database_file)


@pytest.fixture(autouse=True)
def stage(settings: Any) -> Iterator[None]:
    """Echo answers, nobody is limited, nothing is left over from the test before."""
    from assistant import backends
    from conversations.running import running
    from fallback import answers, quarantine, shared

    running._turns.clear()  # one that was opened and never read holds its place for seconds
    settings.ASSISTANT = {
        **settings.ASSISTANT,
        "ROUTE": ["reviewed", "cache", "echo", "stale", "rules", "human"],
        "ABANDON_GRACE_S": 0.05,
    }
    settings.ASSISTANT_RATE = None
    settings.ASSISTANT_ANONYMOUS = False
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    for cache in caches.all():
        cache.clear()
    shared.forget()
    answers.forget()
    yield
    backends.reset()
    quarantine.forget()


def _person(name: str, **kwargs: Any) -> User:
    return User.objects.create_user(name, f"{name}@example.com", PASSWORD, **kwargs)


@pytest.fixture
def ana(db: None) -> User:
    return _person("ana")


@pytest.fixture
def ben(db: None) -> User:
    return _person("ben")


@pytest.fixture
def sam(db: None) -> User:
    return _person("sam", is_staff=True)


@pytest.fixture
def token_of() -> Callable[[User], str]:
    from knox.models import AuthToken

    return lambda user: str(AuthToken.objects.create(user)[1])


@pytest.fixture
def cookie_of() -> Callable[[User], str]:
    """The value of a session cookie of that user."""

    def cookie(user: User) -> str:
        client = Client()
        client.force_login(user)
        return client.cookies["sessionid"].value

    return cookie


# --- Real servers --------------------------------------------------------------------------------


@dataclass
class Server:
    """A server process on the test's own database."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}"


COMMANDS = {
    "uvicorn": [
        *("uvicorn", "--port", "{port}", "--timeout-graceful-shutdown", "5"),
        *("--no-proxy-headers", "--no-server-header", "--ws-max-size", "65536"),
        *("--ws", "config.sockets:BoundedSockets"),
    ],
    "daphne": ["daphne", "-p", "{port}"],
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(name: str, database: Path, folder: Path, **extra: str) -> Iterator[Server]:
    """That server, started and answering; stopped and its log kept afterwards."""
    port, log = free_port(), folder / f"{name}.log"
    environment = {
        **os.environ,
        "SECRET_KEY": django_settings.SECRET_KEY,
        "DATABASE_URL": f"sqlite:///{database}",
        "ASSISTANT_DATA_DIR": str(folder),
        "ASSISTANT_BACKEND": "echo",
        "ASSISTANT_RATE": "off",
        "ASSISTANT_ANONYMOUS": "true",
        "ASSISTANT_MAX_NEW_TOKENS": "900",
        **extra,
    }
    command = [part.format(port=port) for part in COMMANDS[name]]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "config.asgi:application"],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
        try:
            _wait_for(port, process, log)
            yield Server(name, port, process, log)
        finally:
            process.terminate()
            process.wait(15)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1_200):  # a machine that trains a model beside takes half a minute
        assert process.poll() is None, log.read_text()
        address = f"http://127.0.0.1:{port}/livez"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.05)
    raise AssertionError(f"no answer on port {port}:\n{log.read_text()}")


@pytest.fixture(scope="session", params=["uvicorn", "daphne"])
def server(
    request: pytest.FixtureRequest,
    django_db_setup: None,
    database_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    """Each real server in turn."""
    folder = tmp_path_factory.mktemp(request.param)
    with serving(request.param, database_file, folder) as running:
        yield running
