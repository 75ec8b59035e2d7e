"""What is compared: one set of seeded random weights, as each engine wants to read it.

Written once into a cache folder. Ours is built anew when the code that builds it has changed, since
a benchmark of yesterday's graph would be worse than none; peers build their own from the same
checkpoint, in their own processes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from assistant import modelkit

#: What the checkpoints written here lack and other engines read.
_TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|pad|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}


@dataclass(frozen=True, slots=True)
class Materials:
    """A folder in the cache for one shape."""

    name: str
    folder: Path
    progress: Callable[[str], None]

    @property
    def checkpoint(self) -> Path:
        """As Hugging Face's libraries read it; written if it is not there."""
        folder = self.folder / "checkpoint"
        if not (folder / "generation_config.json").exists():
            self.progress(f"writing random weights of shape {self.name} into {folder} ...")
            _complete(self._plain(), folder)
        return folder

    def ours(self, quant: str) -> Path:
        """Our build by one scheme. Raises: what ``modelkit.build`` raises."""
        from assistant.modelkit.build import build

        folder, stamp = self.folder / f"ours-{quant}", self.folder / f"ours-{quant}.built-by"
        if not stamp.exists() or stamp.read_text() != fingerprint():
            self.progress(f"building our {quant} model into {folder} ...")
            build(self._plain(), folder, quant)
            stamp.write_text(fingerprint())
        return folder

    def _plain(self) -> Path:
        from assistant.modelkit.checkpoint import write_random

        folder = self.folder / "weights"
        if not (folder / "inhouse.json").exists():
            write_random(self.name, folder)
        return folder


def fingerprint() -> str:
    """Of the code that builds models."""
    found = hashlib.sha256()
    (root,) = modelkit.__path__
    for path in sorted(Path(root).glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def _complete(plain: Path, folder: Path) -> None:
    """The checkpoint with what transformers and genai's builder want to know, last file last."""
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16)
    from safetensors.numpy import load_file, save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(plain / "model.safetensors")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(plain / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    config |= {**_SPECIAL, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    # Under both names: transformers 4 knows the one, genai's builder insists on the other.
    config["rope_scaling"] = {"rope_type": "default"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    for name, value in (
        ("config.json", config),
        ("tokenizer_config.json", _TOKENIZER),
        ("generation_config.json", _SPECIAL),
    ):
        (folder / name).write_text(json.dumps(value, indent=2), encoding="utf-8")
