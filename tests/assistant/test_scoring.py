"""The figures everything is judged by, against values worked out by hand."""

import math

import numpy as np
import pytest

from assistant.modelkit import scoring


def test_auroc_counts_pairs_and_halves_ties() -> None:
    assert scoring.auroc([3, 4], [1, 2]) == 1.0
    assert scoring.auroc([1, 3], [2, 3]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert math.isnan(scoring.auroc([], [1]))


def test_ece_is_the_weighted_gap_between_sure_and_right() -> None:
    assert scoring.ece([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 0]) == pytest.approx(0.25)
    assert scoring.ece([0.9, 0.9, 0.1, 0.1], [1, 1, 0, 0]) == pytest.approx(0.1)
    assert math.isnan(scoring.ece([], []))


def test_coverage_keeps_the_most_confident_rows_within_the_error() -> None:
    sure = [0.9, 0.8, 0.7, 0.6]
    assert scoring.coverage_at_error(sure, [1, 1, 0, 1], error=0.25) == 1.0
    assert scoring.coverage_at_error(sure, [1, 1, 0, 1], error=0.05) == 0.5
    assert scoring.coverage_at_error(sure, [0, 0, 0, 0]) == 0.0


def test_reliability_bins_hold_their_rows_and_leave_empty_ones_out() -> None:
    low, high = scoring.reliability([0.1, 0.95, 1.0], [0, 1, 0], bins=10)
    assert (low.low, low.high, low.rows, low.right) == (0.1, 0.2, 1, 0.0)
    assert (high.rows, high.right) == (2, 0.5)
    assert high.confidence == pytest.approx(0.975)
    assert scoring.reliability([], []) == []


def test_the_coverage_curve_adds_rows_from_the_surest_on() -> None:
    kept, wrong = scoring.coverage_curve([0.6, 0.9, 0.7, 0.8], [1, 1, 0, 1])
    assert kept.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert wrong.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 4])


def pair(kind: str, cosine: float, *, same: bool = False, agree: bool = True) -> scoring.Pair:
    return scoring.Pair(kind, same, cosine, agree)


def test_near_matches_hit_only_above_what_must_never_match() -> None:
    found = scoring.near_matches(
        [
            pair("surface_variant", 0.99, same=True),
            pair("surface_variant", 0.90, same=True),
            pair("other_value:order_id", 0.95),
            pair("near_equal_intent", 0.97),
            pair("random_other_intent", 0.10),
        ]
    )
    assert list(found.pairs) == [
        "surface_variant", "near_equal_intent", "other_value:order_id", "random_other_intent"
    ]  # fmt: skip
    assert found.median_cosine["surface_variant"] == pytest.approx(0.945)
    assert (found.raw.threshold, found.raw.hit_rate, found.raw.pairs) == (0.95, 0.5, 2)
    assert found.raw.hits["near_equal_intent"] == 1.0, "debatable: it bounds no threshold"
    assert found.raw.auroc == {
        "surface_variant": None,
        "near_equal_intent": 0.5,
        "other_value:order_id": 0.5,
        "random_other_intent": 1.0,
    }


def test_near_matches_that_do_not_agree_are_none() -> None:
    found = scoring.near_matches(
        [
            pair("surface_variant", 0.98, same=True),
            pair("surface_variant", 0.98, same=True, agree=False),
            pair("other_value:order_id", 1.0, agree=False),
            pair("opposite_request", 0.5),
        ]
    )
    assert (found.raw.threshold, found.raw.hit_rate) == (1.0, 0.0)
    assert (found.agreed.threshold, found.agreed.hit_rate) == (0.5, 0.5)
    assert found.agree == {
        "surface_variant": 0.5, "opposite_request": 1.0, "other_value:order_id": 0.0
    }  # fmt: skip
    assert found.agreed.auroc["other_value:order_id"] == 0.75, "one true pair above, one level"


def test_near_matches_without_anything_to_fear_hit_whatever_agrees() -> None:
    found = scoring.near_matches([pair("surface_variant", -0.2, same=True)])
    assert (found.raw.hit_rate, found.agreed.hit_rate) == (1.0, 1.0)
    assert scoring.near_matches([]).raw.hit_rate is None


def test_an_answer_may_only_show_values_it_was_given() -> None:
    known = frozenset({"Order Number", "Support Phone"})
    fine = scoring.placeholders_ok
    assert fine(
        "1. Open order {{Order Number}}.\n2. Call {{Support Phone}}.", {"Order Number": "x"}, known
    )
    assert not fine("Open order {{Order Number}}.", {}, known)
    assert not fine("See {{Nothing}}.", {}, known)
    assert not fine("Your order 48213377 is late.", {}, known)
    assert fine("Your order 48213377 is late.", {"Order Number": "48213377"}, known)
    assert not fine("Call {{Support", {}, known)


def test_an_answer_ends_well_or_not() -> None:
    assert scoring.well_ended("Open My Orders.", finished=True)
    assert not scoring.well_ended("Open My Orders.", finished=False)
    assert not scoring.well_ended("Open My", finished=True)
    assert not scoring.well_ended("go to the page of the shop " * 4 + ".", finished=True)


def test_temperature_is_found_again() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)) * 3
    wanted = np.array([rng.choice(5, p=row) for row in scoring.softmax(logits / 2.0)])
    assert scoring.fit_temperature(logits, wanted) == pytest.approx(2.0, rel=0.1)


def test_scope_is_fitted_so_that_the_middle_parts_the_two_sides() -> None:
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(5, 1, 500), rng.normal(1, 1, 500)
    scale, bias = scoring.fit_scope(inside, outside)
    assert (scoring.sigmoid(inside / scale + bias) > 0.5).mean() > 0.95
    assert (scoring.sigmoid(outside / scale + bias) < 0.5).mean() > 0.95


def test_a_threshold_keeps_the_error() -> None:
    sure = np.array([0.9, 0.8, 0.7, 0.6])
    assert scoring.threshold_for_error(sure, np.array([1.0, 1, 0, 1]), 0.05) == 0.8
    assert scoring.threshold_for_error(sure, np.zeros(4), 0.05) == 1.0
