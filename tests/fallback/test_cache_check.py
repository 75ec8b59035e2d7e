"""``manage.py cache_check``: what it counts, and what it says of a file that is no pairs file."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

PAIRS = [
    ("How do I cancel my order?", "help me cancel a purchase", 1, "same"),
    ("How do I cancel my order?", "how do i cancel my ORDER", 1, "same"),
    ("How do I cancel my order?", "where is my parcel", 1, "same"),
    ("cancel order 12345", "cancel order 12346", 0, "other_value"),
    ("see my invoice", "check the bill", 0, "noise"),
]


@pytest.fixture(autouse=True)
def by_words(settings: Any) -> None:
    settings.ASSISTANT = {**settings.ASSISTANT, "ROUTE": ["reviewed", "rules", "human"]}


def written(path: Path, *rows: object) -> Path:
    opened = gzip.open(path, "wt") if path.suffix == ".gz" else path.open("w")
    with opened as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return path


def checked(path: Path, *options: str) -> str:
    out = io.StringIO()
    call_command("cache_check", "--pairs", str(path), *options, stdout=out)
    return out.getvalue()


def rows() -> list[dict[str, Any]]:
    return [dict(zip(("a", "b", "label", "kind"), pair, strict=True)) for pair in PAIRS]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz"])
def test_hits_wrong_hits_and_the_rate_are_counted_by_kind(tmp_path, name):
    assert json.loads(checked(written(tmp_path / name, *rows()), "--json")) == {
        "hits_by_kind": {"noise": 1, "other_value": 0, "same": 2},
        "wrong_hits_by_kind": {"noise": 1, "other_value": 0},
        "hit_rate": 0.6667,
        "rows_by_kind": {"noise": 1, "other_value": 1, "same": 3},
    }


def test_people_get_a_table(tmp_path):
    table = checked(written(tmp_path / "pairs.jsonl", *rows()))
    assert "hit rate: 66.7% of pairs that want one" in table
    assert "wrong hits: 1" in table


def test_a_file_without_true_pairs_has_no_rate(tmp_path):
    path = written(tmp_path / "pairs.jsonl", rows()[3])
    assert json.loads(checked(path, "--json"))["hit_rate"] is None
    assert "no pair wants one answer" in checked(path)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"a": "x", "b": "y", "kind": "k"}, "line 2 is no pair"),
        ({"a": "x", "b": 5, "label": 1, "kind": "k"}, "line 2 is no pair"),
        ({"a": "x", "b": "y", "label": "1", "kind": "k"}, "line 2 is no pair"),
        ([1, 2], "line 2 is not a JSON object such as"),
        (None, "line 2 is not a JSON object such as"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, said):
    with pytest.raises(CommandError, match=said):
        checked(written(tmp_path / "pairs.jsonl", rows()[0], row))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(CommandError, match="is not a file"):
        checked(tmp_path / "missing.jsonl")
    with pytest.raises(CommandError, match="is not a file"):
        checked(tmp_path)
    (tmp_path / "half.jsonl").write_text('{"a": ')
    with pytest.raises(CommandError, match="line 1 is not JSON"):
        checked(tmp_path / "half.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(CommandError, match="has no pairs"):
        checked(tmp_path / "empty.jsonl")
    (tmp_path / "plain.jsonl.gz").write_text("not packed")
    with pytest.raises(CommandError, match="cannot be read"):
        checked(tmp_path / "plain.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CommandError, match="line 1 is not JSON"):
        checked(tmp_path / "latin.jsonl")
