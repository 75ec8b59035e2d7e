"""Builds the training mix from a folder of public sets and the project's own written rows.

Pure data work: reads files, gives placeholders surface values, augments, removes what stands in an
evaluation row, and splits. Knows nothing of masking, tokens or tensors: a text stays as typed.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from assistant.modelkit.labels import OUT_OF_SCOPE, SUPPORT

WRITTEN = Path(__file__).with_name("written")


class CorpusError(Exception):
    """A data file is missing or broken; the message names it and what to do."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One user turn and, where it is trained, the answer that follows."""

    question: str
    intent: str
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation whose last turn is trained on. ``group`` names its source for the report."""

    turns: tuple[Turn, ...]
    group: str


@dataclass(slots=True)
class Corpus:
    """``labelled``: questions with an intent; ``dialogues``: with history; ``unlabelled``: text."""

    labelled: list[Sample] = field(default_factory=list)
    dialogues: list[Sample] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    followups: list[dict[str, Any]] = field(default_factory=list)
    answers: Answers | None = None
    dev: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


#: How often the first of several answers is trained on.
_FAVOURITE = 0.85


class Answers:
    """The written answers by intent; ``pick`` prefers those that use what the user gave."""

    def __init__(self, rows: Iterable[dict[str, Any]]) -> None:
        self._by_intent: dict[str, list[tuple[frozenset[str], str]]] = defaultdict(list)
        for row in rows:
            self._by_intent[row["intent"]].append((frozenset(row["requires"]), row["text"]))

    def pick(self, intent: str, slots: frozenset[str], rng: random.Random) -> str:
        """The first fitting one mostly: between equal favourites, rounding would choose."""
        fitting = [(need, text) for need, text in self._by_intent[intent] if need <= slots]
        using = [text for need, text in fitting if need] or [text for _, text in fitting]
        return using[0] if rng.random() < _FAVOURITE else rng.choice(using)

    def by_intent(self, intents: Sequence[str]) -> dict[str, list[str]]:
        """All of them, of those of these intents that have one."""
        found = {one: [text for _, text in self._by_intent.get(one, ())] for one in intents}
        return {intent: texts for intent, texts in found.items() if texts}

    def texts(self) -> list[str]:
        return [text for rows in self._by_intent.values() for _, text in rows]


# -- reading -----------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a ``.jsonl`` or ``.jsonl.gz`` file. Raises: CorpusError with the line."""
    if not path.is_file():
        raise CorpusError(f"{path} is missing. See the README, 'Train your own', for its source.")
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()
    with opened as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise CorpusError(f"{path} line {number} is not JSON: {error}") from error


def written(*names: str) -> list[dict[str, Any]]:
    """Rows of the project's own training texts, of all files named."""
    return [row for name in names for row in read_rows(WRITTEN / f"{name}.jsonl")]


# -- Bitext's placeholders become surface values, so that one mask serves training and serving ---

_VALUE_OF: dict[str, Callable[[random.Random], str]] = {
    "Order Number": lambda rng: rng.choice(["", "", "", "#", "ORD-"]) + _digits(rng),
    "Invoice Number": lambda rng: rng.choice(["#", "INV-", ""]) + str(rng.randrange(10000, 10**7)),
    "Person Name": lambda rng: rng.choice(
        ["Mr. Jones", "Ms. Green", "Anna Smith", "my wife", "Mrs. Patel", "Tom", "Dr. Lee"]
    ),
    "Account Type": lambda rng: rng.choice(["premium", "gold", "standard", "free", "pro", "basic"]),
    "Account Category": lambda rng: rng.choice(["platinum", "business", "freemium", "silver"]),
    "Refund Amount": lambda rng: str(rng.randrange(5, 900)),
    "Currency Symbol": lambda rng: rng.choice(["$", "€", "£", " dollars"]),
    "Delivery City": lambda rng: rng.choice(["Boston", "Leeds", "Lyon", "Austin", "Berlin"]),
    "Delivery Country": lambda rng: rng.choice(["Canada", "Spain", "Ireland", "Brazil", "India"]),
}
_PLACEHOLDER = re.compile(r"\{\{([^}]+)\}\}")


def _digits(rng: random.Random) -> str:
    return str(rng.randrange(10**4, 10 ** rng.randrange(5, 12)))


def _surface(text: str, rng: random.Random) -> str:
    return _PLACEHOLDER.sub(
        lambda match: _VALUE_OF[match[1]](rng) if match[1] in _VALUE_OF else match[1].lower(),
        text,
    )


# -- augmentation ------------------------------------------------------------------------------

_NEAR = {"a": "sq", "e": "wr", "i": "ou", "o": "ip", "n": "mb", "r": "et", "s": "ad", "t": "ry"}


def typo(text: str, rng: random.Random) -> str:
    """``text`` with one to three slips of the kind fingers make."""
    for _ in range(rng.randint(1, 1 + len(text) // 40)):
        if len(text) < 4:
            return text
        at = rng.randrange(1, len(text) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
        elif kind == 1:
            text = text[:at] + text[at + 1 :]
        elif kind == 2:
            text = text[:at] + text[at] + text[at:]
        else:
            near = _NEAR.get(text[at].lower())
            text = text[:at] + rng.choice(near) + text[at + 1 :] if near else text
    return text


_LEADS = (
    *("hi, ", "hello ", "hey ", "Good morning. ", "um ", "so ", "quick question: ", "please, "),
    *("Hi there! ", "ok ", "excuse me, ", "sorry to bother you, ", "hello again, ", "well, "),
    *("I wonder, ", "one thing: ", "Dear team, ", "can you help me, ", "urgent! ", "right, "),
)
_TAILS = (
    *(" thanks", " please", " thank you!", "??", "!!", " asap", " pls", " ty", ".", " cheers"),
    *(" Thanks in advance.", " - can you help?", " help", " Kind regards", " tia", " :("),
)


#: How often words are exchanged or left out, and how many of them then are.
_REWORDED, _THINNED, _LOST, _LEAST_WORDS = 0.4, 0.3, 0.12, 4


@cache
def _synonyms() -> tuple[re.Pattern[str], dict[str, list[str]]]:
    others: dict[str, list[str]] = defaultdict(list)
    for row in written("synonyms"):
        for word in row["words"]:
            others[word] += [other for other in row["words"] if other != word]
    longest_first = sorted(others, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.I), others


def reworded(text: str, rng: random.Random) -> str:
    """``text`` with about half of the words that have a synonym exchanged."""
    pattern, others = _synonyms()

    def swap(match: re.Match[str]) -> str:
        return match[0] if rng.random() < 0.5 else rng.choice(others[match[0].lower()])

    return pattern.sub(swap, text)


def thinned(text: str, rng: random.Random) -> str:
    """``text`` without about every eighth word: none alone may decide. Short ones stay whole."""
    said = text.split(" ")
    kept = [word for word in said if rng.random() >= _LOST]
    return " ".join(kept) if len(kept) >= _LEAST_WORDS else text


def augment(text: str, rng: random.Random) -> str:
    """Perhaps other or fewer words; then one cheap variation: casing, punctuation, a lead or tail,
    a typo, or nothing."""
    if rng.random() < _REWORDED:
        text = reworded(text, rng)
    if rng.random() < _THINNED:
        text = thinned(text, rng)
    kind = rng.randrange(8)
    if kind == 0:
        return text.lower()
    if kind == 1:
        return re.sub(r"[^\w\s#@{}$€£'-]", "", text).lower()
    if kind == 2:
        return rng.choice(_LEADS) + text[0].lower() + text[1:]
    if kind == 3:
        return text.rstrip(".!?") + rng.choice(_TAILS)
    if kind == 4:
        return typo(text, rng)
    if kind == 5:
        return typo(text.lower().rstrip(".!?"), rng)
    if kind == 6 and len(text) < 80:
        return text.upper() if rng.random() < 0.3 else text.capitalize()
    return text


# -- keeping evaluation rows out ---------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, no punctuation, every number alike: what 'the same question' means here."""
    return re.sub(r"\s+", " ", re.sub(r"[^a-z0 ]", " ", re.sub(r"\d+", "0", text.lower()))).strip()


def trigrams(text: str) -> frozenset[str]:
    padded = f"  {normalise(text)} "
    return frozenset(padded[at : at + 3] for at in range(len(padded) - 2))


class HeldOut:
    """Texts that training must not see: equal, or trigram Jaccard of ``limit`` or more."""

    def __init__(self, texts: Iterable[str], limit: float = 0.85) -> None:
        self._limit = limit
        self._exact: set[str] = set()
        self._grams: list[frozenset[str]] = []
        self._index: dict[str, list[int]] = defaultdict(list)
        for text in texts:
            self._add(text)

    def _add(self, text: str) -> None:
        if (key := normalise(text)) in self._exact:
            return
        self._exact.add(key)
        grams = trigrams(text)
        for gram in grams:
            self._index[gram].append(len(self._grams))
        self._grams.append(grams)

    def __contains__(self, text: str) -> bool:
        if normalise(text) in self._exact:
            return True
        grams = trigrams(text)
        # Jaccard >= limit needs one shared gram among the rarest (1 - limit) of them, plus one.
        rare = sorted(grams, key=lambda gram: len(self._index.get(gram, ())))
        probe = rare[: int(len(grams) * (1 - self._limit)) + 1]
        near = {at for gram in probe for at in self._index.get(gram, ())}
        low, high = self._limit * len(grams), len(grams) / self._limit
        return any(
            low <= len(self._grams[at]) <= high
            and self._jaccard(grams, self._grams[at]) >= self._limit
            for at in near
        )

    @staticmethod
    def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
        shared = len(one & other)
        return shared / max(1, len(one) + len(other) - shared)


# -- the mix -----------------------------------------------------------------------------------

#: CLINC150 labels that a shop's desk may well be asked: neither in nor out.
_CLINC_UNCLEAR = frozenset(
    {"order", "cancel", "card_declined", "report_fraud", "pay_bill", "change_user_name"}
    | {"maybe", "repeat", "text"}
)
_CLINC_TALK = {
    "greeting": "greeting",
    "goodbye": "goodbye",
    "thank_you": "thanks",
    "are_you_a_bot": "bot_identity",
    "what_can_i_ask_you": "capabilities",
    "yes": "affirm",
    "no": "deny",
}
#: NatCS and Banking77 labels close to a support intent without being mapped to one.
_NEAR_SCOPE = re.compile(
    r"account|email|address|phone|bill|payment|cancel|refund|charge|declin|statement|pin|password"
    r"|delivery|arrival|top_up|identity|personal|security",
    re.I,
)


#: The project's own questions by group.
_WRITTEN = {
    "written": (*(f"natural_{part}" for part in "abcdefg"), "hard_negatives"),
    "rude": ("rude", "rude_b"),
    "plain": ("plain",),
    "talk": ("smalltalk", "smalltalk_b"),
    "written_out": (
        *("out_of_scope", "out_of_scope_b", "out_of_scope_c", "out_of_scope_d"),
        *("injection", "injection_b"),
    ),
}
_DIALOGUES = ("dialogues", "dialogues_b", "dialogues_c", "dialogues_d")
_FOLLOWUPS = ("followups", "followups_b", "followups_c")


@dataclass(frozen=True, slots=True)
class _Row:
    text: str
    label: str
    group: str


def _public_rows(data: Path, rng: random.Random) -> tuple[list[_Row], dict[str, list[_Row]]]:
    train: list[_Row] = []
    dev: dict[str, list[_Row]] = defaultdict(list)
    for name in ("support_queries", "support_qa"):
        for row in read_rows(data / f"{name}.jsonl.gz"):
            found = _Row(_surface(row["query"], rng), row["intent"], "bitext")
            dev["bitext"].append(found) if row.get("split") == "dev" else train.append(found)
    for name in ("intents_banking77", "intents_natcs", "intents_clinc150"):
        for row in read_rows(data / f"{name}.jsonl.gz"):
            label = _public_label(row)
            if label is None:
                continue
            group = "natural" if label in SUPPORT else "out" if label == OUT_OF_SCOPE else "talk"
            found = _Row(row["text"], label, group)
            dev[group].append(found) if _is_dev(row) else train.append(found)
    return train, dev


def _public_label(row: dict[str, Any]) -> str | None:
    if intent := row.get("support_intent"):
        # "I want to cancel my order" is a refund request in a bank's set, and not in a shop's.
        unclear = intent == "get_refund" and "cancel" in row["text"].lower()
        return None if unclear else str(intent)
    if row["source"] == "clinc150":
        if talk := _CLINC_TALK.get(row["intent"]):
            return talk
        return None if row["intent"] in _CLINC_UNCLEAR else OUT_OF_SCOPE
    return None if _NEAR_SCOPE.search(row["intent"]) else OUT_OF_SCOPE


def _is_dev(row: dict[str, Any]) -> bool:
    """Original test splits; NatCS has nothing else, so a fifth of it by hash."""
    if row["source"] == "natcs":
        return hashlib.sha256(normalise(row["text"]).encode()).digest()[0] < 51
    return str(row["split"]) == "test"


def _written_rows() -> list[_Row]:
    return [
        _Row(row["text"], row.get("intent", OUT_OF_SCOPE), group)
        for group, names in _WRITTEN.items()
        for row in written(*names)
    ]


def build(data: Path, *, seed: int = 0, evaluation: Sequence[Path] = ()) -> Corpus:
    """The whole corpus, seeded. ``evaluation``: more files whose questions training must not see.

    Raises: CorpusError.
    """
    rng = random.Random(seed)  # noqa: S311 - shuffling, not secrets
    train, dev = _public_rows(data, rng)
    dev["written"] = [
        _Row(row["text"], row["intent"], "written_dev") for row in written("natural_dev")
    ]
    held = HeldOut([row.text for rows in dev.values() for row in rows] + _questions(evaluation))
    corpus = Corpus(answers=Answers(written("answers")))
    seen: set[str] = set()
    for row in _written_rows() + train:  # our own first: an equal public row may be mislabelled
        if (key := normalise(row.text)) in seen or row.text in held:
            continue
        seen.add(key)
        corpus.labelled.append(Sample((Turn(row.text, row.label),), row.group))
    corpus.dev = {name: [(row.text, row.label) for row in rows] for name, rows in dev.items()}
    corpus.dialogues = _dialogues(held)
    corpus.followups = [row for row in written(*_FOLLOWUPS) if row["text"] not in held]
    corpus.unlabelled = _unlabelled(data, held, seen)
    corpus.report = _report(corpus, data, seed)
    return corpus


def own(evaluation: Sequence[Path] = ()) -> Corpus:
    """The project's own rows alone: what tuning replays where the public sets are not at hand.

    Raises: CorpusError.
    """
    dev = [(row["text"], row["intent"]) for row in written("natural_dev")]
    held = HeldOut([text for text, _ in dev] + _questions(evaluation))
    corpus = Corpus(answers=Answers(written("answers")), dev={"written": dev})
    corpus.labelled = [
        Sample((Turn(row.text, row.label),), row.group)
        for row in _written_rows()
        if row.text not in held
    ]
    corpus.dialogues = _dialogues(held)
    corpus.followups = [row for row in written(*_FOLLOWUPS) if row["text"] not in held]
    return corpus


def _questions(files: Sequence[Path]) -> list[str]:
    return [
        row["query"] if "query" in row else row["turns"][-1]["text"]
        for path in files
        for row in read_rows(path)
    ]


def _dialogues(held: HeldOut) -> list[Sample]:
    """One sample for every user turn of a written dialogue, with the turns before it.

    An opening that stands in an evaluation is left out; a later turn has a history of its own.
    """
    samples = []
    for row in written(*_DIALOGUES):
        turns: list[Turn] = []
        for user, assistant in zip(row["turns"][::2], row["turns"][1::2], strict=True):
            turns.append(Turn(user["text"], user["intent"], assistant["text"]))
            if len(turns) > 1 or user["text"] not in held:
                samples.append(Sample(tuple(turns), "dialogue"))
    return samples


def _unlabelled(data: Path, held: HeldOut, seen: set[str]) -> list[str]:
    texts: list[str] = []
    for row in read_rows(data / "user_turns_multidogo.jsonl.gz"):
        texts += [turn["text"] for turn in row["user_turns"] if len(turn["text"]) > 20]
    for name in ("intents_banking77", "intents_natcs", "intents_clinc150", "intents_nlupp"):
        texts += [
            row["text"]
            for row in read_rows(data / f"{name}.jsonl.gz")
            if row.get("split") != "test" or row["source"] == "natcs"
        ]
    found = []
    for text in texts:
        key = normalise(text)
        if key not in seen and len(text) < 400 and text not in held:
            seen.add(key)
            found.append(text)
    return found


def _report(corpus: Corpus, data: Path, seed: int) -> dict[str, Any]:
    files = sorted(data.glob("*.jsonl.gz")) + sorted(WRITTEN.glob("*.jsonl"))
    return {
        "seed": seed,
        "groups": dict(Counter(sample.group for sample in corpus.labelled)),
        "labels": dict(Counter(sample.turns[-1].intent for sample in corpus.labelled)),
        "dialogue_turns": len(corpus.dialogues),
        "unlabelled": len(corpus.unlabelled),
        "dev": {name: len(rows) for name, rows in corpus.dev.items()},
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }
