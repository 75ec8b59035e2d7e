"""Measurements that nobody runs for months still start, and say what they are for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SCRIPTS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if not path.stem.startswith("test_") and "argparse.ArgumentParser(" in path.read_text()
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_measurement_starts_and_explains_itself(name: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", f"tests.load.{name}", "--help"],
        cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert "usage:" in told.stdout and "--" in told.stdout
