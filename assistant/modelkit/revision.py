"""From a base model and reviewed corrections to a revised model folder: tune, build, judge, mark.

The base is only read. Everything lies in the run's own folder, and ``OUT/model`` appears whole or
not at all, with what the revision won and lost in its ``model.json`` and its card. Knows paths and
their order; how a model learns is ``tune``'s business.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assistant.engine import Manifest, drafts
from assistant.engine.manifest import MODEL
from assistant.engine.wide import FILE as WIDE
from assistant.engine.wide import Wide
from assistant.modelkit import corpus, labels
from assistant.modelkit.build import DETAILS, build, build_for
from assistant.modelkit.corpus import Corpus, CorpusError, HeldOut
from assistant.modelkit.corrections import Case, Said, read_corrections, read_golden, redacted
from assistant.modelkit.judging import Outcome, judge
from assistant.modelkit.shape import ModelShape
from assistant.modelkit.tokens import Encoder, Mask
from assistant.modelkit.train import Progress
from assistant.modelkit.unpack import details, is_built, unpack
from assistant.modelkit.weights import CheckpointError, read_json

if TYPE_CHECKING:
    from assistant.modelkit.examples import TrainConfig

#: Replayed rows this like a correction (trigram Jaccard) might say the opposite of it.
_LIKE = 0.6
#: Checkpoints, twice while one replaces the other, base, weights and the built model.
_BYTES_PER_WEIGHT = 64
#: Questions on which quantising is measured.
_PROMPTS = 160
_BASE, _BASE_MODEL, _WEIGHTS, _RESULT = "base", "base-model", "weights", "model"
_CHECKPOINT, _SETTINGS = "checkpoint.pt", "training.json"


class RevisionError(Exception):
    """A revision cannot begin. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one revision works on.

    ``base``: a built model, or a checkpoint with its ``inhouse.json``. ``golden`` judges;
    ``evaluation``: every file whose questions are never trained on. ``replay``: a folder with the
    public sets, if at hand. ``name`` and ``version``: the base's, counted up, where empty.
    """

    base: Path
    corrections: Path
    out: Path
    golden: Path
    evaluation: Sequence[Path] = ()
    replay: Path | None = None
    name: str = ""
    version: str = ""
    resume: bool = False


def revise(plan: Plan, mask: Mask, config: TrainConfig, progress: Progress) -> Outcome:
    """The revised model and what it won and lost.

    Raises: RevisionError, CorpusError, ManifestError, CheckpointError, BuildError.
    """
    from assistant.modelkit.tune import tune

    mask = redacted(mask)
    cases, left_out = _unseen(read_corrections(plan.corrections, mask), plan.evaluation)
    for case in left_out:
        progress(f"{case.where} stands in an evaluation set, so it is not trained on")
    golden = read_golden(plan.golden)
    built = _built(plan, progress)
    manifest = _known_labels(built)
    _begin(plan, built, config, progress)
    replay = _replay(plan, cases, config.seed)
    unseen = [Case("", text, (Said("user", text),), name) for text, name in replay.dev["written"]]
    progress(f"judging {manifest.name}@{manifest.version} as it is ...")
    before = judge(built, cases, golden, unseen, mask)
    progress(f"before: {before.line(len(cases))}")
    checkpoint = unpacked(built, plan.out) if built == plan.base else plan.base
    wide = _revised_wide(checkpoint, cases, replay, mask, config.seed, progress)
    student, run = tune(
        checkpoint, cases, replay, mask, plan.out, config, manifest.calibration,
        wide=wide, resume=plan.resume, progress=progress,
    )  # fmt: skip
    weights = _keep_weights(student, wide, cases, checkpoint, plan, manifest)
    with _draft(plan.out, _RESULT) as draft:
        prompts = _prompts(Encoder.load(checkpoint / "tokenizer.json"), mask, unseen, cases)
        progress(f"building ({manifest.quant}) and judging the revised model ...")
        build(weights, draft, manifest.quant, prompts=prompts)
        after = judge(draft, cases, golden, unseen, mask)
        outcome = Outcome(
            plan.out / _RESULT, before, after, len(cases), run.steps, run.elapsed_s / 60
        )
        _mark(draft, built, manifest, outcome, len(left_out))
    progress(f"after:  {after.line(len(cases))}")
    return outcome


def unpacked(built: Path, out: Path) -> Path:
    """``OUT/base``: the checkpoint of a built model. Raises: ManifestError, CheckpointError."""
    unpack(built, out / _BASE)
    return out / _BASE


# -- what is refused before anything is written ----------------------------------------------------


def refuse_overwriting(out: Path, kept: Sequence[Path]) -> None:
    """Raises: RevisionError where a run in ``out`` would write into a folder of ``kept``."""
    if out.exists() and not out.is_dir():
        raise RevisionError(f"{out} is a file; name a folder for the run: --out DIR.")
    inner = [(out / name).resolve() for name in (_RESULT, _WEIGHTS, _BASE, _BASE_MODEL)]
    for folder in kept:
        model = folder.resolve()
        within = any(model == one or model in one.parents for one in (out.resolve(), *inner))
        if within or any(one in model.parents for one in inner):
            raise RevisionError(
                f"--out {out} would write into {folder}, which is in use and stays as it is. Name "
                "another folder; switch to the new model when you have looked at it."
            )


def refuse_finished(out: Path) -> None:
    """Raises: RevisionError where ``out`` holds a result already."""
    if (out / _RESULT).exists():
        raise RevisionError(
            f"{out / _RESULT} is there already: that run is finished. Name another --out, or "
            "delete the folder."
        )


def refuse_full_disk(out: Path, parameters: int) -> None:
    """Raises: RevisionError where the run would not fit on its disk."""
    needed = parameters * _BYTES_PER_WEIGHT
    place = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise RevisionError(
            f"The run needs about {needed / 1e6:,.0f} MB on the disk of {out}, and "
            f"{free / 1e6:,.0f} MB are free. Free some, or name an --out on another disk."
        )


def parameters_of(base: Path) -> int:
    """How many weights a built model or a checkpoint has. Raises: CheckpointError, ManifestError,
    RevisionError."""
    if is_built(base):
        return ModelShape(**asdict(Manifest.load(base).architecture)).parameters
    return ModelShape.from_config(_json(_checkpoint_file(base, "config.json"))).parameters


def _checkpoint_file(base: Path, name: str) -> Path:
    path = base / name
    if not path.is_file():
        raise RevisionError(
            f"{base} is no model: it holds neither model.json and model.onnx (a built one) nor "
            f"config.json, model.safetensors and {DETAILS} (a checkpoint of train_model). "
            f"Missing: {name}."
        )
    return path


def _built(plan: Plan, progress: Progress) -> Path:
    """The base as a built model; a checkpoint is built first, to be judged."""
    if is_built(plan.base):
        return plan.base
    for name in ("config.json", "model.safetensors", DETAILS):
        _checkpoint_file(plan.base, name)
    progress(f"building {plan.base}, to judge it as it is ...")
    build_for("throughput", plan.base, plan.out / _BASE_MODEL, progress)
    return plan.out / _BASE_MODEL


def _known_labels(built: Path) -> Manifest:
    """Raises: RevisionError for a model that speaks other intents than are trained here."""
    manifest = Manifest.load(built)
    if tuple(manifest.intents) != labels.INTENTS or manifest.scope is None:
        raise RevisionError(
            f"{built} speaks other intents than this version of the product, so corrections cannot "
            "be taught to it. Train it anew with the public sets: --data DIR."
        )
    return manifest


def _unseen(cases: Sequence[Case], evaluation: Sequence[Path]) -> tuple[list[Case], list[Case]]:
    """The cases to train on, and those that stand in an evaluation. Raises: CorpusError."""
    rows = [case for path in evaluation for case in read_golden(path)]
    whole = {case.key for case in rows}
    alone = HeldOut(case.question for case in rows if len(case.turns) == 1)
    seen = [
        case.key in whole or (len(case.turns) == 1 and case.question in alone) for case in cases
    ]
    kept = [case for case, out in zip(cases, seen, strict=True) if not out]
    if not kept:
        raise CorpusError("Every correction stands in an evaluation set: nothing to train on.")
    return kept, [case for case, out in zip(cases, seen, strict=True) if out]


# -- the run's own files ---------------------------------------------------------------------------


def _begin(plan: Plan, built: Path, config: TrainConfig, progress: Progress) -> None:
    """Notes what the run works on; a resumed one must work on the same. Raises: RevisionError."""
    base, data = _sha256(built / MODEL), _sha256(plan.corrections)
    path, kept = plan.out / _SETTINGS, plan.out / _CHECKPOINT
    plan.out.mkdir(parents=True, exist_ok=True)
    if plan.resume and kept.exists():
        noted = _json(path) if path.exists() else {}
        if (noted.get("base"), noted.get("corrections")) != (base, data):
            raise RevisionError(
                f"{plan.out} was begun with another model or other corrections, so it cannot be "
                "resumed with these. Leave --resume out, or name another --out."
            )
    else:
        kept.unlink(missing_ok=True)
    if plan.resume and not kept.exists():
        progress("there is no checkpoint to resume from, so this starts at the beginning")
    _write_whole(path, {"base": base, "corrections": data, "config": asdict(config)})


def _replay(plan: Plan, cases: Sequence[Case], seed: int) -> Corpus:
    """What the model is held to: nothing that may contradict a correction, no evaluation row."""
    if plan.replay is None:
        found = corpus.own(plan.evaluation)
    else:
        found = corpus.build(plan.replay, seed=seed, evaluation=plan.evaluation)
    near = HeldOut((case.question for case in cases if len(case.turns) == 1), _LIKE)
    found.labelled = [one for one in found.labelled if one.turns[-1].question not in near]
    found.unlabelled = [text for text in found.unlabelled if text not in near]
    return found


def _prompts(
    encoder: Encoder, mask: Mask, unseen: Sequence[Case], cases: Sequence[Case]
) -> list[list[int]]:
    """What quantising is measured on. Every other prompt gives the scales and the rest the
    quality, so each correction stands there twice."""
    from assistant.modelkit.tune import prompt_of

    some = [*unseen[:_PROMPTS], *(case for case in cases[:_PROMPTS] for _ in range(2))]
    return [prompt_of(case, encoder, mask) for case in some]


def _revised_wide(
    checkpoint: Path,
    cases: Sequence[Case],
    replay: Corpus,
    mask: Mask,
    seed: int,
    progress: Progress,
) -> Wide | None:
    """The table of the base, told the corrections; None where the base has none."""
    if not (checkpoint / WIDE).is_file():
        return None
    from assistant.modelkit import wide

    progress("telling the wide half ...")
    return wide.revise(Wide.load(checkpoint, len(wide.TOPICS)), cases, replay, mask, seed)


def _keep_weights(
    student: Any,
    wide: Wide | None,
    cases: Sequence[Case],
    checkpoint: Path,
    plan: Plan,
    base: Manifest,
) -> Path:
    """``OUT/weights``: the tuned checkpoint, with the base's calibration."""
    from assistant.modelkit.student import save_checkpoint

    version = plan.version or next_version(base.version)
    own = {**details(base), "name": plan.name or base.name, "version": version}
    own["quality"] = {"base": _base_note(base)}
    with _draft(plan.out, _WEIGHTS) as draft:
        save_checkpoint(student, draft)
        shutil.copyfile(checkpoint / "tokenizer.json", draft / "tokenizer.json")
        if wide is not None:
            wide.save(draft)
        if (checkpoint / drafts.FILE).is_file():
            drafts.save(draft, _told(checkpoint, cases, base.architecture.vocab_size))
        _write_whole(draft / DETAILS, own)
    return plan.out / _WEIGHTS


def _told(checkpoint: Path, cases: Sequence[Case], vocab_size: int) -> list[list[int]]:
    """The answers the base knows, behind those of the corrections: the newest are found first."""
    encoder = Encoder.load(checkpoint / "tokenizer.json")
    new = [
        [encoder.id(labels.intent_token(case.intent)), *encoder.answer(case.answer)]
        for case in cases
        if case.answer
    ]
    return [*new, *drafts.read(checkpoint, vocab_size)]


def next_version(base: str) -> str:
    """``0.1.0`` becomes ``0.1.0+1``, and that ``0.1.0+2``: revisions counted from a release."""
    match = re.fullmatch(r"(.+)\+(\d+)", base)
    return f"{match[1]}+{int(match[2]) + 1}" if match else f"{base}+1"


def _base_note(base: Manifest) -> dict[str, Any]:
    """Where a revision comes from. Its development figures are of the model first trained."""
    figures = base.quality.get("development") or base.quality.get("base", {}).get("development")
    sha256 = base.files[MODEL].sha256
    return {"model": f"{base.name}@{base.version}", "sha256": sha256, "development": figures}


# -- marking -------------------------------------------------------------------------------------


def _mark(draft: Path, built: Path, base: Manifest, outcome: Outcome, left_out: int) -> None:
    """Writes what the revision won and lost into the model's manifest and card."""
    manifest = Manifest.load(draft)
    found = {**outcome.figures(), "left_out": left_out}
    replace(manifest, quality={**manifest.quality, "corrections": found}).write(draft)
    old = built / "MODEL_CARD.md"
    text = old.read_text(encoding="utf-8") if old.is_file() else ""
    title = f"# {manifest.name} {manifest.version}"
    card = revised_card(text, title, f"{base.name} {base.version}", outcome)
    (draft / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    if (built / "curves.png").is_file():
        shutil.copyfile(built / "curves.png", draft / "curves.png")


def revised_card(text: str, title: str, base: str, outcome: Outcome) -> str:
    """The base's card under a new title, with a section on the corrections before its figures."""
    section = _SECTION.format(base=base, table=outcome.table(), verdict=outcome.verdict())
    text = re.sub(r"(?ms)^## Corrections\n.*?(?=^## |\Z)", "", text)
    body = re.sub(r"\A# [^\n]*\n", "", text).strip()
    head, figures, rest = body.partition("## Figures")
    found = (title, head.strip(), section.strip(), (figures + rest).strip())
    return "\n\n".join(part for part in found if part) + "\n"


_SECTION = """## Corrections

Revised from {base} with reviewed corrections (`manage.py train_model --from DIR --data FILE`).
{verdict} Every other figure, and the answers below, are those of the model first trained.

| measure | before | after |
|---|---|---|
{table}
"""


# -- whole or not at all ---------------------------------------------------------------------------


@contextmanager
def _draft(out: Path, name: str) -> Iterator[Path]:
    """A folder that becomes ``out/name`` when the block ends well, and vanishes when it does not.

    An older ``out/name`` is replaced.
    """
    draft = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
    try:
        yield draft
        draft.chmod(0o755)  # whoever serves the model may be another user
        for path in (*draft.iterdir(), draft):
            _sync(path)
        shutil.rmtree(out / name, ignore_errors=True)
        draft.replace(out / name)
        _sync(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_whole(path: Path, content: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _sync(part)
    part.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise RevisionError(str(error)) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
