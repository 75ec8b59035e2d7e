"""Builds a model folder: ``model.onnx``, ``tokenizer.json`` and ``model.json``.

Measures what quantising cost and refuses a build below its floor. Every file appears whole or not
at all, ``model.json`` last, so an interrupted build never leaves a folder that loads. Knows nothing
of training.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from assistant.engine.manifest import (
    MODEL,
    NAME,
    TOKENIZER,
    Architecture,
    Calibration,
    Chat,
    Manifest,
    describe_files,
)
from assistant.engine.text import Codec
from assistant.modelkit.checkpoint import Checkpoint, CheckpointError, write_random
from assistant.modelkit.graph import LIMIT_BYTES, build_graph
from assistant.modelkit.quality import GREEDY_TOKENS, Floor, Prompts, compare, open_session
from assistant.modelkit.quantise import scheme

Progress = Callable[[str], None]

#: Least quality of trained weights. Perplexity says whether the text got worse, so its floor is
#: tight. Greedy agreement also falls at near ties, of which half-trained weights have many (a 9 M
#: model after a fifth of its training: 0.78 at a perplexity ratio of 1.0001), so it only has to
#: tell a working build from a broken one.
FLOORS = {"row8": Floor(0.60, 1.02), "int4": Floor(0.40, 1.10)}
#: The rotary tables lie in the file, so a model that could read 32k tokens is not built for them.
_MOST_CONTEXT_TOKENS = 4096
#: Random weights have no quality to lose; above this size it is not even recorded.
_MOST_RANDOM_PARAMETERS = 50_000_000
#: What a checkpoint folder says of a model besides its weights: the manifest's own keys.
DETAILS = "inhouse.json"

_QUESTIONS = (
    "how do I cancel my order?",
    "I want my money back",
    "where is my package, it should have been here on monday",
    "can I change the delivery address?",
    "Which payment methods do you accept?",
    "my card was charged twice",
    "I forgot my password and cannot log in",
    "How long does shipping take?",
    "I need the invoice from last month",
    "delete my account please",
    "let me talk to a person",
    "the item arrived broken, what now?",
    "hello",
    "thank you, that was all",
    "is there a fee if I cancel?",
    "how can I leave a review",
    "I would like to subscribe to the newsletter",
    "I cannot complete the payment, there is an error every time",
    "do you ship to Norway?",
    "add two more items to my order",
    "what is the capital of France?",
    "write me a poem about the sea",
    "I have been waiting for three weeks and nobody answers!",
    "How do I switch to a business account?",
)


class BuildError(RuntimeError):
    """The model was not built. The message says what fell short and what to do."""


def _silent(line: str) -> None:
    """Progress nobody watches."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint with what the folder says about it besides its weights."""

    checkpoint: Checkpoint
    details: Mapping[str, Any]
    context_tokens: int

    @classmethod
    def open(cls, directory: Path) -> _Source:
        checkpoint = Checkpoint.open(directory)
        if not (directory / TOKENIZER).is_file():
            raise CheckpointError(f"{directory / TOKENIZER} is missing; a model needs it.")
        own = directory / DETAILS
        details = _json(own) if own.is_file() else _foreign(directory)
        longest = min(checkpoint.shape.max_position_embeddings, _MOST_CONTEXT_TOKENS)
        return cls(checkpoint, details, int(details.get("context_tokens", longest)))

    @property
    def random(self) -> bool:
        return bool(self.details.get("random"))

    def graph(self, quant: str, progress: Progress) -> bytes:
        model = build_graph(
            self.checkpoint, scheme(quant), context_tokens=self.context_tokens, progress=progress
        )
        data: bytes = model.SerializeToString()
        return data

    def manifest(self, quant: str) -> Manifest:
        """What is known before building: all but the files and the quality of this build."""
        try:
            return self._manifest(quant)
        except (KeyError, TypeError, ValueError) as error:
            path = self.checkpoint.directory / DETAILS
            raise CheckpointError(f"{path} is not as a manifest needs it: {error!r}.") from error

    def _manifest(self, quant: str) -> Manifest:
        shape, own = asdict(self.checkpoint.shape), self.details
        scope = own.get("scope")
        return Manifest(
            name=str(own.get("name", self.checkpoint.directory.resolve().name)),
            version=str(own.get("version", "1")),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            architecture=Architecture(
                **{one.name: shape[one.name] for one in fields(Architecture)}
            ),
            quant=quant,
            context_tokens=self.context_tokens,
            chat=Chat(**own.get("chat", {})),
            intents=dict(own.get("intents", {})),
            smalltalk=tuple(own.get("smalltalk", ())),
            scope=(scope["in"], scope["out"]) if scope else None,
            placeholders=dict(own.get("placeholders", {})),
            calibration=Calibration(**own.get("calibration", {})),
            quality=dict(own.get("quality", {})),
        )


def build(
    source_dir: Path,
    out_dir: Path,
    quant: str = "row8",
    progress: Progress = _silent,
    *,
    prompts: Prompts | None = None,
    floor: Floor | None = None,
) -> Manifest:
    """Builds the checkpoint in ``source_dir`` into ``out_dir``, replacing an older build there.

    ``prompts`` (token ids) are what quality is measured on, instead of a few built-in questions.
    Raises: QuantError, CheckpointError, GraphError, ManifestError, BuildError.
    """
    scheme(quant)  # an unknown or refused scheme fails before any work
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise BuildError(f"{out_dir} is a file; name a folder for the model.")
    source = _Source.open(Path(source_dir))
    manifest = source.manifest(quant)
    progress(f"{manifest.name}: {source.checkpoint.shape.parameters / 1e6:.1f} M parameters")
    model = source.graph(quant, progress)
    figures = _quality(source, manifest, model, prompts, floor, progress)
    manifest = replace(manifest, quality={**manifest.quality, "quantised": figures})
    manifest = _publish(out_dir, source.checkpoint.directory, manifest, model)
    progress(f"wrote {out_dir}: {MODEL} has {manifest.files[MODEL].bytes / 1e6:.1f} MB")
    return manifest


def build_random(
    name: str,
    out_dir: Path,
    quant: str = "row8",
    progress: Progress = _silent,
    *,
    seed: int = 0,
) -> Manifest:
    """A model of a known shape with seeded random weights: its text is noise, its speed is real."""
    scheme(quant)
    with tempfile.TemporaryDirectory(prefix="inhouse-random-") as folder:
        progress(f"drawing random weights, shape {name}, seed {seed}")
        write_random(name, Path(folder), seed)
        return build(Path(folder), out_dir, quant, progress)


def _quality(
    source: _Source,
    manifest: Manifest,
    model: bytes,
    prompts: Prompts | None,
    floor: Floor | None,
    progress: Progress,
) -> dict[str, Any]:
    """Figures against fp32 for ``model.json``. Raises: BuildError below the floor."""
    reason = _unmeasured(source, manifest.quant)
    if reason:
        progress(f"quality not measured: {reason}")
        return {"measured": False, "why": reason}
    progress("measuring against fp32")
    codec = Tokenizer.from_file(str(source.checkpoint.directory / TOKENIZER))
    quality = compare(
        open_session(source.graph("fp32", _silent)),
        open_session(model),
        source.checkpoint.shape,
        _fitting(prompts or _questions(codec), source.context_tokens),
        end=codec.token_to_id(manifest.chat.end),
        rule=manifest.first_token_rule(),
    )
    figures = {"measured": True, "random_weights": source.random, **quality.figures()}
    progress(
        f"greedy agreement {quality.greedy_agreement:.3f}, "
        f"perplexity ratio {quality.perplexity_ratio:.4f}"
    )
    if source.random:
        return figures
    floor = floor or FLOORS[manifest.quant]
    if not quality.meets(floor):
        raise BuildError(
            f"The {manifest.quant} build falls below its floor: greedy agreement "
            f"{quality.greedy_agreement:.3f} (at least {floor.greedy_agreement}), perplexity ratio "
            f"{quality.perplexity_ratio:.3f} (at most {floor.perplexity_ratio}). Nothing was "
            "written. Use a scheme with more bits, or train longer: weights far from converged "
            "change their mind easily."
        )
    return {**figures, "floor": asdict(floor)}


def _unmeasured(source: _Source, quant: str) -> str:
    parameters = source.checkpoint.shape.parameters
    if quant == "fp32":
        return "fp32 is the reference itself"
    if source.random and parameters > _MOST_RANDOM_PARAMETERS:
        return "random weights have no quality to lose"
    if parameters * 4 > LIMIT_BYTES:
        return "the fp32 reference does not fit one ONNX file"
    return ""


def _questions(codec: Any) -> Prompts:
    """The built-in questions as prompts, in the chat format where the tokenizer has it."""
    user, assistant = (codec.token_to_id(f"<|{role}|>") for role in ("user", "assistant"))
    texts = [codec.encode(text, add_special_tokens=False).ids for text in _QUESTIONS]
    if user is None or assistant is None:
        return texts
    return [[user, *ids, assistant] for ids in texts]


def _fitting(prompts: Prompts, context_tokens: int) -> Prompts:
    fitting = [prompt for prompt in prompts if 0 < len(prompt) <= context_tokens - GREEDY_TOKENS]
    if not fitting:
        raise BuildError(
            f"No prompt to measure quality on fits {context_tokens} tokens of context together "
            f"with an answer of {GREEDY_TOKENS}. Pass shorter ones."
        )
    return fitting


def _publish(out_dir: Path, source_dir: Path, manifest: Manifest, model: bytes) -> Manifest:
    """Writes all files beside ``out_dir``, proves that they load, then moves them in."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        (draft / MODEL).write_bytes(model)
        shutil.copyfile(source_dir / TOKENIZER, draft / TOKENIZER)
        manifest = replace(manifest, files=describe_files(draft))
        manifest.write(draft)
        _prove(draft)
        out_dir.mkdir(exist_ok=True)
        # The manifest last: until then a reader sees the old one, whose hashes fit no new file.
        for name in (MODEL, TOKENIZER, NAME):
            _sync(draft / name)
            (draft / name).replace(out_dir / name)
        _sync(out_dir)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _prove(directory: Path) -> None:
    """Raises: ManifestError where the engine would not take this folder."""
    manifest = Manifest.load(directory)
    if manifest.chat.format == "inhouse":
        Codec.load(directory, manifest)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _foreign(directory: Path) -> dict[str, Any]:
    """Details of a checkpoint from elsewhere: it has no intents, only a token that ends answers."""
    path = directory / "tokenizer_config.json"
    end = _json(path).get("eos_token") if path.is_file() else None
    if isinstance(end, dict):
        end = end.get("content")
    if not isinstance(end, str):
        raise CheckpointError(
            f"{path} names no eos_token, so it is unknown what ends an answer. Add it there, or "
            f'write {directory / DETAILS} with {{"chat": {{"format": "jinja", "end": "..."}}}}.'
        )
    return {"chat": {"format": "jinja", "end": end}}


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold one JSON object.")
    return data
