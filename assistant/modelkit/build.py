"""Builds a model folder: ``model.onnx``, ``tokenizer.json``, a chat template and ``model.json``.

Measures what quantising cost and refuses a build below its floor. Every file appears whole or not
at all, ``model.json`` last, so an interrupted build never leaves a folder that loads. Knows nothing
of training.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assistant.engine.drafts import FILE as DRAFTS
from assistant.engine.drafts import Known
from assistant.engine.manifest import (
    MODEL,
    NAME,
    TEMPLATE,
    TOKENIZER,
    Architecture,
    Calibration,
    Chat,
    Manifest,
    describe_files,
)
from assistant.engine.sampling import FirstTokenRule
from assistant.engine.template import TemplateError
from assistant.engine.text import Codec
from assistant.engine.wide import FILE as WIDE
from assistant.engine.wide import Wide
from assistant.modelkit.balance import Balanced
from assistant.modelkit.checkpoint import Checkpoint, CheckpointError, write_random
from assistant.modelkit.foreign import PLAIN_TEMPLATE, chat_of, open_tokenizer, template_of
from assistant.modelkit.graph import LIMIT_BYTES, build_graph
from assistant.modelkit.quality import (
    GREEDY_TOKENS,
    MEASURED_TOKENS,
    Floor,
    Prompts,
    Quality,
    compare,
    measure_peaks,
    open_session,
)
from assistant.modelkit.quantise import Tapped, known, scheme
from assistant.modelkit.weights import read_json

Progress = Callable[[str], None]

#: Least quality of trained weights. Perplexity says whether the text got worse, so its floor is
#: tight. Greedy agreement also falls at near ties, of which half-trained weights have many (a 9 M
#: model after a fifth of its training: 0.78 at a perplexity ratio of 1.0001), so it only has to
#: tell a working build from a broken one.
FLOORS = {
    "static8": Floor(0.60, 1.02),
    "row8": Floor(0.60, 1.02),
    "int4": Floor(0.40, 1.10),
}
#: Schemes by what a model is for, the best first. No load ever chooses between builds: an answer
#: must not depend on who else asks.
PROFILES = {"throughput": ("static8", "row8"), "latency": ("int4", "row8")}
#: The rotary tables lie in the file, so a model that could read 32k tokens is not built for them.
_MOST_CONTEXT_TOKENS = 4096
_MOST_ASKED_TOKENS = 1 << 17
#: Random weights have no quality to lose; above this size it is not even recorded.
_MOST_RANDOM_PARAMETERS = 50_000_000
#: Bytes of a weight as each scheme stores it, scales left out.
_LEAST_BYTES = {"fp32": 4.0, "static8": 1.0, "row8": 1.0, "int4": 0.5}
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


class UnfitScheme(BuildError):
    """This scheme will not do for these weights; another may."""


def _silent(line: str) -> None:
    """Progress nobody watches."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A checkpoint with what the folder says about it besides its weights."""

    checkpoint: Checkpoint
    tokenizer: Any
    details: Mapping[str, Any]
    chat: Chat
    template: str
    context_tokens: int

    @classmethod
    def open(cls, directory: Path, progress: Progress) -> _Source:
        checkpoint = Checkpoint.open(directory)
        tokenizer = open_tokenizer(directory)
        own = directory / DETAILS
        details = read_json(own) if own.exists() else {}
        chat = _own_chat(own, details) or chat_of(directory, tokenizer)
        template = template_of(directory) if chat.format == "jinja" else ""
        if chat.format == "jinja" and not template:
            progress("no chat template, so a plain one is written: a base model may ramble")
            template = PLAIN_TEMPLATE
        context = _context_tokens(checkpoint, details, progress)
        return cls(checkpoint, tokenizer, details, chat, template, context)

    @property
    def random(self) -> bool:
        return bool(self.details.get("random"))

    def graph(self, quant: str, progress: Progress, even: Balanced | None = None) -> bytes:
        """``quant`` may be ``tapped``: the graph that measures activations. static8 is built of
        ``even`` weights."""
        how = Tapped if quant == "tapped" else scheme(quant, even.peaks if even else None)
        model = build_graph(
            even or self.checkpoint, how, context_tokens=self.context_tokens, progress=progress
        )
        if self.checkpoint.unread:
            left = self.checkpoint.unread
            raise BuildError(
                f"The graph leaves out {left[0]} and {len(left) - 1} more weights, so its answers "
                "would be another model's. Build it with --via optimum (slower)."
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
        scope, (name, version) = own.get("scope"), _named(self.checkpoint.directory)
        return Manifest(
            name=str(own.get("name", name)),
            version=str(own.get("version", version)),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            architecture=Architecture(
                **{one.name: shape[one.name] for one in fields(Architecture)}
            ),
            quant=quant,
            context_tokens=self.context_tokens,
            chat=self.chat,
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
    known(quant)  # an unknown or refused scheme fails before any work
    out_dir = Path(out_dir)
    if out_dir.exists() and not out_dir.is_dir():
        raise BuildError(f"{out_dir} is a file; name a folder for the model.")
    source = _Source.open(Path(source_dir), progress)
    manifest = source.manifest(quant)
    _check_chat(source, manifest)
    parameters = source.checkpoint.shape.parameters
    progress(f"{manifest.name}: {parameters / 1e6:.1f} M parameters")
    _refuse_too_large(parameters, quant)
    rule = manifest.first_token_rule()
    even = _balanced(source, prompts, rule, progress) if quant == "static8" else None
    model = source.graph(quant, progress, even)
    figures = _quality(source, manifest, model, prompts, floor, progress)
    manifest = replace(manifest, quality={**manifest.quality, "quantised": figures})
    manifest = _publish(out_dir, source, manifest, model)
    progress(f"wrote {out_dir}: {MODEL} has {manifest.files[MODEL].bytes / 1e6:.1f} MB")
    return manifest


def build_for(
    profile: str,
    source_dir: Path,
    out_dir: Path,
    progress: Progress = _silent,
    *,
    prompts: Prompts | None = None,
) -> Manifest:
    """Builds with the first scheme of ``profile`` that does for these weights.

    Raises: as ``build``.
    """
    *first, last = PROFILES[profile]
    for quant in first:
        try:
            return build(source_dir, out_dir, quant, progress, prompts=prompts)
        except UnfitScheme as error:
            progress(f"{error} Trying {last}.")
    return build(source_dir, out_dir, last, progress, prompts=prompts)


def build_random(
    name: str,
    out_dir: Path,
    quant: str = "row8",
    progress: Progress = _silent,
    *,
    seed: int = 0,
) -> Manifest:
    """A model of a known shape with seeded random weights: its text is noise, its speed is real."""
    known(quant)
    with tempfile.TemporaryDirectory(prefix="inhouse-random-") as folder:
        progress(f"drawing random weights, shape {name}, seed {seed}")
        write_random(name, Path(folder), seed)
        return build(Path(folder), out_dir, quant, progress)


def _balanced(
    source: _Source, prompts: Prompts | None, rule: FirstTokenRule | None, progress: Progress
) -> Balanced:
    """Even weights, by activations on the prompts that quality is not measured on.

    Raises: UnfitScheme where full precision does not fit one file.
    """
    if source.checkpoint.shape.parameters * 4 > LIMIT_BYTES:
        raise UnfitScheme(
            "static8 is measured on a full-precision graph, and this one does not fit one ONNX "
            "file. Build with --quant row8."
        )
    progress("measuring activations")
    session = open_session(source.graph("tapped", _silent))
    some = _fitting(prompts or _questions(source.tokenizer), source.context_tokens)
    prompts = some[0::2] or some
    room = source.context_tokens - max(map(len, prompts))
    peaks = measure_peaks(
        session, source.checkpoint.shape, prompts, rule, min(MEASURED_TOKENS, room)
    )
    return Balanced.of(source.checkpoint, peaks)


def _quality(
    source: _Source,
    manifest: Manifest,
    model: bytes,
    prompts: Prompts | None,
    floor: Floor | None,
    progress: Progress,
) -> dict[str, Any]:
    """Figures against fp32 for ``model.json``, on every second prompt: static8 was measured on the
    others. Raises: BuildError below the floor."""
    reason = _unmeasured(source, manifest.quant)
    if reason:
        progress(f"quality not measured: {reason}")
        return {"measured": False, "why": reason}
    progress("measuring against fp32")
    some = _fitting(prompts or _questions(source.tokenizer), source.context_tokens)
    quality = compare(
        open_session(source.graph("fp32", _silent)),
        open_session(model),
        source.checkpoint.shape,
        some[1::2] or some,
        end=source.tokenizer.token_to_id(manifest.chat.end),
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
    _hold(quality, floor, manifest.quant)
    return {**figures, "floor": asdict(floor)}


def _hold(quality: Quality, floor: Floor, quant: str) -> None:
    """Raises: UnfitScheme below the floor."""
    if not quality.meets(floor):
        raise UnfitScheme(
            f"The {quant} build falls below its floor: greedy agreement "
            f"{quality.greedy_agreement:.3f} (at least {floor.greedy_agreement}), perplexity ratio "
            f"{quality.perplexity_ratio:.3f} (at most {floor.perplexity_ratio}). Nothing was "
            "written. Use a scheme with more bits, or train longer: weights far from converged "
            "change their mind easily."
        )


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


def _publish(out_dir: Path, source: _Source, manifest: Manifest, model: bytes) -> Manifest:
    """Writes all files beside ``out_dir``, proves that they load, then moves them in."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        (draft / MODEL).write_bytes(model)
        shutil.copyfile(source.checkpoint.directory / TOKENIZER, draft / TOKENIZER)
        names = [MODEL, TOKENIZER]
        for name in (WIDE, DRAFTS):
            if (source.checkpoint.directory / name).is_file():
                shutil.copyfile(source.checkpoint.directory / name, draft / name)
                names.append(name)
        if source.template:
            (draft / TEMPLATE).write_text(source.template, encoding="utf-8")
            names.append(TEMPLATE)
        manifest = replace(manifest, files=describe_files(draft, names))
        manifest.write(draft)
        _prove(draft)
        out_dir.mkdir(exist_ok=True)
        # The manifest last: until then a reader sees the old one, whose hashes fit no new file.
        for name in (*names, NAME):
            _sync(draft / name)
            (draft / name).replace(out_dir / name)
        _sync(out_dir)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def _prove(directory: Path) -> None:
    """Raises: ManifestError where the engine would not take this folder."""
    manifest = Manifest.load(directory)
    Codec.load(directory, manifest)
    if WIDE in manifest.files:
        Wide.load(directory, len(manifest.topics))
    if DRAFTS in manifest.files:
        Known.load(directory, manifest.architecture.vocab_size)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_chat(path: Path, details: Mapping[str, Any]) -> Chat | None:
    """The chat settings of ``inhouse.json``, if it has any. Raises: CheckpointError."""
    if not details:
        return None
    try:
        own = dict(details.get("chat", {}))
        return Chat(**{**own, "more_ends": tuple(own.get("more_ends", ()))})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is not as a manifest needs it: {error}.") from error


def _check_chat(source: _Source, manifest: Manifest) -> None:
    """What cannot be talked to fails before any work. Raises: CheckpointError, ManifestError."""
    try:
        Codec(source.tokenizer, manifest, source.template)
    except TemplateError as error:
        raise CheckpointError(
            f"The chat template of {source.checkpoint.directory} cannot be used: {error}. Put one "
            f"that works there, as {TEMPLATE}."
        ) from error


def _context_tokens(checkpoint: Checkpoint, details: Mapping[str, Any], progress: Progress) -> int:
    """Tokens of a conversation. Within a sliding window, attending to everything is the same."""
    window = checkpoint.shape.sliding_window
    longest = min(checkpoint.shape.longest_context, _MOST_CONTEXT_TOKENS)
    wanted = details.get("context_tokens", longest)
    most = min(window or _MOST_ASKED_TOKENS, _MOST_ASKED_TOKENS)
    if type(wanted) is not int or not 1 <= wanted <= most:
        raise CheckpointError(
            f"{checkpoint.directory / DETAILS}: context_tokens is {wanted!r}; give a whole number "
            f"from 1 to {most}{', the sliding_window of config.json' if window else ''}."
        )
    if window and window < min(checkpoint.shape.max_position_embeddings, _MOST_CONTEXT_TOKENS):
        progress(f"context cut to the {window} tokens of the model's sliding window")
    return wanted


def _named(directory: Path) -> tuple[str, str]:
    """Name and version; in the Hub's cache the folders are called after commits."""
    folder = directory.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.split("--")[-1], folder.name[:12]
    return folder.name, "1"


def _refuse_too_large(parameters: int, quant: str) -> None:
    """Before anything is read: protobuf would only say so after minutes and gigabytes."""
    least = parameters * _LEAST_BYTES.get(quant, 0.5)
    if least > LIMIT_BYTES:
        smaller = [name for name, each in _LEAST_BYTES.items() if parameters * each <= LIMIT_BYTES]
        cure = f"Build with --quant {' or '.join(smaller)}." if smaller else "Use a smaller model."
        raise BuildError(
            f"The weights take at least {least / 2**30:.1f} GiB as {quant}, and one ONNX file "
            f"holds less than 2 GiB. {cure}"
        )
