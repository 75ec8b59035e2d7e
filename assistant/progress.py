"""How far a command has come, for whoever waits in front of it."""

from __future__ import annotations

import sys
import time


class CountUp:
    """Says "3,000 of 11,975 pairs" on stderr: on a terminal in one line that counts up, elsewhere
    in a new line every ten seconds."""

    def __init__(self, total: int, things: str, *, quiet: bool) -> None:
        self._total, self._things, self._quiet = total, things, quiet
        self._said = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, count: int) -> None:
        now = time.monotonic()
        if self._quiet or (now - self._said < (0.1 if self._terminal else 10)):
            return
        self._said = now
        end = "\r" if self._terminal else "\n"
        sys.stderr.write(f"{count:,} of {self._total:,} {self._things}{end}")
