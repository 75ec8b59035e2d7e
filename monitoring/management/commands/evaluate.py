"""``manage.py evaluate``: asks the model every row of a dataset and prints how well it did."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant.progress import CountUp


class Command(BaseCommand):
    help = "Judge the model on a dataset (default: the golden set) and print the figures."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py evaluate\n"
            "  manage.py evaluate --dataset questions.jsonl.gz --predictions answers.jsonl\n"
            "  manage.py evaluate --plot calibration.png  how far confidence can be trusted\n"
            "  manage.py evaluate --fail-under 0.9        exit 1 if intent accuracy is lower\n"
            "  manage.py evaluate --save                  keep the figures, for the admin\n\n"
            'a row: {"query": "..."} or {"turns": [{"role", "text"}]}, plus any of intent, scope\n'
            "(in/out), answer, attack, id, kind"
        )
        parser.add_argument(
            "--dataset", type=Path, help="JSON Lines, .gz allowed (default: the golden set)"
        )
        parser.add_argument("--model", type=Path, help="model folder (default: the one in use)")
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        parser.add_argument("--predictions", type=Path, metavar="OUT", help="one line a row")
        parser.add_argument("--plot", type=Path, metavar="PNG", help="diagrams (needs matplotlib)")
        parser.add_argument("--save", action="store_true", help="keep the figures, for the admin")
        parser.add_argument("--fail-under", type=_share, metavar="F", help="0..1, intent accuracy")

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant.errors import AssistantError
        from assistant.modelkit import diagrams
        from monitoring import evaluation
        from monitoring.jobs import JobError

        try:
            if options["plot"]:
                diagrams.check(options["plot"])
            for path in (options["predictions"], options["plot"]):
                _refuse_unwritable(path)
            rows = _rows(options)
            if options["plot"] and not any(row.intent for row in rows):
                raise CommandError("--plot needs rows with an intent, and there is none.")
            began = time.monotonic()
            manifest, answers = self._answers(rows, options)
            if options["save"]:
                _save(rows, answers, time.monotonic() - began, options)
            report = evaluation.report(_name(manifest, options), rows, answers)
            if options["predictions"]:
                _write_predictions(options["predictions"], answers)
            if options["plot"]:
                _plot(options["plot"], report["model"], manifest, rows, answers)
        except (evaluation.DatasetError, AssistantError, diagrams.DiagramError, JobError) as error:
            raise CommandError(str(error)) from error
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _tables(report))
        self._judge(report, options["fail_under"])

    def _answers(self, rows: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        from assistant.backends.onnx import OnnxBackend
        from assistant.backends.onnx import Options as OnnxOptions
        from monitoring import evaluation

        backend = OnnxBackend("evaluate", OnnxOptions(str(_folder(options)), max_queue=256))
        try:
            backend.check()
            done = CountUp(len(rows), "rows", quiet=options["json"])
            answers = asyncio.run(evaluation.ask_all(backend, rows, done=done))
            return backend.engine.manifest, answers
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


def _rows(options: dict[str, Any]) -> Any:
    """The dataset's; else the golden set's, with the cases of staff where they are to be compared.

    Raises: DatasetError, LoopError.
    """
    from monitoring import evaluation, loop

    if options["dataset"]:
        return evaluation.read_dataset(options["dataset"])
    return loop.golden_suite().rows if options["save"] else evaluation.read_golden()


def _save(rows: Any, answers: Any, seconds: float, options: dict[str, Any]) -> None:
    """Raises: LoopError."""
    from assistant.models import ModelVersion
    from monitoring import loop

    model = loop.at(_folder(options))
    version = ModelVersion.objects.filter(sha256=model.sha256).first()
    name = options["dataset"].name.split(".")[0] if options["dataset"] else loop.GOLDEN
    suite = loop.suite(name, rows)
    loop.store(suite, replace(model, version=version), answers, seconds, "command")


def _refuse_unwritable(path: Path | None) -> None:
    """Before the model works for minutes, not after. Raises: CommandError."""
    if path is None:
        return
    try:
        path.open("a").close()
    except OSError as error:
        raise CommandError(f"Cannot write {path}: {error.strerror}.") from error


def _folder(options: dict[str, Any]) -> Path:
    from assistant import registry

    return Path(options["model"] or registry.folder_in_use())


def _name(manifest: Any, options: dict[str, Any]) -> str:
    return f"{manifest.name}@{manifest.version}" if manifest else str(_folder(options))


def _write_predictions(path: Path, answers: Any) -> None:
    from monitoring import evaluation

    with path.open("w", encoding="utf-8", errors="replace") as file:
        file.writelines(f"{line}\n" for line in evaluation.prediction_lines(answers))


def _plot(path: Path, name: str, manifest: Any, rows: Any, answers: Any) -> None:
    """Raises: DiagramError."""
    from assistant.modelkit import diagrams
    from monitoring import evaluation

    labelled = [row for row in evaluation.judged(rows, answers) if row.wanted]
    fitted = manifest.calibration if manifest else None
    diagrams.calibration(
        [row.confidence for row in labelled],
        [row.right for row in labelled],
        path,
        title=name,
        bands=diagrams.Bands(fitted.answer_from, fitted.caution_from) if fitted else None,
    )


_SCORES = (
    ("rows", "rows"),
    ("intent_accuracy", "intent"),
    ("scope_auroc", "scope AUROC"),
    ("ece", "ECE"),
    ("coverage", "cover@5%"),
    ("placeholder_ok", "placeholders"),
    ("well_ended", "ended"),
    ("answer_similarity", "similarity"),
)
_FATES = (
    ("rows", "rows"),
    ("answered", "answered"),
    ("with_caution", "with caution"),
    ("handed_on", "handed on"),
    ("turned_away", "turned away"),
    ("out_of_scope_found", "found"),
)


def _tables(report: dict[str, Any]) -> str:
    """How good, what becomes of a question, and a line on conversations."""
    lines = [f"model {report['model']}", "", *_table(report, _SCORES), ""]
    lines += ["What becomes of a question (turned away: of those in scope; found: of the others)"]
    lines += [*(f"  {line}" for line in _table(report, _FATES)), ""]
    talks = report["several_turns"]
    if talks["rows"]:
        lines.append(f"several turns: right topic {talks['right_topic']:.1%} of {talks['rows']}")
    lines.append(f"{len(report['failures'])} rows went wrong (first 50 kept; --json lists them)")
    return "\n".join(lines)


def _table(report: dict[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    lines = ["kind".ljust(15) + "".join(title.rjust(13) for _, title in columns)]
    for kind, found in [*report["by"].items(), ("all", report)]:
        lines.append(kind[:14].ljust(15) + "".join(_cell(found[key]) for key, _ in columns))
    return lines


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-".rjust(13)
    return (f"{value:,}" if isinstance(value, int) else f"{value:.3f}").rjust(13)
