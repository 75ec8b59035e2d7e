"""The small decoder in PyTorch, for training only; weights carry the Llama family's names.

Serving never imports this: ``graph.py`` builds the ONNX graph from the saved checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama-family shape; defaults are the model that ships (8.6 M parameters)."""

    vocab_size: int = 6144
    hidden_size: int = 320
    num_hidden_layers: int = 6
    num_attention_heads: int = 5
    num_key_value_heads: int = 1
    head_dim: int = 64
    intermediate_size: int = 896
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv, self.dim = (
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
        self.q_proj = nn.Linear(shape.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (B, T, H); right padding needs no mask, for attention is causal."""
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        repeat = self.heads // self.kv
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(b, t, -1))
        return out


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), cos, sin))
        out: Tensor = x + self.drop(self.mlp(self.post_attention_layernorm(x)))
        return out


class Student(nn.Module):
    """Decoder with tied embedding; ``teach`` maps its pooled state to a teacher's embedding."""

    def __init__(self, shape: Shape, teacher_dim: int = 384) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.drop = nn.Dropout(0.0)
        self.teach = nn.Linear(shape.hidden_size, teacher_dim, bias=False)
        cos, sin = rotary(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(self._init)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Normed hidden states (B, T, H) of ids (B, T)."""
        x = self.drop(self.embed_tokens(ids))
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def drop_out(self, share: float) -> None:
        """While it trains, leave out that share of what each part says."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = share

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed_tokens.weight.T


def rotary(shape: Shape) -> tuple[Tensor, Tensor]:
    """cos and sin, each (max_positions, head_dim), halves repeated (the Llama layout)."""
    steps = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angle = torch.outer(
        torch.arange(shape.max_position_embeddings).float(), shape.rope_theta**-steps
    )
    both = torch.cat((angle, angle), dim=-1)
    return both.cos(), both.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, heads, T, head_dim) turned by its position."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-two, one), dim=-1) * sin


def save_checkpoint(model: Student, folder: Path) -> None:
    """config.json and model.safetensors, as any Llama loader expects them."""
    from safetensors.torch import save_file

    state = {
        f"model.{name}": tensor.detach().to(torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith("teach")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **asdict(model.shape),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
