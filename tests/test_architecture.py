"""The stack: who may import whom, read from the source; and an engine that is only a library."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

#: From the top; each imports only from what stands below it.
STACK = [
    "config",
    "monitoring",
    "conversations",
    "fallback",
    "assistant",
    "assistant.modelkit",
    "assistant.engine",
]
#: Named by dotted path in settings, never imported by name.
FREE_OF_DJANGO = {"assistant.modelkit", "assistant.engine"}


def layer_of(module: str) -> str | None:
    fitting = [layer for layer in STACK if module == layer or module.startswith(f"{layer}.")]
    return max(fitting, key=len, default=None)


def files() -> Iterator[tuple[str, Path]]:
    for top in ("config", "monitoring", "conversations", "fallback", "assistant"):
        for path in sorted((ROOT / top).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield module.removesuffix(".__init__"), path


def imports(module: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: say whence"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("layer", STACK)
def test_each_layer_imports_only_from_below(layer):
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        if layer_of(module) == layer
        for name in imports(module, path)
        if (other := layer_of(name)) is not None and STACK.index(other) < STACK.index(layer)
    ]
    assert wrong == []


def test_nobody_imports_settings_except_through_django():
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        for name in imports(module, path)
        if name.startswith("config.settings")
    ]
    assert wrong == []


def test_model_code_and_engine_do_not_import_django():
    wrong = [
        f"{module} imports {name}"
        for module, path in files()
        if layer_of(module) in FREE_OF_DJANGO
        for name in imports(module, path)
        if name.split(".")[0] in {"django", "rest_framework", "channels"}
    ]
    assert wrong == []


def test_importing_the_engine_loads_no_django():
    program = "import sys, assistant.engine; sys.exit('django' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_look_at_the_test_itself_finds_a_wrong_import(tmp_path):
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from conversations.turn import Turn")
    (name,) = imports("assistant.wrong", wrong)
    assert STACK.index(layer_of(name)) < STACK.index("assistant")
