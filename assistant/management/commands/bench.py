"""``manage.py bench``: how fast the engine answers on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

_COLUMNS = (
    ("concurrency", "chats"),
    ("ttft_ms_p50", "TTFT p50"),
    ("ttft_ms_p99", "p99 ms"),
    ("itl_ms_p50", "gap p50"),
    ("itl_ms_p99", "p99 ms"),
    ("output_tokens_per_s", "tok/s"),
    ("cpu_s_per_1k_tokens", "CPU s/1k"),
    ("peak_rss_mb", "RSS MB"),
)


def whole_numbers(text: str) -> list[int]:
    """``1,8,32`` as a list. Raises: ArgumentTypeError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > 512:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,8,32 (each 1 to 512)")
    return found


class Command(BaseCommand):
    help = "Measure the engine with 1, 8 and 32 chats at once: first token, gaps, tokens a second."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py bench\n"
            "  manage.py bench --concurrency 1,32 --new-tokens 128 --json\n"
            "  manage.py build_model --random 15m /tmp/15m && manage.py bench --model /tmp/15m"
        )
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        parser.add_argument("--model", type=Path, help="model folder (default: the one in use)")
        parser.add_argument(
            "--concurrency", type=whole_numbers, default=[1, 8, 32], metavar="1,8,32"
        )
        parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
        parser.add_argument("--new-tokens", type=int, default=64, metavar="N")
        parser.add_argument("--rounds", type=int, default=4, metavar="N", help="answers per chat")
        parser.add_argument("--threads", type=int, default=0, metavar="N", help="0: all cores")

    def handle(self, *args: Any, **options: Any) -> None:
        from django.conf import settings

        from assistant import benchmark
        from assistant.engine import EngineError
        from assistant.engine.manifest import ManifestError

        model = settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]["model_dir"]
        folder = options["model"] or Path(model)
        try:
            rows = self._measure(folder, options)
        except (ManifestError, EngineError, ValueError) as error:
            raise CommandError(str(error)) from error
        if options["json"]:
            found = {"machine": benchmark.machine(), "model": str(folder), "engine": rows}
            self.stdout.write(json.dumps(found, indent=2))
        else:
            self.stdout.write("".join(title.rjust(11) for _, title in _COLUMNS))
            for row in rows:
                self.stdout.write("".join(str(row[key]).rjust(11) for key, _ in _COLUMNS))
            self.stdout.write(f"\n{benchmark.machine()}")

    def _measure(self, folder: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
        from assistant import benchmark

        loads = [
            benchmark.Workload(
                concurrency, options["prompt_tokens"], options["new_tokens"], options["rounds"]
            )
            for concurrency in options["concurrency"]
        ]
        largest = max(loads, key=lambda load: load.concurrency)
        engine = benchmark.open_engine(folder, largest, options["threads"])
        rows = []
        try:
            for workload in loads:
                if not options["json"]:
                    sys.stderr.write(f"measuring {workload.concurrency} chat(s) ...\n")
                rows.append(asdict(benchmark.measure(engine, workload)))
        finally:
            engine.close()
        return rows
