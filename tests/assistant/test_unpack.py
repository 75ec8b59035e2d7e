"""A built model gives its weights back: unpacked and built again it writes what it wrote before."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from assistant.engine.drafts import FILE as DRAFTS
from assistant.engine.manifest import MODEL, Manifest
from assistant.engine.wide import FILE as WIDE
from assistant.modelkit.build import build
from assistant.modelkit.checkpoint import SHAPES, Checkpoint, write_checkpoint, write_random
from assistant.modelkit.quality import Batch, generate, open_session
from assistant.modelkit.quantise import quantise_blocks, quantise_rows
from assistant.modelkit.unpack import _blocks, _matrix, is_built, unpack
from assistant.modelkit.weights import CheckpointError

PROMPTS = [[3, 40, 50, 60, 4], [3, 100, 101, 4], [3, 7, 200, 300, 400, 4], [3, 99, 4]]
TOKENS = 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_random("tiny", folder, seed=3)
    return folder


def greedy(folder: Path) -> np.ndarray:
    return generate(open_session(str(folder / MODEL)), SHAPES["tiny"], PROMPTS, TOKENS)


def again(checkpoint: Path, quant: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Greedy ids of a build, and of the build of what was unpacked from it."""
    build(checkpoint, folder / "one", quant)
    unpack(folder / "one", folder / "back")
    build(folder / "back", folder / "two", quant)
    return greedy(folder / "one"), greedy(folder / "two")


@pytest.mark.parametrize("quant", ["fp32", "row8", "int4"])
def test_unpacked_and_built_again_it_writes_the_same(
    checkpoint: Path, quant: str, tmp_path: Path
) -> None:
    # These schemes keep a matrix's codes when it is quantised a second time.
    one, two = again(checkpoint, quant, tmp_path)
    assert np.array_equal(one, two)


def test_static8_measures_anew_and_is_no_further_from_full_precision(
    checkpoint: Path, tmp_path: Path
) -> None:
    again(checkpoint, "static8", tmp_path)
    build(checkpoint, tmp_path / "fp32", "fp32")
    right, one, two = (logprobs(tmp_path / name) for name in ("fp32", "one", "two"))
    assert np.abs(two - right).mean() <= 1.5 * np.abs(one - right).mean()
    assert np.abs(two - one).mean() <= 1.5 * np.abs(one - right).mean()


def logprobs(folder: Path) -> np.ndarray:
    session = open_session(str(folder / MODEL))
    return Batch(session, SHAPES["tiny"], len(PROMPTS), 16).step(PROMPTS)


def test_full_precision_comes_back_bit_by_bit(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "built", "fp32")
    unpack(tmp_path / "built", tmp_path / "back")
    one, two = Checkpoint.open(checkpoint), Checkpoint.open(tmp_path / "back")
    assert one.shape == two.shape
    for name in one.shape.tensors():
        assert np.array_equal(one.tensor(name), two.tensor(name)), name


@pytest.mark.parametrize(("quant", "error"), [("row8", 0.005), ("int4", 0.15)])
def test_quantised_weights_come_back_as_near_as_their_bits_allow(
    checkpoint: Path, quant: str, error: float, tmp_path: Path
) -> None:
    build(checkpoint, tmp_path / "built", quant)
    unpack(tmp_path / "built", tmp_path / "back")
    one, two = Checkpoint.open(checkpoint), Checkpoint.open(tmp_path / "back")
    for name in one.shape.tensors():
        largest = np.abs(one.tensor(name)).max()
        assert np.abs(one.tensor(name) - two.tensor(name)).max() <= error * largest, name


def test_a_head_of_its_own_comes_back(tmp_path: Path) -> None:
    from dataclasses import replace

    write_checkpoint(tmp_path / "one", replace(SHAPES["tiny"], tie_word_embeddings=False))
    build(tmp_path / "one", tmp_path / "built", "row8")
    unpack(tmp_path / "built", tmp_path / "back")
    one, two = Checkpoint.open(tmp_path / "one"), Checkpoint.open(tmp_path / "back")
    assert np.abs(one.head - two.head).max() < 0.02
    assert np.abs(one.embedding - two.embedding).max() < 0.02


def test_an_embedding_stored_only_column_by_column_is_read_too() -> None:
    table = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    values, scales = quantise_rows(table)
    older = {"embed.int8": values.T, "embed.scale": scales, "embed.row_scale": scales[:, None]}
    assert np.abs(_matrix(older, "embed", 8) - table).max() < 0.02


def test_blocks_of_four_bits_stand_for_their_numbers_again() -> None:
    matrix = np.random.default_rng(1).standard_normal((6, 50)).astype(np.float32)
    back = _blocks(*quantise_blocks(matrix))[:, :50]
    assert np.abs(back - matrix).max() <= np.abs(matrix).max() / 8


def test_calibration_intents_and_name_come_back_and_old_measurements_do_not(
    tmp_path: Path, checkpoint: Path
) -> None:
    build(checkpoint, tmp_path / "built", "row8")
    before = Manifest.load(tmp_path / "built")
    unpack(tmp_path / "built", tmp_path / "back")
    own = json.loads((tmp_path / "back" / "inhouse.json").read_text())
    assert (own["name"], own["version"]) == (before.name, before.version)
    assert own["calibration"]["answer_from"] == before.calibration.answer_from
    assert own["intents"] == dict(before.intents) and own["scope"]["in"] == before.scope[0]
    assert "quantised" not in own["quality"]
    tokenizer = (tmp_path / "back" / "tokenizer.json").read_bytes()
    assert tokenizer == (checkpoint / "tokenizer.json").read_bytes()


def test_the_bundled_model_can_be_unpacked(tmp_path: Path) -> None:
    from django.conf import settings

    bundled = Path(settings.BASE_DIR) / "assistant" / "bundled" / "support-en"
    assert is_built(bundled)
    manifest = unpack(bundled, tmp_path / "back")
    opened = Checkpoint.open(tmp_path / "back")
    assert opened.shape.vocab_size == manifest.architecture.vocab_size
    for name in (WIDE, DRAFTS):
        assert (tmp_path / "back" / name).read_bytes() == (bundled / name).read_bytes()
    assert not is_built(tmp_path / "back")


def test_what_stood_there_is_replaced_as_a_whole(checkpoint: Path, tmp_path: Path) -> None:
    build(checkpoint, tmp_path / "built", "row8")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "left.txt").write_text("over from before")
    unpack(tmp_path / "built", tmp_path / "back")
    assert not (tmp_path / "back" / "left.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "built"]


def test_weights_with_parts_that_are_not_trained_here_are_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    write_checkpoint(tmp_path / "one", replace(SHAPES["tiny"], family="qwen2"))
    build(tmp_path / "one", tmp_path / "built", "row8")
    with pytest.raises(CheckpointError, match=r"holds layer_0\.qkv\.bias"):
        unpack(tmp_path / "built", tmp_path / "back")
    assert not (tmp_path / "back").exists()
