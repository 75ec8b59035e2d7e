"""The README tells the truth: settings, commands, links, stack and snippets follow the code."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from django.contrib.auth.models import User
from django.core.management import get_commands

from config import settings as settings_module
from tests.conftest import COMMANDS, serving

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def settings_rows() -> list[str]:
    return [
        f"| `{variable.name}` | {f'`{variable.default}`' if variable.default else 'unset'} "
        f"| {variable.help} |"
        for variable in settings_module.ENVIRONMENT.values()
    ]


def test_the_settings_table_is_the_settings_module() -> None:
    section = README.split("## Settings")[1].split("\n## ")[0]
    listed = [line for line in section.splitlines() if line.startswith("| `")]
    assert listed == settings_rows()


def test_every_command_in_the_readme_exists_and_every_command_is_in_it() -> None:
    ours = {
        name
        for name, app in get_commands().items()
        if app in {"assistant", "conversations", "fallback", "monitoring"}
    }
    table = README.split("## Commands")[1].split("\n## ")[0]
    assert set(re.findall(r"`manage\.py (\w+)", table)) == ours
    assert set(re.findall(r"manage\.py (\w+)", README)) <= set(get_commands())


def test_every_link_and_picture_in_the_papers_is_there() -> None:
    for name in ("README.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        targets = re.findall(r"\]\(([^)#:]+)\)", text)
        missing = [target for target in targets if not (ROOT / target).exists()]
        assert not missing, f"{name} points at {missing}"


def test_every_path_named_in_the_readme_is_there() -> None:
    folders = "assistant|conversations|fallback|monitoring|config"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]+)`", README))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_stack_in_the_readme_is_the_one_that_is_tested() -> None:
    from tests.test_architecture import STACK

    block = README.split("**The stack**")[1].split("```")[1]
    assert [line.split()[0] for line in block.strip().splitlines()] == list(STACK)


def test_the_servers_of_the_tests_are_started_as_the_readme_says() -> None:
    readme = README.replace("\\\n", " ")
    (line,) = re.findall(r"^uvicorn .*", readme, re.M)
    values = {"--host", "--port", "--timeout-graceful-shutdown"}

    def switches(words: list[str]) -> set[str]:
        return {word for word in words if word.startswith("--")} - values

    assert switches(shlex.split(line)) == switches(COMMANDS["uvicorn"])
    assert "--no-proxy-headers" in line and "--ws-max-size" in line


@pytest.mark.slow
@pytest.mark.parametrize("block", re.findall(r"```bash\n(.*?)```", README, re.S))
def test_shell_snippets_parse_and_use_real_options(block: str) -> None:
    subprocess.run(["bash", "-n"], input=block.encode(), check=True)
    for line in block.replace("\\\n", " ").splitlines():
        for part in re.findall(r"python manage\.py ([^&|)]+)", line):
            name, *arguments = shlex.split(part)
            options = {a.split("=")[0] for a in arguments if a.startswith("--")}
            command = [sys.executable, "manage.py", name, "--help"]
            known = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            assert all(option in known.stdout for option in options), (name, options)


@pytest.mark.slow
@pytest.mark.django_db(transaction=True)
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_api_snippet_does_what_it_says(
    ana: User, token_of: Callable[[User], str], database_file: Path, tmp_path: Path
) -> None:
    snippet = next(b for b in re.findall(r"```bash\n(.*?)```", README, re.S) if "curl -sN" in b)
    with serving("uvicorn", database_file, tmp_path, ASSISTANT_BACKEND="model") as server:
        script = snippet.replace("http://127.0.0.1:8000", server.http)
        script = script.replace("python -c", f"{sys.executable} -c")
        done = subprocess.run(
            ["bash", "-eu", "-c", script],
            env={**os.environ, "TOKEN": token_of(ana)},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    assert '"route":"model"' in done.stdout.replace(" ", "")
    assert "event: message.delta" in done.stdout
    assert "event: message.completed" in done.stdout
