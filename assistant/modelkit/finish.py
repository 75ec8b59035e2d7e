"""From trained weights to a folder that can ship: calibrate, build, judge, write the card.

The judging runs the built model in the real engine, on development rows that training never saw, on
the golden set where it is given, and on pairs of questions that may or may not share an answer.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from assistant.engine import Engine, EngineConfig, Manifest, Sampling, drafts
from assistant.engine.machine import cores
from assistant.engine.manifest import MODEL
from assistant.engine.text import ChatTurn, Slot
from assistant.engine.wide import Wide
from assistant.modelkit import card, diagrams, labels, scoring
from assistant.modelkit.build import build, build_for
from assistant.modelkit.calibrate import calibrate, choose_share, write_card_source
from assistant.modelkit.card import Measure
from assistant.modelkit.corpus import Corpus, read_rows
from assistant.modelkit.quality import Batch, Floor, Prompts, open_session
from assistant.modelkit.scoring import Figures, Judged, NearMatches, Pair
from assistant.modelkit.shape import ModelShape
from assistant.modelkit.tokens import Encoder, Mask, MaskedText
from assistant.modelkit.train import Progress
from assistant.modelkit.wide import examples, fit, shared

if TYPE_CHECKING:
    from assistant.modelkit.student import Student

#: Questions whose answers the card shows: one of each sort a newcomer would try.
SHOWN = (
    "how do I cancel my order 48213377?",
    "I moved last week and the parcel still goes to the old flat",
    "how long does shipping take",
    "my card keeps getting declined",
    "Where's my money?? I sent the shoes back ages ago",
    "forgot my password",
    "can I talk to a real person please",
    "do you take paypal",
    "thanks, that helped!",
    "what's the weather like tomorrow?",
)
#: And two conversations, each question asked after the model's own answer to the one before.
SHOWN_TALKS = (
    (
        "where is my parcel? the number is 48213377",
        "it says delivered but nothing is here. I want my money back",
        "how long will that take",
    ),
    ("I'd like to cancel an order", "48213377", "will you charge me for that?"),
)

#: Development questions on which quantising is measured.
_PROMPTS = 160
#: About how many development rows of a kind are judged.
_ENOUGH = 1500
_ANSWER_TOKENS = 160
#: Begins the kinds of golden rows, some of which are called like kinds of development rows.
_GOLDEN = "golden "
#: int4 does not ship here: it is measured, however bad it is.
_ANY = Floor(0.0, 1e9)
_PLACEHOLDER = re.compile(r"\{\{([^{}]+)\}\}")


class ValuedText(MaskedText, Protocol):
    """A masked text that says what was taken out."""

    @property
    def values(self) -> Mapping[str, str]: ...


ValuedMask = Callable[[str], ValuedText]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the built model made of one question. ``intent``: what it answers as; ``best``: the best
    intent of those in scope."""

    question: str
    intent: str
    best: str
    confidence: float
    scope: float
    band: str
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A conversation of (role, text) whose last turn is asked, and what is expected of it."""

    kind: str
    turns: tuple[tuple[str, str], ...]
    wanted: str | None
    scope: str | None

    @property
    def question(self) -> str:
        return self.turns[-1][1]


def finish(
    model: Student,
    corpus: Corpus,
    mask: ValuedMask,
    folder: Path,
    name: str,
    version: str,
    *,
    pairs: Sequence[Path] = (),
    golden: Sequence[Path] = (),
    progress: Progress,
) -> Path:
    """The path of the model card in ``folder/model``. ``pairs``, ``golden``: as in ``describe``.

    Raises: BuildError, CorpusError, ManifestError.
    """
    model.eval()
    encoder = Encoder.load(folder / "tokenizer.json")
    wide = fit_wide(model, corpus, encoder, mask, progress)
    wide.save(folder)
    drafts.save(folder, taught(corpus, encoder))
    fitted, figures = calibrate(model, encoder, mask, corpus.dev, wide)
    write_card_source(folder, name, version, fitted, figures)
    prompts = _measured_on(corpus, encoder, mask)
    build_for("throughput", folder, folder / "model", progress, prompts=prompts)
    return describe(corpus, mask, folder, pairs=pairs, golden=golden, progress=progress)


def taught(corpus: Corpus, encoder: Encoder) -> list[list[int]]:
    """The written answers as the model writes them, intents first: what it may be about to say."""
    answers = corpus.answers.by_intent(labels.INTENTS) if corpus.answers else {}
    return [
        [encoder.id(labels.intent_token(intent)), *encoder.answer(text)]
        for intent, texts in answers.items()
        for text in texts
    ]


def fit_wide(
    model: Student, corpus: Corpus, encoder: Encoder, mask: Mask, progress: Progress
) -> Wide:
    """The table that stands beside ``model``, with as much to say as does both good."""
    progress("fitting the wide half ...")
    found = fit(examples(corpus, mask), progress=progress)
    share = choose_share(model, found, encoder, mask, corpus.dev)
    progress(f"  it counts {share:g} times; calibrating on development rows ...")
    return shared(found, share)


def describe(
    corpus: Corpus,
    mask: ValuedMask,
    folder: Path,
    *,
    pairs: Sequence[Path] = (),
    golden: Sequence[Path] = (),
    progress: Progress,
) -> Path:
    """Judges the model built in ``folder/model`` and writes what was found into its manifest, its
    card and its pictures; any number of times. Returns the card's path.

    ``pairs``: files of question pairs for the embedding; ``golden``: more rows to judge, as
    ``manage.py evaluate`` reads them. Raises: BuildError, CorpusError, ManifestError.
    """
    out = folder / "model"
    manifest, encoder = Manifest.load(out), Encoder.load(folder / "tokenizer.json")
    progress("measuring int4 beside it ...")
    int4 = _int4(folder, _measured_on(corpus, encoder, mask))
    progress("judging the built model ...")
    rows = [row for path in golden for row in read_rows(path)]
    judged, replies, shown = _judge(out, [*_development(corpus), *_golden_rows(rows)], mask)
    measures = [*_measures(judged, replies), _as_written(corpus, judged, replies)]
    kinds = _kinds(judged)
    near = {_stem(path): near_matches(out, path, mask) for path in pairs}
    kept = {
        "int4": int4,
        "kinds": {kind: asdict(one) for kind, one in kinds.items()},
        "near_matches": {name: asdict(one) for name, one in near.items()},
    }
    manifest = replace(manifest, quality={**manifest.quality, **kept})
    manifest.write(out)
    _pictures(folder, manifest, judged, progress)
    findings = card.Findings(
        manifest=manifest,
        builds={manifest.quant: _lost(manifest), "int4": int4},
        kinds=kinds,
        talks=scoring.right_topic(judged),
        measures=measures,
        near=near,
        shown=shown,
        settings=_settings(folder),
        report=corpus.report,
        cores=cores(),
    )
    for measure in measures:
        progress(f"  {measure.title:40} {measure.value}")
    return card.write_card(out, findings)


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _measured_on(corpus: Corpus, encoder: Encoder, mask: Mask) -> list[list[int]]:
    """Prompts of development questions, on which quantising is measured."""
    return _prompts(encoder, mask, [text for text, _ in corpus.dev["written"][:_PROMPTS]])


def _prompts(encoder: Encoder, mask: Mask, questions: Sequence[str]) -> list[list[int]]:
    """Questions as the model reads them: what quantising is measured on."""
    user, assistant = encoder.id(labels.USER), encoder.id(labels.ASSISTANT)
    return [[user, *encoder.parts(mask(text).parts), assistant] for text in questions]


def _int4(folder: Path, prompts: Prompts) -> dict[str, Any]:
    """What the 4-bit build of the same weights loses, on the same prompts; it is not kept."""
    with tempfile.TemporaryDirectory(prefix="inhouse-int4-") as scratch:
        built = build(folder, Path(scratch) / "int4", "int4", prompts=prompts, floor=_ANY)
        return _lost(built)


def _lost(manifest: Manifest) -> dict[str, Any]:
    """What quantising changed, as the builder measured it, and the size it came to."""
    found = manifest.quality.get("quantised", {})
    names = ("prompts", "tokens", "same_first", "greedy_agreement", "perplexity_ratio")
    return {name: found[name] for name in names if name in found} | {
        "bytes": manifest.files[MODEL].bytes
    }


# -- questions -----------------------------------------------------------------------------------


def _development(corpus: Corpus) -> list[Asked]:
    """Some of each kind, thinned as ``calibrate`` does: every other natural row is unfitted."""
    return [
        Asked(kind, (("user", text),), *_expected(label))
        for kind in ("bitext", "natural", "written", "talk", "out")
        for text, label in _thinned(corpus.dev.get(kind, []))
    ]


def _thinned(rows: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    return rows[:: max(1, len(rows) // _ENOUGH)]


def _expected(label: str) -> tuple[str | None, str]:
    return (None, "out") if label == labels.OUT_OF_SCOPE else (label, "in")


def _golden_rows(rows: Iterable[Mapping[str, Any]]) -> list[Asked]:
    """Rows of a dataset of ``manage.py evaluate``: a question, or turns with role and text."""
    return [
        Asked(
            kind=f"{_GOLDEN}{row.get('kind') or 'all'}",
            turns=tuple((one["role"], one["text"]) for one in _turns(row)),
            wanted=row.get("intent"),
            scope=row.get("scope"),
        )
        for row in rows
    ]


def _turns(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    return row["turns"] if "turns" in row else ({"role": "user", "text": row["query"]},)


# -- asking the built model ----------------------------------------------------------------------


def _judge(
    folder: Path, questions: Sequence[Asked], mask: ValuedMask
) -> tuple[list[Judged], list[Reply], list[list[Reply]]]:
    """Every question judged, with its reply, and the conversations that the card shows."""
    engine = Engine(EngineConfig(folder))
    engine.start()
    try:
        chats = _chats(engine, mask, questions)
        replies = _ask(engine, [row.question for row in questions], chats)
        shown = [[reply] for reply in answers(engine, mask, SHOWN)]
        shown += [_talk(engine, mask, said) for said in SHOWN_TALKS]
    finally:
        engine.close()
    judged = [_judged(row, reply, mask) for row, reply in zip(questions, replies, strict=True)]
    return judged, replies, shown


def _judged(row: Asked, reply: Reply, mask: Mask) -> Judged:
    given: dict[str, str] = {}
    for role, text in row.turns:
        given |= _given(mask, text) if role == "user" else {}
    return Judged(
        kind=row.kind,
        wanted=row.wanted,
        scope=row.scope,
        intent=reply.best,
        confidence=reply.confidence,
        inside=reply.scope,
        band=reply.band,
        turns=len(row.turns),
        placeholders_ok=scoring.placeholders_ok(reply.text, given, frozenset(labels.PLACEHOLDERS)),
        well_ended=scoring.well_ended(reply.text, reply.finished),
    )


def _given(mask: Mask, question: str) -> dict[str, str]:
    """Names of the values in the question; the value stays a placeholder in this judging."""
    return {str(part): "{{" + part + "}}" for part in mask(question).parts if type(part) is not str}


def _chats(engine: Engine, mask: ValuedMask, questions: Sequence[Asked]) -> list[list[ChatTurn]]:
    """Conversations as the product keeps them: earlier answers filled with what the user gave, each
    under the intent that the model finds in the question before it."""
    chats: list[list[ChatTurn]] = [[] for _ in questions]
    for depth in range(max((len(row.turns) for row in questions), default=0)):
        there = [at for at, row in enumerate(questions) if depth < len(row.turns)]
        spoken = [at for at in there if questions[at].turns[depth][0] != "user"]
        intents = dict(zip(spoken, _understood(engine, [chats[at] for at in spoken]), strict=True))
        for at in there:
            turns = questions[at].turns
            text, asked = turns[depth][1], [said for role, said in turns[:depth] if role == "user"]
            chats[at].append(
                ChatTurn("assistant", _filled(mask, text, asked), intents[at])
                if at in intents
                else _turn(mask, text)
            )
    return chats


def _understood(engine: Engine, chats: Sequence[Sequence[ChatTurn]]) -> list[str]:
    """The intent under which each last question would be answered."""
    return [reply.intent for reply in _ask(engine, [""] * len(chats), chats, most=1)]


def _filled(mask: ValuedMask, text: str, asked: Sequence[str]) -> tuple[str | Slot, ...]:
    """An answer with the placeholders that the questions gave a value; the others are words."""
    given = {name for question in asked for name in mask(question).values}
    parts: list[str | Slot] = []
    for at, piece in enumerate(_PLACEHOLDER.split(text)):
        if at % 2 == 0:
            parts += _slots(mask(piece))
        else:
            parts.append(Slot(piece) if piece in given else piece.lower())
    return tuple(parts)


def _turn(mask: Mask, text: str) -> ChatTurn:
    return ChatTurn("user", tuple(_slots(mask(text))))


def _slots(masked: MaskedText) -> Iterator[str | Slot]:
    return (part if type(part) is str else Slot(part) for part in masked.parts)


def _talk(engine: Engine, mask: ValuedMask, questions: Sequence[str]) -> list[Reply]:
    """Replies to questions asked one after the other in one conversation."""
    chat: list[ChatTurn] = []
    replies: list[Reply] = []
    for at, text in enumerate(questions):
        chat.append(_turn(mask, text))
        replies += _ask(engine, [text], [chat])
        said = _filled(mask, replies[-1].text, questions[: at + 1])
        chat.append(ChatTurn("assistant", said, replies[-1].intent))
    return replies


def answers(engine: Engine, mask: Mask, questions: Sequence[str]) -> list[Reply]:
    """Greedy answers to questions asked alone, in batches, placeholders left as they are."""
    return _ask(engine, questions, [[_turn(mask, text)] for text in questions])


def _ask(
    engine: Engine,
    questions: Sequence[str],
    chats: Sequence[Sequence[ChatTurn]],
    *,
    most: int = _ANSWER_TOKENS,
) -> list[Reply]:
    """A greedy answer to the last turn of each chat. ``questions``: how the replies call it."""
    assert engine.codec is not None and engine.manifest is not None
    replies = []
    for start in range(0, len(chats), 64):
        generations = [
            engine.submit(
                engine.codec.encode_chat(chat),
                max_new_tokens=most,
                sampling=Sampling(banned=engine.codec.absent(chat, labels.USER_SLOTS)),
                stop_ids={engine.codec.end_id},
                first=engine.first_token_rule(chat),
            )
            for chat in chats[start : start + 64]
        ]
        replies += [
            _reply(engine, text, generation)
            for text, generation in zip(questions[start : start + 64], generations, strict=True)
        ]
    return replies


def _reply(engine: Engine, question: str, generation: Any) -> Reply:
    assert engine.codec is not None and engine.manifest is not None
    stream = engine.codec.stream()
    text = "".join(stream.push(token.id) for tokens in generation.tokens_sync() for token in tokens)
    verdict = generation.verdict
    names = {id_: name for name, id_ in engine.manifest.intents.items()}
    return Reply(
        question=question,
        intent=names[verdict.token_id],
        best=names[verdict.intent_id],
        confidence=verdict.confidence,
        scope=verdict.scope,
        band=_band(engine.manifest, verdict),
        text=text,
        finished=generation.finish_reason == "stop",
    )


def _band(manifest: Manifest, verdict: Any) -> str:
    """What the model's own thresholds say of an answer, as the product does."""
    if verdict.token_id != verdict.intent_id:
        return "out_of_scope"
    if verdict.confidence >= manifest.calibration.answer_from:
        return "answer"
    return "caution" if verdict.confidence >= manifest.calibration.caution_from else "hand_on"


# -- embeddings ----------------------------------------------------------------------------------


def near_matches(folder: Path, path: Path, mask: ValuedMask) -> NearMatches:
    """How well the model in ``folder`` tells the question pairs of the file at ``path`` apart.

    The embedding of a question is the pooled state after its prompt; a near match also asks for the
    same best intent and equal masked values. Raises: CorpusError, ManifestError.
    """
    rows = list(read_rows(path))
    texts = sorted({row[side] for row in rows for side in "ab"})
    at = {text: place for place, text in enumerate(texts)}
    states, intents = _states(folder, mask, texts)
    values = [dict(mask(text).values) for text in texts]
    pairs = []
    for row in rows:
        a, b = at[row["a"]], at[row["b"]]
        agree = bool(intents[a] == intents[b]) and values[a] == values[b]
        cosine = round(float(states[a] @ states[b]), 6)  # equal prompts: 1.0, whatever their norm
        pairs.append(Pair(row["kind"], row["label"] == 1, cosine, agree))
    return scoring.near_matches(pairs)


def _states(folder: Path, mask: Mask, texts: Sequence[str]) -> tuple[scoring.Floats, Sequence[int]]:
    """Unit pooled states (N, hidden) and ids of the best intents, each text asked alone; equal
    prompts are read once and have the very same state."""
    manifest, encoder = Manifest.load(folder), Encoder.load(folder / "tokenizer.json")
    rule = manifest.first_token_rule()
    assert rule is not None, "only models with intents are trained here"
    prompts = [tuple(prompt) for prompt in _prompts(encoder, mask, texts)]
    different = sorted(set(prompts), key=lambda prompt: (len(prompt), prompt))
    session = open_session(str(folder / MODEL))
    shape = ModelShape(**asdict(manifest.architecture))
    found, best = {}, {}
    for start in range(0, len(different), 32):
        some = different[start : start + 32]
        read = Batch(session, shape, len(some), len(some[-1])).run(some)
        chosen = read["logprobs"][:, list(rule.intent_ids)].argmax(axis=1).tolist()
        for prompt, state, intent in zip(some, read["pooled"], chosen, strict=True):
            found[prompt], best[prompt] = state.astype(float), intent
    states = np.array([found[prompt] for prompt in prompts])
    states /= np.linalg.norm(states, axis=1, keepdims=True)
    return states, [best[prompt] for prompt in prompts]


# -- what was found ------------------------------------------------------------------------------


def _kinds(judged: Sequence[Judged]) -> dict[str, Figures]:
    """Figures by kind, each of one side of the scope; golden rows are held against golden rows."""
    rows = _one_sided(judged)
    golden = [row for row in rows if row.kind.startswith(_GOLDEN)]
    others = [row for row in rows if not row.kind.startswith(_GOLDEN)]
    return scoring.by_kind(others) | scoring.by_kind(golden)


def _one_sided(judged: Sequence[Judged]) -> list[Judged]:
    """Where a kind has questions in scope, those out of scope become a kind of their own."""
    inside = {row.kind for row in judged if row.scope == "in"}
    return [
        replace(row, kind=f"{row.kind}, out of scope")
        if row.scope == "out" and row.kind in inside
        else row
        for row in judged
    ]


def _unfitted(judged: Sequence[Judged]) -> list[Judged]:
    """The naturally worded rows that ``calibrate`` did not fit on: every other one."""
    natural = [row for row in judged if row.kind in ("natural", "written")]
    return [row for row in natural if row.wanted in labels.SUPPORT][1::2]


def _measures(judged: Sequence[Judged], replies: Sequence[Reply]) -> list[Measure]:
    routed = [_routed(row) for row in judged if row.kind in ("bitext", "natural", "written")]
    words = sorted(len(reply.text.split()) for reply in replies)
    every, held = scoring.figures(judged), scoring.figures(_unfitted(judged))
    return [
        Measure("built_route_accuracy", round(sum(routed) / len(routed), 4), len(routed)),
        Measure("natural_ece", held.ece, held.rows),
        Measure("natural_coverage_at_5pct_error", held.coverage, held.rows),
        Measure("placeholders_ok", every.placeholder_ok, every.rows),
        Measure("well_ended", every.well_ended, every.rows),
        Measure("median_words", words[len(words) // 2], len(words)),
    ]


def _as_written(corpus: Corpus, judged: Sequence[Judged], replies: Sequence[Reply]) -> Measure:
    """Single questions answered word for word as somebody wrote it for the intent it is answered
    under: what a small model makes up itself is mostly muddled."""
    answers = corpus.answers.by_intent(labels.INTENTS) if corpus.answers else {}
    written = {(intent, _plain(text)) for intent, texts in answers.items() for text in texts}
    found = [
        (reply.intent, _plain(reply.text)) in written
        for row, reply in zip(judged, replies, strict=True)
        if not row.kind.startswith(_GOLDEN)
    ]
    return Measure("answers_as_written", round(sum(found) / max(1, len(found)), 4), len(found))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _routed(row: Judged) -> bool:
    """Whether the question was answered as what it is, out of scope included."""
    turned_away = row.band == labels.OUT_OF_SCOPE
    return turned_away if row.scope == "out" else row.right and not turned_away


def _pictures(
    folder: Path, manifest: Manifest, judged: Sequence[Judged], progress: Progress
) -> None:
    """The curves of the training and the calibration, into the built folder."""
    out, rows = folder / "model", _unfitted(judged)
    if (folder / card.CURVES).exists():
        shutil.copyfile(folder / card.CURVES, out / card.CURVES)
    fitted = manifest.calibration
    try:
        diagrams.calibration(
            [row.confidence for row in rows],
            [row.right for row in rows],
            out / card.CALIBRATION,
            title=f"{manifest.name} {manifest.version}, naturally worded, not fitted on",
            bands=diagrams.Bands(fitted.answer_from, fitted.caution_from),
        )
    except diagrams.DiagramError as error:
        progress(f"no calibration diagram: {error}")


def _settings(folder: Path) -> dict[str, Any]:
    """What the run was told, as training wrote it down; empty where it did not."""
    path = folder / "training.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(found.get("config", {}))
