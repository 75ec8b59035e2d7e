"""Checkpoints from anywhere: whatever is wrong with one is said in a line, before any session."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assistant.engine.manifest import Manifest
from assistant.modelkit import build as building
from assistant.modelkit.build import BuildError, build
from assistant.modelkit.checkpoint import (
    SHAPES,
    Checkpoint,
    CheckpointError,
    ModelShape,
    RopeScaling,
    write_checkpoint,
    write_random,
)
from assistant.modelkit.foreign import PLAIN_TEMPLATE, chat_of, open_tokenizer, template_of
from assistant.modelkit.rotary import frequencies

TINY = SHAPES["tiny"]
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"
TEMPLATE = "{% for one in messages %}{{ one.content }}<|user|>{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint from elsewhere, for a test to spoil."""
    write_random("tiny", tmp_path / "source")
    (tmp_path / "source" / "inhouse.json").unlink()
    write(tmp_path / "source" / "tokenizer_config.json", {"eos_token": "<|end|>"})
    return tmp_path / "source"


@pytest.fixture
def no_session(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> Any:
        raise AssertionError("a session was made")

    monkeypatch.setattr(building, "open_session", refuse)


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data))


def configure(folder: Path, **changes: Any) -> None:
    write(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)


def load(folder: Path, name: str = WEIGHTS) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return {key: value.astype(np.float32) for key, value in load_file(folder / name).items()}


def store(folder: Path, tensors: dict[str, Any], name: str = WEIGHTS) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, folder / name)


def spoil(folder: Path, key: str, change: Callable[[Any], Any]) -> None:
    tensors = load(folder)
    store(folder, tensors | {key: change(tensors[key])})


def shard(folder: Path, *, index: dict[str, str] | None = None) -> None:
    """The weights in two files with an index; ``index`` changes where it says that tensors lie."""
    tensors = load(folder)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    places = {
        key: f"model-0000{1 + (number % 2)}-of-00002.safetensors"
        for number, key in enumerate(names)
    }
    for place in set(places.values()):
        store(folder, {key: tensors[key] for key in names if places[key] == place}, place)
    write(folder / INDEX, {"metadata": {}, "weight_map": places | (index or {})})


def header(folder: Path, text: bytes, length: int | None = None, body: bytes = b"") -> None:
    size = struct.pack("<Q", len(text) if length is None else length)
    (folder / WEIGHTS).write_bytes(size + text + body)


def entry(folder: Path, **changes: Any) -> None:
    """The true header, but for what it says of one tensor."""
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    told = json.loads(raw[8 : 8 + length])
    told[NORM] |= changes
    header(folder, json.dumps(told).encode(), body=raw[8 + length :])


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def lfs_pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 4242\n"
    )


def link_out(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def sparse(folder: Path) -> None:
    """A terabyte of zeros, of which the header speaks the truth."""
    rows = (1 << 38) // TINY.hidden_size
    told = {"dtype": "F32", "shape": [rows, 48], "data_offsets": [0, rows * 48 * 4]}
    header(folder, json.dumps({"model.embed_tokens.weight": told}).encode())
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size + rows * 48 * 4)


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size - 100)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # config.json
    "another architecture": (lambda at: configure(at, model_type="gpt2"), "--via optimum"),
    "no architecture": (lambda at: configure(at, model_type=["llama"]), "is not built here"),
    "config is not JSON": (
        lambda at: (at / "config.json").write_text("{"),
        r"config\.json is not JSON",
    ),
    "config is a list": (lambda at: write(at / "config.json", []), "one JSON object"),
    "config is nested": (
        lambda at: (at / "config.json").write_text("[" * 100_000),
        r"config\.json is not JSON",
    ),
    "config is not text": (
        lambda at: (at / "config.json").write_bytes(b"\xff\xfe\x00"),
        "not UTF-8",
    ),
    "config is huge": (
        lambda at: os.truncate(at / "config.json", 1 << 34),
        "larger than 16777216 bytes",
    ),
    "a billion layers": (
        lambda at: configure(at, num_hidden_layers=10**9),
        "between 1 and 512",
    ),
    "endless layers": (
        lambda at: (at / "config.json").write_text(
            (at / "config.json")
            .read_text()
            .replace('"num_hidden_layers": 2', '"num_hidden_layers": 1e999')
        ),
        "num_hidden_layers is inf",
    ),
    "half a layer": (lambda at: configure(at, num_hidden_layers=1.5), "not such a number"),
    "a theta that is not a number": (lambda at: configure(at, rope_theta="big"), "rope_theta"),
    "a context without end": (
        lambda at: configure(at, max_position_embeddings=10**12),
        "max_position_embeddings is",
    ),
    "more weights than fit": (
        lambda at: configure(at, hidden_size=16384, intermediate_size=65536, num_hidden_layers=99),
        r"billion weights; models up to 4\.3",
    ),
    "dynamic rope": (
        lambda at: configure(at, rope_scaling={"type": "dynamic", "factor": 2}),
        "'dynamic' is not built: it changes with the length",
    ),
    "yarn": (
        lambda at: configure(at, rope_scaling={"rope_type": "yarn", "factor": 4}),
        "'yarn' is not built: it also rescales.*remove rope_scaling",
    ),
    "longrope": (
        lambda at: configure(at, rope_parameters={"rope_type": "longrope"}),
        "'longrope' is not built",
    ),
    "rope of another kind": (lambda at: configure(at, rope_scaling="llama3"), "not an object"),
    "half a rope": (lambda at: configure(at, partial_rotary_factor=0.5), "turns whole heads"),
    "llama3 upside down": (
        lambda at: configure(
            at,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8,
                "low_freq_factor": 4,
                "high_freq_factor": 1,
                "original_max_position_embeddings": 64,
            },
        ),
        "high_freq_factor above",
    ),
    "an attention of another kind": (
        lambda at: configure(at, layer_types=["chunked_attention"] * 2),
        "layer_types names",
    ),
    "no window at all": (
        lambda at: configure(at, model_type="mistral", sliding_window=0),
        "sliding_window is 0",
    ),
    "quantised": (lambda at: configure(at, quantization_config={"bits": 4}), "full weights"),
    # weights
    "no weights": (lambda at: (at / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "pickle only": (pickle_only, "pytorch_model.bin is a pickle.*save_pretrained"),
    "an adapter": (
        lambda at: ((at / WEIGHTS).unlink(), write(at / "adapter_config.json", {})),
        "merge it into its base",
    ),
    "a pointer": (lfs_pointer, "git lfs pull"),
    "weights are a folder": (
        lambda at: ((at / WEIGHTS).unlink(), (at / WEIGHTS).mkdir()),
        "not a plain file",
    ),
    "weights are a pipe": (
        lambda at: ((at / WEIGHTS).unlink(), os.mkfifo(at / WEIGHTS)),
        "not a plain file",
    ),
    "weights lie elsewhere": (lambda at: link_out(at, WEIGHTS), "outside its folder"),
    "config lies elsewhere": (lambda at: link_out(at, "config.json"), "outside its folder"),
    "links in a circle": (
        lambda at: ((at / "config.json").unlink(), (at / "config.json").symlink_to("config.json")),
        "cannot be read|is missing",
    ),
    "cut short": (cut, "damaged or cut short"),
    "a terabyte of nothing": (sparse, r"has shape \(5726623061, 48\)"),
    "empty": (lambda at: (at / WEIGHTS).write_bytes(b""), "claims 0 bytes of 0"),
    "a header without end": (lambda at: header(at, b"{}", 1 << 62), "header claims"),
    "a header that is no JSON": (lambda at: header(at, b"{{"), "not JSON"),
    "a header that is a list": (lambda at: header(at, b"[]"), "not a JSON object"),
    "a header of nothing": (lambda at: header(at, b"{}"), "lacks model.embed_tokens.weight"),
    "an entry that is none": (
        lambda at: header(at, b'{"a\\nb": {"dtype": "F32"}}'),
        r"no type, shape and place for 'a\\nb'",
    ),
    "an offset beyond the file": (
        lambda at: entry(at, data_offsets=[0, 1 << 60]),
        "would end at byte",
    ),
    "an offset below zero": (lambda at: entry(at, data_offsets=[-8, 88]), "would end at byte"),
    "a shape that its bytes deny": (
        lambda at: entry(at, shape=[48, 48]),
        r"of shape \[48, 48\] does not take 96 bytes",
    ),
    "a shape below zero": (lambda at: entry(at, shape=[-48]), "no type, shape and place"),
    "a gigantic shape": (lambda at: entry(at, shape=[1 << 62, 1 << 62]), "no type, shape and"),
    "another shape": (
        lambda at: spoil(at, NORM, lambda norm: norm[:-1].copy()),
        r"norm\.weight has shape \(47,\).*\(48,\)",
    ),
    "int8": (
        lambda at: spoil(at, NORM, lambda norm: norm.astype(np.int8)),
        "stored as 'I8'",
    ),
    "fp8": (
        lambda at: entry(at, dtype="F8_E4M3", data_offsets=[0, 48]),
        "stored as 'F8_E4M3'",
    ),
    "not a number": (lambda at: spoil(at, NORM, lambda norm: norm * np.nan), "NaN or infinite"),
    "infinite": (
        lambda at: spoil(at, NORM, lambda norm: np.where(np.arange(48) == 7, np.inf, norm)),
        "NaN or infinite",
    ),
    "a bias that config.json keeps silent about": (
        lambda at: store(
            at, load(at) | {"model.layers.1.self_attn.q_proj.bias": np.zeros(64, np.float32)}
        ),
        "would be another model's",
    ),
    # shards
    "a missing shard": (
        lambda at: (shard(at), (at / "model-00002-of-00002.safetensors").unlink()),
        "00002-of-00002.safetensors is missing",
    ),
    "a shard of another model": (
        lambda at: shard(at, index={NORM: "model-00001-of-00002.safetensors"}),
        "not of one model",
    ),
    "a shard outside": (
        lambda at: shard(at, index={NORM: "../outside.safetensors"}),
        "names the shard '../outside",
    ),
    "a shard at the root": (
        lambda at: shard(at, index={NORM: "/etc/passwd"}),
        "names the shard '/etc/passwd'",
    ),
    "a shard that is a link": (
        lambda at: (shard(at), link_out(at, "model-00001-of-00002.safetensors")),
        "outside its folder",
    ),
    "a pickle as shard": (
        lambda at: shard(at, index={NORM: "pytorch_model.bin"}),
        "names the shard 'pytorch_model.bin'",
    ),
    "an index without a map": (
        lambda at: (shard(at), write(at / INDEX, {"metadata": {}})),
        "no weight_map",
    ),
    # tokenizer and chat
    "no tokenizer": (
        lambda at: (at / "tokenizer.json").unlink(),
        r"tokenizer\.json is missing.*AutoTokenizer",
    ),
    "a tokenizer that is none": (
        lambda at: (at / "tokenizer.json").write_text("{}"),
        "is no tokenizer",
    ),
    "a tokenizer from elsewhere": (lambda at: link_out(at, "tokenizer.json"), "outside its"),
    "no end": (lambda at: (at / "tokenizer_config.json").unlink(), "names no eos_token"),
    "an end of another kind": (
        lambda at: write(at / "generation_config.json", {"eos_token_id": ["2"]}),
        "not a token's id",
    ),
    "a template of another kind": (
        lambda at: write(
            at / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": {"a": 1}}
        ),
        "not a short text",
    ),
    "a template that fails": (
        lambda at: (at / "chat_template.jinja").write_text("{% for"),
        r"chat template of .* cannot be used.*as chat_template\.jinja",
    ),
    "a template that reaches out": (
        lambda at: (at / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}"),
        "chat template of .* cannot be used",
    ),
    "a template without end": (
        lambda at: (at / "chat_template.jinja").write_text("x" * (1 << 20)),
        "larger than",
    ),
    "a context beyond the tables": (
        lambda at: write(at / "inhouse.json", {"context_tokens": 10**9}),
        "context_tokens is 1000000000",
    ),
    "chat settings of another kind": (
        lambda at: write(at / "inhouse.json", {"chat": {"template": "x"}}),
        r"inhouse\.json is not as a manifest needs it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_checkpoint_is_refused_in_one_line_before_a_session(
    fault: str, folder: Path, no_session: None
) -> None:
    do, message = FAULTS[fault]
    do(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        build(folder, folder.parent / "out", "row8")
    assert "\n" not in str(caught.value)
    assert not (folder.parent / "out").exists()


def test_a_sound_checkpoint_needs_a_session(folder: Path, no_session: None) -> None:
    with pytest.raises(AssertionError, match="a session was made"):
        build(folder, folder.parent / "out", "row8")


@pytest.mark.parametrize("fault", ["int8", "fp8"])
def test_weights_of_a_wrong_type_are_noticed_before_any_is_read(fault: str, folder: Path) -> None:
    do, message = FAULTS[fault]
    do(folder)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_a_model_too_large_for_its_scheme_is_refused_before_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random("tiny", tmp_path / "source")
    monkeypatch.setattr(building, "LIMIT_BYTES", 100_000)
    with pytest.raises(BuildError, match=r"as fp32, and one ONNX file.*--quant .*row8 or int4"):
        build(tmp_path / "source", tmp_path / "out", "fp32")


def test_a_weight_that_the_graph_leaves_out_is_noticed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnx import ModelProto

    monkeypatch.setattr(building, "build_graph", lambda *args, **how: ModelProto())
    with pytest.raises(BuildError, match=r"leaves out model\.embed_tokens\.weight and 19 more"):
        build(folder, folder.parent / "out", "fp32")


# --- What is read ---------------------------------------------------------------------------------


def test_shards_are_read_as_one_file(folder: Path) -> None:
    whole = {name: Checkpoint.open(folder).tensor(name) for name in TINY.tensors()}
    shard(folder)
    split = Checkpoint.open(folder)
    for name, value in whole.items():
        np.testing.assert_array_equal(split.tensor(name), value)


def test_the_links_of_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--owner--shop"
    snapshot = home / "snapshots" / "0a1b2c3d4e5f6a7b8c9d"
    (home / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(folder.iterdir()):
        path.rename(home / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    manifest = build(snapshot, tmp_path / "out", "fp32")
    assert (manifest.name, manifest.version) == ("shop", "0a1b2c3d4e5f")


def test_a_large_tensor_is_never_held_with_the_others(folder: Path, tmp_path: Path) -> None:
    import tracemalloc

    shape = replace(TINY, num_hidden_layers=24, intermediate_size=768)
    write_checkpoint(tmp_path / "deep", shape)
    largest = max(int(np.prod(size)) for size in shape.tensors().values())
    tracemalloc.start()
    try:
        checkpoint = Checkpoint.open(tmp_path / "deep")
        for name in shape.tensors():
            checkpoint.tensor(name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < largest * 4 * 2 + 500_000 < shape.parameters * 2


def test_old_frequencies_in_the_file_are_passed_over(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(8, np.float32)}
    store(folder, load(folder) | extra)
    assert Checkpoint.open(folder).shape == TINY


def test_who_says_nothing_of_tying_has_tied_or_stores_a_head(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    write(folder / "config.json", config)
    assert Checkpoint.open(folder).shape.tie_word_embeddings
    head = np.zeros((TINY.vocab_size, TINY.hidden_size), np.float32)
    store(folder, load(folder) | {"lm_head.weight": head})
    assert not Checkpoint.open(folder).shape.tie_word_embeddings


LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
SHAPES_THAT_RETURN = {
    "llama3": replace(TINY, rope_scaling=LLAMA3),
    "linear": replace(TINY, rope_scaling=RopeScaling("linear", 2.0)),
    "biases": replace(TINY, attention_bias=True, mlp_bias=True),
    "mistral": replace(TINY, family="mistral"),
    "mistral, window": replace(TINY, family="mistral", sliding_window=64),
    "qwen2, window": replace(TINY, family="qwen2", sliding_window=64),
    "qwen3, bias": replace(TINY, family="qwen3", attention_bias=True),
}


@pytest.mark.parametrize("name", SHAPES_THAT_RETURN)
def test_a_shape_comes_back_from_its_config(name: str) -> None:
    shape = SHAPES_THAT_RETURN[name]
    assert ModelShape.from_config(json.loads(json.dumps(shape.config()))) == shape


def test_a_window_that_is_not_used_bounds_nothing() -> None:
    config = TINY.config() | {"model_type": "qwen2", "sliding_window": 32}
    assert ModelShape.from_config(config | {"use_sliding_window": False}).sliding_window is None
    assert ModelShape.from_config(config | {"use_sliding_window": True}).longest_context == 32
    kinds = ["full_attention", "sliding_attention"]
    assert ModelShape.from_config(config | {"layer_types": kinds}).longest_context == 32


def test_llama3_keeps_short_waves_and_stretches_long_ones() -> None:
    shape = replace(TINY, head_dim=64, rope_theta=500_000.0)
    plain, scaled = frequencies(shape), frequencies(replace(shape, rope_scaling=LLAMA3))
    ratio = plain / scaled
    waves = 2 * np.pi / plain
    np.testing.assert_allclose(ratio[waves < 64 / 4], 1)
    np.testing.assert_allclose(ratio[waves > 64 / 1], 8)
    between = ratio[(waves > 64 / 4) & (waves < 64)]
    assert len(between) and ((between > 1) & (between < 8)).all()
    halved = frequencies(replace(shape, rope_scaling=RopeScaling("linear", 2.0)))
    np.testing.assert_allclose(plain / halved, 2)


# --- How it talks ---------------------------------------------------------------------------------


def test_a_foreign_chat_is_kept_with_all_that_ends_an_answer(folder: Path) -> None:
    settings = {"bos_token": {"content": "<|system|>"}, "eos_token": {"content": "<|user|>"}}
    write(folder / "tokenizer_config.json", settings | {"chat_template": TEMPLATE})
    write(folder / "generation_config.json", {"eos_token_id": [1, 3, 9999]})
    manifest = build(folder, folder.parent / "out", "fp32")
    chat = manifest.chat
    assert (chat.format, chat.bos, chat.end) == ("jinja", "<|system|>", "<|user|>")
    assert chat.more_ends == ("<|end|>",), "3 is <|user|> itself, 9999 no token"
    template = folder.parent / "out" / "chat_template.jinja"
    assert template.read_text() == TEMPLATE
    assert manifest.files[template.name].bytes == template.stat().st_size
    assert Manifest.load(folder.parent / "out") == manifest


TEMPLATES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "a file before settings": ({"chat_template": "old"}, "new", "new"),
    "settings": ({"chat_template": "old"}, None, "old"),
    "the default of several": (
        {
            "chat_template": [
                {"name": "tool_use", "template": "tools"},
                {"name": "default", "template": "plain"},
            ]
        },
        None,
        "plain",
    ),
    "none": ({}, None, ""),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_the_template_is_found_where_transformers_puts_it(case: str, folder: Path) -> None:
    settings, file, wanted = TEMPLATES[case]
    write(folder / "tokenizer_config.json", settings)
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    assert template_of(folder) == wanted


def test_a_base_model_gets_a_plain_template_and_is_told_so(folder: Path) -> None:
    lines: list[str] = []
    build(folder, folder.parent / "out", "fp32", lines.append)
    assert (folder.parent / "out" / "chat_template.jinja").read_text() == PLAIN_TEMPLATE
    assert any("no chat template" in line for line in lines)


def test_the_end_may_stand_in_older_files_or_in_the_config_alone(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    write(folder / "tokenizer_config.json", {"eos_token": None})
    configure(folder, eos_token_id=1)
    assert chat_of(folder, tokenizer).end == "<|end|>"
    write(folder / "special_tokens_map.json", {"eos_token": "<|user|>"})
    assert chat_of(folder, tokenizer).end == "<|user|>"
    assert chat_of(folder, tokenizer).more_ends == ("<|end|>",)
