"""``manage.py cache_check``: would a reviewed answer be given to the wrong question?"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from assistant.progress import CountUp

#: Longer files are cut into several: a pair is a row in memory.
MOST_PAIRS = 1_000_000
_MOST_LINE_BYTES = 1 << 18
_ROW = '{"a": text, "b": text, "label": 0 or 1, "kind": text}.'


@dataclass(frozen=True, slots=True)
class Pair:
    a: str
    b: str
    same: bool
    kind: str


class Command(BaseCommand):
    help = "Store one question of each pair as reviewed, ask the other, and count the hits."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = (
            "examples:\n"
            "  manage.py cache_check --pairs pairs.jsonl\n"
            "  manage.py cache_check --pairs pairs.jsonl.gz --json\n\n"
            'a row: {"a": "...", "b": "...", "label": 1 or 0, "kind": "..."}; label 1: one answer '
            "serves both"
        )
        parser.add_argument(
            "--pairs", type=Path, required=True, metavar="FILE", help="JSON Lines, .gz allowed"
        )
        parser.add_argument("--json", action="store_true", help="print JSON and nothing else")

    def handle(self, *args: Any, **options: Any) -> None:
        from assistant import backends

        pairs = read_pairs(options["pairs"])
        try:
            hits = asyncio.run(_ask_all(pairs, CountUp(len(pairs), "pairs", quiet=options["json"])))
        finally:
            backends.reset()
        report = figures(pairs, hits)
        self.stdout.write(json.dumps(report, indent=2) if options["json"] else _table(report))


def read_pairs(path: Path) -> list[Pair]:
    """Raises: CommandError naming the file, the line and what is wrong with it."""
    from assistant.modelkit.jsonlines import objects

    if not path.is_file():
        raise CommandError(f"{path} is not a file. Give --pairs a .jsonl or .jsonl.gz file.")
    found = objects(
        path, CommandError, most_lines=MOST_PAIRS, line_bytes=_MOST_LINE_BYTES, like=_ROW
    )
    pairs = [_pair(row, path, at) for at, row in found]
    if not pairs:
        raise CommandError(f"{path} has no pairs. Each line is one JSON object.")
    return pairs


def _pair(row: dict[str, Any], path: Path, number: int) -> Pair:
    """Raises: CommandError."""
    a, b, label, kind = (row.get(name) for name in ("a", "b", "label", "kind"))
    if all(isinstance(text, str) for text in (a, b, kind)) and label in (0, 1):
        return Pair(str(a), str(b), label == 1, str(kind))
    raise CommandError(f"{path} line {number} is no pair. A row is {_ROW}")


async def _ask_all(pairs: Sequence[Pair], done: CountUp) -> list[bool]:
    hits = []
    for pair in pairs:
        hits.append(await hit(pair))
        done(len(hits))
    return hits


async def hit(pair: Pair) -> bool:
    """Whether ``b`` gets the answer that was reviewed for ``a``."""
    from fallback.answers import Known, Reviewed
    from fallback.near import Entry, Shelf
    from fallback.rules import normalise

    reviewed = {normalise(pair.a): Reviewed("yes", "", pair.a)}
    known = Known((), reviewed, Shelf([Entry(pair.a, "yes")]))
    if known.reviewed_for(pair.b) is not None:
        return True
    return (await known.near_for(pair.b)).entry is not None


def figures(pairs: Sequence[Pair], hits: Sequence[bool]) -> dict[str, Any]:
    """Hits by kind; those on pairs that want different answers; the share of true pairs hit."""
    found = [pair for pair, is_hit in zip(pairs, hits, strict=True) if is_hit]
    kinds = sorted({pair.kind for pair in pairs})
    wrong = sorted({pair.kind for pair in pairs if not pair.same})
    all_hits, rows = Counter(pair.kind for pair in found), Counter(pair.kind for pair in pairs)
    wrong_hits = Counter(pair.kind for pair in found if not pair.same)
    true = sum(pair.same for pair in pairs)
    right = sum(pair.same for pair in found)
    return {
        "hits_by_kind": {kind: all_hits[kind] for kind in kinds},
        "wrong_hits_by_kind": {kind: wrong_hits[kind] for kind in wrong},
        "hit_rate": round(right / true, 4) if true else None,
        "rows_by_kind": {kind: rows[kind] for kind in kinds},
    }


def _table(report: dict[str, Any]) -> str:
    lines = [f"{'kind':34}{'pairs':>8}{'hits':>8}{'wrong':>8}"]
    for kind, count in report["rows_by_kind"].items():
        wrong = report["wrong_hits_by_kind"].get(kind, "-")
        lines.append(f"{kind[:33]:34}{count:>8,}{report['hits_by_kind'][kind]:>8,}{wrong:>8}")
    rate = report["hit_rate"]
    share = "no pair wants one answer" if rate is None else f"{rate:.1%} of pairs that want one"
    lines += ["", f"hit rate: {share}", f"wrong hits: {sum(report['wrong_hits_by_kind'].values())}"]
    return "\n".join(lines)
