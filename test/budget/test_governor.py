"""Tests of the governor in artificial worlds, including hostile ones: does it keep the mean?"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deer_vla_ros.budget.governor import AUTHORITY, MEMORY, Governor

LOW, HIGH = 2.0, 12.0


def run(target: float, world, steps: int = 1000, governed: bool = True) -> np.ndarray:
    """The costs of the steps. world(step, asked): the cost of a step if thresholds are solved for `asked`."""
    governor, costs = Governor(target, LOW, HIGH), []
    for step in range(steps):
        cost = min(
            max(world(step, governor.effective(governor.overspent) if governed else target), LOW), HIGH
        )
        governor.note(cost)
        costs.append(cost)
    return np.array(costs)


def window_means(costs: np.ndarray, settling: int = 200, width: int = 200) -> np.ndarray:
    return np.convolve(costs[settling:], np.ones(width) / width, mode="valid")


# Worlds in which full depth costs enough to reach the budget.
WORLDS = [
    (t, s)
    for t in (3.0, 5.0, 8.0, 10.5)
    for s in (0.4, 0.7, 1.0, 1.5, 2.5)
    if LOW + (HIGH - LOW) * s >= t + 2.5
]


@pytest.mark.parametrize(("target", "slope"), WORLDS)
def test_a_world_that_costs_more_or_less_than_calibrated_is_brought_onto_the_budget(target, slope):
    random = np.random.default_rng(0)

    def world(step: int, asked: float) -> float:
        mean = LOW + (asked - LOW) * slope
        return mean + random.choice([-2.0, 0.0, 2.0])

    assert np.abs(window_means(run(target, world)) / target - 1).max() < 0.05


@settings(max_examples=200)
@given(target=st.floats(LOW, HIGH), costs=st.lists(st.floats(LOW, HIGH), max_size=400))
def test_what_is_asked_for_stays_between_the_first_exit_and_full_depth_and_the_sum_is_bounded(target, costs):
    governor = Governor(target, LOW, HIGH)
    for cost in costs:
        governor.note(cost)
        assert LOW - 1e-9 <= governor.effective(governor.overspent) <= HIGH + 1e-9
        assert -MEMORY <= governor.overspent <= governor.most


@settings(max_examples=100)
@given(target=st.floats(3.0, 11.0), pattern=st.lists(st.booleans(), min_size=1, max_size=50))
def test_a_hostile_world_is_forgotten_within_a_bounded_number_of_steps(target, pattern):
    governor = Governor(target, LOW, HIGH)
    for is_dear in pattern * 20:
        governor.note(HIGH if is_dear else LOW)
    for _ in range(600):  # from here on the world is as calibrated
        governor.note(governor.effective(governor.overspent))
    assert governor.effective(governor.overspent) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("target", [2.2, 2.5, 3.0])
def test_a_tight_budget_is_kept_where_the_world_takes_full_depth_whenever_it_may(target):
    """One step of full depth costs several budgets here; all of them are remembered until they are repaid."""
    costs = run(target, lambda step, asked: HIGH if asked > LOW else LOW, steps=5000)
    assert costs.mean() <= 1.01 * target
    assert window_means(costs).max() <= 1.04 * target + HIGH / 200


@settings(max_examples=100)
@given(target=st.floats(2.5, 11.0), deltas=st.lists(st.floats(0.0, 1.0), min_size=400, max_size=400))
def test_whatever_the_deltas_do_no_window_overspends_by_more_than_the_governor_remembers(target, deltas):
    """A step goes to full depth if its delta exceeds the threshold for `asked`, else to the first exit."""
    costs = run(
        target,
        lambda step, asked: HIGH if deltas[step] > 1 - (asked - LOW) / (HIGH - LOW) else LOW,
        steps=400,
    )
    overspent = np.convolve(costs / target - 1, np.ones(200), mode="valid")
    assert overspent.max() <= AUTHORITY + MEMORY + HIGH / target


def test_overspending_lowers_what_is_asked_for_and_saving_raises_it():
    governor = Governor(6.0, LOW, HIGH)
    governor.note(9.0)
    assert governor.effective(governor.overspent) == pytest.approx(6.0 - 0.5 / AUTHORITY * (6.0 - LOW))
    governor.note(3.0)
    assert governor.effective(governor.overspent) == pytest.approx(6.0)
    governor.note(3.0)
    assert governor.effective(governor.overspent) == pytest.approx(6.0 + 0.5 / AUTHORITY * (HIGH - 6.0))
