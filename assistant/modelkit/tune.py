"""Teaches a trained model reviewed corrections, and holds it where it was everywhere else.

The corrections are drawn again and again, those not yet learned most often. Between them stand rows
it was trained on: beside their labels, what the old model made of them (KL) keeps the new one near
it, so that what nobody corrected stays. Ends as soon as every correction is right with a margin.
Knows no files but its checkpoint; building and judging come after it.

Source: Li and Hoiem 2016, "Learning without Forgetting".
"""

from __future__ import annotations

import copy
import json
import pickle
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from assistant.engine.manifest import Calibration
from assistant.engine.wide import Opinion, Wide
from assistant.modelkit import labels, scoring
from assistant.modelkit.calibrate import Scores
from assistant.modelkit.corpus import Corpus, CorpusError, Sample, Turn
from assistant.modelkit.corrections import Case, written_out
from assistant.modelkit.examples import (
    ANSWERS,
    IGNORE,
    Example,
    ExampleMaker,
    Tensors,
    TrainConfig,
    batches,
    collate,
)
from assistant.modelkit.tokens import Encoder, Mask
from assistant.modelkit.train import Loss, Progress, Run
from assistant.modelkit.wide import TOPICS, chat

if TYPE_CHECKING:
    import torch

    from assistant.modelkit.student import Student

#: How many of the examples are corrections, and how many of those are of cases not yet learned.
_CORRECTED, _UNLEARNED = 0.35, 0.6
#: Measured on 20 corrections, 80 steps, 154 golden intents (won-lost): at a rate of 2e-4 2-8; at
#: 1e-4 7-4 by KL of weight 4 alone, 2-7 at 12, 5-3 with labels and 2. Trained in the last one to
#: three layers only, 1-3, 1-6 and 2-1; between old and new weights nothing was better than the new.
_HOLD_WEIGHT = 2.0
#: A run that ends at once has learned the wording and nothing near it.
_LEAST_STEPS, _LOOK_EVERY = 60, 20
_ROOM_TOKENS = 48
_GROUP = "correction"


def gentle(minutes: float, seed: int, device: str) -> TrainConfig:
    """A learning rate that leaves trained weights near where they are, and no teacher but them."""
    config = TrainConfig(minutes=minutes, seed=seed, device=device).without_teacher()
    stage = replace(ANSWERS, unlabelled=0.15, answered=0.4, dropout=0.0)
    return replace(
        config, learning_rate=1e-4, weight_decay=0.0, ema=0.95, batch_tokens=1024,
        stages=(stage,), checkpoint_every_s=60.0,
    )  # fmt: skip


# -- what is drawn -------------------------------------------------------------------------------


class Drawer(ExampleMaker):
    """Corrections among replayed rows, which carry teacher 0: the model as it was."""

    def __init__(
        self,
        replay: Corpus,
        cases: Sequence[Sample],
        encoder: Encoder,
        mask: Mask,
        config: TrainConfig,
        rng: random.Random,
    ) -> None:
        super().__init__(replay, encoder, mask, config, rng)
        self.cases = list(cases)
        self.unlearned: list[Sample] = []

    def draw(self, progress: float) -> Example:
        if self.rng.random() >= _CORRECTED:
            return replace(super().draw(progress), teacher=0)
        hard = self.unlearned and self.rng.random() < _UNLEARNED
        return self._labelled(self.rng.choice(self.unlearned if hard else self.cases))


def sample_of(case: Case, mask: Mask, intents: Sequence[str]) -> Sample:
    """A case as training draws it; ``intents`` of the earlier questions, as the model has them."""
    said = case.turns
    earlier = [
        Turn(said[at].text, intent, written_out(mask(said[at + 1].text).parts))
        for at, intent in zip(range(0, len(said) - 1, 2), intents, strict=True)
    ]
    return Sample((*earlier, Turn(case.question, case.intent, case.answer)), _GROUP)


def prompt_of(case: Case, encoder: Encoder, mask: Mask, turns: int = 0) -> list[int]:
    """Token ids of the conversation (of its first ``turns`` turns), ready for an answer."""
    user, assistant = encoder.id(labels.USER), encoder.id(labels.ASSISTANT)
    ids: list[int] = []
    for role, text in case.turns[: turns or None]:
        parts = mask(text).parts
        if role == "user":
            ids += [user, *encoder.parts(parts), assistant]
        else:
            ids += encoder.answer(written_out(parts))
    return ids


def refuse_too_long(
    cases: Sequence[Case], encoder: Encoder, mask: Mask, config: TrainConfig
) -> None:
    """Raises: CorpusError for a conversation that would be cut off in training."""
    room = config.max_tokens - _ROOM_TOKENS
    for case in cases:
        answer = encoder.answer(case.answer) if case.answer else []
        count = len(prompt_of(case, encoder, mask)) + len(answer)
        if count > room:
            raise CorpusError(
                f"{case.where}: the conversation takes {count} tokens with its answer; at most "
                f"{room} are learned. Leave out the earliest turns."
            )


# -- the loss ------------------------------------------------------------------------------------


class HoldingLoss(Loss):
    """The labels' loss, and on replayed rows the distance from the old model."""

    def __init__(self, encoder: Encoder, config: TrainConfig, old: Student) -> None:
        super().__init__(encoder, config, None)
        self._old = old

    def __call__(self, model: Student, batch: Tensors) -> tuple[torch.Tensor, dict[str, float]]:
        import torch

        hidden = model(batch.ids)
        rows = torch.arange(len(batch.at), device=batch.at.device)
        pooled = hidden[rows, batch.at]
        parts = {
            "answer": self._language(model, hidden, batch),
            "intent": self._intent(model, pooled, batch),
            "scope": self._scope(model, pooled, batch),
            "hold": self._hold(model, hidden, batch) * _HOLD_WEIGHT,
        }
        total = torch.stack(list(parts.values())).sum()
        return total, {name: float(value.detach()) for name, value in parts.items()}

    def _hold(self, model: Student, hidden: torch.Tensor, batch: Tensors) -> torch.Tensor:
        """How far intents, scope and answers of replayed rows have moved: mean KL in nats."""
        import torch

        held = batch.teacher >= 0
        if not bool(held.any()):
            return hidden.sum() * 0.0
        now, at = hidden[held], batch.at[held]
        rows = torch.arange(len(at), device=at.device)
        with torch.no_grad():
            before = self._old(batch.ids[held])
        moved = hidden.sum() * 0.0
        for ids in (self.intent_ids, self.scope_ids):
            new = now[rows, at] @ model.embed_tokens.weight[ids].T
            old = before[rows, at] @ self._old.embed_tokens.weight[ids].T
            moved = moved + _kl(new, old).mean()
        words = batch.targets[held] != IGNORE
        weights = batch.weights[held][words]
        apart = _kl(model.logits(now[words]), self._old.logits(before[words]))
        return moved + (apart * weights).sum() / weights.sum().clamp(min=1.0)


def _kl(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """KL divergence of each row of logits ``new`` from ``old``. Shapes: (N, K) -> (N,)."""
    was = old.log_softmax(-1)
    apart: torch.Tensor = (was.exp() * (was - new.log_softmax(-1))).sum(-1)
    return apart


# -- how far it has learned ----------------------------------------------------------------------


def first_scores(
    model: Student, encoder: Encoder, prompts: Sequence[Sequence[int]], at_once: int = 64
) -> Scores:
    """First-position scores of each prompt (token ids)."""
    import torch

    intents = [encoder.id(labels.intent_token(name)) for name in labels.INTENTS[:-1]]
    wanted = [*intents, encoder.id(labels.IN_SCOPE), encoder.id(labels.OUT_SCOPE)]
    device, found = model.embed_tokens.weight.device, []
    with torch.inference_mode():
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            ids = torch.zeros(len(some), max(map(len, some)), dtype=torch.long)
            for row, prompt in zip(ids, some, strict=True):
                row[: len(prompt)] = torch.tensor(prompt)
            ends = [len(prompt) - 1 for prompt in some]
            pooled = model(ids.to(device))[list(range(len(some))), ends]
            found.append((pooled @ model.embed_tokens.weight[wanted].T).double().cpu().numpy())
    rows = np.concatenate(found)
    return Scores(rows[:, :-2], rows[:, -2] - rows[:, -1])


def learned(scores: Scores, wanted: Sequence[str], fitted: Calibration) -> tuple[list[bool], ...]:
    """Of each case, whether it is taken for what it is, and whether with a margin: a confidence in
    the upper half of the band that is answered with caution, a scope well on its side."""
    chances = scoring.softmax(scores.intents / fitted.temperature)
    scope = scoring.sigmoid(scores.scope / fitted.scope_temperature + fitted.scope_bias)
    edge = fitted.scope_threshold
    enough = min((fitted.caution_from + fitted.answer_from) / 2, 0.9)
    right, sure = [], []
    for row, inside, intent in zip(chances, scope, wanted, strict=True):
        if intent == labels.OUT_OF_SCOPE:
            right.append(bool(inside < edge))
            sure.append(bool(inside < 0.7 * edge))
            continue
        best = labels.INTENTS[int(row.argmax())]
        right.append(bool(best == intent and inside >= edge))
        sure.append(bool(right[-1] and row.max() >= enough and inside >= edge + 0.3 * (1 - edge)))
    return right, sure


def guessed_intents(
    model: Student, encoder: Encoder, mask: Mask, cases: Sequence[Case]
) -> list[list[str]]:
    """What the model takes each earlier question of each case for, the last one left out."""
    asked = [
        (at, prompt_of(case, encoder, mask, turn + 1))
        for at, case in enumerate(cases)
        for turn in range(0, len(case.turns) - 1, 2)
    ]
    found: list[list[str]] = [[] for _ in cases]
    if asked:
        scores = first_scores(model, encoder, [prompt for _, prompt in asked])
        for (at, _), best in zip(asked, scores.intents.argmax(1), strict=True):
            found[at].append(labels.INTENTS[best])
    return found


# -- the run -------------------------------------------------------------------------------------


def load_student(folder: Path, device: str) -> Student:
    """The checkpoint in ``folder`` as a model to train. Raises: CorpusError where it is no model
    of ours."""
    from safetensors.torch import load_file

    from assistant.modelkit.student import Shape, Student

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(**{one.name: config[one.name] for one in fields(Shape) if one.name in config})
    model = Student(shape)
    found = load_file(folder / "model.safetensors")
    state = {name.removeprefix("model."): value for name, value in found.items()}
    lacking = model.load_state_dict(state, strict=False)
    odd = [name for name in lacking.missing_keys if not name.startswith("teach")]
    if odd or lacking.unexpected_keys:
        named = (odd + lacking.unexpected_keys)[0]
        raise CorpusError(f"{folder} is not a model trained here: {named} does not fit.")
    placed: Student = model.to(device)
    return placed


def tune(
    base: Path,
    cases: Sequence[Case],
    replay: Corpus,
    mask: Mask,
    folder: Path,
    config: TrainConfig,
    fitted: Calibration,
    *,
    wide: Wide | None = None,
    resume: bool = False,
    progress: Progress = lambda line: None,
) -> tuple[Student, Run]:
    """The checkpoint ``base`` once it has learned ``cases``, and the run that taught it.

    ``wide``: the table beside it, which was told already: what it has learned the network need not.

    ``fitted``: the base's calibration, which stays. An interrupted run keeps a checkpoint in
    ``folder`` for ``resume``. Raises: CorpusError.
    """
    import torch

    torch.manual_seed(config.seed)
    encoder = Encoder.load(base / "tokenizer.json")
    model = load_student(base, config.device)
    old = copy.deepcopy(model).eval().requires_grad_(False)
    refuse_too_long(cases, encoder, mask, config)
    guesses = guessed_intents(old, encoder, mask, cases)
    samples = [sample_of(case, mask, some) for case, some in zip(cases, guesses, strict=True)]
    maker = Drawer(replay, samples, encoder, mask, config, random.Random(config.seed))  # noqa: S311
    run = Run(model, config, folder)
    if resume and _resumed(run):
        progress(f"resumed at step {run.steps:,}, {run.elapsed_s / 60:.1f} minutes in")
    prompts = [prompt_of(case, encoder, mask) for case in cases]
    priors = [wide.opinion(chat(case.turns, mask), TOPICS) for case in cases] if wide else []
    look = _Look(encoder, prompts, [case.intent for case in cases], fitted, priors)
    least = 0 if wide and not any(case.answer for case in cases) else _LEAST_STEPS
    try:
        _loop(run, maker, HoldingLoss(encoder, config, old), look, least, progress)
    finally:
        run.save()
    model.load_state_dict(run.average)
    return model.eval(), run


class _Look:
    """How many of the cases the averaged weights have learned."""

    def __init__(
        self,
        encoder: Encoder,
        prompts: Sequence[Sequence[int]],
        wanted: Sequence[str],
        fitted: Calibration,
        priors: Sequence[Opinion],
    ) -> None:
        self._encoder, self._prompts, self._wanted = encoder, prompts, wanted
        self._fitted, self._priors = fitted, priors

    def __call__(self, run: Run) -> tuple[list[bool], ...]:
        current = {name: value.clone() for name, value in run.model.state_dict().items()}
        run.model.load_state_dict(run.average)
        scores = first_scores(run.model, self._encoder, self._prompts)
        run.model.load_state_dict(current)
        if self._priors:
            scores = Scores(
                scores.intents + np.array([one.intents for one in self._priors]),
                scores.scope + np.array([one.scope for one in self._priors]),
            )
        return learned(scores, self._wanted, self._fitted)


def _resumed(run: Run) -> bool:
    path = run.folder / "checkpoint.pt"
    try:
        return run.resume()
    except (RuntimeError, KeyError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CorpusError(
            f"{path} cannot be read ({type(error).__name__}): delete it and run without --resume."
        ) from error


def _loop(
    run: Run, maker: Drawer, loss: HoldingLoss, look: _Look, least: int, progress: Progress
) -> None:
    """Steps until every case is learned, or the minutes are over."""
    began, before = time.monotonic(), run.elapsed_s
    said = saved = began
    drawn: Iterator[list[Example]] = batches(maker, lambda: run.progress)
    parts: dict[str, float] = {}
    while True:
        if run.steps % _LOOK_EVERY == 0 or run.progress >= 1:
            right, sure = look(run)
            maker.unlearned = [one for one, done in zip(maker.cases, sure, strict=True) if not done]
            over = run.progress >= 1 or (run.steps >= least and all(sure))
            if over or time.monotonic() - said > 10:
                progress(_line(run, parts, sum(right), sum(sure), len(right)))
                said = time.monotonic()
            if over:
                return
        parts = run.step(loss, collate(next(drawn), run.config.device))
        now = time.monotonic()
        run.elapsed_s = before + now - began
        if now - saved > run.config.checkpoint_every_s:
            run.save()
            saved = now


def _line(run: Run, parts: dict[str, float], right: int, sure: int, count: int) -> str:
    losses = " ".join(f"{name} {value:.3f}" for name, value in parts.items())
    left = run.config.minutes - run.elapsed_s / 60
    return (
        f"step {run.steps:,}  {losses}  corrections {right} of {count} right, {sure} surely  "
        f"at most {max(0.0, left):.1f} min left"
    )
