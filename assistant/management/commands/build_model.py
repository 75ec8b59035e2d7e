"""``manage.py build_model``: a checkpoint, or random weights, becomes a model folder.

Thin: arguments in, ``assistant.modelkit.build`` does the work, its errors come out as one line.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

_EXAMPLES = """
SOURCE holds config.json, model.safetensors (fp32, fp16 or bf16) and tokenizer.json, of the Llama
family: Llama, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen3. OUT gets model.onnx, tokenizer.json and
model.json; a model already there is replaced only once the new one is complete.

examples:
  manage.py build_model runs/support-en assistant/bundled/support-en
  manage.py build_model runs/support-en /srv/models/support-fp32 --quant fp32
  manage.py build_model --random 15m var/models/random-15m
  manage.py build_model --random smollm2-135m var/models/random-135m --quant int4 --seed 7

quant:
  row8   8-bit weights, one activation scale per token; the default
  int4   4-bit weights, for a single chat or little memory
  fp32   the reference
"""


class Command(BaseCommand):
    help = "Build an ONNX model folder from a checkpoint, or from seeded random weights."
    requires_system_checks = []  # no server and no database are needed to build a model

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> Any:
        kwargs |= {
            "formatter_class": RawDescriptionHelpFormatter,
            "epilog": _EXAMPLES,
            "usage": "%(prog)s SOURCE OUT [options]\n       %(prog)s --random NAME OUT [options]",
        }
        return super().create_parser(prog_name, subcommand, **kwargs)

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "paths", nargs="+", metavar="PATH", help="SOURCE and OUT; with --random only OUT"
        )
        parser.add_argument("--quant", default="row8", help="row8 (default), int4 or fp32")
        parser.add_argument("--random", metavar="NAME", help="a known shape: tiny, 9m, 15m, ...")
        parser.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
        parser.add_argument(
            "--via", choices=("graph", "optimum"), default="graph", help="default: graph"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        if options["via"] == "optimum":
            raise CommandError(
                "--via optimum belongs to a later version. This one builds the Llama family "
                "itself: leave --via out."
            )
        try:
            self._build(*self._paths(options), options)
        except ModuleNotFoundError as error:
            raise CommandError(
                f'{error.name} is not installed. Install the extra: pip install -e ".[build]"'
            ) from error
        except (ValueError, RuntimeError, OSError) as error:
            # every error of modelkit is one of these and says what to do; ours need no traceback
            if options["traceback"]:
                raise
            raise CommandError(str(error)) from error

    def _paths(self, options: dict[str, Any]) -> tuple[Path | None, Path]:
        paths = [Path(path) for path in options["paths"]]
        if options["random"] and len(paths) == 1:
            return None, paths[0]
        if not options["random"] and len(paths) == 2:
            return paths[0], paths[1]
        wanted = "--random NAME takes one path, OUT" if options["random"] else "name SOURCE and OUT"
        raise CommandError(f"{len(paths)} paths were given: {wanted}. See --help for examples.")

    def _build(self, source: Path | None, out: Path, options: dict[str, Any]) -> None:
        from assistant.modelkit.build import build, build_random

        quant = options["quant"]
        if source is None:
            build_random(options["random"], out, quant, self._say, seed=options["seed"])
        else:
            build(source, out, quant, self._say)

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()
