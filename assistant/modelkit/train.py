"""Trains a support model: intent, scope, answer and embedding in one loss, within a time budget.

Takes a corpus and a mask function, writes a checkpoint folder (config.json, model.safetensors,
tokenizer.json, curves, settings). Calibration and the ONNX build come after it. Needs the ``train``
extra; knows no Django and prints nothing itself (progress goes to the callback).
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from assistant.modelkit import labels
from assistant.modelkit.corpus import Corpus
from assistant.modelkit.examples import (
    IGNORE,
    ExampleMaker,
    Tensors,
    TrainConfig,
    batches,
    collate,
)
from assistant.modelkit.tokens import Encoder, Mask, train_tokenizer

if TYPE_CHECKING:
    import torch

    from assistant.modelkit.distil import Teacher
    from assistant.modelkit.student import Student

Progress = Callable[[str], None]
#: How good a model is on development rows: larger is better.
Judge = Callable[["Student", Encoder], float]
#: Parts of the run after which it is judged. The best average is kept, of those that have had time
#: to learn the answers too.
_JUDGED_AT = (0.15, 0.3, 0.5, 0.65, 0.8, 0.9, 0.95, 1.0)
_KEPT_FROM = 0.85
#: Texts that a projection to the teacher's space is fitted to; a state has some 300 numbers.
_AIMED_AT = 8_192


class Loss:
    """The multi-task loss; remembers which ids are intents and which pair is scope."""

    def __init__(self, encoder: Encoder, config: TrainConfig, teacher: Teacher | None) -> None:
        names = labels.INTENTS[:-1]
        self.intent_ids = [encoder.id(labels.intent_token(name)) for name in names]
        self.scope_ids = [encoder.id(labels.IN_SCOPE), encoder.id(labels.OUT_SCOPE)]
        self.config, self.teacher = config, teacher
        self._bfloat16 = fast_bfloat16(config.device)

    def __call__(self, model: Student, batch: Tensors) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        kind = torch.device(self.config.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self._bfloat16):
            hidden = model(batch.ids)
            answer = self._language(model, hidden, batch)
        pooled = hidden[torch.arange(len(batch.at)), batch.at].float()
        parts = {
            "answer": answer,
            "intent": self._intent(model, pooled, batch),
            "scope": self._scope(model, pooled, batch) * self.config.scope_weight,
            "teach": self._teach(model, pooled, batch) * self.config.teach_weight,
            "soft": self._soft(model, pooled, batch) * self.config.soft_weight,
        }
        total = torch.stack(list(parts.values())).sum()
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def _language(self, model: Student, hidden: torch.Tensor, batch: Tensors) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        wanted = batch.targets != IGNORE
        logits = model.logits(hidden[wanted]).float()
        loss = F.cross_entropy(logits, batch.targets[wanted], reduction="none")
        weights = batch.weights[wanted]
        return (loss * weights).sum() / weights.sum().clamp(min=1.0)

    def _intent(self, model: Student, pooled: torch.Tensor, batch: Tensors) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        known = batch.intent != IGNORE
        if not bool(known.any()):
            return pooled.sum() * 0.0
        rows = model.embed_tokens.weight[self.intent_ids]
        logits = pooled[known] @ rows.T
        return F.cross_entropy(logits, batch.intent[known], label_smoothing=0.05)

    def _scope(self, model: Student, pooled: torch.Tensor, batch: Tensors) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        rows = model.embed_tokens.weight[self.scope_ids]
        score = pooled @ (rows[0] - rows[1])
        loss = F.binary_cross_entropy_with_logits(score, batch.scope, reduction="none")
        return (loss * batch.scope_weight).sum() / batch.scope_weight.sum().clamp(min=1.0)

    def _teach(self, model: Student, pooled: torch.Tensor, batch: Tensors) -> torch.Tensor:
        import torch.nn.functional as F  # noqa: N812

        known = batch.teacher >= 0
        if self.teacher is None or not bool(known.any()):
            return pooled.sum() * 0.0
        wanted = self.teacher.embeddings[batch.teacher[known]].float()
        return 1.0 - F.cosine_similarity(model.teach(pooled[known]), wanted).mean()

    def _soft(self, model: Student, pooled: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """Cross-entropy with the teacher's intents, as far as it thinks a text has one."""
        known = batch.teacher >= 0
        if self.teacher is None or not bool(known.any()):
            return pooled.sum() * 0.0
        rows = model.embed_tokens.weight[self.intent_ids]
        at = batch.teacher[known]
        scores = (pooled[known] @ rows.T).log_softmax(1)
        losses = -(self.teacher.intents[at] * scores).sum(1) * self.teacher.inside[at]
        return losses.mean()


def fast_bfloat16(device: str) -> bool:
    """Whether the processor multiplies bfloat16 itself: training is then twice as fast; where it
    must be imitated, slower."""
    import torch

    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


# -- the run -------------------------------------------------------------------------------------


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Warm-up over the first 2 %, then a cosine to a twentieth."""
    if progress < 0.02:
        return config.learning_rate * (0.05 + progress / 0.02 * 0.95)
    return config.learning_rate * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, progress))))


class Run:
    """One training run that can stop and resume: weights, average, optimiser, clock."""

    def __init__(self, model: Student, config: TrainConfig, folder: Path) -> None:
        import torch

        self.model, self.config, self.folder = model, config, folder
        decay = [p for p in model.parameters() if p.ndim > 1]
        plain = [p for p in model.parameters() if p.ndim <= 1]
        self.optimiser = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": config.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
        )
        self.average = {k: v.detach().clone() for k, v in model.state_dict().items()}
        self.steps, self.tokens, self.elapsed_s = 0, 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.judged, self.quality = 0, 0.0
        self.kept: dict[str, torch.Tensor] | None = None

    @property
    def progress(self) -> float:
        return self.elapsed_s / (self.config.minutes * 60)

    def step(self, loss: Loss, batch: Tensors) -> dict[str, float]:
        import torch

        self.model.drop_out(self.config.stage(self.progress).dropout)
        rate = learning_rate(self.config, self.progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        total, parts = loss(self.model, batch)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        keep = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - keep)
        self.steps += 1
        self.tokens += batch.ids.numel()
        return parts

    def judge(self, judge: Judge, encoder: Encoder) -> float:
        """How good the average is; it is kept where it is the best so far."""
        current = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        quality = judge(self.model, encoder)
        self.model.train()
        self.model.load_state_dict(current)
        if self.progress >= _KEPT_FROM and quality >= self.quality:
            self.quality = quality
            self.kept = {name: value.clone() for name, value in self.average.items()}
        self.judged += 1
        return quality

    def due(self) -> bool:
        """Whether it is time to be judged."""
        return self.judged < len(_JUDGED_AT) and self.progress >= _JUDGED_AT[self.judged]

    def save(self) -> None:
        """A checkpoint that ``resume`` takes; written whole or not at all."""
        import torch

        state = {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimiser": self.optimiser.state_dict(),
            "clock": [self.steps, self.tokens, self.elapsed_s],
            "curve": self.curve,
            "quality": self.quality,
            "kept": self.kept,
        }
        temporary = self.folder / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.folder / "checkpoint.pt")

    def resume(self) -> bool:
        import torch

        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True, map_location=self.config.device)
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps, self.tokens, self.elapsed_s = state["clock"]
        self.curve = state["curve"]
        self.quality = state["quality"]
        self.kept = state["kept"]
        if self.progress < _KEPT_FROM:  # the run was made longer: what was late is early now
            self.kept, self.quality = None, 0.0
        self.judged = sum(self.progress >= part for part in _JUDGED_AT)
        return True


def train(
    corpus: Corpus,
    mask: Mask,
    folder: Path,
    config: TrainConfig,
    *,
    resume: bool = False,
    start: Path | None = None,
    judge: Judge | None = None,
    progress: Progress = lambda line: None,
) -> Student:
    """Trains for ``config.minutes`` and writes the averaged weights to ``folder``.

    A run that is interrupted (Ctrl-C) keeps a checkpoint of its last step for ``resume``.
    ``start``: a checkpoint folder to fine-tune (its tokenizer is kept). ``judge``: of the averages
    late in the run, the one it likes best is taken. Raises: FileNotFoundError.
    """
    import torch

    from assistant.modelkit.student import Shape, Student, save_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)  # tiny numbers cost a hundred times what they are worth
    encoder = _tokenizer(corpus, folder, config, start)
    shape = Shape(vocab_size=encoder.tokenizer.get_vocab_size())
    model = Student(shape)
    model.to(config.device)
    if start is not None:
        _load_weights(model, start)
    elif config.teach_weight > 0:
        _warm(model, encoder)
    maker = ExampleMaker(corpus, encoder, mask, config, random.Random(config.seed))  # noqa: S311
    teacher = _teacher(maker, corpus, mask, folder, config, progress)
    run = Run(model, config, folder)
    if resume and run.resume():
        progress(f"resumed at step {run.steps:,}, {run.progress:.0%} of the time budget")
    elif start is not None and teacher is not None:
        _aim(model, maker, teacher)
    _write_settings(folder, corpus, config)
    try:
        _loop(run, maker, Loss(encoder, config, teacher), judge, progress)
    except KeyboardInterrupt:
        run.save()
        raise
    model.load_state_dict(run.kept or run.average)
    save_checkpoint(model, folder)
    plot_curves(run.curve, folder / "curves.png")
    return model


def plot_curves(curve: Sequence[dict[str, float]], path: Path) -> None:
    """Each part of the loss over the run, one panel a part."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in (curve[0] if curve else {}) if name != "at"]
    figure, axes = pyplot.subplots(1, max(1, len(names)), figsize=(12, 2.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=False):
        axis.plot([100 * row["at"] for row in curve], [row[name] for row in curve], linewidth=1)
        axis.set(title=name, xlabel="% of the run")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def _loop(
    run: Run, maker: ExampleMaker, loss: Loss, judge: Judge | None, progress: Progress
) -> None:
    last_saved = last_said = time.monotonic()
    sums: dict[str, float] = {}
    since = 0
    for batch in batches(maker, lambda: run.progress):
        began = time.monotonic()
        for name, value in run.step(loss, collate(batch, run.config.device)).items():
            sums[name] = sums.get(name, 0.0) + value
        since += 1
        now = time.monotonic()
        run.elapsed_s += now - began
        if now - last_said > 15:
            run.curve.append({"at": run.progress} | {k: v / since for k, v in sums.items()})
            progress(_line(run, {k: v / since for k, v in sums.items()}))
            last_said, since, sums = now, 0, {}
        if judge is not None and run.due():
            quality = run.judge(judge, maker.encoder)
            progress(f"{run.progress:4.0%}  natural development rows {quality:.1%} right")
        if now - last_saved > run.config.checkpoint_every_s or run.progress >= 1:
            run.save()
            last_saved = now
        if run.progress >= 1:
            return


def _line(run: Run, means: dict[str, float]) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in means.items())
    left = run.config.minutes - run.elapsed_s / 60
    rate = run.tokens / max(1.0, run.elapsed_s)
    return (
        f"{run.progress:4.0%}  step {run.steps:,}  {losses}  {rate:,.0f} tok/s  {left:.0f} min left"
    )


def _tokenizer(corpus: Corpus, folder: Path, config: TrainConfig, start: Path | None) -> Encoder:
    target = folder / "tokenizer.json"
    if start is not None:
        target.write_bytes((start / "tokenizer.json").read_bytes())
    if not target.exists():
        texts = [sample.turns[-1].question for sample in corpus.labelled]
        texts += corpus.unlabelled
        texts += (corpus.answers.texts() if corpus.answers else []) * 20
        tokenizer = train_tokenizer(texts, config.vocab_size)
        tokenizer.encode_special_tokens = True
        tokenizer.save(str(target))
    return Encoder.load(target)


def _warm(model: Student, encoder: Encoder) -> None:
    from assistant.modelkit.distil import warm_embedding

    table, first = model.embed_tokens.weight, len(labels.special_tokens())
    words = [encoder.tokenizer.decode([at]) for at in range(first, len(table))]
    warm_embedding(table, words, first)


def _load_weights(model: Student, start: Path) -> None:
    from safetensors.torch import load_file

    found = load_file(start / "model.safetensors")
    state = {name.removeprefix("model."): value for name, value in found.items()}
    model.load_state_dict(state, strict=False)


def _teacher(
    maker: ExampleMaker,
    corpus: Corpus,
    mask: Mask,
    folder: Path,
    config: TrainConfig,
    progress: Progress,
) -> Teacher | None:
    from assistant.modelkit.distil import soft_intents, teacher_embeddings

    if config.teach_weight <= 0:
        return None
    texts = [s.turns[-1].question for s in corpus.labelled] + corpus.unlabelled
    maker.teacher_index = {text: at for at, text in enumerate(texts)}
    found = teacher_embeddings(texts, folder / "teacher.npz", config.device, progress)
    progress("teacher: learning the intents ...")
    return soft_intents(found, [sample.turns[-1].intent for sample in corpus.labelled])


def _aim(model: Student, maker: ExampleMaker, teacher: Teacher) -> None:
    """Fits the projection to the teacher's space, which is not kept with the weights: least squares
    over some texts. One that begins anew pulls trained states about for minutes."""
    import torch

    texts = maker.rng.sample(list(maker.teacher_index), min(_AIMED_AT, len(maker.teacher_index)))
    examples = sorted(map(maker.plain, texts), key=lambda example: len(example.ids))
    states, wanted = [], []
    model.eval()
    with torch.no_grad():
        for at in range(0, len(examples), 64):
            batch = collate(examples[at : at + 64], maker.config.device)
            states.append(model(batch.ids)[torch.arange(len(batch.at)), batch.at].float())
            wanted.append(teacher.embeddings[batch.teacher].float())
        found = torch.linalg.lstsq(torch.cat(states), torch.cat(wanted)).solution
        model.teach.weight.copy_(found.T)
    model.train()


def _write_settings(folder: Path, corpus: Corpus, config: TrainConfig) -> None:
    settings = {"config": asdict(config), "corpus": corpus.report}
    (folder / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
