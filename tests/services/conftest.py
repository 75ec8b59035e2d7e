"""A real Redis and a real PostgreSQL on free ports, in temporary folders, for as long as needed.

Where a binary is missing the test is skipped by name; with ``REQUIRE_SERVICES`` set, as in CI, it
fails instead. Nothing of a Redis or PostgreSQL that already runs here is touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Server, free_port, serving

PATIENCE_S = 60


def needed(name: str, package: str) -> str:
    """The path of that program; the test ends here without it."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name) or next(
        (str(place / name) for place in places if (place / name).exists()), None
    )
    if found is None:
        end = pytest.fail if os.environ.get("REQUIRE_SERVICES") else pytest.skip
        end(f"no {name}: apt-get install {package}")
    return found


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


# -- Redis ---------------------------------------------------------------------------------------


@dataclass
class Redis:
    """A Redis that can be killed, hung and brought back on the same port."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @classmethod
    def start(cls, folder: Path, port: int) -> Redis:
        command = [needed("redis-server", "redis-server"), "--port", str(port)]
        command += ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        log = folder / "redis.log"
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        running = cls(folder, port, process)
        wait_until(running.answers, process, log)
        return running

    def answers(self) -> bool:
        with contextlib.suppress(Exception), self.client() as client:
            return bool(client.ping())
        return False

    def client(self) -> Any:
        import redis

        return redis.Redis(port=self.port, socket_timeout=5)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def hang(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def fill(self) -> None:
        """From now on it refuses every write."""
        with self.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", "1mb")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of the test's own."""
    running = Redis.start(tmp_path, free_port())
    yield running
    running.kill()


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Redis]:
    """A Redis for tests that leave it alive."""
    running = Redis.start(tmp_path_factory.mktemp("redis"), free_port())
    yield running
    running.kill()


# -- PostgreSQL ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a database all tests share. PostgreSQL refuses root, so root lends its user."""
    initdb, server = needed("initdb", "postgresql"), needed("postgres", "postgresql")
    owner: dict[str, Any] = {}
    if os.geteuid() == 0:
        owner = {"user": "postgres", "group": "postgres", "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="inhouse-postgres-"))  # pytest's own is closed to others
    try:
        if owner:
            shutil.chown(folder, "postgres", "postgres")
        yield from _postgres(initdb, server, folder, owner)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _postgres(initdb: str, server: str, folder: Path, owner: dict[str, Any]) -> Iterator[str]:
    data, port = folder / "data", free_port()
    made = subprocess.run(
        [initdb, "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8",
         "--locale", "C", "--no-sync"],
        cwd=folder, capture_output=True, text=True, **owner,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    command = [server, "-D", str(data), "-p", str(port), "-k", str(folder), "-F"]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "-c", "listen_addresses=127.0.0.1"],
            cwd=folder, stdout=output, stderr=output, **owner,
        )  # fmt: skip
    url = f"postgres://postgres@127.0.0.1:{port}/postgres"
    try:
        wait_until(lambda: _connects(url), process, log)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # its "fast" shutdown: open connections are ended
        process.wait(PATIENCE_S)


@pytest.fixture
def own_postgres(postgres: str) -> str:
    """The URL of an empty database, for a test that counts rows."""
    import psycopg

    name = f"own_{uuid.uuid4().hex}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres.removesuffix("postgres") + name


def _connects(url: str) -> bool:
    import psycopg

    with contextlib.suppress(psycopg.Error), psycopg.connect(url, connect_timeout=2):
        return True
    return False


# -- the product on top of them ------------------------------------------------------------------

#: What ana says to sign in.
SIGN_IN = {"username": "ana", "password": "a word for a test"}
_PREPARE = f"""
import django
django.setup()
from django.contrib.auth.models import User
from django.core.management import call_command
call_command("migrate", verbosity=0)
User.objects.filter(username="ana").exists() or User.objects.create_user(**{SIGN_IN})
call_command("issue_token", "ana")
"""


def manage(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python ARGS`` with these settings, on the echo backend."""
    environment = {**os.environ, "ASSISTANT_BACKEND": "echo", **variables}
    environment["DJANGO_SETTINGS_MODULE"] = "config.settings"
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip


def prepare(**variables: str) -> str:
    """Migrates, makes ``ana`` and issues a token for her: the token."""
    found = manage("-c", _PREPARE, **variables)
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


@dataclass
class Stack:
    """A served product on Redis and PostgreSQL, with a customer's token."""

    server: Server
    token: str
    database_url: str


@contextlib.contextmanager
def stacked(folder: Path, redis: Redis, database_url: str, **extra: str) -> Iterator[Stack]:
    variables = {
        "ASSISTANT_DATA_DIR": str(folder),
        "REDIS_URL": redis.url,
        "DATABASE_URL": database_url,
        "SECRET_KEY": "one key for every process of a test, long enough to be one",
        **extra,
    }
    token = prepare(**variables)
    with serving("uvicorn", folder / "unused", folder, **variables) as server:
        yield Stack(server, token, database_url)


@pytest.fixture(scope="session")
def stack(
    shared_redis: Redis, postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """One server for all tests that only talk to it."""
    folder = tmp_path_factory.mktemp("stack")
    with stacked(folder, shared_redis, postgres, ASSISTANT_RATE="1000/m") as running:
        yield running
