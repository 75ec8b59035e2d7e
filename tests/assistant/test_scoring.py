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
