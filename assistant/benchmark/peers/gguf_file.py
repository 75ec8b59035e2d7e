"""A Llama checkpoint as a GGUF file for llama.cpp, from config.json and safetensors alone.

Independent of our own graph builder on purpose: equal answers of both prove that both are right.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Hugging Face's name within a layer, GGUF's name.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Float32, with no vocabulary: it speaks token ids. Raises: ValueError for other families."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type", "llama") != "llama":
        raise ValueError(f"{config['model_type']} is not written as GGUF here; only llama is")
    draft = path.with_suffix(".part")
    writer = gguf.GGUFWriter(draft, "llama")
    _describe(writer, config)
    for name, value in _tensors(checkpoint, config):
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    draft.replace(path)


def _describe(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(0)  # all float32
    writer.add_tokenizer_model("none")


def _tensors(checkpoint: Path, config: dict[str, Any]) -> Iterator[tuple[str, NDArray[np.float32]]]:
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
    from safetensors import safe_open

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            value = np.asarray(file.get_tensor(name), np.float32)
            yield gguf_name(name), half_to_pairs(value, heads.get(name.split(".")[-2], 0))


def gguf_name(name: str) -> str:
    """Raises: KeyError for a tensor llama.cpp's Llama does not have."""
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_LAYER[rest.removesuffix('.weight')]}.weight"


def half_to_pairs(matrix: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows reordered for llama.cpp's rotary: Hugging Face turns element i of a head with element
    i + half, llama.cpp turns neighbours. 0 heads: as it was."""
    if not heads:
        return np.ascontiguousarray(matrix)
    half = matrix.shape[0] // heads // 2
    apart = matrix.reshape(heads, 2, half, -1)
    return np.ascontiguousarray(apart.swapaxes(1, 2).reshape(matrix.shape))
