"""``manage.py build_model``: a checkpoint, from here or the Hub, becomes a model folder.

Thin: arguments in, ``assistant.modelkit`` does the work, its errors come out as one line.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

_EXAMPLES = """
SOURCE is a checkpoint folder (config.json, tokenizer.json and safetensors, whole or in shards, in
fp32, fp16 or bf16) of a Llama, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5 or Qwen3, or the name of
such a model on the Hugging Face Hub. OUT gets model.onnx, tokenizer.json, model.json and the chat
template; a model already there is replaced only once the new one is complete.

examples:
  manage.py build_model runs/support-en assistant/bundled/support-en
  manage.py build_model runs/support-en /srv/models/support-fp32 --quant fp32
  manage.py build_model ~/checkpoints/Qwen2.5-0.5B-Instruct var/models/qwen --quant int4
  manage.py build_model HuggingFaceTB/SmolLM2-135M-Instruct var/models/smollm2
  manage.py build_model Qwen/Qwen3-0.6B var/models/qwen3 --revision main --max-download-gb 2
  manage.py build_model ~/checkpoints/gpt2 var/models/gpt2 --via optimum
  manage.py build_model --random 15m var/models/random-15m
  manage.py build_model --random smollm2-135m var/models/random-135m --quant int4 --seed 7

profile:
  throughput   many chats at once: static8, or row8 where static8 loses quality; the default
  latency      one chat at a time, or little memory: int4, or row8 where int4 loses quality

quant, where you know better:
  static8   8-bit weights, constant activation scales measured on sample questions
  row8      8-bit weights, one activation scale per token
  int4      4-bit weights in blocks of 32, 8-bit activations
  fp32      the reference

from the Hub:
  Only safetensors, JSON, tokenizer.json and the chat template are fetched: no pickle, no code. They
  stay in the Hub's cache (HF_HOME). Models behind a licence need HF_TOKEN.

via optimum:
  Exports any other architecture with optimum-onnx (extra: train) in fp32. Slower: its graph has
  twenty times as many nodes and every row is padded.
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
        parser.add_argument(
            "--profile", choices=("throughput", "latency"), default="throughput",
            help="what the model is for (default: throughput)",
        )  # fmt: skip
        parser.add_argument("--quant", help="static8, row8, int4 or fp32, whatever the profile")
        parser.add_argument("--random", metavar="NAME", help="a known shape: tiny, 9m, 15m, ...")
        parser.add_argument("--seed", type=int, default=0, help="of --random (default 0)")
        parser.add_argument(
            "--via", choices=("graph", "optimum"), default="graph", help="default: graph"
        )
        parser.add_argument("--revision", help="branch, tag or commit on the Hub (default main)")
        parser.add_argument(
            "--max-download-gb", type=float, metavar="GB", help="most to fetch (default 8)"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant.engine.manifest import ManifestError

        try:
            self._build(*self._paths(options), options)
        except ModuleNotFoundError as error:
            extra = "train" if options["via"] == "optimum" else "build"
            raise CommandError(
                f'{error.name} is not installed. Install the extra: pip install -e ".[{extra}]"'
            ) from error
        except (ValueError, RuntimeError, OSError, ManifestError) as error:
            # every error of modelkit is one of these and says what to do; ours need no traceback
            if options["traceback"]:
                raise
            raise CommandError(str(error)) from error

    def _paths(self, options: dict[str, Any]) -> tuple[str, Path]:
        """SOURCE, "" for random weights, and OUT."""
        paths = options["paths"]
        if options["random"] and len(paths) == 1:
            return "", Path(paths[0])
        if not options["random"] and len(paths) == 2:
            return str(paths[0]), Path(paths[1])
        wanted = "--random NAME takes one path, OUT" if options["random"] else "name SOURCE and OUT"
        raise CommandError(f"{len(paths)} paths were given: {wanted}. See --help for examples.")

    def _build(self, named: str, out: Path, options: dict[str, Any]) -> None:
        from assistant.modelkit.build import PROFILES, build, build_for, build_random

        quant = options["quant"]
        if options["via"] == "optimum":
            self._export(named, out, options)
        elif not named:  # random weights have no quality to lose: the profile's first choice
            quant = quant or PROFILES[options["profile"]][0]
            build_random(options["random"], out, quant, self._say, seed=options["seed"])
        elif quant:
            build(self._source(named, options), out, quant, self._say)
        else:
            build_for(options["profile"], self._source(named, options), out, self._say)

    def _export(self, named: str, out: Path, options: dict[str, Any]) -> None:
        if not named or options["quant"] not in (None, "fp32"):
            raise CommandError(
                "--via optimum exports a checkpoint in fp32: leave --random and --quant out."
            )
        from assistant.modelkit.generic import export

        export(self._source(named, options), out, self._say)

    def _source(self, named: str, options: dict[str, Any]) -> Path:
        """The checkpoint folder, fetched from the Hub where ``named`` is a name there."""
        from assistant.modelkit import hub

        if not hub.is_hub_id(named):
            for option in ("revision", "max_download_gb"):
                if options[option] is not None:
                    raise CommandError(
                        f"--{option.replace('_', '-')} is for a model on the Hub, and {named} "
                        "names a folder here."
                    )
            return Path(named)
        self._say(f"{named} is no folder here: looking for it on the Hub")
        # Settings keep servers off the Hub; who names a model there asks for it.
        os.environ["HF_HUB_OFFLINE"] = "0"
        return hub.download(
            named,
            self._say,
            revision=options["revision"] or "main",
            most_gb=hub.MOST_GB if (most := options["max_download_gb"]) is None else most,
            any_family=options["via"] == "optimum",
        )

    def _say(self, line: str) -> None:
        self.stdout.write(line)
        self.stdout.flush()
