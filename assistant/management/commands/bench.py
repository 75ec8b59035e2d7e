"""``manage.py bench``: how fast the engine answers on this machine, alone or beside others'."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

_EPILOG = """
workloads (--workloads, default single,chats,ttft; "all" for every one):
{workloads}

peers (--peers, with --random):
  llama.cpp, genai (onnxruntime-genai), optimum and transformers run the same seeded weights, each
  in a process of its own, with its own best settings, in turns with ours. Get them with
  {extra}. Where two of them cannot live in one environment, give
  each the interpreter that has it: --peer-python genai=/srv/genai/bin/python (it needs NumPy too).
  llama.cpp's AMX kernels have crashed on some machines; if the report says so, build it with
  CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_FMA=ON
  -DGGML_F16C=ON -DGGML_AVX2=ON" pip install --no-binary :all: --no-cache llama-cpp-python

examples:
  manage.py bench
  manage.py bench --workloads single,intruder,overload --json
  manage.py bench --concurrency 8,64,128 --new-tokens 128
  manage.py bench --workloads readers --random 15m --plot readers.png
  manage.py bench --workloads growth --growth 20000
  manage.py bench --end-to-end
  manage.py bench --random 15m --peers --json > report.json
  manage.py bench --random smollm2-135m --peers llama.cpp,genai --profile throughput --plot bars.png
"""


def whole_numbers(text: str) -> tuple[int, ...]:
    """``1,8,32`` as numbers. Raises: ArgumentTypeError."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or max(found) > 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,8,32 (each 1 to 4096)")
    return tuple(found)


class Command(BaseCommand):
    help = "Measure the engine: first tokens, gaps, tokens a second, goals; beside other engines."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        from assistant.benchmark import peers, workloads

        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        known = "\n".join(f"  {name:13} {text}" for name, text in workloads.WORKLOADS.items())
        parser.epilog = _EPILOG.format(workloads=known, extra=peers.EXTRA)
        self._add_what(parser)
        self._add_how(parser)
        self._add_output(parser)

    def _add_what(self, parser: CommandParser) -> None:
        parser.add_argument("--model", type=Path, help="model folder (default: the one in use)")
        parser.add_argument("--random", metavar="NAME", help="seeded weights: 15m, smollm2-135m")
        parser.add_argument("--workloads", metavar="NAMES", help="see below")
        parser.add_argument(
            "--end-to-end", action="store_true", help="add the workload stack: the whole product"
        )
        parser.add_argument(
            "--peers", nargs="?", const="all", metavar="NAMES", help="other engines; all of them"
        )
        parser.add_argument(
            "--peer-python", action="append", default=[], metavar="[NAME=]PATH",
            help="interpreter for one peer, or for all",
        )  # fmt: skip
        parser.add_argument(
            "--profile", choices=("latency", "throughput"),
            help="which of our builds the goals count: int4, or the 8-bit ones (default: the best)",
        )  # fmt: skip
        parser.add_argument("--schemes", metavar="NAMES", help="our builds, as row8,int4")
        parser.add_argument("--no-check", action="store_true", help="skip comparing greedy ids")

    def _add_how(self, parser: CommandParser) -> None:
        number: dict[str, Any] = {"type": int, "metavar": "N"}
        parser.add_argument("--concurrency", type=whole_numbers, metavar="1,8,32")
        parser.add_argument("--prompt-tokens", **number)
        parser.add_argument("--new-tokens", **number)
        parser.add_argument("--rounds", **number, help="answers per chat")
        parser.add_argument("--repeats", **number, default=3, help="repetitions (default 3)")
        parser.add_argument("--threads", **number, default=0, help="0: all cores")
        parser.add_argument("--share", type=float, metavar="X", help="poisson's part of capacity")
        parser.add_argument("--readers", type=whole_numbers, metavar="50,100,200")
        parser.add_argument("--idle-s", type=float, metavar="S", help="default 60")
        parser.add_argument("--growth", **number, help="requests of growth (default 2000)")
        parser.add_argument("--timeout-s", type=float, default=900, metavar="S", help="per job")
        parser.add_argument("--quick", action="store_true", help="tiny sizes: only proves it runs")

    def _add_output(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
        parser.add_argument("--plot", type=Path, metavar="PNG", help="bars and curves (matplotlib)")

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant.benchmark.compare import BenchError

        try:
            self._bench(_Options.of(options))
        except (BenchError, ValueError) as error:
            raise CommandError(str(error)) from error

    def _bench(self, options: _Options) -> None:
        from assistant.benchmark import compare, goals, machine, workloads

        busy = machine.busy()
        jobs = workloads.jobs(options.workloads, options.sizes)
        lineup = options.lineup()
        sides = lineup.sides()
        same = lineup.check(*options.checked, options.timeout_s) if options.check else {}
        plan = compare.Plan(jobs, sides, options.repeats, options.threads, options.timeout_s)
        found = compare.run(plan, compare.to_stderr)
        counted = lineup.counted(options.profile)
        verdicts = [] if options.quick else goals.verdicts(found.cells, counted)
        conditions: dict[str, Any] = {
            "machine": machine.describe(),
            "busy_before": busy,
            "versions": machine.versions(),
            "settings": options.settings(),
        }
        if options.json:
            from assistant.benchmark.report import report

            said = report(found, verdicts, conditions=conditions, same_model=same)
            self.stdout.write(json.dumps(said, indent=2))
        else:
            self._print(found, verdicts, conditions, same)
        if options.plot is not None:
            from assistant.benchmark.plot import plot

            plot(found.cells, options.plot, f"{options.title}\n{conditions['machine']}")
        if found.fault:
            raise compare.BenchError(found.fault)

    def _print(self, found: Any, verdicts: Any, conditions: Any, same: Any) -> None:
        from assistant.benchmark import table

        settings = conditions["settings"]
        parts = [
            table.table(found.cells),
            table.facts(found.cells),
            table.settings(found.cells),
            table.statuses(found.statuses),
            [f"{name}: {text}" for name, text in same.items()],
            table.goals(verdicts),
            table.warnings(found.cells),
            [
                f"{conditions['machine']}; load before {conditions['busy_before']:.2f} a core",
                f"{settings['threads']} threads, medians of {settings['repeats']}",
            ],
        ]
        self.stdout.write("\n\n".join("\n".join(lines) for lines in parts if lines))


@dataclass(frozen=True, slots=True)
class _Options:
    """The command line, checked. ``peers`` is empty for ours alone."""

    model: Path
    random: str
    workloads: tuple[str, ...]
    sizes: Any
    peers: tuple[str, ...]
    pythons: dict[str, str]
    schemes: tuple[str, ...]
    profile: str
    repeats: int
    threads: int
    timeout_s: float
    check: bool
    quick: bool
    json: bool
    plot: Path | None

    @classmethod
    def of(cls, given: dict[str, Any]) -> _Options:
        """Raises: ValueError."""
        from django.conf import settings

        from assistant.benchmark import machine, peers, workloads

        model = settings.ASSISTANT["BACKENDS"]["model"]["OPTIONS"]["model_dir"]
        if given["peers"] and not given["random"]:
            raise ValueError(
                "--peers compares the same weights in every engine's own format, so it needs "
                "--random NAME (15m, smollm2-135m) instead of a built model"
            )
        if given["plot"] and not given["plot"].parent.is_dir():
            raise ValueError(f"--plot {given['plot']}: there is no folder {given['plot'].parent}")
        if given["plot"] and find_spec("matplotlib") is None:
            raise ValueError(f"--plot needs matplotlib: {peers.EXTRA}, or pip install matplotlib")
        if min(given["repeats"], given["timeout_s"]) < 1 or given["threads"] < 0:
            raise ValueError("repeats and seconds of patience start at 1, threads at 0")
        names = given["workloads"] or ",".join(workloads.CORE)
        if given["end_to_end"] and names != "all":
            names += ",stack"
        return cls(
            model=given["model"] or Path(model),
            random=given["random"] or "",
            workloads=workloads.chosen(names),
            sizes=_sizes(given),
            peers=peers.chosen(given["peers"]) if given["peers"] else (),
            pythons=_pythons(given["peer_python"]),
            schemes=_schemes(given["schemes"]),
            profile=given["profile"] or "",
            repeats=1 if given["quick"] else given["repeats"],
            threads=given["threads"] or machine.cores(),
            timeout_s=given["timeout_s"],
            check=bool(given["peers"]) and not given["no_check"],
            quick=given["quick"],
            json=given["json"],
            plot=given["plot"],
        )

    @property
    def title(self) -> str:
        name = f"random weights, shape {self.random}" if self.random else self.model.name
        return f"{name}, {self.threads} threads, medians of {self.repeats}"

    @property
    def checked(self) -> tuple[tuple[int, ...], int]:
        """Lengths of the prompts, and tokens, that are compared between engines."""
        return ((3, 9), 8) if self.quick else ((5, 17, 64, 200), 32)

    def lineup(self) -> Any:
        from django.conf import settings

        from assistant.benchmark.lineup import Lineup

        return Lineup(
            model=self.model,
            random=self.random,
            cache=settings.DATA_DIR / "bench",
            schemes=self.schemes,
            peers=self.peers,
            pythons=self.pythons,
            threads=self.threads,
        )

    def settings(self) -> dict[str, Any]:
        """What a report says of them."""
        return {
            "model": self.random or str(self.model),
            "workloads": self.workloads,
            "peers": self.peers,
            "profile": self.profile,
            "repeats": self.repeats,
            "threads": self.threads,
            "quick": self.quick,
            "sizes": asdict(self.sizes),
        }


def _sizes(given: dict[str, Any]) -> Any:
    """Raises: ValueError."""
    from assistant.benchmark.workloads import Sizes

    sizes = Sizes.quick() if given["quick"] else Sizes()
    names = ("prompt_tokens", "new_tokens", "rounds", "share", "readers", "idle_s", "growth")
    changed = {name: given[name] for name in names if given[name] is not None}
    if given["concurrency"]:
        changed["chats"] = given["concurrency"]
    return replace(sizes, **changed)


def _pythons(given: list[str]) -> dict[str, str]:
    """Interpreter by peer; "" for all that have none of their own. Raises: ValueError."""
    from assistant.benchmark.peers import CATALOGUE

    found = {}
    for text in given:
        name, _, path = text.rpartition("=")
        if name and name not in CATALOGUE:
            raise ValueError(f"{name!r} is no peer; known: {', '.join(CATALOGUE)}")
        if not Path(path).is_file():
            raise ValueError(f"{path} is no interpreter; --peer-python takes [NAME=]PATH")
        found[name] = path
    return found


def _schemes(text: str | None) -> tuple[str, ...]:
    """Ours, fp32 left out unless it is asked for. Raises: ValueError."""
    from assistant.modelkit.quantise import SCHEMES

    if not text:
        return tuple(name for name in SCHEMES if name != "fp32")
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SCHEMES]:
        raise ValueError(f"{unknown[0]!r} is no scheme of ours; known: {', '.join(SCHEMES)}")
    return names
