"""Families that are not built here: exported by optimum, run by the plain runner, equal to torch.

Each checkpoint is made by transformers with seeded random weights and a handful of layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from assistant.engine import Codec, Engine, EngineConfig
from assistant.engine.manifest import MODEL, Manifest
from assistant.engine.plain import PlainRunner
from assistant.engine.worker import Loaded
from assistant.modelkit.build import BuildError
from assistant.modelkit.weights import CheckpointError

# torch and optimum warn of their own future; their warnings are not ours to mend.
pytestmark = [pytest.mark.train, pytest.mark.filterwarnings("default")]

CONTEXT = 96
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT},
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "opt": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 48},
    "phi": {**SMALL, "partial_rotary_factor": 0.5},
    "gemma": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "bloom": {"hidden_size": 48, "n_layer": 3, "n_head": 4},
}
PROMPTS = ["hi", "where is my order?", "a much longer question about several orders " * 2]


@pytest.fixture(scope="module", autouse=True)
def _needs_the_train_extra() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("optimum.exporters.onnx")


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE without merges; its size."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={one: at for at, one in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(one, special=True) for one in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(pieces)


def write_checkpoint(family: str, folder: Path) -> Any:
    """The torch model, saved in ``folder``. Norms and biases are not left at 1 and 0."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    vocab = write_tokenizer(folder)
    ids = {"bos_token_id": 1, "eos_token_id": 4, "pad_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=vocab, **ids, **FAMILIES[family])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoint, torch model and exported folder of a family, each made once."""
    from assistant.modelkit.generic import export

    root, made = tmp_path_factory.mktemp("generic"), {}

    def get(family: str) -> tuple[Path, Any]:
        if family not in made:
            model = write_checkpoint(family, root / family)
            said: list[str] = []
            export(root / family, root / "out" / family, said.append)
            assert "slower" in said[-1]
            made[family] = (root / "out" / family, model)
        return made[family]

    return get


def open_engine(folder: Path, **settings: Any) -> Engine:
    def load(config: EngineConfig) -> Loaded:
        manifest = Manifest.load(config.model_dir)
        codec = Codec.load(config.model_dir, manifest)
        runner = PlainRunner(
            config.model_dir / MODEL, manifest.architecture, slots=config.max_batch,
            step_tokens=config.step_tokens, context_tokens=CONTEXT, threads=config.threads,
        )  # fmt: skip
        return Loaded(runner, codec.banned_ids, CONTEXT, None, manifest, codec)

    wanted = {"max_batch": 3, "step_tokens": 24, "context_tokens": CONTEXT, "threads": 1}
    return Engine(EngineConfig(folder, **{**wanted, **settings}), load=load)


def by_torch(model: Any, prompt: Sequence[int], count: int, banned: Sequence[int]) -> list[int]:
    import torch

    written = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None,
        suppress_tokens=list(banned),
    )  # fmt: skip
    found: list[int] = written[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_is_not_built_here_writes_what_transformers_writes(
    built: Any, family: str
) -> None:
    folder, model = built(family)
    engine = open_engine(folder)
    engine.start()
    try:
        assert engine.codec is not None
        banned = engine.codec.banned_ids
        prompts = [engine.codec.encode(text)[:40] for text in PROMPTS]
        answers = [engine.submit(one, max_new_tokens=48) for one in prompts]
        written = [[t.id for part in one.tokens_sync() for t in part] for one in answers]
    finally:
        engine.close()
    expected = [by_torch(model, prompt, 48, banned) for prompt in prompts]
    assert written == expected
    assert len({tuple(one) for one in written}) == len(PROMPTS), "the prompts matter"


def test_an_exported_folder_says_what_it_is(built: Any) -> None:
    folder, _ = built("gpt2")
    manifest = Manifest.load(folder)
    assert (manifest.runner, manifest.quant, manifest.chat.format) == ("plain", "fp32", "jinja")
    assert (manifest.chat.end, manifest.chat.bos) == ("<|im_end|>", "<s>")
    assert manifest.context_tokens == CONTEXT
    assert manifest.quality["export"]["largest_difference"] < 1e-3
    assert "slower" in manifest.quality["export"]["note"]
    names = {"model.onnx", "tokenizer.json", "chat_template.jinja", "model.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in folder.parent.iterdir()} >= {folder.name}
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


def test_code_that_a_checkpoint_brings_is_refused_and_pickles_are_never_read(
    tmp_path: Path,
) -> None:
    from assistant.modelkit.generic import export

    write_checkpoint("gpt2", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    own = {**config, "auto_map": {"AutoModelForCausalLM": "modeling.Own"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(own))
    with pytest.raises(CheckpointError, match="code of its own"):
        export(tmp_path / "source", tmp_path / "out", print)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        export(tmp_path / "source", tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_an_architecture_that_nobody_knows_is_refused_in_one_line(tmp_path: Path) -> None:
    from assistant.modelkit.generic import export

    write_checkpoint("gpt2", tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "model_type": "moon"}))
    with pytest.raises(CheckpointError, match=r"transformers cannot load .*moon"):
        export(tmp_path / "source", tmp_path / "out", print)


def test_what_optimum_cannot_export_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    from assistant.modelkit.generic import export

    FAMILIES["xlnet"] = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}
    try:
        write_checkpoint("xlnet", tmp_path / "source")
    finally:
        del FAMILIES["xlnet"]
    with pytest.raises(BuildError, match=r"optimum cannot export a xlnet"):
        export(tmp_path / "source", tmp_path / "out", print)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_weights_beyond_one_file_are_refused_before_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from assistant.modelkit import generic

    write_checkpoint("gpt2", tmp_path / "source")
    monkeypatch.setattr(generic, "LIMIT_BYTES", 1000)
    with pytest.raises(BuildError, match=r"less than 2 GiB.*at most 530 M"):
        generic.export(tmp_path / "source", tmp_path / "out", print)
