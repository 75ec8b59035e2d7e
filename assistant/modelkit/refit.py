"""The word table of a built model fitted anew to today's questions; its network stays as it is.

Minutes instead of hours: what new written wordings, follow-ups and conversations teach at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from assistant.engine import drafts
from assistant.engine.manifest import describe_files
from assistant.engine.wide import FILE as WIDE
from assistant.modelkit.calibrate import calibrate, write_card_source
from assistant.modelkit.corpus import Corpus
from assistant.modelkit.finish import ValuedMask, describe, fit_wide, taught
from assistant.modelkit.revision import RevisionError
from assistant.modelkit.tokens import Encoder
from assistant.modelkit.train import Progress
from assistant.modelkit.tune import load_student
from assistant.modelkit.unpack import unpack


def refit(
    built: Path,
    corpus: Corpus,
    mask: ValuedMask,
    out: Path,
    version: str,
    *,
    pairs: Sequence[Path] = (),
    golden: Sequence[Path] = (),
    progress: Progress,
) -> Path:
    """Writes ``out/model``: the model in ``built`` beside a new table, calibrated and judged anew.
    Returns its card's path. ``pairs``, ``golden``: as in ``finish.describe``.

    Raises: RevisionError where ``out`` is not empty; BuildError, CheckpointError, CorpusError,
    ManifestError.
    """
    if out.exists() and any(out.iterdir()):
        raise RevisionError(f"{out} is not empty. Name another --out, or delete the folder.")
    manifest = unpack(built, out)
    network, encoder = load_student(out, "cpu").eval(), Encoder.load(out / "tokenizer.json")
    table = fit_wide(network, corpus, encoder, mask, progress)
    fitted, figures = calibrate(network, encoder, mask, corpus.dev, table)
    write_card_source(out, manifest.name, version, fitted, figures)
    shutil.copytree(built, out / "model")
    for folder in (out, out / "model"):
        table.save(folder)
        drafts.save(folder, taught(corpus, encoder))
    files = {**manifest.files, **describe_files(out / "model", (WIDE, drafts.FILE))}
    quality = {**manifest.quality, "development": figures}
    replace(manifest, version=version, calibration=fitted, quality=quality, files=files).write(
        out / "model"
    )
    return describe(corpus, mask, out, pairs=pairs, golden=golden, progress=progress)
