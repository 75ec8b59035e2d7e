"""The graph against a plain NumPy decoder, and the folder that ``build`` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.core.management import CommandError, call_command

from assistant.engine.manifest import Manifest, ManifestError
from assistant.engine.text import ChatTurn, Codec, Slot
from assistant.modelkit import build as building
from assistant.modelkit.build import BuildError, UnfitScheme, build, build_for, build_random
from assistant.modelkit.checkpoint import (
    SHAPES,
    Checkpoint,
    CheckpointError,
    ModelShape,
    write_checkpoint,
    write_random,
)
from assistant.modelkit.graph import build_graph
from assistant.modelkit.quality import Batch, Floor, generate, open_session
from assistant.modelkit.quantise import scheme

TINY = SHAPES["tiny"]
FAMILIES = {
    "tied": TINY,
    "untied": replace(TINY, tie_word_embeddings=False),
    "one key-value head": replace(TINY, num_attention_heads=5, num_key_value_heads=1),
    "qwen2 with bias": replace(TINY, family="qwen2", rope_theta=1_000_000.0),
    "qwen3 with query and key norm": replace(TINY, family="qwen3", rms_norm_eps=1e-6),
}


def reference(checkpoint: Checkpoint, tokens: Sequence[int]) -> np.ndarray:
    """Log-probabilities after every token, in float64, without any cache. (T, vocab)"""
    shape = checkpoint.shape

    def weight(name: str) -> np.ndarray:
        return checkpoint.tensor(name).astype(np.float64)

    def norm(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + shape.rms_norm_eps) * gamma

    x = weight("model.embed_tokens.weight")[list(tokens)]
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}."
        y = norm(x, weight(f"{at}input_layernorm.weight"))
        x = x + _attend(shape, f"{at}self_attn.", weight, norm, y)
        y = norm(x, weight(f"{at}post_attention_layernorm.weight"))
        gate = y @ weight(f"{at}mlp.gate_proj.weight").T
        up = y @ weight(f"{at}mlp.up_proj.weight").T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weight(f"{at}mlp.down_proj.weight").T
    logits = norm(x, weight("model.norm.weight")) @ checkpoint.head.astype(np.float64).T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _attend(
    shape: ModelShape,
    at: str,
    weight: Callable[[str], np.ndarray],
    norm: Callable[[np.ndarray, np.ndarray], np.ndarray],
    y: np.ndarray,
) -> np.ndarray:
    count, half = len(y), shape.head_dim // 2
    angles = np.arange(count)[:, None] * shape.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def heads(name: str) -> np.ndarray:
        value = y @ weight(f"{at}{name}_proj.weight").T
        if shape.qkv_bias:
            value = value + weight(f"{at}{name}_proj.bias")
        value = value.reshape(count, -1, shape.head_dim)
        if name == "v":
            return value
        if shape.qk_norm:
            value = norm(value, weight(f"{at}{name}_norm.weight"))
        low, high = value[..., :half], value[..., half:]
        return np.concatenate([low * cos - high * sin, low * sin + high * cos], -1)

    group = shape.num_attention_heads // shape.num_key_value_heads
    q, k, v = heads("q"), heads("k").repeat(group, 1), heads("v").repeat(group, 1)
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(shape.head_dim)
    scores += np.triu(np.full((count, count), -np.inf), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("hts,shd->thd", scores, v).reshape(count, -1)
    return mixed @ weight(f"{at}o_proj.weight").T


def session(checkpoint: Checkpoint, quant: str = "fp32", context_tokens: int = 128) -> Any:
    model = build_graph(checkpoint, scheme(quant), context_tokens=context_tokens)
    return open_session(model.SerializeToString())


def flat(shape: ModelShape) -> dict[str, float]:
    """As if every activation had been 1 at most."""
    layers = range(shape.num_hidden_layers)
    names = [f"layer_{layer}.{name}" for layer in layers for name in ("qkv", "o", "gate", "down")]
    return dict.fromkeys([*names, "embed"], 1.0)


def some_tokens(seed: int, count: int, vocab: int = TINY.vocab_size) -> list[int]:
    return np.random.default_rng(seed).integers(20, vocab, count).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_random("tiny", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny_session(tiny: Checkpoint) -> Any:
    return session(tiny)


# --- Numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_prefill_equals_plain_numpy(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, FAMILIES[family], seed=3)
    tokens = some_tokens(1, 23)
    found = Batch(session(checkpoint), checkpoint.shape, 1, 64).step([tokens], every=True)
    np.testing.assert_allclose(found, reference(checkpoint, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_then_decoding_equals_plain_numpy(family: str, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, FAMILIES[family], seed=4)
    tokens = some_tokens(2, 24)
    batch = Batch(session(checkpoint), checkpoint.shape, 1, 64)
    cuts = [0, 9, 10, 21, 22, 23, 24]
    found = [batch.step([tokens[a:b]], every=True) for a, b in pairwise(cuts)]
    np.testing.assert_allclose(
        np.concatenate(found), reference(checkpoint, tokens), atol=1e-4, rtol=0
    )


def test_one_run_mixes_prefill_decode_and_idle_rows(tiny: Checkpoint, tiny_session: Any) -> None:
    rows = [some_tokens(seed, count) for seed, count in ((1, 30), (2, 12), (3, 7), (4, 11))]
    batch = Batch(tiny_session, TINY, 4, 64)
    batch.step([rows[0][:14], rows[1][:11], rows[2], []])
    before = {name: value.copy() for name, value in batch.cache.items()}
    found = batch.step([rows[0][14:], rows[1][11:], [], rows[3]])
    wanted = [reference(tiny, rows[row])[-1] for row in (0, 1, 3)]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)
    for name, value in batch.cache.items():
        np.testing.assert_array_equal(value[2], before[name][2], "the idle row's cache moved")
    found = batch.step([[], [], some_tokens(5, 1), []])
    wanted = reference(tiny, rows[2] + some_tokens(5, 1))[-1:]
    np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=0)


def test_only_sampled_rows_are_computed_and_none_is_allowed(
    tiny: Checkpoint, tiny_session: Any
) -> None:
    tokens = some_tokens(6, 10)
    batch = Batch(tiny_session, TINY, 1, 32)
    inputs = batch._inputs([tokens], np.array([10], np.int32), every=False)
    inputs |= {f"past_{name}": value for name, value in batch.cache.items()}
    wanted = reference(tiny, tokens)
    for sample in ([7], [9, 2, 2], []):
        inputs["sample"] = np.array(sample, np.int64)
        (found,) = tiny_session.run(["logprobs"], inputs)
        assert found.shape == (len(sample), TINY.vocab_size)
        np.testing.assert_allclose(found, wanted[sample], atol=1e-4, rtol=0)


def test_pooled_is_the_normed_state_that_the_head_reads(
    tiny: Checkpoint, tiny_session: Any
) -> None:
    batch = Batch(tiny_session, TINY, 1, 32)
    inputs = batch._inputs([some_tokens(7, 5)], np.array([5], np.int32), every=False)
    inputs |= {f"past_{name}": value for name, value in batch.cache.items()}
    inputs["sample"] = np.array([4], np.int64)
    logprobs, pooled = tiny_session.run(["logprobs", "pooled"], inputs)
    logits = pooled @ tiny.embedding.T
    logits -= np.log(np.exp(logits).sum())
    np.testing.assert_allclose(logprobs, logits, atol=1e-4, rtol=0)


def test_a_cache_longer_than_the_context_is_accepted(tiny: Checkpoint) -> None:
    tokens = some_tokens(8, 30)
    batch = Batch(session(tiny, context_tokens=30), TINY, 1, 80)
    batch.step([tokens[:29]])
    found = batch.step([tokens[29:]])
    np.testing.assert_allclose(found, reference(tiny, tokens)[-1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("quant", "most"), [("fp32", 90), ("int4", 100), ("static8", 130), ("row8", 270)]
)
def test_eight_layers_take_few_nodes(quant: str, most: int, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, replace(TINY, num_hidden_layers=8))
    model = build_graph(checkpoint, scheme(quant, flat(checkpoint.shape)), context_tokens=64)
    assert len(model.graph.node) <= most


def test_rows_come_in_a_rectangle_and_nothing_between_the_layers_turns_it(
    tiny: Checkpoint,
) -> None:
    model = build_graph(tiny, scheme("fp32"), context_tokens=64)
    sizes = {
        one.name: [axis.dim_param or axis.dim_value for axis in one.type.tensor_type.shape.dim]
        for one in model.graph.input
    }
    assert sizes["input_ids"] == ["B", "S"]
    assert sizes["seqlens_k"] == sizes["query_seqlens"] == ["B"]
    assert (sizes["sample"], sizes["total_length"]) == (["R"], [])
    assert sizes["past_k_1"] == ["B", TINY.num_key_value_heads, "capacity", TINY.head_dim]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Gather") == 3, "the embedding, and twice the sampled rows"
    assert not {"Transpose", "ScatterND", "GatherND", "Pad"} & set(kinds)


def decoded(session: Any, prompt: list[int], width: int) -> np.ndarray:
    """Log-probabilities of one token after ``prompt``, in a rectangle of ``width`` columns."""
    batch = Batch(session, TINY, 1, 64)
    batch.step([prompt])
    counts = np.array([1], np.int32)
    inputs = batch._inputs([[30]], counts, every=False)
    inputs["input_ids"] = np.pad([[30]], ((0, 0), (0, width - 1)), constant_values=77)
    inputs["sample"] = np.array([0], np.int64)
    inputs |= {f"past_{name}": value for name, value in batch.cache.items()}
    (found,) = session.run(["logprobs"], inputs)
    return np.array(found[0])


def test_padding_is_never_read(tiny_session: Any) -> None:
    for seed in range(8):
        prompt = some_tokens(seed, 9 + seed)
        alone = decoded(tiny_session, prompt, 1)
        for width in (2, 3, 20):
            np.testing.assert_allclose(
                decoded(tiny_session, prompt, width), alone, atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("quant", ["row8", "static8"])
def test_how_a_prompt_is_cut_never_shows_while_no_token_is_left_alone(
    quant: str, tiny: Checkpoint
) -> None:
    """What the runner relies on: every cut into chunks of two or more gives the same bits."""
    model = build_graph(tiny, scheme(quant, flat(TINY)), context_tokens=128)
    opened = open_session(model.SerializeToString())
    rng = np.random.default_rng(9)
    for _ in range(25):
        tokens = some_tokens(int(rng.integers(1000)), int(rng.integers(4, 40)))
        whole = Batch(opened, TINY, 1, 80).step([tokens], every=True)
        batch, parts, done = Batch(opened, TINY, 1, 80), [], 0
        while done < len(tokens):
            size = int(rng.integers(2, 9))
            size += len(tokens) - done - size == 1
            parts.append(batch.step([tokens[done : done + size]], every=True))
            done += size
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.train
@pytest.mark.filterwarnings("default")
def test_transformers_writes_the_same_greedy_ids(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **{**TINY.config(), "tie_word_embeddings": False, "initializer_range": 0.3},
        attention_bias=False,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    prompts = [some_tokens(seed, 5 + seed) for seed in range(6)]
    found = generate(session(checkpoint), checkpoint.shape, prompts, 24)
    for prompt, ids in zip(prompts, found.tolist(), strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert ids == wanted[0, len(prompt) :].tolist()


# --- Checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_weights_are_read_in_every_float_format(kind: str, tmp_path: Path) -> None:
    import ml_dtypes
    from safetensors.numpy import load_file, save_file

    write_random("tiny", tmp_path)
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {name: value.astype(dtype) for name, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = Checkpoint.open(tmp_path).embedding
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, weights["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not built"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope scaling 'llama3'"),
        ({"num_key_value_heads": 3}, "not a multiple"),
        ({"head_dim": 20}, "multiple of 16"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2"),
        ({"intermediate_size": 128}, "has shape"),
        ({"attention_bias": True}, "lacks model.layers.0.self_attn.q_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "quantised already"),
    ],
)
def test_a_checkpoint_that_cannot_be_built_says_why(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_random("tiny", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value), "the message names the file"


def test_missing_or_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        Checkpoint.open(tmp_path)
    write_random("tiny", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(200))
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        Checkpoint.open(tmp_path)


def test_the_same_seed_draws_the_same_checkpoint(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_random("tiny", tmp_path / name, seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_known_shapes_have_the_parameters_their_names_say() -> None:
    counts = {name: round(shape.parameters / 1e6, 1) for name, shape in SHAPES.items()}
    assert counts["15m"] == 15.7
    assert counts["smollm2-135m"] == 134.5
    assert counts["qwen2.5-0.5b"] == 494.0


@pytest.mark.parametrize("vocab", [269, 270, 512, 6000, 49152])
def test_the_random_tokenizer_fills_its_vocabulary_and_reads_back_any_text(vocab: int) -> None:
    from tokenizers import Tokenizer

    from assistant.modelkit.checkpoint import _tokenizer

    text, ids = _tokenizer(vocab)
    tokenizer = Tokenizer.from_str(text)
    assert tokenizer.get_vocab_size() == vocab
    assert list(ids.values()) == list(range(len(ids)))
    for sample in ("where is my order 4711?", "déjà vu, 漢字 🙂\n  indented\tthrough"):
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


# --- The folder -----------------------------------------------------------------------------------


def test_a_built_folder_loads_in_the_engine_and_keeps_the_details(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "models" / "out"
    write_random("tiny", source)
    path = source / "inhouse.json"
    own = json.loads(path.read_text())
    own |= {"name": "shop", "version": "7", "calibration": {"temperature": 1.5}}
    path.write_text(json.dumps(own | {"quality": {"intents": 0.9}}))
    lines: list[str] = []
    build(source, out, "row8", lines.append)
    manifest = Manifest.load(out)
    assert (manifest.name, manifest.version, manifest.quant) == ("shop", "7", "row8")
    assert manifest.calibration.temperature == 1.5
    assert manifest.intents == own["intents"]
    assert manifest.scope == (5, 6)
    assert manifest.quality["intents"] == 0.9
    assert manifest.quality["quantised"]["prompts"] == 12, "every second question"
    codec = Codec.load(out, manifest)
    prompt = codec.encode_chat([ChatTurn("user", ("cancel ", Slot("Order Number")))])
    assert prompt[-2:] == [manifest.placeholders["Order Number"], 4]
    assert any("greedy agreement" in line for line in lines)
    assert [entry.name for entry in (tmp_path / "models").iterdir()] == ["out"], "drafts are gone"


def test_fp32_is_the_reference_and_says_so(tmp_path: Path) -> None:
    manifest = build_random("tiny", tmp_path, "fp32")
    quality = manifest.quality["quantised"]
    assert quality == {"measured": False, "why": "fp32 is the reference itself"}


def _trained(directory: Path) -> None:
    """The same weights, no longer marked as random."""
    write_random("tiny", directory)
    path = directory / "inhouse.json"
    own = json.loads(path.read_text())
    del own["random"]
    path.write_text(json.dumps(own))


@pytest.mark.parametrize("quant", ["row8", "static8", "int4"])
def test_trained_weights_below_the_floor_are_refused_and_the_old_build_stays(
    quant: str, tmp_path: Path
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    _trained(source)
    build(source, out, "fp32")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UnfitScheme, match=f"The {quant} build falls below its floor"):
        build(source, out, quant, floor=Floor(1.01, 1.0))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    manifest = build(source, out, quant, floor=Floor(0.0, 9.0))
    figures = manifest.quality["quantised"]
    assert figures["measured"] and figures["floor"]["greedy_agreement"] == 0.0
    assert 0 < figures["greedy_agreement"] <= 1 and figures["perplexity_ratio"] > 0
    assert Manifest.load(out) == manifest


def test_a_profile_falls_back_where_its_first_scheme_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, lines = tmp_path / "source", list[str]()
    _trained(source)
    floors = dict.fromkeys(building.FLOORS, Floor(0.0, 9.0))
    monkeypatch.setattr(building, "FLOORS", floors)
    assert build_for("throughput", source, tmp_path / "a").quant == "static8"
    monkeypatch.setattr(building, "FLOORS", floors | {"static8": Floor(1.01, 1.0)})
    assert build_for("throughput", source, tmp_path / "b", lines.append).quant == "row8"
    assert any("static8 build falls below its floor" in line for line in lines)
    monkeypatch.setattr(building, "FLOORS", dict.fromkeys(floors, Floor(1.01, 1.0)))
    with pytest.raises(UnfitScheme, match="The row8 build"):
        build_for("latency", source, tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_static8_is_measured_on_other_prompts_than_it_is_judged_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random("tiny", tmp_path / "source")
    seen: dict[str, list[list[int]]] = {}

    def spy(name: str, at: int) -> None:
        real = getattr(building, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            seen[name] = [list(prompt) for prompt in args[at]]
            return real(*args, **kwargs)

        monkeypatch.setattr(building, name, spied)

    spy("measure_peaks", 2)
    spy("compare", 3)
    prompts = [some_tokens(seed, 6) for seed in range(5)]
    build(tmp_path / "source", tmp_path / "out", "static8", prompts=prompts)
    assert seen == {"measure_peaks": prompts[0::2], "compare": prompts[1::2]}
    build(tmp_path / "source", tmp_path / "out", "static8", prompts=prompts[:1])
    assert seen == {"measure_peaks": prompts[:1], "compare": prompts[:1]}, "one has to do for both"


def test_a_build_cut_short_never_leaves_a_folder_that_loads_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    write_random("tiny", source)
    build(source, out, "fp32")
    real = building._sync

    def full_disk(path: Path) -> None:
        if path.name == "model.json":
            raise OSError("no space left")
        real(path)

    monkeypatch.setattr(building, "_sync", full_disk)
    with pytest.raises(OSError, match="no space"):
        build(source, out, "row8")
    with pytest.raises(ManifestError, match=r"model\.onnx has \d+ bytes instead of"):
        Manifest.load(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_prompts_may_be_passed_and_must_fit(tmp_path: Path) -> None:
    write_random("tiny", tmp_path / "source")
    prompts = [some_tokens(seed, 6) for seed in range(3)]
    manifest = build(tmp_path / "source", tmp_path / "out", prompts=prompts)
    assert manifest.quality["quantised"]["prompts"] == 1, "every second one"
    with pytest.raises(BuildError, match="fits"):
        build(tmp_path / "source", tmp_path / "out", prompts=[[20] * 1020])


def test_a_checkpoint_from_elsewhere_needs_only_its_end_token(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _trained(source)
    (source / "inhouse.json").unlink()
    with pytest.raises(CheckpointError, match="eos_token"):
        build(source, tmp_path / "out", "fp32")
    (source / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|end|>"}}')
    manifest = build(source, tmp_path / "out", "fp32")
    assert (manifest.chat.format, manifest.chat.end) == ("jinja", "<|end|>")
    assert manifest.intents == {}
    assert manifest.scope is None
    assert manifest.name == "source"


@pytest.mark.parametrize("intents", [{"cancel_order": 9999}, {"cancel_order": 8}])
def test_details_that_the_tokenizer_contradicts_are_refused(
    intents: dict[str, int], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_random("tiny", source)
    path = source / "inhouse.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intents": intents}))
    with pytest.raises(ManifestError):
        build(source, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


# --- The command ----------------------------------------------------------------------------------


def test_the_command_builds_random_and_stored_checkpoints(tmp_path: Path) -> None:
    out = StringIO()
    call_command("build_model", str(tmp_path / "a"), random="tiny", quant="fp32", stdout=out)
    assert "wrote" in out.getvalue()
    write_random("tiny", tmp_path / "source")
    call_command("build_model", str(tmp_path / "source"), str(tmp_path / "b"), stdout=out)
    assert Manifest.load(tmp_path / "a").quant == "fp32"
    assert Manifest.load(tmp_path / "b").quant == "static8"


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        (["nowhere", "out"], {}, "config.json is missing"),
        (["out"], {}, "name SOURCE and OUT"),
        (["a", "b"], {"random": "tiny"}, "takes one path"),
        (["out"], {"random": "huge"}, "Known: tiny"),
        (["out"], {"random": "tiny", "quant": "dynamic"}, "dynamic is refused"),
        (["a", "b"], {"via": "optimum"}, "config.json is missing"),
    ],
)
def test_the_command_explains_what_it_cannot_do(
    paths: list[str], options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=message):
        call_command("build_model", *(str(tmp_path / path) for path in paths), **options)
    assert list(tmp_path.iterdir()) == []
