"""How often the canary's test takes back what is no worse, and how soon it finds what is.

``python -m tests.monitoring.canary_power [--runs 2000] [--false 0.05]``, half an hour.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from operator import length_hint
from statistics import median
from typing import Any

from monitoring import betting
from monitoring.betting import Talk

EQUAL: Mapping[str, Mapping[str, Any]] = {
    "equal, a share of 10 %": {},
    "equal, a share of 50 %": {"share": 0.5},
    "equal, hours that are bad for both": {"rush": True, "share": 0.3},
    "equal, 0.2 % errors": {"errors": (0.002, 0.002)},
}
WORSE: Mapping[str, Mapping[str, Any]] = {
    "errors 2 -> 4 %": {"errors": (0.02, 0.04)},
    "errors 2 -> 6 %": {"errors": (0.02, 0.06)},
    "errors 2 -> 8 %": {"errors": (0.02, 0.08)},
    "errors 2 -> 12 %": {"errors": (0.02, 0.12)},
    "errors 2 -> 50 %": {"errors": (0.02, 0.5)},
    "degraded 10 -> 30 %": {"degraded": (0.1, 0.3)},
    "thumbs down 3 -> 15 %": {"thumbs": (0.03, 0.15)},
    "1.5 times as slow": {"slower": 1.5},
}


def talks(
    seed: int, n: int, *, share: float = 0.1, errors: tuple[float, float] = (0.02, 0.02),
    degraded: tuple[float, float] = (0.1, 0.1), thumbs: tuple[float, float] = (0.03, 0.03),
    slower: float = 1.0, rush: bool = False,
) -> list[Talk]:  # fmt: skip
    """Conversations of (active, canary) with these rates; ``rush``: bad hours, for both alike."""
    rng, found = random.Random(seed), []
    for at in range(n):
        mine = rng.random() < share
        worse = 4.0 if rush and at // 250 % 2 else 1.0
        took = worse * (slower if mine else 1.0) * math.exp(rng.gauss(0, 0.5))
        found.append(
            Talk(
                mine,
                errors=rng.random() < errors[mine] * worse,
                degraded=rng.random() < degraded[mine] * worse,
                thumbs_down=rng.random() < thumbs[mine],
                first_word=[20 * took],
                duration=[80 * took * math.exp(rng.gauss(0, 0.3))],
            )
        )
    return found


def found_after(seed: int, turns: int, case: Mapping[str, Any]) -> float:
    """Turns until the alarm; infinite if there is none."""
    said = talks(seed, turns, **case)
    verdict = betting.judge(said)
    return _turn(said, verdict.blocks) if verdict.worse else math.inf


def _turn(said: list[Talk], blocks: int) -> int:
    """The turn with which so many blocks were there."""
    left = iter(said)
    for _ in islice(betting.blocks(left), blocks):
        pass
    return len(said) - length_hint(left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--turns", type=int, default=5_000, help="of canaries that are no worse")
    parser.add_argument("--worse", type=int, default=3_000, help="turns of those that are")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--false", type=float, default=betting.FALSE, help="another chance")
    options = parser.parse_args()
    betting.FALSE = options.false  # the processes of the pool are made after this
    with ProcessPoolExecutor() as pool:
        for cases, turns in ((EQUAL, options.turns), (WORSE, options.worse)):
            for name, case in ((n, c) for n, c in cases.items() if options.only in n):
                one = partial(found_after, turns=turns, case=case)
                found = list(pool.map(one, range(options.runs), chunksize=10))
                _tell(name, found)


def _tell(name: str, found: list[float]) -> None:
    shares = (sum(at <= most for at in found) / len(found) for most in (500, 1_000, 1_500, 1e9))
    told = "  ".join(f"{share:7.1%}" for share in shares)
    print(f"{name:36}{told}  median {median(found):.0f}", flush=True)


if __name__ == "__main__":
    main()
