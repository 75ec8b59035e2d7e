"""A tiny model with seeded random weights: its text is noise, everything around it is real."""

from __future__ import annotations

from pathlib import Path

import pytest

from assistant.modelkit.build import build_random


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_random("tiny", folder, quant="row8", seed=0)
    return folder
