"""A process that may have no more memory: the model's answers fail typed, and it lives on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.chaos

#: The engine is loaded with all memory, asked with hardly any more, and asked again with all.
ASKS = """
import json, resource, sys
from pathlib import Path
from assistant.engine import Engine, EngineConfig, EngineError

def answer(length):
    try:
        engine.start()
        answer = engine.submit([300] * length, max_new_tokens=8)
        return [token.id for tokens in answer.tokens_sync() for token in tokens]
    except EngineError as error:
        return type(error).__name__

room = dict(step_tokens=1024, most_step_s=60, context_tokens=1024)
engine = Engine(EngineConfig(Path(sys.argv[1]), max_batch=1, threads=1, **room))
told = [answer(8)]
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))
told.append(answer(1000))
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
told += [answer(8), answer(1000)]
print(json.dumps(told))
engine.close()
"""


def test_an_answer_there_is_no_memory_for_fails_typed_and_the_next_is_written() -> None:
    model = ROOT / "assistant" / "bundled" / "support-en"
    asked = [sys.executable, "-c", ASKS, str(model)]
    # Blocks of their own for what is large, so that no heap has room left for it.
    heap = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(asked, cwd=ROOT, env=heap, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    before, without, after, whole = json.loads(done.stdout.splitlines()[-1])
    assert without == "EngineCrashed"
    assert after == before and len(before) == 8
    assert len(whole) == 8
