"""The API does what its description says: thousands of made-up requests to a running server.

All of schemathesis' checks: examples, boundary values, random data and chains of requests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from tests.conftest import ROOT, serving

pytestmark = [pytest.mark.slow, pytest.mark.django_db(transaction=True)]

CONFIG = Path(__file__).with_name("schemathesis.toml")
SEED, MOST_EXAMPLES = 1, 10


def test_no_request_is_answered_otherwise_than_described(
    ana: User, token_of: Any, database_file: Path, tmp_path: Path
) -> None:
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), "run"),
        *(str(ROOT / "docs" / "openapi.yaml"), "--checks", "all", "--continue-on-failure"),
        *("--seed", str(SEED), "--max-examples", str(MOST_EXAMPLES), "--no-color"),
        *("--header", f"Authorization: Bearer {token_of(ana)}"),
    ]
    with serving("uvicorn", database_file, tmp_path) as server:
        done = subprocess.run(
            [*command, "--url", server.http],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=900,
        )
        log = server.log.read_text()
    assert done.returncode == 0, done.stdout[-8_000:] + done.stderr[-2_000:]
    assert "Traceback" not in log
    assert "ERROR" not in log.replace("ERROR django.request Service Unavailable", "")
