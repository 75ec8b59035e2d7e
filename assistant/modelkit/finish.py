"""From trained weights to a folder that can ship: calibrate, build, judge, write the card.

The judging runs the built model in the real engine, on development rows that training never saw.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assistant.engine import Engine, EngineConfig, Manifest
from assistant.engine.text import ChatTurn, Slot
from assistant.modelkit import card, labels, scoring
from assistant.modelkit.build import build_for
from assistant.modelkit.calibrate import calibrate, write_card_source
from assistant.modelkit.corpus import Corpus
from assistant.modelkit.tokens import Encoder, Mask
from assistant.modelkit.train import Progress

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


#: Development questions on which quantising is measured.
_PROMPTS = 160


@dataclass(frozen=True, slots=True)
class Reply:
    """What the built model made of one question."""

    question: str
    intent: str
    confidence: float
    scope: float
    text: str
    finished: bool


def finish(
    model: Student,
    corpus: Corpus,
    mask: Mask,
    folder: Path,
    name: str,
    version: str,
    *,
    progress: Progress,
) -> Path:
    """The path of the model card in ``folder/model``. Raises: BuildError, ManifestError."""
    progress("calibrating on development rows ...")
    encoder = Encoder.load(folder / "tokenizer.json")
    fitted, figures = calibrate(model, encoder, mask, corpus.dev)
    write_card_source(folder, name, version, fitted, figures)
    out = folder / "model"
    prompts = _prompts(encoder, mask, [text for text, _ in corpus.dev["written"][:_PROMPTS]])
    manifest = build_for("throughput", folder, out, progress, prompts=prompts)
    progress("judging the built model ...")
    judged, replies = _judge(out, corpus, mask)
    judged |= _against_fp32(manifest)
    card.write_card(out, name, version, {**figures, **judged}, replies, corpus.report)
    if (folder / "curves.png").exists():
        shutil.copyfile(folder / "curves.png", out / "curves.png")
    for key, value in {**figures, **judged}.items():
        progress(f"  {key.replace('_', ' '):40} {value}")
    return out / "MODEL_CARD.md"


def _prompts(encoder: Encoder, mask: Mask, questions: Sequence[str]) -> list[list[int]]:
    """Questions as the model reads them: what quantising is measured on."""
    user, assistant = encoder.id(labels.USER), encoder.id(labels.ASSISTANT)
    return [[user, *encoder.parts(mask(text).parts), assistant] for text in questions]


def _against_fp32(manifest: Manifest) -> dict[str, Any]:
    """What quantising changed, as the builder measured it."""
    found = manifest.quality.get("quantised", {})
    return {
        f"8_bit_{name}": found[name]
        for name in ("same_first", "greedy_agreement", "perplexity_ratio")
        if name in found
    }


def _judge(folder: Path, corpus: Corpus, mask: Mask) -> tuple[dict[str, Any], list[Reply]]:
    engine = Engine(EngineConfig(folder))
    engine.start()
    try:
        rows = corpus.dev["bitext"] + corpus.dev["natural"] + corpus.dev["written"]
        replies = answers(engine, mask, [text for text, _ in rows])
        shown = answers(engine, mask, SHOWN)
    finally:
        engine.close()
    return _answer_figures(rows, replies, mask), shown


def _answer_figures(
    rows: Sequence[tuple[str, str]], replies: Sequence[Reply], mask: Mask
) -> dict[str, Any]:
    known = frozenset(labels.PLACEHOLDERS)
    placeholders = [
        scoring.placeholders_ok(reply.text, _given(mask, reply.question), known)
        for reply in replies
    ]
    ended = [scoring.well_ended(reply.text, reply.finished) for reply in replies]
    right = [reply.intent == label for (_, label), reply in zip(rows, replies, strict=True)]
    words = sorted(len(reply.text.split()) for reply in replies)
    return {
        "built_route_accuracy": round(sum(right) / len(right), 4),
        "placeholders_ok": round(sum(placeholders) / len(replies), 4),
        "well_ended": round(sum(ended) / len(replies), 4),
        "median_words": words[len(words) // 2],
    }


def _given(mask: Mask, question: str) -> dict[str, str]:
    """Names of the values in the question; the value stays a placeholder in this judging."""
    return {str(part): "{{" + part + "}}" for part in mask(question).parts if type(part) is not str}


def answers(engine: Engine, mask: Mask, questions: Sequence[str]) -> list[Reply]:
    """Greedy answers to questions asked alone, in batches, placeholders left as they are."""
    assert engine.codec is not None and engine.manifest is not None
    replies = []
    for start in range(0, len(questions), 64):
        batch = questions[start : start + 64]
        prompts = [engine.codec.encode_chat([_turn(mask, text)]) for text in batch]
        generations = [
            engine.submit(
                prompt,
                max_new_tokens=160,
                stop_ids={engine.codec.end_id},
                first=engine.manifest.first_token_rule(),
            )
            for prompt in prompts
        ]
        replies += [
            _reply(engine, text, generation)
            for text, generation in zip(batch, generations, strict=True)
        ]
    return replies


def _turn(mask: Mask, text: str) -> ChatTurn:
    parts = tuple(part if type(part) is str else Slot(part) for part in mask(text).parts)
    return ChatTurn("user", parts)


def _reply(engine: Engine, question: str, generation: Any) -> Reply:
    assert engine.codec is not None and engine.manifest is not None
    stream = engine.codec.stream()
    text = "".join(stream.push(token.id) for tokens in generation.tokens_sync() for token in tokens)
    verdict = generation.verdict
    names = {id_: name for name, id_ in engine.manifest.intents.items()}
    return Reply(
        question,
        names[verdict.token_id],
        verdict.confidence,
        verdict.scope,
        text,
        generation.finish_reason == "stop",
    )
