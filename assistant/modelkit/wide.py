"""Fits the wide half of a model (``engine.wide``): a linear classifier over hashed features.

Half a minute on one core, after the network's training or after a revision. Knows questions, what
was asked before them, and labels; knows nothing of the network but how sure it is.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from assistant.engine.text import ChatTurn, Slot
from assistant.engine.wide import Exchange, Opinion, Wide, features, normalised, plain, rows_of
from assistant.modelkit import labels, scoring
from assistant.modelkit.corpus import Corpus, augment
from assistant.modelkit.corrections import Case
from assistant.modelkit.followups import FollowUps
from assistant.modelkit.tokens import Mask

if TYPE_CHECKING:
    import torch

TOPICS = labels.INTENTS[:-1]
#: Rows of the table: with half as many, hashes that share a row cost one question in a hundred.
ROWS = 1 << 16
#: Made conversations, how often each written dialogue is read, questions put behind another's, and
#: answers read with theirs.
_MADE, _DIALOGUES, _BEHIND, _ENDED = 60_000, 6, 8_000, 10_000
#: How many of a conversation's last questions are read, how often one before the last is taken for
#: another, and how often the question of an answer is left out, or another's.
_QUESTIONS, _MISTAKEN, _UNASKED = 3, 0.25, 0.25
#: How often a written wording is read, changed as fingers and habits change it.
_VARIANTS = 2
#: How much each kind of rows counts, within one intent: Bitext's closed style must not outvote the
#: wordings of people, and there are few of those.
_MASS = {"bitext": 1.0, "alone": 1.0, "dialogue": 0.5, "made": 1.0, "behind": 0.5, "ended": 1.0}
_VARIED = frozenset({"written", "natural", "plain", "rude"})
#: A kind's share of an intent grows with its rows, but slower.
_CROWDING = 0.7
_EPOCHS, _BATCH, _RATE, _DECAY = 8, 512, 0.03, 2e-6
#: For a revision: passes, rate, how often each correction is read anew, and how much all of them
#: weigh beside what is replayed.
_REVISED_EPOCHS, _REVISED_RATE, _READ, _CORRECTED = 3, 0.005, 24, 0.15
#: How much the table says beside the network: chosen among these on development rows.
SHARES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A question with what was asked before it; ``kind`` is one of ``_MASS``."""

    exchanges: tuple[Exchange, ...]
    intent: str
    kind: str


# -- what it is fitted on ------------------------------------------------------------------------


def examples(corpus: Corpus, mask: Mask, seed: int = 0) -> list[Labelled]:
    """Every question alone, and those with a history: written, made, or with another's before."""
    rng = random.Random(seed)  # noqa: S311
    source = _Source(corpus, mask, rng)
    kinds = (source.alone, source.written, source.made, source.behind, source.ended)
    return [example for kind in kinds for example in kind()]


class _Source:
    def __init__(self, corpus: Corpus, mask: Mask, rng: random.Random) -> None:
        self._corpus, self._mask, self._rng = corpus, mask, rng
        self._answers = corpus.answers.by_intent(TOPICS) if corpus.answers else {}
        self._said: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for sample in corpus.labelled:
            last = sample.turns[-1]
            self._said[last.intent][sample.group].append(last.question)

    def alone(self) -> Iterator[Labelled]:
        for sample in self._corpus.labelled:
            last = sample.turns[-1]
            kind = "bitext" if sample.group == "bitext" else "alone"
            yield Labelled((self._asked(last.question),), last.intent, kind)
            for _ in range(_VARIANTS if sample.group in _VARIED else 0):
                varied = self._asked(augment(last.question, self._rng))
                yield Labelled((varied,), last.intent, kind)

    def written(self) -> Iterator[Labelled]:
        for sample in self._corpus.dialogues * _DIALOGUES:
            turns = [(turn.question, turn.intent) for turn in sample.turns]
            yield self._conversation(turns, "dialogue")

    def made(self) -> Iterator[Labelled]:
        if not self._corpus.followups:
            return
        talks = FollowUps(self._corpus.followups, self._ask, lambda intent: "")
        for _ in range(_MADE):
            turns = [(question, intent) for question, intent, _ in talks.draw(self._rng)]
            yield self._conversation(turns, "made")

    def ended(self) -> Iterator[Labelled]:
        """A question with its answer, which alone has to tell the topic now and then."""
        turns = [sample.turns[-1] for sample in self._corpus.dialogues * _DIALOGUES]
        rows = [(turn.question, turn.intent, turn.answer or "") for turn in turns]
        for _ in range(_ENDED if self._answers else 0):
            intent = self._rng.choice(sorted(self._answers))
            rows.append((self._ask(intent), intent, self._answer(intent)))
        for question, intent, answer in rows:
            if answer:
                asked = self._vague(question)
                said = plain(chat([("assistant", answer)], self._mask)[0])
                yield Labelled((Exchange(asked, "", said),), intent, "ended")

    def _vague(self, question: str) -> str:
        """The question, nothing, or another: questions are misread, and answers tell."""
        draw = self._rng.random()
        if draw < _UNASKED:
            return ""
        other = draw < 2 * _UNASKED
        text = self._ask(self._rng.choice(labels.SUPPORT)) if other else question
        return self._asked(augment(text, self._rng)).text

    def behind(self) -> Iterator[Labelled]:
        """A question that stands alone, after one about something else."""
        before = [intent for intent in labels.SUPPORT if intent in self._said]
        for _ in range(_BEHIND if before else 0):
            last = self._rng.choice(self._corpus.labelled).turns[-1]
            intent = self._rng.choice(before)
            turns = [(self._ask(intent), intent), (last.question, last.intent)]
            yield self._conversation(turns, "behind")

    def _conversation(self, turns: Sequence[tuple[str, str]], kind: str) -> Labelled:
        *before, (question, intent) = turns[-_QUESTIONS:]
        earlier = [self._earlier(*one) for one in before]
        return Labelled((*earlier, self._asked(augment(question, self._rng))), intent, kind)

    def _earlier(self, question: str, intent: str) -> Exchange:
        """Now and then taken for something else, as happens."""
        taken = self._rng.choice(TOPICS) if self._rng.random() < _MISTAKEN else intent
        return Exchange(self._asked(augment(question, self._rng)).text, taken)

    def _answer(self, intent: str) -> str:
        return self._rng.choice(self._answers[intent])

    def _ask(self, intent: str) -> str:
        groups = list(self._said[intent].values())
        return self._rng.choice(self._rng.choice(groups)) if groups else intent.replace("_", " ")

    def _asked(self, question: str) -> Exchange:
        return Exchange(plain(chat([("user", question)], self._mask)[0]))


# -- fitting -------------------------------------------------------------------------------------


def fit(
    examples: Sequence[Labelled],
    *,
    start: Wide | None = None,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    epochs: int = _EPOCHS,
    rate: float = _RATE,
    progress: Callable[[str], None] = lambda line: None,
) -> Wide:
    """The table that tells these apart; from ``start`` on, if given, with its rarities.

    ``weights``: how much each example counts; by default as ``_MASS`` says.
    """
    import torch

    rows = [rows_of(features(one.exchanges), ROWS) for one in examples]
    rarity = start.rarity if start is not None else _rarity(rows)
    counted = _weights(examples) if weights is None else np.asarray(weights)
    data = _Data(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate([normalised(rarity[found]) for found in rows])),
        np.cumsum([0, *map(len, rows)]),
        torch.tensor([_topic(one.intent) for one in examples]),
        torch.tensor(counted, dtype=torch.float32),
    )
    table, bias = _learn(data, start, seed, epochs, rate, progress)
    return _packed(table, bias, rarity)


@dataclass(frozen=True, slots=True)
class _Data:
    rows: torch.Tensor
    values: torch.Tensor
    ends: NDArray[np.int64]
    topics: torch.Tensor
    weights: torch.Tensor

    def batch(self, at: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, their values and where each example begins."""
        import torch

        spans = [np.arange(self.ends[one], self.ends[one + 1]) for one in at]
        flat = torch.from_numpy(np.concatenate(spans))
        begins = np.cumsum([0, *(len(span) for span in spans[:-1])])
        return self.rows[flat], self.values[flat], torch.from_numpy(begins)


def _learn(
    data: _Data,
    start: Wide | None,
    seed: int,
    epochs: int,
    rate: float,
    progress: Callable[[str], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch
    from torch.nn.functional import embedding_bag

    table = torch.zeros(ROWS, len(TOPICS) + 1)
    bias = torch.zeros(len(TOPICS) + 1)
    if start is not None:
        table = torch.from_numpy(start.table.astype(np.float32) * start.scale)
        bias = torch.from_numpy(start.bias.copy())
    for trained in (table, bias):
        trained.requires_grad_()
    count, rng = len(data.topics), np.random.default_rng(seed)
    steps = max(1, epochs * -(-count // _BATCH))
    # Adam makes whole steps of the smallest decay: what a revision does not read would fade.
    decay = _DECAY if start is None else 0.0
    optimiser = torch.optim.Adam([table, bias], lr=rate, weight_decay=decay)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, steps)
    for epoch in range(epochs):
        order, total = rng.permutation(count), 0.0
        for begin in range(0, count, _BATCH):
            at = order[begin : begin + _BATCH]
            rows, values, begins = data.batch(at)
            scores = embedding_bag(rows, table, begins, mode="sum", per_sample_weights=values)
            loss = _loss(scores + bias, data.topics[at], data.weights[at])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            slower.step()
            total += float(loss.detach()) * len(at)
        progress(f"  wide: pass {epoch + 1} of {epochs}, loss {total / count:.4f}")
    return table.detach(), bias.detach()


def _loss(scores: torch.Tensor, topics: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Of the intent, where there is one, and of being within scope at all."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    inside = topics >= 0
    scope = binary_cross_entropy_with_logits(
        scores[:, -1], inside.float(), weight=weights, reduction="sum"
    )
    intent = torch.zeros(())
    if bool(inside.any()):
        each = cross_entropy(scores[inside, :-1], topics[inside], reduction="none")
        intent = (each * weights[inside]).sum()
    return (intent + scope) / len(topics)


def _topic(intent: str) -> int:
    return TOPICS.index(intent) if intent in TOPICS else -1


def _rarity(rows: Sequence[NDArray[np.intp]]) -> NDArray[np.float16]:
    """Inverse document frequency, as it is stored."""
    stands = np.bincount(np.concatenate(rows), minlength=ROWS)
    return np.log((1 + len(rows)) / (1 + stands)).astype(np.float16)


def _weights(examples: Sequence[Labelled]) -> Floats:
    counts = Counter((one.intent, one.kind) for one in examples)
    found = np.array(
        [_MASS[one.kind] / counts[one.intent, one.kind] ** _CROWDING for one in examples]
    )
    scaled: Floats = found / found.mean()
    return scaled


def _packed(table: torch.Tensor, bias: torch.Tensor, rarity: NDArray[np.float16]) -> Wide:
    """8 bits a weight, one scale a column."""
    weights = table.numpy()
    scale = np.maximum(np.abs(weights).max(axis=0), 1e-9).astype(np.float32) / 127
    return Wide(
        np.round(weights / scale).astype(np.int8), scale, bias.numpy().astype(np.float32), rarity
    )


def revise(wide: Wide, cases: Sequence[Case], replay: Corpus, mask: Mask, seed: int = 0) -> Wide:
    """The table once it was told these corrections, between rows it was fitted on."""
    rng = random.Random(seed)  # noqa: S311
    told = [one for case in cases for one in _corrected(wide, case, mask, rng)]
    known = examples(replay, mask, seed)
    weights = _weights(known) * len(known)
    weights = np.append(
        np.full(len(told), _CORRECTED / len(told)), (1 - _CORRECTED) * weights / weights.sum()
    )
    return fit(
        [*told, *known], start=wide, weights=[*weights / weights.mean()], seed=seed,
        epochs=_REVISED_EPOCHS, rate=_REVISED_RATE,
    )  # fmt: skip


def _corrected(wide: Wide, case: Case, mask: Mask, rng: random.Random) -> Iterator[Labelled]:
    """The case as it stands, and as others might have typed it."""
    for at in range(_READ):
        said = [(role, text if at == 0 else augment(text, rng)) for role, text in case.turns]
        yield Labelled(tuple(wide.exchanges(chat(said, mask), TOPICS)), case.intent, "alone")


def chat(said: Sequence[tuple[str, str]], mask: Mask) -> list[ChatTurn]:
    """Roles and texts as the product reads them, but for what answers were about."""
    return [
        ChatTurn(role, tuple(p if type(p) is str else Slot(p) for p in mask(text).parts))
        for role, text in said
    ]


# -- beside the network --------------------------------------------------------------------------


def opinions(wide: Wide, mask: Mask, texts: Sequence[str]) -> list[Opinion]:
    """Of each text asked alone."""
    return [wide.opinion(chat([("user", text)], mask), TOPICS) for text in texts]


def shared(wide: Wide, share: float) -> Wide:
    """The table whose opinion of the intent counts ``share`` times as much; that of the scope stays
    (1.0 was best on out-of-scope rows written here, 2.0 on those of others, both by little)."""
    factor = np.append(np.full(len(TOPICS), share, np.float32), np.float32(1.0))
    return Wide(wide.table, wide.scale * factor, wide.bias * factor, wide.rarity)


def best_share(network: Floats, table: Floats, wanted: Sequence[int]) -> float:
    """Of ``SHARES`` the one under which the right intents are likeliest, each at its own best
    temperature. *Shapes*: network, table (N, K) scores."""
    right = np.asarray(wanted)

    def cost(share: float) -> float:
        scores = network + share * table
        chances = scoring.softmax(scores / scoring.fit_temperature(scores, right))
        return -float(np.log(np.maximum(chances[np.arange(len(right)), right], 1e-9)).mean())

    return min(SHARES, key=cost)
