"""A server that starts without what it leans on: at work by rules, or one line and the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, free_port, serving

pytestmark = pytest.mark.chaos

NOBODY = f"redis://127.0.0.1:{free_port()}/0"
MISSING: dict[str, dict[str, str]] = {
    "redis": {"REDIS_URL": NOBODY},
    "model": {"ASSISTANT_BACKEND": "model", "ASSISTANT_MODEL_DIR": "/nowhere/model"},
    "upstream": {
        "OPENAI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1",
        "OPENAI_API_KEY": "key",
        "ASSISTANT_UPSTREAM_MODEL": "big",
    },
}
MISSING["all of them"] = {
    name: value for variables in MISSING.values() for name, value in variables.items()
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("start") / "db.sqlite3"
    done = manage(made.parent, "migrate", "-v0", DATABASE_URL=f"sqlite:///{made}")
    assert done.returncode == 0, done.stderr
    return made


def manage(folder: Path, *arguments: str, **extra: str) -> Any:
    environment = {**os.environ, "ASSISTANT_DATA_DIR": str(folder), **extra}
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("missing", MISSING)
def test_without_a_helper_it_starts_and_answers(
    missing: str, database: Path, tmp_path: Path
) -> None:
    with serving("uvicorn", database, tmp_path, **MISSING[missing]) as server:
        ready(server.http)
        status, told = reply(f"{server.http}/v1/models")
        assert status in (200, 401), told
        assert server.process.poll() is None
    assert "Traceback" not in server.log.read_text()


def test_without_its_database_it_is_alive_and_never_ready(tmp_path: Path) -> None:
    nowhere = f"postgres://nobody:no@127.0.0.1:{free_port()}/none"
    with serving("uvicorn", tmp_path / "none", tmp_path, DATABASE_URL=nowhere) as server:
        for _ in range(3):
            assert reply(f"{server.http}/readyz")[0] == 503
        assert reply(f"{server.http}/livez")[0] == 200


def test_a_data_folder_nobody_may_make_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = manage(tmp_path / "file", "check")
    assert done.returncode != 0
    assert "ASSISTANT_DATA_DIR" in done.stderr.strip().splitlines()[-1]


def ready(http: str) -> None:
    """Within a while: what is loaded is loaded when it is first asked for."""
    for _ in range(100):
        status, told = reply(f"{http}/readyz")
        if status == 200:
            return
        time.sleep(0.2)
    raise AssertionError(told)


def reply(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
