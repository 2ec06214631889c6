"""Does a budget become a rule that keeps it, and is one that cannot be kept refused?"""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.keeper import Budget, BudgetKeeper
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.model.config import openflamingo_3b, openflamingo_9b, tabletop

CONFIGS = (tabletop(), openflamingo_3b(), openflamingo_9b())

configs = st.sampled_from(CONFIGS)
token_counts = st.integers(3, 32)


def new_keeper(config=CONFIGS[0], tokens: int = 10) -> BudgetKeeper:
    keeper = BudgetKeeper(config, "l2", tuple(range(1, len(config.exits) + 1)), bytes_per_weight=4)
    keeper.set_tokens(tokens)
    return keeper


def step_under(keeper: BudgetKeeper, exit_index: int) -> PolicyStep:
    """A step that took the given exit of the rule in force."""
    rule = keeper.rule
    return PolicyStep(
        action=Action(np.zeros(6, np.float32), 0.5),
        exits=rule.exits,
        exit_index=exit_index,
        stop=StopReason.AGREED,
        deltas=(math.nan,) * len(rule.exits),
        thresholds=rule.thresholds,
        head_probes=exit_index + 2,
        tokens=keeper.status().tokens,
        times=StageTimes(0.0, 0.0, 0.0, 0.0),
    )


@given(config=configs, tokens=token_counts, share=st.floats(0, 1.5))
def test_no_exit_of_the_rule_passes_the_peak_and_no_cheaper_one_is_left_out(config, tokens, share):
    keeper, table = new_keeper(config, tokens), cost_table(config, tokens)
    low, high = keeper.status().feasible_min_gmac, keeper.status().feasible_max_gmac
    peak = low + share * (high - low)
    keeper.check(Budget(peak))
    keeper.set(Budget(peak))
    allowed = tuple(exit_layer for exit_layer in config.exits if table.language(exit_layer + 1) <= peak)
    assert keeper.rule.exits == allowed
    assert keeper.rule.thresholds == tuple(range(1, len(allowed) + 1)), "each exit keeps its own threshold"
    assert all(keeper.book(step_under(keeper, i)).language_gmac <= peak for i in range(len(allowed)))


@given(config=configs, tokens=token_counts, share=st.floats(0.01, 0.99999))
def test_a_peak_below_the_first_exit_is_refused_with_the_feasible_range_and_nothing_changes(config, tokens, share):
    keeper = new_keeper(config, tokens)
    before, rule = keeper.status(), keeper.rule
    with pytest.raises(UserError) as refusal:
        keeper.check(Budget(share * before.feasible_min_gmac))
    message = str(refusal.value)
    low, high = (float(number) for number in re.search(r"ask for (\S+) to (\S+),", message).groups())
    assert low == pytest.approx(before.feasible_min_gmac, rel=2e-3)
    assert high == pytest.approx(before.feasible_max_gmac, rel=2e-3)
    assert f"at {tokens} tokens" in message and "\n" not in message
    assert keeper.rule is rule
    assert repr(keeper.status()) == repr(before)


@given(config=configs, tokens=token_counts)
def test_the_smallest_budget_that_a_refusal_names_is_accepted(config, tokens):
    keeper = new_keeper(config, tokens)
    with pytest.raises(UserError) as refusal:
        keeper.check(Budget(1e-6))
    named = float(re.search(r"ask for (\S+) to", str(refusal.value))[1])
    keeper.check(Budget(named))
    keeper.set(Budget(named))
    assert keeper.rule.exits == config.exits[:1]


@pytest.mark.parametrize("peak", [-1.0, math.nan, math.inf, -math.inf])
def test_a_peak_that_is_no_amount_is_refused(peak):
    with pytest.raises(UserError, match="budget.peak_gmac is"):
        new_keeper().check(Budget(peak))


def test_no_peak_and_one_above_full_depth_allow_every_exit():
    keeper = new_keeper()
    for peak in (0.0, keeper.status().feasible_max_gmac, 1e6):
        keeper.check(Budget(peak))
        keeper.set(Budget(peak))
        assert keeper.rule.exits == tabletop().exits


def test_a_new_rule_gets_a_new_id_and_an_account_of_its_own():
    keeper = new_keeper()
    keeper.book(step_under(keeper, 0))
    first = keeper.budget_id
    keeper.set(Budget(keeper.status().feasible_min_gmac))
    second = keeper.budget_id
    assert second != first
    assert keeper.status().achieved_steps == 0 and math.isnan(keeper.status().achieved_mean_gmac)
    keeper.set(Budget())
    assert keeper.budget_id not in (first, second)
    assert keeper.status().budget_id == keeper.budget_id


def test_another_instruction_length_makes_the_rule_anew_and_the_same_length_does_not():
    keeper = new_keeper(tokens=10)
    peak = cost_table(tabletop(), 10).language(6)
    keeper.set(Budget(peak))
    first = keeper.budget_id
    assert keeper.rule.exits == (1, 3, 5)
    keeper.set_tokens(10)
    assert keeper.budget_id == first
    keeper.set_tokens(20)
    assert keeper.budget_id != first
    assert keeper.rule.exits[-1] < 5, "longer instructions cost more, so the same peak buys less depth"
    assert keeper.status().requested_peak_gmac == peak


def test_a_peak_that_a_longer_instruction_makes_impossible_leaves_the_first_exit_and_shows():
    keeper = new_keeper(tokens=3)
    keeper.set(Budget(keeper.status().feasible_min_gmac))
    keeper.set_tokens(32)
    status = keeper.status()
    assert keeper.rule.exits == tabletop().exits[:1]
    assert status.feasible_min_gmac > status.requested_peak_gmac


def test_the_achieved_mean_is_that_of_the_steps_booked():
    keeper, table = new_keeper(tokens=10), cost_table(tabletop(), 10)
    assert math.isnan(keeper.status().achieved_mean_gmac)
    for exit_index in (0, 0, 5, 2):
        keeper.book(step_under(keeper, exit_index))
    expected = sum(table.language(layers) for layers in (2, 2, 12, 6)) / 4
    assert keeper.status().achieved_mean_gmac == pytest.approx(expected)
    assert keeper.status().achieved_steps == 4


def test_a_booked_step_says_what_it_cost():
    keeper, table = new_keeper(tokens=10), cost_table(tabletop(), 10)
    cost = keeper.book(step_under(keeper, 1))
    assert cost.language_gmac == pytest.approx(table.language(4))
    assert cost.language_gmac_full == pytest.approx(table.language(12))
    assert cost.total_gmac == pytest.approx(table.vision + table.language(4) + 3 * table.head)


def test_memory_is_that_of_all_layers_of_the_language_model():
    # The paper: 12 layers of the 3B in float32 take 6 GB with their visual side and embedding; the layers alone 3.9 GiB.
    assert new_keeper(openflamingo_3b()).status().resident_gib == pytest.approx(12 * (50.3 + 36.7) * 1e6 * 4 / 2**30, rel=0.01)
    assert new_keeper(openflamingo_3b()).status().resident_layers == 12
