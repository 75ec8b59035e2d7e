"""static8, row8 and int4: close to fp32, and an answer that no neighbour can change."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assistant.modelkit import quality as judging
from assistant.modelkit.balance import Balanced
from assistant.modelkit.checkpoint import SHAPES, Checkpoint, ModelShape, write_checkpoint
from assistant.modelkit.graph import Scheme, Weight, Writer, build_graph
from assistant.modelkit.quality import (
    Batch,
    Floor,
    Quality,
    compare,
    generate,
    measure_peaks,
    open_session,
)
from assistant.modelkit.quantise import (
    SCHEMES,
    Int4,
    QuantError,
    Row8,
    Static8,
    Tapped,
    quantise_blocks,
    quantise_rows,
    scheme,
)

#: Wide enough for every kernel's full-width path, small enough for hundreds of runs.
SHAPE = ModelShape(160, 3, 5, 1, 32, 288, 700)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), SHAPE, seed=11)


@pytest.fixture(scope="module")
def tapped(checkpoint: Checkpoint) -> Any:
    return open_session(build_graph(checkpoint, Tapped, context_tokens=128).SerializeToString())


@pytest.fixture(scope="module")
def even(checkpoint: Checkpoint, tapped: Any) -> Balanced:
    prompts = _prompts(np.random.default_rng(0), 24)
    return Balanced.of(checkpoint, measure_peaks(tapped, SHAPE, prompts))


@pytest.fixture(scope="module")
def sessions(checkpoint: Checkpoint, even: Balanced) -> dict[str, Any]:
    return {quant: _session(even if quant == "static8" else checkpoint, quant) for quant in SCHEMES}


def _session(checkpoint: Checkpoint, quant: str) -> Any:
    model = build_graph(checkpoint, _scheme(checkpoint, quant), context_tokens=128)
    return open_session(model.SerializeToString())


def _scheme(checkpoint: Checkpoint, quant: str) -> Callable[[Writer], Scheme]:
    return scheme(quant, checkpoint.peaks if isinstance(checkpoint, Balanced) else None)


def _prompts(rng: np.random.Generator, count: int) -> list[list[int]]:
    return [rng.integers(20, 700, rng.integers(1, 24)).tolist() for _ in range(count)]


# --- Independence of neighbours -------------------------------------------------------------------


def _in_company(session: Any, rng: np.random.Generator, prompts: list[list[int]]) -> list[Any]:
    """Each prompt's log-probabilities over six tokens, in a batch of random chunks and idle rows.

    Every row reads its prompt in chunks of its own and rests at random, so that prefill, decoding
    and idle rows meet in one run.
    """
    batch = Batch(session, SHAPE, len(prompts), 80)
    todo = [list(prompt) for prompt in prompts]
    seen: list[list[np.ndarray]] = [[] for _ in prompts]
    while any(len(rows) < 6 for rows in seen):
        rows: list[list[int]] = []
        for row, tokens in enumerate(todo):
            idle = len(seen[row]) == 6 or rng.random() < 0.2
            size = int(rng.integers(2, 12))
            # a chunk of one token is the one cut that the attention kernel does not hide
            rows.append([] if idle else tokens[: size + (len(tokens) == size + 1)])
        if not any(rows):
            continue
        logprobs = iter(batch.step(rows))
        for row, chunk in enumerate(rows):
            if not chunk:
                continue
            found = next(logprobs).copy()
            todo[row] = todo[row][len(chunk) :]
            if not todo[row]:
                seen[row].append(found)
                todo[row] = [int(found.argmax())]
    return [np.array(rows) for rows in seen]


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_alone_equals_in_any_batch_bit_for_bit(quant: str, sessions: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(25):
        prompts = _prompts(rng, int(rng.integers(2, 9)))
        together = _in_company(sessions[quant], rng, prompts)
        for prompt, found in zip(prompts, together, strict=True):
            batch = Batch(sessions[quant], SHAPE, 1, 64)
            alone = [batch.step([prompt])[0].copy()]
            while len(alone) < 6:
                alone.append(batch.step([[int(alone[-1].argmax())]])[0].copy())
            np.testing.assert_array_equal(found, np.array(alone))


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_greedy_ids_do_not_depend_on_the_batch(quant: str, sessions: dict[str, Any]) -> None:
    rng = np.random.default_rng(2)
    prompts = _prompts(rng, 48)
    together = generate(sessions[quant], SHAPE, prompts, 16)
    for prompt, ids in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(generate(sessions[quant], SHAPE, [prompt], 16)[0], ids)


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_an_outlier_beside_a_row_does_not_move_it(quant: str, checkpoint: Checkpoint) -> None:
    """The reason why one scale for the whole batch is refused, on a single product."""
    calm = np.random.default_rng(3).standard_normal((4, 160)).astype(np.float32)
    wild = np.concatenate([calm, np.full((1, 160), 1e4, np.float32)])
    kind = _static(3.0) if quant == "static8" else Row8
    run = _product(checkpoint.tensor("model.layers.0.mlp.up_proj.weight"), kind)
    np.testing.assert_array_equal(run(wild)[:4], run(calm))


def test_no_scale_of_static8_is_computed_while_it_runs(
    even: Balanced,
) -> None:
    model = build_graph(even, scheme("static8", even.peaks), context_tokens=64)
    constants = {one.name for one in model.graph.initializer}
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"ReduceMax", "Abs", "DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
    products = [node for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert len(products) == 5 * SHAPE.num_hidden_layers + 1
    for node in products:
        assert set(node.input[1:5]) <= constants, "weights, both scales and the zero point"


# --- Closeness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quant", "most"), [("row8", 0.06), ("static8", 0.12), ("int4", 0.40)])
def test_a_quantised_build_stays_close_to_fp32(
    quant: str, most: float, sessions: dict[str, Any]
) -> None:
    tokens = np.random.default_rng(4).integers(20, 700, 60).tolist()
    right, found = (
        Batch(sessions[name], SHAPE, 1, 64).step([tokens], every=True) for name in ("fp32", quant)
    )
    error = np.sqrt(((found - right) ** 2).mean() / right.var())
    assert 1e-4 < error < most


def test_a_build_compared_with_itself_is_perfect(sessions: dict[str, Any]) -> None:
    prompts = _prompts(np.random.default_rng(5), 20)
    quality = compare(sessions["static8"], sessions["static8"], SHAPE, prompts)
    assert quality == Quality(20, 16, 1.0, 1.0, 1.0, 1.0)
    assert quality.meets(Floor(1.0, 1.0))


def test_other_weights_fall_below_the_floor(sessions: dict[str, Any], tmp_path: Path) -> None:
    other = _session(write_checkpoint(tmp_path, SHAPE, seed=12), "fp32")
    prompts = _prompts(np.random.default_rng(6), 20)
    quality = compare(sessions["fp32"], other, SHAPE, prompts)
    assert quality.greedy_agreement < 0.1
    assert quality.perplexity_ratio > 2
    assert not quality.meets(Floor(0.5, 1.5))


def test_noise_has_a_ratio_that_json_can_hold(
    sessions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nats = iter([1000.0, 0.0])
    monkeypatch.setattr(
        judging, "_losses", lambda *_: np.full((2, 15), next(nats), dtype=np.float32)
    )
    prompts = _prompts(np.random.default_rng(8), 2)
    found = compare(sessions["fp32"], sessions["static8"], SHAPE, prompts)
    assert 1e20 < found.perplexity_ratio < math.inf


def test_what_follows_the_end_token_is_not_judged(sessions: dict[str, Any]) -> None:
    prompts = _prompts(np.random.default_rng(7), 12)
    answers = generate(sessions["fp32"], SHAPE, prompts, 16)
    whole = compare(sessions["fp32"], sessions["int4"], SHAPE, prompts)
    end = int(answers[0, 0])
    short = compare(sessions["fp32"], sessions["int4"], SHAPE, prompts[:1], end=end)
    assert short.greedy_agreement in (0.0, 1.0), "one token is judged, the end itself"
    assert short.perplexity_ratio == 1.0
    assert 0 < whole.greedy_agreement < 1


# --- Measuring ------------------------------------------------------------------------------------


def test_the_graph_that_measures_writes_what_fp32_writes(
    sessions: dict[str, Any], tapped: Any
) -> None:
    tokens = np.random.default_rng(14).integers(20, 700, 40).tolist()
    found, right = (
        Batch(session, SHAPE, 1, 64).step([tokens], every=True)
        for session in (tapped, sessions["fp32"])
    )
    np.testing.assert_allclose(found, right, atol=1e-5, rtol=0)
    assert generate(tapped, SHAPE, [tokens], 16).tolist() == (
        generate(sessions["fp32"], SHAPE, [tokens], 16).tolist()
    )


def test_peaks_are_the_largest_sizes_of_what_enters_each_matrix(
    checkpoint: Checkpoint, tapped: Any
) -> None:
    prompts = _prompts(np.random.default_rng(15), 5)
    peaks = measure_peaks(tapped, SHAPE, prompts, tokens=4)
    layers = range(SHAPE.num_hidden_layers)
    names = {f"layer_{layer}.{name}" for layer in layers for name in ("qkv", "o", "gate", "down")}
    assert peaks.keys() == names | {"embed"}
    answers = generate(tapped, SHAPE, prompts, 4).tolist()
    seen = [token for prompt, answer in zip(prompts, answers, strict=True) for token in
            (*prompt, *answer)]  # fmt: skip
    x = checkpoint.embedding[seen].astype(np.float64)
    x /= np.sqrt((x * x).mean(axis=1, keepdims=True) + SHAPE.rms_norm_eps)
    x *= checkpoint.tensor("model.layers.0.input_layernorm.weight")
    np.testing.assert_allclose(peaks["layer_0.qkv"], np.abs(x).max(axis=0), rtol=1e-4)
    assert [len(peaks[f"layer_1.{name}"]) for name in ("o", "down")] == [160, 288]


def test_peaks_of_several_prompts_are_the_largest_of_each(tapped: Any) -> None:
    prompts = _prompts(np.random.default_rng(16), 3)
    together = measure_peaks(tapped, SHAPE, prompts, tokens=3)
    alone = [measure_peaks(tapped, SHAPE, [prompt], tokens=3) for prompt in prompts]
    for name, peaks in together.items():
        np.testing.assert_allclose(peaks, np.max([one[name] for one in alone], axis=0), rtol=1e-3)


def test_outliers_are_shared_with_the_weights_and_the_function_stays(
    checkpoint: Checkpoint, tapped: Any
) -> None:
    peaks = measure_peaks(tapped, SHAPE, _prompts(np.random.default_rng(17), 8))
    peaks["layer_1.down"][3] = 500
    even = Balanced.of(checkpoint, peaks)
    down = np.abs(checkpoint.tensor("model.layers.1.mlp.down_proj.weight")).max(axis=0)
    share = even.rows["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_allclose(share, peaks["layer_1.down"] ** 0.8 / down**0.2, rtol=1e-4)
    spread = peaks["layer_1.down"] / share
    assert even.peaks["layer_1.down"] == pytest.approx(0.9 * spread.max(), rel=1e-5)
    assert even.peaks["layer_1.o"] == pytest.approx(0.9 * peaks["layer_1.o"].max())
    rows = _prompts(np.random.default_rng(18), 6)
    right = Batch(_session(checkpoint, "fp32"), SHAPE, 6, 64).step(rows)
    found = Batch(_session(even, "fp32"), SHAPE, 6, 64).step(rows)
    np.testing.assert_allclose(found, right, atol=2e-4, rtol=0)


def test_channels_that_were_always_zero_still_have_a_scale(
    checkpoint: Checkpoint, tapped: Any
) -> None:
    peaks = {name: found * 0 for name, found in measure_peaks(tapped, SHAPE, [[30, 40]]).items()}
    even = Balanced.of(checkpoint, peaks)
    assert all(np.isfinite(one).all() and (one > 0).all() for one in even.rows.values())
    product = _product(np.eye(4, dtype=np.float32), _static(0.0))
    assert np.isfinite(product(np.ones((2, 4), np.float32))).all()


def test_static8_without_measurements_is_refused() -> None:
    with pytest.raises(QuantError, match="static8 needs measured peaks"):
        scheme("static8")


# --- The pieces -----------------------------------------------------------------------------------


def _product(weight: np.ndarray, kind: Callable[[Writer], Scheme] = Row8) -> Any:
    """The scheme's product with one weight, as a function."""
    writer = Writer()
    (name,) = kind(writer).matmuls("x", Weight("w", weight))
    return _runs(writer, name, weight.shape[1], weight.shape[0])


def _runs(writer: Writer, name: str, width: int, out: int) -> Any:
    """The graph from ``x`` to ``name``, as a function."""
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        writer.nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", out])],
        list(writer.constants.values()),
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = open_session(model.SerializeToString())
    return lambda x: session.run(None, {"x": x})[0]


def _static(peak: float) -> Callable[[Writer], Scheme]:
    """static8 for the single matrix ``w``, whose inputs were at most ``peak``."""
    return lambda writer: Static8(writer, {"w": peak})


def test_static8_multiplies_as_plain_integers_say() -> None:
    rng = np.random.default_rng(18)
    weight = rng.standard_normal((33, 70)).astype(np.float32)
    x = rng.standard_normal((9, 70)).astype(np.float32)
    values, scales = quantise_rows(weight)
    step = np.float32(4 / 127)
    small = np.clip(np.rint(x / step), -128, 127).astype(np.int64)
    wanted = (small @ values.T.astype(np.int64)) * (scales * step)
    found = _product(weight, _static(4.0))(x)
    # A value that lies on the edge of a step may fall to either side: one step of one input.
    np.testing.assert_allclose(found, wanted, atol=0.15, rtol=0)
    assert np.median(np.abs(found - wanted)) < 1e-5


def test_activations_larger_than_ever_measured_are_cut_off_there() -> None:
    rng = np.random.default_rng(19)
    weight = rng.standard_normal((12, 40)).astype(np.float32)
    x = rng.standard_normal((5, 40)).astype(np.float32)
    x[2, 7], x[3, 8] = 1000.0, -1000.0
    run = _product(weight, _static(2.0))
    limit = np.float32(2 / 127)
    np.testing.assert_array_equal(run(x), run(np.clip(x, -128 * limit, 127 * limit)))


def test_even_weights_bring_static8_nearer_to_full_precision(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    wild = _with_an_outlier(checkpoint, tmp_path)
    prompts = _prompts(np.random.default_rng(20), 12)
    tapped = open_session(build_graph(wild, Tapped, context_tokens=128).SerializeToString())
    peaks = measure_peaks(tapped, SHAPE, prompts)
    plain = {name: float(found.max()) for name, found in peaks.items()}
    right = Batch(_session(wild, "fp32"), SHAPE, 12, 64).step(prompts)
    errors = []
    even = Balanced.of(wild, peaks)
    for weights, sizes in ((wild, plain), (even, even.peaks)):
        model = build_graph(weights, scheme("static8", sizes), context_tokens=128)
        found = Batch(open_session(model.SerializeToString()), SHAPE, 12, 64).step(prompts)
        errors.append(float(np.abs(found - right).mean()))
    assert errors[1] < 0.6 * errors[0]


def _with_an_outlier(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The same weights, but one channel of every norm and of ``up`` is out of proportion, and small
    weights undo it."""
    from safetensors.numpy import save_file

    found = {name: checkpoint.tensor(name) for name in checkpoint.shape.tensors()}
    for layer in range(SHAPE.num_hidden_layers):
        at = f"model.layers.{layer}."
        found[f"{at}post_attention_layernorm.weight"][5] *= 100
        found[f"{at}mlp.up_proj.weight"][:, 5] /= 100
        found[f"{at}mlp.gate_proj.weight"][:, 5] /= 100
        found[f"{at}mlp.up_proj.weight"][7] *= 300
        found[f"{at}mlp.down_proj.weight"][:, 7] /= 300
    for name in ("config.json", "tokenizer.json", "inhouse.json"):
        (folder / name).write_bytes((checkpoint.directory / name).read_bytes())
    save_file(
        {name: np.ascontiguousarray(one) for name, one in found.items()},
        folder / "model.safetensors",
    )
    return Checkpoint.open(folder)


def test_row8_multiplies_as_plain_integers_say() -> None:
    rng = np.random.default_rng(8)
    weight = rng.standard_normal((33, 70)).astype(np.float32)
    x = rng.standard_normal((9, 70)).astype(np.float32)
    values, scales = quantise_rows(weight)
    peak = np.abs(x).max(axis=1, keepdims=True)
    small = np.rint(x / peak * np.float32(127)).astype(np.int64)
    wanted = (small @ values.T.astype(np.int64)) * (scales / 127) * peak
    # A value that lies on the edge of a step may fall to either side: one step of one input.
    np.testing.assert_allclose(_product(weight)(x), wanted, atol=0.1, rtol=0)
    assert np.median(np.abs(_product(weight)(x) - wanted)) < 1e-5


def test_a_row_of_zeros_stays_zero_and_spoils_nobody() -> None:
    weight = np.random.default_rng(9).standard_normal((16, 32)).astype(np.float32)
    x = np.random.default_rng(10).standard_normal((3, 32)).astype(np.float32)
    x[1] = 0
    found = _product(weight)(x)
    np.testing.assert_array_equal(found[1], 0)
    assert np.isfinite(found).all()


def test_int8_rows_come_back_within_half_a_step() -> None:
    matrix = np.random.default_rng(11).standard_normal((40, 64)).astype(np.float32)
    matrix[7] = 0
    values, scales = quantise_rows(matrix)
    error = np.abs(values * scales[:, None] - matrix)
    assert (error <= scales[:, None] * 0.5001).all()
    assert (error[7] == 0).all()
    assert np.abs(values).max() == 127


def test_int4_blocks_come_back_within_a_step() -> None:
    matrix = np.random.default_rng(12).standard_normal((5, 80)).astype(np.float32)
    matrix[2, 32:64] = 0
    packed, scales = quantise_blocks(matrix)
    assert packed.shape == (5, 3, 16), "80 inputs take three blocks, the last one padded"
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(5, 3, 32).astype(np.int64)
    back = ((codes - 8) * scales[..., None]).reshape(5, 96)
    steps = np.repeat(scales, 32, axis=1)[:, :80]
    error, level = np.abs(back[:, :80] - matrix), matrix / steps
    kept = (level >= -8) & (level <= 7)
    assert (error[kept] <= np.abs(steps[kept]) * 0.501).all() and kept.mean() > 0.9
    assert (error <= np.abs(matrix) * 0.3 + np.abs(steps) * 0.501).all(), "the rest is cut off"
    assert (back[:, 80:] == 0).all()
    assert (back[2, 32:64] == 0).all()


def test_a_block_takes_the_scale_that_leaves_the_least_error() -> None:
    matrix = np.random.default_rng(14).standard_normal((64, 256)).astype(np.float32)
    packed, scales = quantise_blocks(matrix)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(64, 8, 32).astype(np.float32)
    found = (codes - 8) * scales[..., None] - matrix.reshape(64, 8, 32)
    cells = matrix.reshape(64, 8, 32)
    full = np.take_along_axis(cells, np.abs(cells).argmax(axis=2)[..., None], axis=2) / -8
    whole = np.clip(np.rint(cells / full), -8, 7) * full - cells
    assert (found**2).sum() < 0.93 * (whole**2).sum()
    assert len(np.unique((scales / full[..., 0]).round(3))) > 5, "blocks choose apart"


def test_int4_multiplies_with_the_weights_it_stored() -> None:
    rng = np.random.default_rng(13)
    weight = rng.standard_normal((48, 160)).astype(np.float32)
    x = rng.standard_normal((9, 160)).astype(np.float32)
    packed, scales = quantise_blocks(weight)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, 5, 32).astype(np.float32)
    stored = ((codes - 8) * scales[..., None]).reshape(48, 160)
    found = _product(weight, Int4)(x)
    np.testing.assert_allclose(found, x @ stored.T, atol=0.02 * found.std() * 3, rtol=0)
    error = np.sqrt(((found - x @ weight.T) ** 2).mean()) / found.std()
    assert error < 0.15


@pytest.mark.parametrize("quant", ["static8", "row8", "int4"])
def test_the_embedding_lies_in_rows_and_the_head_in_columns_both_in_8_bit(
    quant: str, checkpoint: Checkpoint, even: Balanced
) -> None:
    from onnx import TensorProto

    weights = even if quant == "static8" else checkpoint
    model = build_graph(weights, _scheme(weights, quant), context_tokens=64)
    large = {
        one.name: (list(one.dims), one.data_type)
        for one in model.graph.initializer
        if 700 in one.dims and len(one.dims) > 1 and min(one.dims) > 1
    }
    int8 = TensorProto.INT8
    assert large == {"embed.rows": ([700, 160], int8), "embed.int8": ([160, 700], int8)}


def test_the_shape_that_ships_takes_eleven_megabytes(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, SHAPES["9m"])
    model = build_graph(checkpoint, scheme("row8"), context_tokens=1024)
    assert 10e6 < model.ByteSize() < 12e6


def test_dynamic_is_refused_with_the_reason() -> None:
    with pytest.raises(QuantError, match="one activation scale for the whole batch"):
        scheme("dynamic")
    with pytest.raises(QuantError, match="Known: static8, row8, int4, fp32"):
        scheme("int2")
