"""A candidate in shadow beside live users; how much it costs them is reported, not asserted."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from tests.load.shadow import measure

pytestmark = pytest.mark.load


def test_a_candidate_in_shadow_keeps_up_and_harms_no_answer() -> None:
    report = measure(rounds=1, seconds=10, users=2, share=1.0, think_s=0.5)
    print(asdict(report))
    assert report.turns_without > 10 and report.turns_with > 10
    assert report.pairs > 0
    assert report.answer_ms_p95_with < 3 * report.answer_ms_p95_without
