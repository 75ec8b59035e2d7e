"""What `pip install` fetches for production: named, hashed, and nothing that runs by itself."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCK = ROOT / "requirements.lock"
#: Files that Python runs at every start, by the package that may bring them.
KNOWN_PTH: set[str] = set()


def locked() -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each locked package."""
    entries = re.split(r"\n(?=\S)", LOCK.read_text().partition("\n\n")[0])
    found = {}
    for entry in entries:
        if named := re.match(r"([\w.-]+)==([^\s;\\]+)", entry):
            found[canonicalize_name(named[1])] = (named[2], entry.count("--hash=sha256:"))
    return found


def wanted() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for line in (*project["dependencies"], *extras["postgres"], *extras["observability"]):
        yield Requirement(line)


def test_the_lock_holds_every_dependency_in_its_range_with_hashes():
    lock = locked()
    assert len(lock) > 60 and all(hashes for _, hashes in lock.values())
    for requirement in wanted():
        version, _ = lock[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_no_locked_package_runs_code_at_every_start_of_python():
    brought, seen = set(), 0
    for name in locked():
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        seen += 1
        brought |= {f"{name}: {file}" for file in files if str(file).endswith(".pth")}
    assert seen > 60 and brought == KNOWN_PTH


@pytest.mark.slow
def test_the_lock_installs_with_hashes_alone():
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run(
        [*command, "--require-hashes", "-r", str(LOCK)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
