"""Samples to sequences: augmented questions, fresh answers and histories, batches of like length.

Draws at random from a corpus, as often from each source as the mix says. Knows tokens; knows
nothing of models, losses or optimisers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from assistant.modelkit import labels
from assistant.modelkit.corpus import Answers, Corpus, Sample, Turn, augment
from assistant.modelkit.followups import FollowUps, shown
from assistant.modelkit.tokens import Encoder, Mask

if TYPE_CHECKING:
    import torch

IGNORE = -100
#: A conversation that a client brings along does not say under which intents it was answered.
_UNMARKED = 0.45
#: What stands for an answer's facts once they are filled; an e-mail or phone is masked again.
_FILLED = {
    "Support Phone": ("our support line", "{{Phone}}"),
    "Support Email": ("our support e-mail address", "{{Email}}"),
    "Support Hours": ("our opening hours", "9 to 5"),
    "Website": ("our website",),
    "Company": ("our shop",),
    "Live Chat": ("live chat",),
}


@dataclass(frozen=True, slots=True)
class Stage:
    """What a part of the run draws: ``until`` (0..1) it, a share of bare text, of questions with an
    answer and of questions behind an unrelated turn, and each source among the labelled rows."""

    until: float
    unlabelled: float
    answered: float
    unrelated: float
    mix: tuple[tuple[str, float], ...]
    #: Of written answers, those to a question about something else: an answer follows the intent it
    #: is given, also where that was decided against what the network reads in the question.
    overruled: float = 0.25
    #: Of what each layer adds: a few thousand written wordings are seen dozens of times.
    dropout: float = 0.1


#: Questions alone take 14 tokens instead of 50: what they mean is learned on four times as many.
QUESTIONS = Stage(
    0.65, 0.35, 0.0, 0.0,
    (
        ("bitext", 0.13),
        ("natural", 0.06),
        ("written", 0.44),
        ("rude", 0.04),
        ("plain", 0.04),
        ("out", 0.11),
        ("written_out", 0.12),
        ("talk", 0.06),
    ),
)  # fmt: skip
ANSWERS = Stage(
    1.0, 0.1, 0.45, 0.12,
    (
        ("bitext", 0.10),
        ("natural", 0.05),
        ("written", 0.31),
        ("rude", 0.03),
        ("plain", 0.04),
        ("out", 0.07),
        ("written_out", 0.08),
        ("talk", 0.04),
        ("dialogue", 0.08),
        ("made", 0.20),
    ),
)  # fmt: skip
#: Answers are learned nearly by heart, which dropout and bare text are in the way of.
WORDS = replace(ANSWERS, unlabelled=0.0, answered=0.9, overruled=0.5, dropout=0.0)


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """What a run depends on; written beside the weights."""

    minutes: float = 75.0
    seed: int = 0
    #: From no weights at all.
    fresh: bool = True
    device: str = "cpu"
    vocab_size: int = 6144
    batch_tokens: int = 2048
    max_tokens: int = 384
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.1
    ema: float = 0.998
    #: Of the loss over what users say; none, for a question is not what the model writes.
    question_weight: float = 0.0
    teach_weight: float = 2.0
    #: The teacher's own opinion of the intent, from a classifier on its embeddings.
    soft_weight: float = 1.0
    scope_weight: float = 0.5
    answer_weight: float = 1.0
    stages: tuple[Stage, ...] = (QUESTIONS, replace(ANSWERS, until=0.9), WORDS)
    checkpoint_every_s: float = 120.0

    def stage(self, progress: float) -> Stage:
        """The one that is drawn from at this point (0..1) of the run."""
        return next((one for one in self.stages if progress < one.until), self.stages[-1])

    def continued(self) -> TrainConfig:
        """For weights that are trained already and shall learn new questions."""
        stages = (replace(QUESTIONS, until=0.45), replace(ANSWERS, until=0.7), WORDS)
        return replace(self, fresh=False, learning_rate=8e-4, stages=stages)

    def tuning(self) -> TrainConfig:
        """For weights that are trained already: gentler, no bare text, mostly answers."""
        return replace(self, fresh=False, learning_rate=5e-4, stages=(WORDS,))

    def without_teacher(self) -> TrainConfig:
        return replace(self, teach_weight=0.0, soft_weight=0.0)


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. ``at``: index of the last ``<|assistant|>``; -1 in a target is not trained."""

    ids: list[int]
    targets: list[int]
    weights: list[float]
    at: int
    intent: int
    scope: float
    scope_weight: float
    teacher: int


class ExampleMaker:
    """Turns samples into sequences, with augmentation, a fresh answer and a fresh history."""

    def __init__(
        self, corpus: Corpus, encoder: Encoder, mask: Mask, config: TrainConfig, rng: random.Random
    ) -> None:
        self.encoder, self.mask, self.config, self.rng = encoder, mask, config, rng
        self.answers: Answers = corpus.answers or Answers([])
        self.answered = list(self.answers.by_intent(labels.INTENTS))
        self.user = encoder.id(labels.USER)
        self.assistant = encoder.id(labels.ASSISTANT)
        self.intents = {name: encoder.id(labels.intent_token(name)) for name in labels.INTENTS}
        self.by_group = self._group(corpus)
        self._by_intent = {
            (name, rows[0].turns[-1].intent): rows
            for name, found in self.by_group.items()
            for rows in found
        }
        self.unlabelled = corpus.unlabelled
        self.followups = FollowUps(corpus.followups, self._asked, self._plain_answer)
        self.teacher_index: dict[str, int] = {}
        self.stage = config.stage(0.0)

    def _group(self, corpus: Corpus) -> dict[str, list[list[Sample]]]:
        """Samples by source, then by intent, so that rare intents are drawn as often."""
        groups: dict[str, dict[str, list[Sample]]] = {}
        for sample in corpus.labelled + corpus.dialogues:
            intent = sample.turns[-1].intent
            groups.setdefault(sample.group, {}).setdefault(intent, []).append(sample)
        return {name: list(found.values()) for name, found in groups.items()}

    def draw(self, progress: float) -> Example:
        """A random example for this point (0..1) of the run."""
        self.stage = self.config.stage(progress)
        if self.unlabelled and self.rng.random() < self.stage.unlabelled:
            return self.plain(self.rng.choice(self.unlabelled))
        known = {"made", *self.by_group}
        mix = [(name, weight) for name, weight in self.stage.mix if name in known]
        names, weights = zip(*mix, strict=True)
        group = self.rng.choices(names, weights)[0]
        if group == "made":
            turns = tuple(Turn(*exchange) for exchange in self.followups.draw(self.rng))
            return self._labelled(Sample(turns, group))
        return self._labelled(self.rng.choice(self.rng.choice(self.by_group[group])))

    def plain(self, text: str) -> Example:
        ids = [self.user, *self._question(text), self.assistant]
        return self._example(ids, teacher=self.teacher_index.get(text, -1))

    def _labelled(self, sample: Sample) -> Example:
        last = sample.turns[-1]
        ids = self._history(sample)
        start = len(ids)
        parts = self.mask(augment(last.question, self.rng)).parts
        ids += [self.user, *self.encoder.parts(parts), self.assistant]
        under, answer = self._answer(last, parts)
        example = self._example(
            ids,
            answer=answer,
            under=under,
            start=start,
            intent=last.intent,
            group=sample.group,
            teacher=self.teacher_index.get(last.question, -1) if start == 0 else -1,
        )
        return example

    def _history(self, sample: Sample) -> list[int]:
        ids: list[int] = []
        turns = sample.turns[:-1]
        if not turns and self.rng.random() < self.stage.unrelated:
            turns = self._unrelated()
        marked = self.rng.random() >= _UNMARKED
        for turn in turns:
            question, answer = turn.question, turn.answer
            if sample.group == "dialogue" and self.rng.random() < 0.3:
                question, answer = self._same_intent(turn)
            parts = self.mask(augment(question, self.rng)).parts
            ids += [self.user, *self.encoder.parts(parts), self.assistant]
            ids += [self.intents[turn.intent]] if marked else []
            ids += self.encoder.answer(self._shown(answer or self._written(turn.intent, parts)))
        return ids

    def _shown(self, answer: str) -> str:
        """A product fills what it can into an answer, and the model reads that in the next turn."""
        return answer if self.rng.random() < 0.4 else shown(answer, _FILLED, self.rng)

    def _asked(self, intent: str) -> str:
        """A question of ``intent``, mostly one that this project wrote."""
        names = ("written", "written", "plain", "rude", "written_out", "out", "bitext")
        found = [rows for name in names if (rows := self._by_intent.get((name, intent)))]
        return self.rng.choice(self.rng.choice(found)).turns[-1].question

    def _plain_answer(self, intent: str) -> str:
        return self.answers.pick(intent, frozenset(), self.rng)

    def _unrelated(self) -> tuple[Turn, ...]:
        """A turn about something else: a topic change must be followed, history or not."""
        names = [name for name in ("bitext", "written", "talk") if name in self.by_group]
        group = self.by_group[self.rng.choice(names)]
        return (self.rng.choice(self.rng.choice(group)).turns[-1],)

    def _same_intent(self, turn: Turn) -> tuple[str, str | None]:
        for group in ("written", "talk"):
            for samples in self.by_group.get(group, []):
                if samples[0].turns[-1].intent == turn.intent:
                    return self.rng.choice(samples).turns[-1].question, None
        return turn.question, turn.answer

    def _question(self, text: str) -> list[int]:
        return self.encoder.parts(self.mask(augment(text, self.rng)).parts)

    def _answer(self, turn: Turn, parts: Sequence[str]) -> tuple[str, list[int]]:
        """Under which intent it is answered, and the answer; none for questions alone."""
        if turn.answer:
            return turn.intent, self.encoder.answer(turn.answer)
        if self.rng.random() >= self.stage.answered:
            return turn.intent, []
        overruled = self.rng.random() < self.stage.overruled
        under = self.rng.choice(self.answered) if overruled else turn.intent
        return under, self.encoder.answer(self._written(under, parts))

    def _written(self, intent: str, parts: Sequence[str]) -> str:
        slots = frozenset(str(part) for part in parts if type(part) is not str)
        return self.answers.pick(intent, slots, self.rng)

    def _example(
        self,
        ids: list[int],
        *,
        answer: Sequence[int] = (),
        under: str = "",
        start: int = 0,
        intent: str | None = None,
        group: str = "",
        teacher: int = -1,
    ) -> Example:
        at = len(ids) - 1
        full = ids + ([self.intents[under], *answer] if answer else [])
        targets = [IGNORE] * len(full)
        weights = [0.0] * len(full)
        for position in range(start, len(full) - 1):
            weight = self.config.answer_weight if position > at else self.config.question_weight
            if position != at and weight > 0:
                targets[position], weights[position] = full[position + 1], weight
        in_scope = intent != labels.OUT_OF_SCOPE
        return Example(
            ids=full[: self.config.max_tokens],
            targets=targets[: self.config.max_tokens],
            weights=weights[: self.config.max_tokens],
            at=at,
            intent=labels.INTENTS.index(intent) if intent and in_scope else IGNORE,
            scope=float(in_scope),
            # Bitext's style gives it away: in scope by style alone is not what we want to teach.
            scope_weight=0.0 if intent is None else 0.15 if group == "bitext" else 1.0,
            teacher=teacher,
        )


def batches(maker: ExampleMaker, progress: Callable[[], float]) -> Iterator[list[Example]]:
    """Endless batches of about ``batch_tokens`` padded tokens, alike in length."""
    while True:
        pool = [maker.draw(progress()) for _ in range(768)]
        pool = [example for example in pool if example.at < maker.config.max_tokens]
        pool.sort(key=lambda example: len(example.ids))
        cut: list[list[Example]] = [[]]
        for example in pool:
            if (len(cut[-1]) + 1) * len(example.ids) > maker.config.batch_tokens:
                cut.append([])
            cut[-1].append(example)
        maker.rng.shuffle(cut)
        yield from (batch for batch in cut if batch)


@dataclass(slots=True)
class Tensors:
    """A batch on the device: (B, T) ids, targets and weights, (B,) everything else."""

    ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    at: torch.Tensor
    intent: torch.Tensor
    scope: torch.Tensor
    scope_weight: torch.Tensor
    teacher: torch.Tensor


def collate(batch: Sequence[Example], device: str) -> Tensors:
    import torch

    longest = max(len(example.ids) for example in batch)

    def pad(rows: list[list[Any]], fill: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(
            [row + [fill] * (longest - len(row)) for row in rows], dtype=dtype, device=device
        )

    def flat(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(e, name) for e in batch], dtype=dtype, device=device)

    return Tensors(
        ids=pad([e.ids for e in batch], 0, torch.long),
        targets=pad([e.targets for e in batch], IGNORE, torch.long),
        weights=pad([e.weights for e in batch], 0.0, torch.float32),
        at=flat("at", torch.long),
        intent=flat("intent", torch.long),
        scope=flat("scope", torch.float32),
        scope_weight=flat("scope_weight", torch.float32),
        teacher=flat("teacher", torch.long),
    )
