"""Reads the weights of a built model back out of its ONNX file: a checkpoint folder to train from.

The opposite of ``build`` for the graphs that are written here, whatever their scheme: 8-bit and
4-bit matrices become the numbers they stand for. What static8 moved from ``up`` to ``down`` stays
there, for it changes nothing. Needs onnx and safetensors; knows nothing of training. No torch.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from assistant.engine.drafts import FILE as DRAFTS
from assistant.engine.manifest import MODEL, NAME, TOKENIZER, Manifest
from assistant.engine.wide import FILE as WIDE
from assistant.modelkit.build import DETAILS
from assistant.modelkit.rotary import rotary_tables
from assistant.modelkit.shape import EMBED, HEAD, NORM, ModelShape
from assistant.modelkit.weights import WHOLE, Array, CheckpointError

Constants = Mapping[str, npt.NDArray[Any]]


def is_built(folder: Path) -> bool:
    """Whether ``folder`` is a built model rather than a checkpoint."""
    return (folder / NAME).is_file() and (folder / MODEL).is_file()


def unpack(folder: Path, out: Path) -> Manifest:
    """Writes the checkpoint of the built model in ``folder`` to ``out``, whole or not at all; what
    stood there is replaced. Returns the manifest it was built with.

    Raises: ManifestError, CheckpointError.
    """
    manifest = Manifest.load(folder)
    shape = _shape(folder, manifest)
    weights = dict(_weights(_constants(folder, manifest, shape), shape, folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write(draft, folder, manifest, shape, weights)
        draft.chmod(0o755)
        shutil.rmtree(out, ignore_errors=True)
        draft.replace(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _write(
    draft: Path, folder: Path, manifest: Manifest, shape: ModelShape, weights: dict[str, Array]
) -> None:
    from safetensors.numpy import save_file

    save_file(weights, draft / WHOLE, metadata={"format": "pt"})
    shutil.copyfile(folder / TOKENIZER, draft / TOKENIZER)
    for name in {WIDE, DRAFTS} & manifest.files.keys():
        shutil.copyfile(folder / name, draft / name)
    config = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", **shape.config()}
    for name, content in (("config.json", config), (DETAILS, details(manifest))):
        (draft / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def details(manifest: Manifest) -> dict[str, Any]:
    """``inhouse.json``: what a build copies into the manifest, calibration and all."""
    quality = {key: value for key, value in manifest.quality.items() if key != "quantised"}
    return {
        "name": manifest.name,
        "version": manifest.version,
        "random": bool(manifest.quality.get("quantised", {}).get("random_weights", False)),
        "context_tokens": manifest.context_tokens,
        "chat": asdict(manifest.chat),
        "intents": dict(manifest.intents),
        "smalltalk": list(manifest.smalltalk),
        "scope": {"in": manifest.scope[0], "out": manifest.scope[1]} if manifest.scope else None,
        "placeholders": dict(manifest.placeholders),
        "calibration": asdict(manifest.calibration),
        "quality": quality,
    }


# -- reading -------------------------------------------------------------------------------------


def _shape(folder: Path, manifest: Manifest) -> ModelShape:
    """Raises: CheckpointError for a graph that was not written here."""
    if manifest.runner != "packed" or manifest.chat.format != "inhouse":
        raise CheckpointError(
            f"{folder} was not trained here, so its weights are not read back. Start from the "
            "checkpoint it was built from, or from a model of ours: --from bundled."
        )
    return ModelShape(**asdict(manifest.architecture))


def _constants(folder: Path, manifest: Manifest, shape: ModelShape) -> Constants:
    """Every constant of the graph by name. Raises: CheckpointError for a Llama with extras."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    found = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    extras = [name for name in found if name.endswith((".bias", "_norm.weight"))]
    cos, _ = rotary_tables(shape, manifest.context_tokens)
    same_rotary = "cos" in found and _alike(found["cos"], cos)
    if extras or not same_rotary:
        what = extras[0] if extras else "a stretched rotary table"
        raise CheckpointError(
            f"{folder / MODEL} holds {what}, which the models trained here do not have. Start from "
            "the checkpoint it was built from."
        )
    return found


def _alike(one: Array, other: Array) -> bool:
    """Equal but for last bits, which another machine's cosine may round differently."""
    return one.shape == other.shape and np.allclose(one, other, atol=1e-5)


def _weights(constants: Constants, shape: ModelShape, folder: Path) -> Iterator[tuple[str, Array]]:
    """Every tensor of the checkpoint, in the names and shapes of Hugging Face's Llama."""
    try:
        for name, value in _tensors(constants, shape):
            if value.shape != shape.tensors()[name]:
                raise ValueError(f"{name} has shape {value.shape}")
            yield name, np.ascontiguousarray(value, np.float32)
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MODEL} is not a graph that this version writes: {error}. Start from the "
            "checkpoint it was built from."
        ) from error


def _tensors(constants: Constants, shape: ModelShape) -> Iterator[tuple[str, Array]]:
    yield EMBED, _matrix(constants, "embed", shape.hidden_size)
    yield NORM, constants[NORM]
    if not shape.tie_word_embeddings:
        yield HEAD, _matrix(constants, "head", shape.hidden_size)
    for layer in range(shape.num_hidden_layers):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{at}{norm}.weight", constants[f"{at}{norm}.weight"]
        qkv = _matrix(constants, f"layer_{layer}.qkv", shape.hidden_size)
        cuts = (shape.query_width, shape.query_width + shape.kv_width)
        for name, part in zip("qkv", np.split(qkv, cuts), strict=True):
            yield f"{at}self_attn.{name}_proj.weight", part
        for name, width in (
            ("self_attn.o", shape.query_width),
            ("mlp.gate", shape.hidden_size),
            ("mlp.up", shape.hidden_size),
            ("mlp.down", shape.intermediate_size),
        ):
            short = f"layer_{layer}.{name.split('.')[1]}"
            yield f"{at}{name}_proj.weight", _matrix(constants, short, width)


def _matrix(constants: Constants, name: str, width: int) -> Array:
    """A matrix as checkpoints store it, (out, in), however the graph does. ``width``: its inputs.

    Raises: KeyError where the graph has no such matrix.
    """
    if f"{name}.rows" in constants:  # row by row, for the gather of embeddings
        return _scaled(constants[f"{name}.rows"], constants[f"{name}.row_scale"].ravel())
    if f"{name}.int8" in constants:
        return _scaled(constants[f"{name}.int8"].T, constants[f"{name}.scale"].ravel())
    if f"{name}.int4" in constants:
        return _blocks(constants[f"{name}.int4"], constants[f"{name}.scale"])[:, :width]
    value: Array = constants[name]
    # The gather reads the embedding by rows; every product reads its matrix turned.
    return value if name in ("embed", "head") else value.T


def _scaled(values: npt.NDArray[np.int8], scales: Array) -> Array:
    """Shapes: (out, in), (out,) -> (out, in)."""
    return values.astype(np.float32) * scales[:, None]


def _blocks(packed: npt.NDArray[np.uint8], scales: Array) -> Array:
    """The opposite of ``quantise_blocks``. Shapes: (out, blocks, 16), (out, blocks) -> (out, in)
    padded to whole blocks."""
    codes = np.stack((packed & 15, packed >> 4), axis=3).reshape(*packed.shape[:2], -1)
    whole = (codes.astype(np.float32) - 8) * scales.reshape(*packed.shape[:2], 1)
    return whole.reshape(len(packed), -1)
