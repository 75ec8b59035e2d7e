"""Measures a trained checkpoint on development rows, fits its calibration, writes ``inhouse.json``.

Runs the PyTorch model (before quantisation). Figures of the built model come from ``evaluate``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from assistant.engine.manifest import Calibration
from assistant.engine.wide import Wide
from assistant.modelkit import labels, scoring
from assistant.modelkit.tokens import Encoder, Mask
from assistant.modelkit.wide import best_share, opinions

if TYPE_CHECKING:
    from assistant.modelkit.student import Student


@dataclass(frozen=True, slots=True)
class Scores:
    """Raw scores of N questions: ``intents`` (N, K) logits, ``scope`` (N,) in minus out."""

    intents: scoring.Floats
    scope: scoring.Floats


def with_wide(scores: Scores, wide: Wide | None, mask: Mask, texts: Sequence[str]) -> Scores:
    """What network and table say together of each text asked alone."""
    if wide is None:
        return scores
    found = opinions(wide, mask, texts)
    return Scores(
        scores.intents + np.array([one.intents for one in found]),
        scores.scope + np.array([one.scope for one in found]),
    )


def choose_share(
    model: Student,
    wide: Wide,
    encoder: Encoder,
    mask: Mask,
    dev: dict[str, list[tuple[str, str]]],
) -> float:
    """How much ``wide`` should say, by every other natural development row."""
    rows = [row for name in ("natural", "written") for row in _limited(dev)[name]]
    rows = [(text, label) for text, label in rows if label in labels.SUPPORT][::2]
    texts = [text for text, _ in rows]
    network = score(model, encoder, mask, texts).intents
    table = np.array([one.intents for one in opinions(wide, mask, texts)])
    return best_share(network, table, [labels.INTENTS.index(label) for _, label in rows])


def score(model: Student, encoder: Encoder, mask: Mask, texts: Sequence[str]) -> Scores:
    """First-position scores of each text asked alone, by the network."""
    import torch

    intent_ids = [encoder.id(labels.intent_token(name)) for name in labels.INTENTS[:-1]]
    pair = [encoder.id(labels.IN_SCOPE), encoder.id(labels.OUT_SCOPE)]
    intents, scope = [], []
    user, assistant = encoder.id(labels.USER), encoder.id(labels.ASSISTANT)
    with torch.inference_mode():
        for text in texts:
            ids = [user, *encoder.parts(mask(text).parts)[:300], assistant]
            device = model.embed_tokens.weight.device
            row = model.logits(model(torch.tensor([ids], device=device))[0, -1]).double()
            intents.append(row[intent_ids].cpu().numpy())
            scope.append(float(row[pair[0]] - row[pair[1]]))
    return Scores(np.array(intents), np.array(scope))


def natural_accuracy(
    model: Student, encoder: Encoder, mask: Mask, dev: dict[str, list[tuple[str, str]]]
) -> float:
    """Share of right intents over the natural development rows, each source counting alike."""
    parts = []
    for name in ("natural", "written"):
        rows = [(text, label) for text, label in dev[name] if label != labels.OUT_OF_SCOPE]
        scores = score(model, encoder, mask, [text for text, _ in rows])
        best = [labels.INTENTS[at] for at in scores.intents.argmax(1)]
        parts.append(scoring.accuracy(best, [label for _, label in rows]))
    return sum(parts) / len(parts)


def calibrate(
    model: Student,
    encoder: Encoder,
    mask: Mask,
    dev: dict[str, list[tuple[str, str]]],
    wide: Wide | None = None,
) -> tuple[Calibration, dict[str, Any]]:
    """Fits on every other natural row, reports on the rest. ``dev``: (text, label) by source."""
    model.eval()
    found = {}
    for name, rows in _limited(dev).items():
        texts = [text for text, _ in rows]
        scores = with_wide(score(model, encoder, mask, texts), wide, mask, texts)
        found[name] = scores, [label for _, label in rows]
    natural = _join([found["natural"], found["written"]], keep=labels.SUPPORT)
    outside = _join([found["out"], found["written"]], keep=(labels.OUT_OF_SCOPE,))
    fitted = _fit(natural, outside)
    return fitted, _figures(found, natural, outside, fitted)


def _limited(
    dev: dict[str, list[tuple[str, str]]], most: int = 1500
) -> dict[str, list[tuple[str, str]]]:
    return {name: rows[:: max(1, len(rows) // most)] for name, rows in dev.items()}


Labelled = tuple[Scores, list[str]]


def _join(sets: Sequence[Labelled], keep: Sequence[str]) -> Labelled:
    intents, scope, names = [], [], []
    for scores, wanted in sets:
        for at, label in enumerate(wanted):
            if label in keep:
                intents.append(scores.intents[at])
                scope.append(scores.scope[at])
                names.append(label)
    return Scores(np.array(intents), np.array(scope)), names


def _fit(natural: Labelled, outside: Labelled) -> Calibration:
    scores, names = natural
    wanted = np.array([labels.INTENTS.index(name) for name in names])
    temperature = scoring.fit_temperature(scores.intents[::2], wanted[::2])
    scale, bias = scoring.fit_scope(scores.scope[::2], outside[0].scope[::2])
    chances = scoring.softmax(scores.intents[::2] / temperature)
    right = (chances.argmax(1) == wanted[::2]).astype(float)
    sure = chances.max(1)
    answer = scoring.threshold_for_error(sure, right, 0.05)
    caution = min(answer, scoring.threshold_for_error(sure, right, 0.15))
    return Calibration(
        temperature=temperature,
        scope_temperature=scale,
        scope_bias=bias,
        scope_threshold=_scope_threshold(scores.scope[::2], scale, bias),
        answer_from=round(min(answer, 0.95), 3),
        caution_from=round(min(caution, 0.6), 3),
    )


def _scope_threshold(inside: scoring.Floats, scale: float, bias: float) -> float:
    """Turns away 3 % of natural questions, fewer where they are likelier inside than not."""
    chance_in = scoring.sigmoid(inside / scale + bias)
    return round(float(np.clip(np.quantile(chance_in, 0.03), 0.02, 0.5)), 4)


def _figures(
    found: dict[str, Labelled], natural: Labelled, outside: Labelled, fitted: Calibration
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, (scores, wanted) in found.items():
        if name == "out":
            continue
        rows = [at for at, label in enumerate(wanted) if label != labels.OUT_OF_SCOPE]
        best = [labels.INTENTS[at] for at in scores.intents[rows].argmax(1)]
        figures[f"intent_accuracy_{name}"] = scoring.accuracy(best, [wanted[at] for at in rows])
    scores, names = natural
    held = slice(1, None, 2)
    chances = scoring.softmax(scores.intents[held] / fitted.temperature)
    right = [
        labels.INTENTS[at] == name for at, name in zip(chances.argmax(1), names[held], strict=True)
    ]
    figures["natural_ece"] = scoring.ece(chances.max(1), right)
    figures["natural_coverage_at_5pct_error"] = scoring.coverage_at_error(chances.max(1), right)
    figures["scope_auroc"] = scoring.auroc(scores.scope, outside[0].scope)
    inside = scoring.sigmoid(scores.scope / fitted.scope_temperature + fitted.scope_bias)
    beyond = scoring.sigmoid(outside[0].scope / fitted.scope_temperature + fitted.scope_bias)
    figures["natural_kept"] = float((inside >= fitted.scope_threshold).mean())
    figures["out_of_scope_found"] = float((beyond < fitted.scope_threshold).mean())
    return {name: round(value, 4) for name, value in figures.items()}


def write_card_source(
    folder: Path, name: str, version: str, fitted: Calibration, figures: dict[str, Any]
) -> None:
    """``inhouse.json``: what the builder copies into the manifest of the model."""
    encoder = Encoder.load(folder / "tokenizer.json")
    content = {
        "name": name,
        "version": version,
        "chat": {"format": "inhouse", "end": labels.END},
        "intents": {i: encoder.id(labels.intent_token(i)) for i in labels.INTENTS},
        "smalltalk": list(labels.SMALL_TALK),
        "scope": {"in": encoder.id(labels.IN_SCOPE), "out": encoder.id(labels.OUT_SCOPE)},
        "placeholders": {p: encoder.id(labels.placeholder_token(p)) for p in labels.PLACEHOLDERS},
        "calibration": asdict(fitted),
        "quality": {"development": figures},
    }
    (folder / "inhouse.json").write_text(json.dumps(content, indent=2) + "\n")
