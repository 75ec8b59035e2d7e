"""The engines we compare with run the model we run: greedy ids of all of them, token by token.

    PEERS_PYTHON=/path/to/python pytest -m "peers or train" tests/load/test_peers.py

Needs the extra ``peers`` (for optimum ``train``), in this interpreter or in the one named.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from assistant.benchmark.lineup import Lineup
from assistant.benchmark.peers import EXTRA

PYTHON = os.environ.get("PEERS_PYTHON", sys.executable)
#: Peer with an exact variant, the module it needs.
EXACT = {"llama.cpp": "llama_cpp", "optimum": "optimum.onnxruntime"}


def has(module: str) -> bool:
    found = subprocess.run([PYTHON, "-c", f"import {module}"], capture_output=True)
    return found.returncode == 0


@pytest.mark.parametrize(
    "peer",
    [
        pytest.param("llama.cpp", marks=pytest.mark.peers),
        pytest.param("optimum", marks=pytest.mark.train),
    ],
)
def test_a_peer_writes_what_our_fp32_build_writes(peer: str, tmp_path: Path) -> None:
    if not has(EXACT[peer]):
        pytest.skip(f"{peer} is not installed: {EXTRA}")
    lineup = Lineup(
        model=tmp_path, random="15m", cache=tmp_path, schemes=(), peers=(peer,),
        pythons={"": PYTHON}, threads=2,
    )  # fmt: skip
    (said,) = lineup.check((5, 64), 32, timeout_s=600).values()
    assert said == "same model as ours: 2 of 2 greedy answers of 32 tokens identical"
