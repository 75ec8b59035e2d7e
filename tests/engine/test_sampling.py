"""Choices from log-probabilities, against slow and plain formulas."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from assistant.engine.sampling import (
    CANDIDATES,
    FirstTokenRule,
    Floats,
    Sampler,
    Sampling,
    judge,
    top_candidates,
)


def rows(count: int, vocab: int, seed: int = 0) -> Floats:
    scores = np.random.default_rng(seed).normal(size=(count, vocab)) * 3
    return (scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))).astype(np.float32)


def draws(sampling: Sampling, row: list[float], count: int = 4000) -> Counter[int]:
    sampler = Sampler(1, len(row))
    sampler.open(0, sampling, [0])
    logprobs = np.log(np.array([row], np.float32) / sum(row))
    return Counter(int(sampler.choose(logprobs.copy(), [0])[0][0]) for _ in range(count))


@pytest.mark.parametrize("vocab", [3, 64, 65, 200, 512, 1000, 6000, 8191, 49152])
def test_the_candidates_are_exactly_the_best_tokens(vocab: int) -> None:
    for seed in range(4):
        scores = rows(5, vocab, seed)
        ids, best = top_candidates(scores, CANDIDATES)
        np.testing.assert_array_equal(best, -np.sort(-scores, axis=1)[:, :CANDIDATES])
        np.testing.assert_array_equal(np.take_along_axis(scores, ids, axis=1), best)
        assert all(len(set(row)) == len(row) for row in ids.tolist())


def test_the_candidates_are_exact_when_every_token_ties() -> None:
    ids, best = top_candidates(np.zeros((2, 6000), np.float32), CANDIDATES)
    assert best.shape == (2, CANDIDATES)
    assert not best.any()
    assert len(set(ids[0].tolist())) == CANDIDATES


def test_greedy_takes_the_best_token_and_its_own_logprob() -> None:
    logprobs = rows(6, 500)
    sampler = Sampler(8, 500)
    ids, chosen = sampler.choose(logprobs, [1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(ids, logprobs.argmax(axis=1))
    np.testing.assert_array_equal(chosen, logprobs.max(axis=1))


def test_banned_tokens_are_never_chosen_greedy_or_drawn() -> None:
    banned = tuple(range(0, 90))
    sampler = Sampler(2, 100, banned)
    sampler.open(1, Sampling(temperature=5.0, seed=1), [0])
    for seed in range(200):
        ids, chosen = sampler.choose(rows(2, 100, seed), [0, 1])
        assert not set(ids.tolist()) & set(banned)
        assert np.isfinite(chosen).all()


def test_temperature_one_draws_from_the_model_s_own_distribution() -> None:
    counts = draws(Sampling(temperature=1.0, seed=3), [0.5, 0.3, 0.15, 0.05])
    for token, share in enumerate([0.5, 0.3, 0.15, 0.05]):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)


def test_a_higher_temperature_flattens_as_the_formula_says() -> None:
    counts = draws(Sampling(temperature=2.0, seed=3), [0.8, 0.2])
    share = math.sqrt(0.8) / (math.sqrt(0.8) + math.sqrt(0.2))
    assert counts[0] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0, top_k=2, seed=1), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.6, seed=1), {0, 1}),
        (Sampling(temperature=1.0, top_p=0.5, seed=1), {0}),
        (Sampling(temperature=1.0, top_p=1e-9, seed=1), {0}),
        (Sampling(temperature=1.0, min_p=0.25, seed=1), {0, 1, 2}),
        (Sampling(temperature=1.0, min_p=1.0, seed=1), {0}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6, seed=1), {0, 1}),
        (Sampling(temperature=1e-6, seed=1), {0}),
    ],
)
def test_limits_keep_exactly_the_tokens_they_should(sampling: Sampling, kept: set[int]) -> None:
    assert set(draws(sampling, [0.5, 0.3, 0.15, 0.05], 1500)) == kept


def test_a_repetition_penalty_turns_from_what_was_read_and_written() -> None:
    row = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    sampler = Sampler(1, 4)
    sampler.open(0, Sampling(repetition_penalty=3.0), [0])
    first, chosen = sampler.choose(row.copy(), [0])
    assert first.tolist() == [1]
    assert chosen[0] == pytest.approx(math.log(0.3)), "the logprob shown is the model's own"
    assert sampler.choose(row.copy(), [0])[0].tolist() == [2]


def test_a_slot_forgets_its_last_request() -> None:
    row = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    sampler = Sampler(1, 3)
    sampler.open(0, Sampling(repetition_penalty=9.0), [0, 1])
    sampler.choose(row.copy(), [0])
    sampler.open(0, Sampling(repetition_penalty=9.0), [2])
    assert sampler.choose(row.copy(), [0])[0].tolist() == [0]


def test_a_seed_gives_the_same_draws_whoever_sits_beside() -> None:
    steps = [rows(3, 300, seed) for seed in range(20)]

    def run(together: bool) -> list[int]:
        sampler = Sampler(3, 300)
        for slot in range(3):
            seed = 7 if slot == 1 else None
            sampler.open(slot, Sampling(temperature=1.0, top_p=0.9, seed=seed), [0])
        if together:
            return [int(sampler.choose(step.copy(), [0, 1, 2])[0][1]) for step in steps]
        return [int(sampler.choose(step[1:2].copy(), [1])[0][0]) for step in steps]

    assert run(together=True) == run(together=False) == run(together=True)


def test_without_a_seed_two_requests_differ() -> None:
    row = rows(1, 300)
    row[:] = -math.log(300)
    sampler = Sampler(2, 300)
    for slot in range(2):
        sampler.open(slot, Sampling(temperature=1.0), [0])
    pairs = [sampler.choose(np.repeat(row, 2, axis=0), [0, 1])[0].tolist() for _ in range(20)]
    assert any(a != b for a, b in pairs)


RULE = FirstTokenRule(
    intent_ids=(2, 3, 4),
    out_of_scope_id=5,
    in_id=0,
    out_id=1,
    temperature=2.0,
    scope_temperature=0.5,
    scope_bias=0.25,
    scope_threshold=0.6,
)


def test_the_verdict_is_the_two_formulas() -> None:
    logits = np.array([1.0, 0.9, 0.1, 2.1, 0.3, 9.0, 8.0], np.float32)
    for shift in (0.0, -11.0):  # logits and log-probabilities differ by a constant only
        verdict = judge(logits + np.float32(shift), RULE)
        weights = [math.exp(x / 2) for x in (0.1, 2.1, 0.3)]
        assert verdict.confidence == pytest.approx(weights[1] / sum(weights), rel=1e-5)
        assert verdict.scope == pytest.approx(1 / (1 + math.exp(-(0.1 / 0.5 + 0.25))), rel=1e-5)
        assert (verdict.intent_id, verdict.token_id) == (3, 3)


def test_below_the_threshold_the_out_of_scope_piece_is_fed_and_the_intent_still_told() -> None:
    verdict = judge(np.array([0.0, 1.0, 0.1, 2.1, 0.3, 0.0], np.float32), RULE)
    assert verdict.scope < 0.6
    assert (verdict.intent_id, verdict.token_id) == (3, 5)


def test_the_verdict_stands_extreme_scores() -> None:
    verdict = judge(np.array([0, -3e4, -1e4, -2e4, -3e4, 0], np.float32), RULE)
    assert (verdict.token_id, verdict.confidence, verdict.scope) == (2, 1.0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_one_answer_must_not_have_its_neighbour_may(temperature: float) -> None:
    sampler = Sampler(4, 6)
    row = np.log(np.array([0.9, 0.06, 0.01, 0.01, 0.01, 0.01], np.float32))
    sampler.open(0, Sampling(temperature=temperature, banned=(0,), seed=1), [0])
    sampler.open(1, Sampling(), [0])
    ids = [sampler.choose(np.stack([row, row]), [0, 1])[0].tolist() for _ in range(20)]
    assert all(first != 0 and second == 0 for first, second in ids)
    sampler.move(0, 3)
    assert sampler.choose(row[None].copy(), [3])[0][0] != 0
    sampler.open(3, Sampling(), [0])  # whoever has the slot next is free
    assert sampler.choose(row[None].copy(), [3])[0][0] == 0
