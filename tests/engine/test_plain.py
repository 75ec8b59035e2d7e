"""The plain runner over a decoder with the inputs and outputs of optimum's exports.

The decoder is small and written here, so that it runs where torch is not; exports of real
architectures are tested in ``tests/assistant/test_generic.py``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from assistant.engine import Engine, EngineConfig, Sampling
from assistant.engine.manifest import Architecture, ManifestError
from assistant.engine.plain import PlainRunner, _groups
from assistant.engine.runner import Batch, batching_error
from assistant.engine.sampling import Floats
from assistant.engine.worker import Loaded
from tests.engine.conftest import ids

SHAPE = Architecture(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    intermediate_size=64, vocab_size=97, rms_norm_eps=1e-5, rope_theta=1e4,
    tie_word_embeddings=True, max_position_embeddings=128,
)  # fmt: skip
HEADS, WIDTH, HIDDEN = 2, 16, 32


def weights() -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    sizes: dict[str, tuple[int, ...]] = {"embed": (97, 32), "places": (128, 32)}
    for layer in range(2):
        sizes |= {f"{name}{layer}": (32, 32) for name in "qkvo"}
    return {
        name: rng.standard_normal(size).astype(np.float32) * (0.5 if len(name) > 2 else 0.3)
        for name, size in sizes.items()
    }


class Graph:
    """Nodes one after another, each named after its output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants = [numpy_helper.from_array(one, name) for name, one in weights().items()]

    def __call__(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def whole(self, *values: int) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def number(self, value: float) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(value, np.float32), name))
        return name

    def heads(self, hidden: str, weight: str) -> str:
        split = self("Reshape", self("MatMul", hidden, weight), self.whole(0, 0, HEADS, WIDTH))
        return self("Transpose", split, perm=[0, 2, 1, 3])

    def allowed(self) -> str:
        """Each token sees what the mask leaves of the tokens up to itself."""
        total = self("Size", self("Gather", "attention_mask", self.whole(0), axis=0))
        new = self("Size", self("Gather", "input_ids", self.whole(0), axis=0))
        zero, one = self("Squeeze", self.whole(0)), self("Squeeze", self.whole(1))
        places = self("Range", zero, total, one)
        mine = self("Range", self("Sub", total, new), total, one)
        causal = self("LessOrEqual", places, self("Unsqueeze", mine, self.whole(1)))
        seen = self("Cast", "attention_mask", to=TensorProto.BOOL)
        return self("And", causal, self("Unsqueeze", seen, self.whole(1, 2)))

    def layer(self, at: int, hidden: str, allowed: str) -> str:
        query = self.heads(hidden, f"q{at}")
        both = []
        for side, letter in (("key", "k"), ("value", "v")):
            new = self.heads(hidden, f"{letter}{at}")
            past, present = (f"{when}.{at}.{side}" for when in ("past_key_values", "present"))
            self.nodes.append(helper.make_node("Concat", [past, new], [present], axis=2))
            both.append(present)
        scores = self("MatMul", query, self("Transpose", both[0], perm=[0, 1, 3, 2]))
        scores = self("Where", allowed, self("Mul", scores, self.number(0.25)), self.number(-1e30))
        mixed = self("MatMul", self("Softmax", scores), both[1])
        mixed = self("Transpose", mixed, perm=[0, 2, 1, 3])
        merged = self("Reshape", mixed, self.whole(0, 0, HIDDEN))
        return self("Add", hidden, self("MatMul", merged, f"o{at}"))


POSITIONS = ["given", "from the mask", "from the past"]  # as most exports, OPT's and Gemma's


def exported(path: Path, positions: str = "given", **changes: Any) -> Path:
    """Writes the decoder."""
    graph = Graph()
    where = "position_ids"
    if positions != "given":
        seen = "attention_mask"
        if positions == "from the past":  # ones, whatever is masked
            seen = graph("Add", graph("Mul", seen, graph.whole(0)), graph.whole(1))
        new = graph("Gather", graph("Shape", "input_ids"), graph.whole(1))
        counted = graph("CumSum", seen, graph.whole(1))
        counted = graph("Slice", counted, graph("Neg", new), graph.whole(1 << 40), graph.whole(1))
        where = graph("Sub", counted, graph.whole(1))
    hidden = graph("Add", graph("Gather", "embed", "input_ids"), graph("Gather", "places", where))
    allowed = graph.allowed()
    for at in range(2):
        hidden = graph.layer(at, hidden, allowed)
    back = graph("Transpose", "embed", perm=[1, 0])
    graph.nodes.append(helper.make_node("MatMul", [hidden, back], ["logits"]))
    integers = ["input_ids", "attention_mask", *(["position_ids"] * (positions == "given"))]
    inputs = [
        helper.make_tensor_value_info(one, TensorProto.INT64, ["b", None]) for one in integers
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", None, 97])]
    for at in range(2):
        for side in ("key", "value"):
            shape = ["b", changes.get("heads", HEADS), None, WIDTH]
            named = f"{changes.get('past', 'past_key_values')}.{at}.{side}"
            inputs.append(helper.make_tensor_value_info(named, TensorProto.FLOAT, shape))
            outputs.append(
                helper.make_tensor_value_info(f"present.{at}.{side}", TensorProto.FLOAT, shape)
            )
    if "past" in changes:
        for node in graph.nodes:
            node.input[:] = [one.replace("past_key_values", changes["past"]) for one in node.input]
    body = helper.make_graph(graph.nodes, "decoder", inputs, outputs, initializer=graph.constants)
    onnx.save(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path
    )
    return path


def by_hand(tokens: list[int]) -> Floats:
    """Log-probabilities after the last of ``tokens``, in NumPy and 64 bits."""
    w = {name: one.astype(np.float64) for name, one in weights().items()}
    hidden = w["embed"][tokens] + w["places"][: len(tokens)]
    causal = np.tril(np.ones((len(tokens), len(tokens)), bool))
    for at in range(2):
        q, k, v = ((hidden @ w[f"{n}{at}"]).reshape(-1, HEADS, WIDTH).swapaxes(0, 1) for n in "qkv")
        scores = np.where(causal, q @ k.swapaxes(1, 2) / 4, -np.inf)
        chances = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (chances / chances.sum(-1, keepdims=True)) @ v
        hidden = hidden + mixed.swapaxes(0, 1).reshape(-1, HIDDEN) @ w[f"o{at}"]
    logits = hidden[-1] @ w["embed"].T
    shifted = logits - logits.max()
    found: Floats = shifted - np.log(np.exp(shifted).sum())
    return found


@pytest.fixture(scope="module", params=POSITIONS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("plain") / "model.onnx", request.param)


def runner(model: Path, slots: int = 4, **changes: Any) -> PlainRunner:
    shape = replace(SHAPE, **changes)
    return PlainRunner(model, shape, slots=slots, step_tokens=64, context_tokens=96, threads=1)


def some(seed: int, count: int) -> list[int]:
    return [int(one) for one in np.random.default_rng(seed).integers(0, 97, count)]


def test_a_prompt_gives_the_probabilities_that_numpy_gives(model: Path) -> None:
    tokens = some(1, 20)
    found = runner(model).step(Batch.of([2], [0], [True], [tokens]))
    assert found.shape == (1, 97)
    np.testing.assert_allclose(found[0], by_hand(tokens), atol=2e-4)


def test_pieces_of_a_prompt_and_single_tokens_give_the_same_as_the_whole(model: Path) -> None:
    one, tokens = runner(model), some(2, 30)
    assert one.step(Batch.of([0], [0], [False], [tokens[:7]])).shape == (0, 97)
    one.step(Batch.of([0], [7], [False], [tokens[7:20]]))
    for at in range(20, 30):
        found = one.step(Batch.of([0], [at], [True], [[tokens[at]]]))
        np.testing.assert_allclose(found[0], by_hand(tokens[: at + 1]), atol=2e-4)


def test_rows_of_all_lengths_in_one_step_are_answered_as_if_alone(model: Path) -> None:
    one = runner(model, slots=6)
    talks = [some(seed, size) for seed, size in enumerate((3, 40, 11, 11, 25, 1))]
    held = [2, 39, 0, 10, 5, 0]
    for slot, (talk, start) in enumerate(zip(talks, held, strict=True)):
        if start:
            one.step(Batch.of([slot], [0], [False], [talk[:start]]))
    wanted = [True, True, False, True, True, True]
    order = [4, 0, 5, 2, 3, 1]
    found = one.step(
        Batch.of(
            order,
            [held[slot] for slot in order],
            [wanted[slot] for slot in order],
            [talks[slot][held[slot] :] for slot in order],
        )
    )
    expected = [by_hand(talks[slot]) for slot in order if wanted[slot]]
    np.testing.assert_allclose(found, np.array(expected), atol=2e-4)


def test_a_slot_may_be_started_again_from_any_earlier_place(model: Path) -> None:
    one, tokens = runner(model), some(3, 24)
    one.step(Batch.of([1], [0], [True], [tokens]))
    other = tokens[:9] + some(4, 6)
    found = one.step(Batch.of([1], [9], [True], [other[9:]]))
    np.testing.assert_allclose(found[0], by_hand(other), atol=2e-4)
    found = one.step(Batch.of([1], [0], [True], [other[3:]]))
    np.testing.assert_allclose(found[0], by_hand(other[3:]), atol=2e-4)


def test_a_copied_slot_goes_its_own_way(model: Path) -> None:
    one, tokens = runner(model), some(5, 16)
    one.step(Batch.of([0], [0], [False], [tokens]))
    one.copy(0, 3, 10)
    branch = tokens[:10] + some(6, 3)
    found = one.step(Batch.of([0, 3], [16, 10], [True, True], [[50], branch[10:]]))
    np.testing.assert_allclose(found[0], by_hand([*tokens, 50]), atol=2e-4)
    np.testing.assert_allclose(found[1], by_hand(branch), atol=2e-4)


def test_what_was_saved_of_a_slot_can_be_put_into_another(model: Path) -> None:
    one, tokens = runner(model), some(8, 20)
    one.step(Batch.of([0], [0], [False], [tokens]))
    saved = one.save(0, 4, 20)
    one.copy(0, 2, 4)
    one.step(Batch.of([0], [0], [False], [some(9, 20)]))
    one.load(2, 4, saved, 12)
    found = one.step(Batch.of([2], [16], [True], [tokens[16:]]))
    np.testing.assert_allclose(found[0], by_hand(tokens), atol=2e-4)


def test_the_last_place_of_the_context_is_usable(model: Path) -> None:
    one, tokens = runner(model, slots=2), some(7, 96)
    one.step(Batch.of([1], [0], [False], [tokens[:-1]]))
    found = one.step(Batch.of([1], [95], [True], [tokens[-1:]]))
    np.testing.assert_allclose(found[0], by_hand(tokens), atol=2e-4)


@pytest.mark.parametrize("slots", [1, 4])
def test_the_engine_s_self_check_passes(model: Path, slots: int) -> None:
    assert batching_error(runner(model, slots), slots) < 1e-3


def test_memory_is_slots_times_context_and_a_run_copies_a_bounded_part(model: Path) -> None:
    one = runner(model, slots=3)
    assert one.token_bytes == 4 * HEADS * WIDTH * 4, "two layers, two sides, four bytes"
    assert sum(cache.nbytes for cache in one._caches.values()) == 3 * 96 * one.token_bytes
    starts = [1000 + at for at in range(20)]
    batch = Batch.of(list(range(20)), starts, [True] * 20, [[1]] * 20)
    groups = list(_groups(batch, padding=True))
    assert sorted(np.concatenate(groups).tolist()) == list(range(20))
    assert all(len(group) * (max(starts[row] for row in group) + 1) <= 4096 for group in groups)
    assert len(groups) == 5
    assert len(list(_groups(batch, padding=False))) == 20, "no two pasts are of one length"


def test_answers_through_the_engine_are_those_of_numpy_alone(model: Path) -> None:
    def load(_: EngineConfig) -> Loaded:
        return Loaded(runner(model), (), 96)

    engine = Engine(EngineConfig(model, max_batch=4, step_tokens=16, context_tokens=96), load=load)
    prompts = [some(seed, 5 + 7 * seed) for seed in range(6)]
    try:
        answers = [engine.submit(one, max_new_tokens=12, sampling=Sampling()) for one in prompts]
        written = [ids(answer) for answer in answers]
    finally:
        engine.close()
    for prompt, answer in zip(prompts, written, strict=True):
        context = list(prompt)
        for token in answer:
            row = by_hand(context)
            assert row[token] >= row.max() - 1e-3, "a near tie may fall either way"
            context.append(token)
        assert len(answer) == 12


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"past": "cache"}, {}, r"cache\.0\.key"),
        ({}, {"num_hidden_layers": 3}, r"past_key_values\.2\.key"),
        ({}, {"num_hidden_layers": 1}, r"past_key_values\.1\.key"),
        ({}, {"head_dim": 8}, r"16\), not \[batch, 2, tokens, 8\]"),
        ({}, {"num_key_value_heads": 1}, "batch, 1, tokens"),
        ({}, {"vocab_size": 100}, "97"),
    ],
)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    tmp_path: Path, changes: dict[str, Any], shape: dict[str, int], message: str
) -> None:
    path = exported(tmp_path / "model.onnx", **changes)
    with pytest.raises(ManifestError, match=rf"not the exported decoder.*{message}.*--via optimum"):
        runner(path, **shape)


def test_a_closed_runner_lets_go_of_its_memory(model: Path) -> None:
    one = runner(model)
    one.close()
    assert one._session is None and not one._caches
