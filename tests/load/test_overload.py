"""Seconds of overload, and nothing about times: ``python -m tests.load.overload`` tells those."""

from __future__ import annotations

import pytest

from tests.load.overload import measure, parser

pytestmark = pytest.mark.load


async def test_under_overload_every_question_ends_typed_and_nothing_crashes() -> None:
    options = parser().parse_args(["--json", "--seconds", "5", "--peak-s", "3", "--factor", "10"])
    (report,) = await measure(options)
    print(report)
    assert report.crashes == 0
    assert report.untyped == 0, report.ends
    by_others = [how for how in report.ends if not how.startswith("model")]
    assert by_others and all("/" in how for how in by_others)
    assert report.goodput_per_s > 0 and sum(report.ends.values()) > 3 * report.peak_per_s
