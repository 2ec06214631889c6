"""Tests of the warm-up: which exits it runs, in which order, and where it ends."""

import pytest
from small_model import INFO, SMALL, small_model, small_tokenizer

from deer_vla_ros.budget.budgeted_policy import WARM_UP_RUNS, BudgetedPolicy
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import Cancelled
from deer_vla_ros.model.checkpoint import Checkpoint

IMAGE = (20, 24)


@pytest.fixture
def policy() -> BudgetedPolicy:
    return BudgetedPolicy(Checkpoint(INFO, small_model(), small_tokenizer()))


def test_with_enough_time_every_exit_runs_as_often_as_every_other(policy):
    told = []
    done = policy.warm_up(IMAGE, on_progress=lambda steps, total: told.append((steps, total)))
    total = WARM_UP_RUNS * len(SMALL.exits)
    assert done.steps == total and done.skipped == () and done.deepest_ms > 0
    assert told == [(steps, total) for steps in range(total + 1)]


def test_without_time_the_deepest_exit_runs_once_and_times_every_exit(policy):
    done = policy.warm_up(IMAGE, seconds=0.0)
    assert done.steps == 1 and done.skipped == SMALL.exits[:-1]
    policy.check(Budget(deadline_ms=1e6))
    low, high = policy.status.feasible["average_ms"]
    assert 0 < low < high == pytest.approx(done.deepest_ms) == pytest.approx(policy.longest_ms)


def test_the_longest_step_is_that_of_the_deepest_exit_that_the_budget_allows(policy):
    policy.warm_up(IMAGE)
    low, high = policy.status.feasible["average_ms"]
    assert policy.longest_ms == pytest.approx(high)
    policy.set(Budget(peak_gmac=policy.status.feasible["peak_gmac"][0]))
    assert policy.longest_ms == pytest.approx(low)


def test_a_warm_up_ends_where_it_is_told_to(policy):
    def end(steps: int, total: int) -> None:
        if steps == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        policy.warm_up(IMAGE, on_progress=end)
