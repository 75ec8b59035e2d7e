"""``manage.py evaluate``: asks the model every row of a dataset and prints how well it did."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    help = "Judge the model on a dataset (default: the golden set) and print the figures."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py evaluate\n"
            "  manage.py evaluate --dataset questions.jsonl.gz --predictions answers.jsonl\n"
            "  manage.py evaluate --fail-under 0.9        exit 1 if intent accuracy is lower\n\n"
            'a row: {"query": "..."} or {"turns": [{"role", "text"}]}, plus any of intent, scope\n'
            "(in/out), answer, attack, id, kind"
        )
        parser.add_argument("--dataset", type=Path, help="JSON Lines, .gz allowed")
        parser.add_argument("--model", type=Path, help="model folder (default: the one in use)")
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        parser.add_argument("--predictions", type=Path, metavar="OUT", help="one line a row")
        parser.add_argument("--fail-under", type=_share, metavar="F", help="0..1, intent accuracy")

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant.errors import AssistantError
        from monitoring import evaluation

        _refuse_unwritable(options["predictions"])
        try:
            rows = evaluation.read_dataset(options["dataset"] or evaluation.GOLDEN)
            name, answers = self._answers(rows, options)
        except (evaluation.DatasetError, AssistantError) as error:
            raise CommandError(str(error)) from error
        report = evaluation.report(name, rows, answers)
        if options["predictions"]:
            with options["predictions"].open("w", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{line}\n" for line in evaluation.prediction_lines(answers))
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _table(report))
        self._judge(report, options["fail_under"])

    def _answers(self, rows: Any, options: dict[str, Any]) -> tuple[str, Any]:
        from assistant.backends.onnx import OnnxBackend
        from assistant.backends.onnx import Options as OnnxOptions
        from monitoring import evaluation

        folder = options["model"] or Path(_configured_model())
        backend = OnnxBackend("evaluate", OnnxOptions(str(folder), max_queue=256))
        try:
            backend.check()
            done = _Progress(len(rows), quiet=options["json"])
            answers = asyncio.run(evaluation.ask_all(backend, rows, done=done))
            manifest = backend.engine.manifest
            return (f"{manifest.name}@{manifest.version}" if manifest else str(folder)), answers
        finally:
            backend.close()

    def _judge(self, report: dict[str, Any], floor: float | None) -> None:
        accuracy = report["intent_accuracy"]
        if floor is not None and accuracy is None:
            raise CommandError("--fail-under needs rows with an intent, and there is none.")
        if floor is not None and accuracy < floor:
            raise CommandError(f"Intent accuracy {accuracy} is under {floor}.")


def _share(text: str) -> float:
    """Raises: ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value


def _refuse_unwritable(path: Path | None) -> None:
    """Before the model works for minutes, not after. Raises: CommandError."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise CommandError(f"Cannot write {path}: {error.strerror}.") from error


def _configured_model() -> str:
    from django.conf import settings

    return str(settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]["model_dir"])


class _Progress:
    """A line that counts up, on a terminal; a line every ten seconds elsewhere."""

    def __init__(self, total: int, *, quiet: bool) -> None:
        self._total, self._quiet, self._said = total, quiet, time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if self._quiet or (now - self._said < (0.1 if self._terminal else 10)):
            return
        self._said = now
        sys.stderr.write(f"{count:,} of {self._total:,} rows" + ("\r" if self._terminal else "\n"))


_COLUMNS = (
    ("rows", "rows"),
    ("intent_accuracy", "intent"),
    ("scope_auroc", "scope AUROC"),
    ("ece", "ECE"),
    ("coverage", "cover@5%"),
    ("placeholder_ok", "placeholders"),
    ("well_ended", "ended"),
    ("answer_similarity", "similarity"),
)


def _table(report: dict[str, Any]) -> str:
    lines = [f"model {report['model']}", ""]
    lines.append("kind".ljust(14) + "".join(title.rjust(14) for _, title in _COLUMNS))
    for kind, found in [*report["by"].items(), ("all", report)]:
        lines.append(kind[:13].ljust(14) + "".join(_cell(found[key]) for key, _ in _COLUMNS))
    lines += ["", f"{len(report['failures'])} rows went wrong (first 50 kept; --json lists them)"]
    return "\n".join(lines)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-".rjust(14)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.3f}").rjust(14)
