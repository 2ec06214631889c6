"""Tests of the thresholds from a budget: the paper's families and the nested path."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import samples

from deer_vla_ros.budget.families import FAMILIES, target_shares, thresholds_for_shares, thresholds_within
from deer_vla_ros.budget.path import ALWAYS, NEVER, ThresholdPath, exit_shares, exits_taken
from deer_vla_ros.errors import UserError

COSTS = np.arange(2.0, 14.0, 2.0)
DELTAS, DEVIATIONS = samples()
PATH = ThresholdPath.ordered(DELTAS, DEVIATIONS, COSTS)

budgets = st.floats(COSTS[0], COSTS[-1])
delta_rows = st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6)


def mean_cost(deltas: np.ndarray, thresholds) -> float:
    return float(COSTS[exits_taken(deltas, thresholds)].mean())


# The paper's families; parity checks them against the reference


@given(
    family=st.sampled_from(list(FAMILIES)),
    ratio=st.floats(0.2, 5.0),
    count=st.integers(2, 12),
    skip=st.booleans(),
)
def test_target_shares_are_shares(family, ratio, count, skip):
    shares = target_shares(family, ratio, count, skip)
    assert shares.sum() == pytest.approx(1.0) and (shares >= 0).all()
    assert not skip or shares[0] == 0


@given(family=st.sampled_from(list(FAMILIES)), low=st.floats(0.2, 5.0), more=st.floats(0.0, 5.0))
def test_a_larger_ratio_aims_deeper(family, low, more):
    assert target_shares(family, low + more, 6) @ COSTS >= target_shares(family, low, 6) @ COSTS - 1e-9


def test_exits_get_the_shares_they_are_to_have():
    shares = np.array([0.3, 0.1, 0.25, 0.05, 0.2, 0.1])
    assert exit_shares(DELTAS, thresholds_for_shares(DELTAS, shares)) == pytest.approx(shares, abs=2e-3)


def test_too_few_samples_for_a_share_are_never_taken():
    assert thresholds_for_shares(DELTAS[:10], np.array([0.05, 0.95, 0, 0, 0, 0]))[0] == NEVER


@given(family=st.sampled_from(list(FAMILIES)), budget=st.floats(COSTS[0] + 0.1, COSTS[-1]))
def test_a_solved_ratio_keeps_the_budget_and_nearly_uses_it(family, budget):
    thresholds = thresholds_within(family, DELTAS, COSTS, budget)
    assert thresholds[-1] == ALWAYS
    cost = mean_cost(DELTAS, thresholds)
    assert cost <= budget + 1e-9
    assert cost == pytest.approx(
        budget, abs=0.3
    )  # an exit never takes a share of less than one sample, so the cost changes in small steps


def test_an_unknown_family_is_refused():
    with pytest.raises(UserError, match="use one of exp, gauss, gamma"):
        target_shares("normal", 1.0, 6)


# The path


@given(budget=budgets)
def test_the_expected_cost_keeps_the_budget_and_uses_it(budget):
    position = PATH.position_within(COSTS, budget)
    cost = float(PATH.shares(position) @ COSTS)
    assert cost <= budget + 1e-9
    assert cost == pytest.approx(budget, abs=1e-6)
    assert mean_cost(DELTAS, PATH.thresholds(position)) == pytest.approx(budget, abs=0.1), (
        "linear between two corners"
    )


@given(low=budgets, high=budgets)
def test_expected_cost_is_monotone_in_the_budget(low, high):
    low, high = sorted((low, high))
    cheap, dear = (PATH.position_within(COSTS, budget) for budget in (low, high))
    assert cheap >= dear
    assert PATH.shares(cheap) @ COSTS <= PATH.shares(dear) @ COSTS + 1e-9


@given(low=budgets, high=budgets, row=delta_rows)
def test_a_looser_budget_never_exits_earlier_on_the_same_deltas(low, high, row):
    low, high = sorted((low, high))
    exits = [
        exits_taken(np.array([row], np.float32), PATH.thresholds(PATH.position_within(COSTS, budget)))[0]
        for budget in (low, high)
    ]
    assert exits[0] <= exits[1]


@given(first=st.floats(0.0, PATH.end), second=st.floats(0.0, PATH.end))
def test_thresholds_only_rise_along_the_path(first, second):
    low, high = sorted((first, second))
    assert all(a <= b for a, b in zip(PATH.thresholds(low), PATH.thresholds(high), strict=True))


def test_the_path_leads_from_full_depth_to_the_first_exit():
    assert PATH.thresholds(0.0) == (*(NEVER,) * 5, ALWAYS)
    assert PATH.thresholds(PATH.end)[0] == ALWAYS
    assert PATH.shares(PATH.end)[0] == 1.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("budget", [3.0, 5.0, 7.0, 9.0, 11.0])
def test_on_held_out_samples_the_path_deviates_as_little_as_the_best_family_or_less(seed, budget):
    train, held_out = samples(8000, seed=seed), samples(8000, seed=100 + seed)

    def deviation(thresholds) -> float:
        return float(held_out[1][np.arange(8000), exits_taken(held_out[0], thresholds)].mean())

    path = ThresholdPath.ordered(*train, COSTS)
    ours = deviation(path.thresholds(path.position_within(COSTS, budget)))
    assert ours <= 1.02 * min(
        deviation(thresholds_within(family, train[0], COSTS, budget)) for family in FAMILIES
    )


@pytest.mark.parametrize("deltas", [np.zeros((50, 6), np.float32), np.ones((3, 6), np.float32), DELTAS[:1]])
@pytest.mark.parametrize("budget", [2.0, 5.0, 12.0])
def test_ties_and_few_samples_never_pass_the_budget(deltas, budget):
    path = ThresholdPath.ordered(deltas, np.zeros_like(deltas), COSTS)
    assert mean_cost(deltas, path.thresholds(path.position_within(COSTS, budget))) <= budget


def test_one_exit_has_a_path_of_one_point():
    path = ThresholdPath.ordered(DELTAS[:, :1], DEVIATIONS[:, :1], COSTS[:1])
    assert path.thresholds(path.position_within(COSTS[:1], 1.0)) == (ALWAYS,)


def test_a_hundred_thousand_samples_are_solved_within_fifty_milliseconds():
    deltas, deviations = samples(100_000)
    taken = []
    for _ in range(5):  # The best of five, by processor time, because the machine is shared.
        began = time.process_time()
        path = ThresholdPath.ordered(deltas, deviations, COSTS)
        path.thresholds(path.position_within(COSTS, 5.0))
        taken.append(time.process_time() - began)
    assert min(taken) < 0.05, taken


@given(
    shares=st.lists(st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6), min_size=2, max_size=20),
    low=budgets,
    high=budgets,
)
def test_whatever_shares_were_measured_expected_cost_falls_along_the_path(shares, low, high):
    measured = np.array(shares) / np.sum(shares, axis=1, keepdims=True)
    levels = np.linspace(0, 1, len(shares))[:, None].repeat(5, axis=1)
    path = ThresholdPath(np.sort(DELTAS[:, :-1].T, axis=1), levels, measured)
    costs = path.corner_shares @ COSTS
    assert (np.diff(costs) <= 1e-9).all()
    assert path.corner_shares.sum(1) == pytest.approx(1.0) and (path.corner_shares >= -1e-12).all()
    low, high = sorted((low, high))
    assert path.position_within(COSTS, low) >= path.position_within(COSTS, high)
