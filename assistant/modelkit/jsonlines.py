"""JSON Lines that somebody else wrote, plain or gzipped: bounded, and a fault names its line.

Every reader has an error of its own, so each gives the one to raise. Knows no rows.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

#: What to raise, of its message.
Fault = Callable[[str], Exception]


def objects(
    path: Path, fault: Fault, *, most_lines: int, line_bytes: int, like: str = ""
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line that is not blank; ``like``: what a row looks like.

    Raises: ``fault`` where the file cannot be read or is larger than allowed, or a line is no
    object.
    """
    try:
        with path.open("rb") as raw:
            stream = gzip.open(raw) if path.suffix == ".gz" else raw
            for at, line in enumerate(_lines(stream, path, fault, most_lines, line_bytes), 1):
                if line.strip():
                    yield at, _object(line, f"{path} line {at}", fault, like)
    except (OSError, EOFError, zlib.error) as error:
        raise fault(f"{path} cannot be read: {error}.") from error


def _lines(
    stream: Any, path: Path, fault: Fault, most_lines: int, line_bytes: int
) -> Iterator[bytes]:
    at = 0
    while line := stream.readline(line_bytes + 1):
        at += 1
        if len(line) > line_bytes:
            raise fault(f"{path} line {at} is longer than {line_bytes:,} bytes.")
        if at > most_lines:
            raise fault(f"{path} line {at}: over {most_lines:,} lines. Split the file.")
        yield line


def _object(line: bytes, where: str, fault: Fault, like: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise fault(f"{where} is not JSON: {error}.") from error
    if not isinstance(row, dict):
        raise fault(f"{where} is not a JSON object{f' such as {like}' if like else '.'}")
    return row
