"""Writes ``MODEL_CARD.md``: what the model is, where it comes from, its figures, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from assistant.modelkit.labels import SMALL_TALK, SUPPORT

if TYPE_CHECKING:
    from assistant.modelkit.finish import Reply

_ABOUT = """# {name} {version}

A task-specific model for the support desk of an online shop: a Llama-shaped decoder trained from
scratch, quantised to 8 bit (row-wise W8A8) and run by `assistant/engine`. It reads a question
(earlier turns included), names one of {intents} intents, says how sure it is and whether the
question is a shop's business at all, then writes a short answer with placeholders where facts
belong. It knows no product, no price and no customer.

## Figures

On development rows that training never saw (removed from it exactly and by trigram Jaccard 0.85).
Repeat with `python manage.py train_model --data DIR --out RUN --minutes 75`, then
`train_model --data DIR --from RUN --out TUNED` twice (18 and 9 minutes) for the answers' polish.

| measure | value |
|---|---|
{figures}

![Losses over the last run](curves.png)

`bitext`: generated questions, closed in style. `natural`: rows with a support intent from Banking77,
NatCS and CLINC150 (8 intents). `written`: the project's own wordings of all 27 intents, written
apart from the training wordings. Temperature and thresholds are fitted on every other natural row;
`natural ece` and the coverage are measured on the rest.

## Ten questions

Placeholders are filled by the product; what it cannot fill becomes plain words.

{questions}

## Data and licences

| source | used for | licence and credit |
|---|---|---|
| Bitext customer support (bitext/customer-support-llm-chatbot-training-dataset) | questions and intents; none of its answers | CDLA-Sharing-1.0, (c) Bitext Innovations |
| Banking77, NLU++ (PolyAI-LDN/task-specific-datasets) | natural questions, out of scope, unlabelled text | CC BY 4.0, (c) PolyAI: Casanueva et al. 2020, 2022 |
| CLINC150 (clinc/oos-eval) | order status, small talk, out of scope, unlabelled text | CC BY 3.0, (c) Clinc: Larson et al. 2019 |
| NatCS (amazon-science/dstc11-track2-intent-induction) | natural questions, out of scope, unlabelled text | CDLA-Permissive-2.0, (c) Amazon |
| MultiDoGO (awslabs/multi-domain-goal-oriented-dialogues-dataset) | unlabelled text | CDLA-Permissive-1.0, (c) Amazon |
| `assistant/modelkit/written/` | natural wordings, small talk, out of scope, dialogues, every answer | Apache-2.0, this project |
| all-MiniLM-L6-v2 (sentence-transformers) | teacher of the pooled state during training; not shipped | Apache-2.0 |

All sources were changed: placeholders given surface values, values masked, rows removed,
augmented with typing errors and casing. No share-alike set other than Bitext took part; under
CDLA-Sharing-1.0 section 3.5 a trained model is a result, free of its terms.

Rows: {groups}; {dialogues} dialogue turns; {unlabelled} unlabelled texts.

## What it cannot do

- It answers from what it learned by heart: general steps of an ordinary online shop. Facts come from
  your settings and functions; have staff review its answers before you rely on them.
- English only. Long, mixed or ironic questions are often misread; the confidence says so more often
  than not, and the product hands such questions on.
- Several turns work for common follow-ups only.

## Train your own

`python manage.py train_model --data DIR --out RUN`, then point `ASSISTANT_MODEL_DIR` at `RUN/model`.
"""


def write_card(
    folder: Path,
    name: str,
    version: str,
    figures: Mapping[str, Any],
    replies: Sequence[Reply],
    report: Mapping[str, Any],
) -> None:
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items())
    text = _ABOUT.format(
        name=name,
        version=version,
        intents=f"{len(SUPPORT)} support and {len(SMALL_TALK)} small-talk",
        figures=rows,
        questions="\n\n".join(_shown(reply) for reply in replies),
        groups=", ".join(f"{count:,} {group}" for group, count in report["groups"].items()),
        dialogues=f"{report['dialogue_turns']:,}",
        unlabelled=f"{report['unlabelled']:,}",
    )
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")


def _shown(reply: Reply) -> str:
    quoted = reply.text.replace("\n", "\n> ")
    sure = f"`{reply.intent}`, confidence {reply.confidence:.2f}, in scope {reply.scope:.2f}"
    return f"**{reply.question}** ({sure})\n\n> {quoted}"
