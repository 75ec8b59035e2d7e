"""Writes ``MODEL_CARD.md``: what the model is, where it comes from, its figures, its limits.

Only lays out what ``finish`` found; measures nothing itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assistant.engine.drafts import FILE as DRAFTS
from assistant.engine.manifest import Manifest
from assistant.engine.wide import FILE
from assistant.modelkit.labels import SMALL_TALK, SUPPORT
from assistant.modelkit.scoring import Figures, NearMatches
from assistant.modelkit.shape import ModelShape

if TYPE_CHECKING:
    from assistant.modelkit.finish import Reply

#: Pictures beside the card, shown where they exist.
CURVES, CALIBRATION = "curves.png", "calibration.png"
_NUMBERS = {10: "Ten", 12: "Twelve"}


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure and the number of rows behind it."""

    name: str
    value: float | int | None
    rows: int

    @property
    def title(self) -> str:
        return self.name.replace("_", " ")


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything the card shows.

    ``builds``: by scheme, what quantising lost; ``talks``: share of conversations of several turns
    that were understood, and their number; ``near``: by file of pairs; ``shown``: conversations of
    one or more replies; ``settings``: the training's; ``report``: the corpus's.
    """

    manifest: Manifest
    builds: Mapping[str, Mapping[str, Any]]
    kinds: Mapping[str, Figures]
    talks: tuple[float | None, int]
    measures: Sequence[Measure]
    near: Mapping[str, NearMatches]
    shown: Sequence[Sequence[Reply]]
    settings: Mapping[str, Any]
    report: Mapping[str, Any]
    cores: int


_ABOUT = """# {name} {version}

A task-specific model for the support desk of an online shop: a Llama-shaped decoder of {millions:.1f}
million parameters, quantised to {quant} and run by `assistant/engine`. It reads a question (earlier
turns included), names one of {intents} intents, says how sure it is and whether the question is a
shop's business at all, then writes a short answer with placeholders where facts belong. It knows no
product, no price and no customer.
{wide}
{training}

## Figures

Of the built model that ships, on questions that training never saw (removed from it exactly and by
trigram Jaccard 0.85). Coverage: the largest share that can be answered, the surest first, with at
most 5 % of the intents wrong. AUROC: of the scope score, against the questions of the other side in
the same set. Answered, with caution, handed on, turned away: what the model's own thresholds say.

### Questions in scope

| kind | rows | intent accuracy | ECE | coverage | AUROC | answered | with caution | handed on | turned away |
|---|---|---|---|---|---|---|---|---|---|
{inside}

### Questions out of scope

| kind | rows | found | AUROC | answered | with caution | handed on |
|---|---|---|---|---|---|---|
{outside}

`bitext`: generated questions, closed in style. `natural`: rows with a support intent from Banking77,
NatCS and CLINC150 (8 intents). `written`: the project's own wordings of all {support} support intents,
written apart from the training wordings. `talk`: small talk. `out`: CLINC150, Banking77 and NatCS.
{golden}

### Confidence and answers

| measure | value | rows |
|---|---|---|
{measures}

`natural ece` and its coverage are on every other row of `natural` and `written`: temperature and
thresholds are fitted on the rest. {calibration}

### 8 and 4 bit against fp32

| build | prompts | same intent | same greedy tokens | perplexity ratio | size |
|---|---|---|---|---|---|
{builds}

Greedy tokens are counted up to the first difference, of {tokens} an answer; equally good words then
lead to equally good, other answers. `model.json` has these figures too. The int4 build does not ship:
`manage.py build_model --profile latency` makes it.
{near}{curves}
## {count} questions

Placeholders are filled by the product; what it cannot fill becomes plain words. In a conversation the
model reads its own earlier answers.

{questions}

## Data and licences

| source | used for | licence and credit |
|---|---|---|
| Bitext customer support (bitext/customer-support-llm-chatbot-training-dataset) | questions and intents; none of its answers | CDLA-Sharing-1.0, (c) Bitext Innovations |
| Banking77, NLU++ (PolyAI-LDN/task-specific-datasets) | natural questions, out of scope, unlabelled text | CC BY 4.0, (c) PolyAI: Casanueva et al. 2020, 2022 |
| CLINC150 (clinc/oos-eval) | order status, small talk, out of scope, unlabelled text | CC BY 3.0, (c) Clinc: Larson et al. 2019 |
| NatCS (amazon-science/dstc11-track2-intent-induction) | natural questions, out of scope, unlabelled text | CDLA-Permissive-2.0, (c) Amazon |
| MultiDoGO (awslabs/multi-domain-goal-oriented-dialogues-dataset) | unlabelled text | CDLA-Permissive-1.0, (c) Amazon |
| `assistant/modelkit/written/` | natural wordings, hard negatives (alike in words, another intent), rude but legitimate questions, injection attempts, small talk, out of scope, dialogues, every answer | Apache-2.0, this project |
{teacher}
All sources were changed: placeholders given surface values, values masked, rows removed,
augmented with typing errors and casing. No share-alike set other than Bitext took part; under
CDLA-Sharing-1.0 section 3.5 a trained model is a result, free of its terms.

Rows: {groups}; {dialogues} dialogue turns; {unlabelled} unlabelled texts.

## What it cannot do

- It answers from what it learned by heart: general steps of an ordinary online shop. Facts come from
  your settings and functions; have staff review its answers before you rely on them.
- It has no rules of your shop: "within 30 days", "free of charge" or "yes, we ship there" it cannot know.
- English only. Long, mixed or ironic questions are often misread; the confidence says so more often
  than not, and the product hands such questions on.
- {talks}
- Its scope score is no guard: what it turns away is in the table above, and so is what it misses. It
  can do nothing but write, so an injection that gets through costs a strange answer.
- Its embedding knows topics, not details: see the figures before you let near matches answer.

## Train your own

`python manage.py train_model --data DIR --out RUN`, then point `ASSISTANT_MODEL_DIR` at `RUN/model`.
"""

_TRAINING = """Trained from scratch in ONE run of {minutes:g} minutes on {device}, seed {seed}, {batch:,} tokens a batch, learning
rate {rate:g}. Repeat with `python manage.py train_model --data DIR --out RUN --minutes {minutes:g} --seed {seed}`.
The first {questions:.0%} of it reads questions alone (short, so many of them), the rest answers and conversations too.
What training learns at once: intent, scope and answer{taught}."""
_TUNED = """Fine-tuned for {minutes:g} minutes on {device} from an earlier checkpoint, seed {seed}, learning rate {rate:g}:
intent, scope and answer{taught}."""
_TAUGHT = """, and from a teacher (a sentence encoder that does not ship)
its embeddings, its opinion of the intent of every text (soft labels, also of text that has none){start}"""
_STARTED = """ and, as
a start, the meanings of words (its word vectors, turned to fewer dimensions)"""
_TEACHER = """| all-MiniLM-L6-v2 (sentence-transformers) | teacher during training: embeddings, soft intents, starting word vectors; not shipped | Apache-2.0 |
"""
_SCHEMES = {
    "static8": "8 bit (constant activation scales, measured beforehand)",
    "row8": "8 bit (an activation scale per token)",
    "int4": "4 bit",
}
_NEAR = """
### Near matches

Whether the cosine of two questions' pooled states says that one answer serves both, on pairs picked to
look alike (`label` 0) and pairs that share an answer (`label` 1). AUROC: all pairs of label 1 against this
kind. Hits: found above the lowest threshold at which no `other_value`, `opposite_request`,
`sibling_intent` or `nlupp_slot_value_differs` pair is hit. Values are masked before the model reads a
question, so pairs that differ in an order number alone are one text to it: *agreed* also asks for equal
masked values and the same intent.
"""
_NEAR_FILE = """
`{name}`: by the cosine alone, {raw}; agreed, {agreed}.

| kind | label | pairs | median cosine | AUROC | hits | agreed: pairs | AUROC | hits |
|---|---|---|---|---|---|---|---|---|
{rows}
"""


_WIDE = f"""
What a question is about, and whether it is a shop's business, is said by two together: the network,
and a table of 8-bit weights over its words, neighbouring words and pieces of words (`{FILE}`), with
what was asked before. The table is fitted to the same questions after the network. It knows wordings by
heart; the network generalises, and writes the answer that follows.
"""
_GUESSES = f"""
The answers it was written to give stand beside it as token ids (`{DRAFTS}`), for guesses of how an answer
goes on: they make it faster and never change it.
"""


def write_card(folder: Path, found: Findings) -> Path:
    """Writes the card into ``folder`` and returns its path."""
    settings = found.settings
    text = _ABOUT.format(
        **_named(found),
        wide="".join(
            text
            for name, text in ((FILE, _WIDE), (DRAFTS, _GUESSES))
            if name in found.manifest.files
        ),
        training=_training(settings, found.cores),
        inside="\n".join(_inside(found.kinds)),
        outside="\n".join(_outside(found.kinds)),
        golden=_golden(found),
        measures="\n".join(_measure(one) for one in found.measures),
        calibration=_picture(folder, CALIBRATION, "Reliability and coverage"),
        curves=_picture(folder, CURVES, "Losses over the run"),
        builds="\n".join(_build(scheme, lost) for scheme, lost in found.builds.items()),
        tokens=next(iter(found.builds.values())).get("tokens", "-"),
        near=_near(found.near),
        count=_NUMBERS.get(len(found.shown), str(len(found.shown))),
        questions="\n\n".join(_conversation(replies) for replies in found.shown),
        teacher=_TEACHER if _has_teacher(settings) else "",
        talks=_talks(found.talks),
    )
    path = folder / "MODEL_CARD.md"
    path.write_text(text, encoding="utf-8")
    return path


def _named(found: Findings) -> dict[str, Any]:
    manifest, report = found.manifest, found.report
    return {
        "name": manifest.name,
        "version": manifest.version,
        "millions": ModelShape(**asdict(manifest.architecture)).parameters / 1e6,
        "quant": _SCHEMES.get(manifest.quant, manifest.quant),
        "intents": f"{len(SUPPORT)} support and {len(SMALL_TALK)} small-talk",
        "support": len(SUPPORT),
        "groups": ", ".join(f"{count:,} {group}" for group, count in report["groups"].items()),
        "dialogues": f"{report['dialogue_turns']:,}",
        "unlabelled": f"{report['unlabelled']:,}",
    }


def _training(settings: Mapping[str, Any], cores: int) -> str:
    """How the run was made; nothing where nobody wrote it down."""
    if not settings:
        return ""
    device = f"{cores} CPU cores" if settings["device"] == "cpu" else "a GPU"
    # Before that was noted, a run of one stage was one that began with trained weights.
    fresh = settings.get("fresh", len(settings["stages"]) > 1)
    taught = _TAUGHT.format(start=_STARTED if fresh else "") if _has_teacher(settings) else ""
    return (_TRAINING if fresh else _TUNED).format(
        minutes=settings["minutes"],
        device=device,
        seed=settings["seed"],
        batch=settings["batch_tokens"],
        rate=settings["learning_rate"],
        questions=settings["stages"][0]["until"],
        taught=taught,
    )


def _has_teacher(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("teach_weight", 1))


# -- tables --------------------------------------------------------------------------------------


def _inside(kinds: Mapping[str, Figures]) -> list[str]:
    return [
        _line(
            kind, f"{one.rows:,}", _share(one.intent_accuracy), _number(one.ece),
            _share(one.coverage), _number(one.scope_auroc), _share(one.answered),
            _share(one.with_caution), _share(one.handed_on), _share(one.turned_away),
        )
        for kind, one in kinds.items()
        if one.out_of_scope_found is None
    ]  # fmt: skip


def _outside(kinds: Mapping[str, Figures]) -> list[str]:
    return [
        _line(
            kind, f"{one.rows:,}", _share(one.out_of_scope_found), _number(one.scope_auroc),
            _share(one.answered), _share(one.with_caution), _share(one.handed_on),
        )
        for kind, one in kinds.items()
        if one.out_of_scope_found is not None
    ]  # fmt: skip


def _golden(found: Findings) -> str:
    """A sentence on the golden set, where it was judged."""
    if not any(kind.startswith("golden ") for kind in found.kinds):
        return ""
    share, rows = found.talks
    several = f" Several turns: right topic {_share(share)} of {rows}." if rows else ""
    return (
        "`golden`: the project's golden set by its own kinds, never used to fit anything; "
        f"`python manage.py evaluate` repeats it.{several}"
    )


def _measure(one: Measure) -> str:
    value = "-" if one.value is None else one.value
    return _line(one.title, str(value), f"{one.rows:,}")


def _build(scheme: str, lost: Mapping[str, Any]) -> str:
    megabytes = f"{lost['bytes'] / 1e6:.1f} MB"
    if "same_first" not in lost:
        return _line(scheme, "-", "-", "-", "-", megabytes)
    return _line(
        scheme, str(lost["prompts"]), _share(lost["same_first"]), _share(lost["greedy_agreement"]),
        f"{lost['perplexity_ratio']:.4f}", megabytes,
    )  # fmt: skip


def _near(near: Mapping[str, NearMatches]) -> str:
    """The section on near matches, where pairs were measured."""
    parts = [
        _NEAR_FILE.format(
            name=name,
            raw=_hit_rate(one.raw.hit_rate, one.raw.pairs, one.raw.threshold),
            agreed=_hit_rate(one.agreed.hit_rate, one.agreed.pairs, one.agreed.threshold),
            rows="\n".join(_near_kind(one, kind) for kind in one.pairs),
        )
        for name, one in near.items()
    ]
    return _NEAR + "".join(parts) if parts else ""


def _hit_rate(rate: float | None, pairs: int, threshold: float) -> str:
    return (
        f"{_share(rate)} of the {pairs:,} pairs of label 1 are hit (cosine above {threshold:.4f})"
    )


def _near_kind(one: NearMatches, kind: str) -> str:
    return _line(
        kind, "1" if one.same[kind] else "0", f"{one.pairs[kind]:,}",
        f"{one.median_cosine[kind]:.3f}", _number(one.raw.auroc[kind]), _share(one.raw.hits[kind]),
        _share(one.agree[kind]), _number(one.agreed.auroc[kind]), _share(one.agreed.hits[kind]),
    )  # fmt: skip


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# -- texts ---------------------------------------------------------------------------------------


def _picture(folder: Path, name: str, title: str) -> str:
    return f"\n\n![{title}]({name})\n" if (folder / name).exists() else ""


def _talks(talks: tuple[float | None, int]) -> str:
    share, rows = talks
    common = "Several turns work for common follow-ups only"
    return (
        f"{common}: right topic in {_share(share)} of {rows} conversations."
        if rows
        else f"{common}."
    )


def _conversation(replies: Sequence[Reply]) -> str:
    return "\n\n".join(_shown(reply) for reply in replies)


def _shown(reply: Reply) -> str:
    quoted = reply.text.replace("\n", "\n> ")
    sure = f"`{reply.intent}`, confidence {reply.confidence:.2f}, in scope {reply.scope:.2f}"
    return f"**{reply.question}** ({sure})\n\n> {quoted}"
