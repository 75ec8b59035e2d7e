"""Builds a model folder from any decoder that optimum can export, for families not built here.

The graph is optimum's, in fp32, run by the plain runner: slower than our own graphs, and the
manifest says so. Only safetensors, JSON and the tokenizer are read; code that a checkpoint brings
is never run. Knows nothing of quantising.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from assistant.engine.manifest import (
    MODEL,
    NAME,
    TEMPLATE,
    TOKENIZER,
    Architecture,
    Chat,
    Manifest,
    describe_files,
)
from assistant.engine.plain import PlainRunner
from assistant.engine.runner import Batch
from assistant.engine.text import Codec
from assistant.modelkit.build import BuildError, _named
from assistant.modelkit.foreign import PLAIN_TEMPLATE, chat_of, open_tokenizer, template_of
from assistant.modelkit.graph import LIMIT_BYTES
from assistant.modelkit.weights import CheckpointError, plain_file, read_json, stored_tensors

Progress = Callable[[str], None]

_TASK = "text-generation-with-past"
#: A model that could read 32k tokens would need keys and values for them in every slot.
_MOST_CONTEXT_TOKENS = 4096
_USUAL_CONTEXT_TOKENS = 2048
#: Of log-probabilities, export against torch. Rounding gives 1e-5; a wrong mask or position gives
#: whole units.
_MOST_DIFFERENCE = 1e-2
_NOTE = (
    "Exported by optimum-onnx and run by the plain runner: several times slower than the families "
    "that are built here, the more so with many chats at once."
)


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint folder and what it says of itself besides its weights."""

    directory: Path
    config: dict[str, Any]
    chat: Chat
    template: str
    weights: tuple[Path, ...]

    @classmethod
    def open(cls, directory: Path, progress: Progress) -> _Source:
        """Raises: CheckpointError, BuildError."""
        config = read_json(directory / "config.json")
        if "auto_map" in config:
            raise CheckpointError(
                f"{directory / 'config.json'} asks for code of its own (auto_map), which is never "
                "run. Use a model whose architecture is part of transformers."
            )
        if config.get("quantization_config"):
            raise CheckpointError("The checkpoint is quantised already; start from full weights.")
        stored = stored_tensors(directory)
        parameters = sum(math.prod(one.shape) for one in stored.values())
        progress(f"{directory.name}: {parameters / 1e6:.1f} M parameters")
        if parameters * 4 > LIMIT_BYTES:
            raise BuildError(
                f"The weights take {parameters * 4 / 2**30:.1f} GiB in fp32, and one ONNX file "
                "holds less than 2 GiB. Use a model of at most 530 M parameters with --via optimum."
            )
        chat, template = chat_of(directory, open_tokenizer(directory)), template_of(directory)
        if not template:
            progress("no chat template, so a plain one is written: a base model may ramble")
        files = tuple(sorted({one.path for one in stored.values()}))
        return cls(directory, config, chat, template or PLAIN_TEMPLATE, files)


def export(source: Path, out: Path, progress: Progress) -> Manifest:
    """Exports the checkpoint in ``source`` into ``out``, replacing an older model there.

    Raises: CheckpointError, BuildError, ManifestError; ModuleNotFoundError without the train extra.
    """
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out} is a file; name a folder for the model.")
    opened = _Source.open(source, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        manifest = _write(opened, draft, progress)
        _move(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    size = manifest.files[MODEL].bytes / 1e6
    progress(f"wrote {out}: {MODEL} has {size:.1f} MB. {_NOTE}")
    return manifest


def _write(source: _Source, draft: Path, progress: Progress) -> Manifest:
    with _quiet():
        torch_model = _load(source)
        _graph(torch_model, draft, progress)
    shutil.copyfile(source.directory / TOKENIZER, draft / TOKENIZER)
    (draft / TEMPLATE).write_text(source.template, encoding="utf-8")
    manifest = _manifest(source, torch_model.config, draft)
    progress("comparing with torch")
    difference = _difference(torch_model, manifest, draft / MODEL)
    if not difference <= _MOST_DIFFERENCE:
        raise BuildError(
            f"The export does not say what torch says: log-probabilities differ by "
            f"{difference:.3g}. Nothing was written. Another release of optimum-onnx may mend it."
        )
    quality = {"quantised": {"measured": False, "why": "fp32 is the reference itself"}}
    quality["export"] = {"largest_difference": difference, "note": _NOTE}
    manifest = replace(
        manifest, quality=quality, files=describe_files(draft, (MODEL, TOKENIZER, TEMPLATE))
    )
    manifest.write(draft)
    Codec.load(draft, Manifest.load(draft))
    return manifest


def _load(source: _Source) -> Any:
    """The torch model, from a folder that holds nothing but what may be read."""
    import torch
    from transformers import AutoModelForCausalLM

    wanted = ["config.json", "generation_config.json", "model.safetensors.index.json"]
    with tempfile.TemporaryDirectory(prefix="inhouse-export-") as folder:
        for path in (*(source.directory / name for name in wanted), *source.weights):
            if path.exists():
                (Path(folder) / path.name).symlink_to(plain_file(path).resolve())
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (ValueError, KeyError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"transformers cannot load {source.directory}: {_first_line(error)}"
            ) from error
        model.config._name_or_path = ""  # the folder goes; nothing may be looked up by its name
    return model.eval()


def _graph(model: Any, draft: Path, progress: Progress) -> None:
    """Writes ``model.onnx`` into ``draft`` and nothing else."""
    from optimum.exporters.onnx import onnx_export_from_model

    progress("exporting with optimum: a minute or so")
    with tempfile.TemporaryDirectory(prefix=".export-", dir=draft) as folder:
        try:
            onnx_export_from_model(
                model, Path(folder), task=_TASK, device="cpu", do_validation=False
            )
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            raise BuildError(
                f"optimum cannot export a {model.config.model_type}: {_first_line(error)}"
            ) from error
        written = sorted(path.name for path in Path(folder).glob("*.onnx*"))
        if written != [MODEL]:
            raise BuildError(
                f"optimum wrote {', '.join(written) or 'no graph'}, and one file is wanted: "
                "such a model cannot be run here."
            )
        (Path(folder) / MODEL).replace(draft / MODEL)


def _manifest(source: _Source, config: Any, draft: Path) -> Manifest:
    """All but the files and the quality."""
    heads, width = _cache_shape(draft / MODEL)
    longest = getattr(config, "max_position_embeddings", None) or _USUAL_CONTEXT_TOKENS
    hidden = int(config.hidden_size)
    wide = next(
        (
            found
            for name in ("intermediate_size", "ffn_dim", "n_inner")
            if (found := getattr(config, name, None))
        ),
        4 * hidden,
    )
    name, version = _named(source.directory)
    return Manifest(
        name=name,
        version=version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        architecture=Architecture(
            hidden_size=hidden,
            num_hidden_layers=int(config.num_hidden_layers),
            num_attention_heads=int(config.num_attention_heads),
            num_key_value_heads=heads,
            head_dim=width,
            intermediate_size=int(wide),
            vocab_size=int(config.vocab_size),
            rms_norm_eps=float(getattr(config, "layer_norm_eps", 1e-5)),
            rope_theta=float(getattr(config, "rope_theta", 10000.0)),
            tie_word_embeddings=bool(config.tie_word_embeddings),
            max_position_embeddings=int(longest),
        ),
        quant="fp32",
        context_tokens=min(int(longest), _MOST_CONTEXT_TOKENS),
        chat=source.chat,
        runner="plain",
    )


def _cache_shape(model: Path) -> tuple[int, int]:
    """Heads and width of the keys of the exported graph. Raises: BuildError."""
    import onnx

    graph = onnx.load(model).graph
    for one in graph.input:
        if one.name == "past_key_values.0.key":
            sizes = [dimension.dim_value for dimension in one.type.tensor_type.shape.dim]
            if len(sizes) == 4 and sizes[1] and sizes[3]:
                return int(sizes[1]), int(sizes[3])
    raise BuildError("The exported graph keeps no keys and values that the plain runner knows.")


def _difference(torch_model: Any, manifest: Manifest, model: Path) -> float:
    """Largest difference of log-probabilities, in pieces and beside another row, from torch's."""
    import torch

    shape, rng = manifest.architecture, np.random.default_rng(0)
    prompts = [rng.integers(0, shape.vocab_size, size).tolist() for size in (5, 11)]
    runner = PlainRunner(model, shape, slots=2, step_tokens=16, context_tokens=16, threads=0)
    runner.step(Batch.of([0, 1], [0, 0], [False, False], [one[:-1] for one in prompts]))
    starts = [len(one) - 1 for one in prompts]
    found = runner.step(Batch.of([0, 1], starts, [True, True], [one[-1:] for one in prompts]))
    with torch.no_grad():
        wanted = [
            torch_model(torch.tensor([one])).logits[0, -1].log_softmax(-1).numpy()
            for one in prompts
        ]
    difference = float(np.abs(found - np.array(wanted)).max())
    runner.close()
    return difference


def _move(draft: Path, out: Path) -> None:
    """The manifest last: until then a reader sees the old one, whose hashes fit no new file."""
    out.mkdir(exist_ok=True)
    for name in (MODEL, TOKENIZER, TEMPLATE, NAME):
        with (draft / name).open("rb") as file:
            os.fsync(file.fileno())
        (draft / name).replace(out / name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporting warns of traced branches by the hundred; what matters is measured afterwards."""
    from optimum.utils import logging as optimum_logging
    from transformers import logging as transformers_logging

    loggings = (optimum_logging, transformers_logging)
    before = [one.get_verbosity() for one in loggings]
    for one in loggings:
        one.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggings, before, strict=True):
            one.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
