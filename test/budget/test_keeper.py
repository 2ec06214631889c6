"""Tests of the budget keeper: its rules keep the budget, and it refuses a budget that cannot be kept."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import calibration, samples

from deer_vla_ros.budget.cost import cost_table, layers_within
from deer_vla_ros.budget.keeper import REFRESH, BudgetKeeper
from deer_vla_ros.budget.path import ALWAYS, NEVER, exits_taken
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.model.config import openflamingo_3b, openflamingo_9b, tabletop
from deer_vla_ros.model.network import layer_bytes

CONFIGS = (tabletop(), openflamingo_3b(), openflamingo_9b())

configs = st.sampled_from(CONFIGS)
token_counts = st.integers(3, 32)


def new_keeper(config=CONFIGS[0], tokens: int = 10, calibrated=None) -> BudgetKeeper:
    keeper = BudgetKeeper(
        config,
        "l2",
        tuple(range(1, len(config.exits) + 1)),
        layer_bytes(config, torch.float32),
        calibration=calibrated,
    )
    keeper.set_tokens(tokens)
    return keeper


def feasible(keeper: BudgetKeeper, name: str = "peak_gmac") -> tuple[float, float]:
    return keeper.status().feasible[name]


def step_under(
    keeper: BudgetKeeper, exit_index: int, slowness: float = 1.0, tokens: int | None = None
) -> PolicyStep:
    """A step to this exit of the present rule: (5 ms + 2 per layer + 1 per probe) times `slowness`."""
    rule = keeper.rule
    return PolicyStep(
        action=Action(np.zeros(6, np.float32), 0.5),
        exits=rule.exits,
        exit_index=exit_index,
        stop=StopReason.AGREED,
        deltas=(math.nan,) * len(rule.exits),
        thresholds=rule.thresholds,
        head_probes=exit_index + 2,
        tokens=tokens or keeper.status().tokens,
        times=StageTimes(
            1.0 * slowness,
            4.0 * slowness,
            2.0 * slowness * (rule.exits[exit_index] + 1),
            1.0 * slowness * (exit_index + 2),
        ),
    )


@given(config=configs, tokens=token_counts, share=st.floats(0, 1.5))
def test_no_exit_of_the_rule_passes_the_peak_and_no_cheaper_one_is_left_out(config, tokens, share):
    keeper, table = new_keeper(config, tokens), cost_table(config, tokens)
    low, high = feasible(keeper)
    peak = low + share * (high - low)
    keeper.check(Budget(peak_gmac=peak))
    keeper.set(Budget(peak_gmac=peak))
    allowed = tuple(exit_layer for exit_layer in config.exits if table.language(exit_layer + 1) <= peak)
    assert keeper.rule.exits == allowed
    assert keeper.rule.thresholds == tuple(range(1, len(allowed) + 1)), "each exit keeps its own threshold"
    assert all(keeper.book(step_under(keeper, i)).language_gmac <= peak for i in range(len(allowed)))


@given(config=configs, tokens=token_counts, share=st.floats(0.01, 0.99999))
def test_a_peak_below_the_first_exit_is_refused_with_the_feasible_range_and_nothing_changes(
    config, tokens, share
):
    keeper = new_keeper(config, tokens)
    before, rule = keeper.status(), keeper.rule
    with pytest.raises(UserError) as refusal:
        keeper.check(Budget(peak_gmac=share * before.feasible["peak_gmac"][0]))
    message = str(refusal.value)
    low, high = (float(number) for number in re.search(r"ask for (\S+) to (\S+),", message).groups())
    assert low == pytest.approx(before.feasible["peak_gmac"][0], rel=2e-3)
    assert high == pytest.approx(before.feasible["peak_gmac"][1], rel=2e-3)
    assert f"at {tokens} tokens" in message and "\n" not in message
    assert keeper.rule is rule
    assert repr(keeper.status()) == repr(before)


@given(config=configs, tokens=token_counts)
def test_the_smallest_budget_that_a_refusal_names_is_accepted(config, tokens):
    keeper = new_keeper(config, tokens)
    with pytest.raises(UserError) as refusal:
        keeper.check(Budget(peak_gmac=1e-6))
    named = float(re.search(r"ask for (\S+) to", str(refusal.value))[1])
    keeper.check(Budget(peak_gmac=named))
    keeper.set(Budget(peak_gmac=named))
    assert keeper.rule.exits == config.exits[:1]


@pytest.mark.parametrize("peak", [-1.0, math.nan, math.inf, -math.inf])
def test_a_peak_that_is_no_amount_is_refused(peak):
    with pytest.raises(UserError, match="budget.peak_gmac is"):
        new_keeper().check(Budget(peak_gmac=peak))


def test_no_peak_and_one_above_full_depth_allow_every_exit():
    keeper = new_keeper()
    for peak in (0.0, feasible(keeper)[1], 1e6):
        keeper.check(Budget(peak_gmac=peak))
        keeper.set(Budget(peak_gmac=peak))
        assert keeper.rule.exits == tabletop().exits


def test_a_new_request_gets_a_new_id_and_an_account_of_its_own():
    keeper = new_keeper()
    keeper.book(step_under(keeper, 0))
    first = keeper.budget_id
    keeper.set(Budget(peak_gmac=feasible(keeper)[0]))
    second = keeper.budget_id
    assert second != first
    assert keeper.status().achieved.steps == 0 and math.isnan(keeper.status().achieved.gmac)
    keeper.set(Budget())
    assert keeper.budget_id not in (first, second)
    assert keeper.status().budget_id == keeper.budget_id


def test_another_instruction_length_makes_the_rule_anew_and_the_same_length_does_not():
    keeper = new_keeper(tokens=10)
    peak = cost_table(tabletop(), 10).language(6)
    keeper.set(Budget(peak_gmac=peak))
    first = keeper.budget_id
    assert keeper.rule.exits == (1, 3, 5)
    keeper.set_tokens(10)
    assert keeper.budget_id == first
    keeper.set_tokens(20)
    assert keeper.budget_id != first
    assert keeper.rule.exits[-1] < 5, "longer instructions cost more, so the same peak buys less depth"
    assert keeper.status().requested.peak_gmac == peak


def test_a_peak_that_a_longer_instruction_makes_impossible_leaves_the_first_exit_and_shows():
    keeper = new_keeper(tokens=3)
    keeper.set(Budget(peak_gmac=feasible(keeper)[0]))
    keeper.set_tokens(32)
    status = keeper.status()
    assert keeper.rule.exits == tabletop().exits[:1]
    assert status.clamped == ("peak_gmac",)


def test_the_achieved_mean_is_that_of_the_steps_booked():
    keeper, table = new_keeper(tokens=10), cost_table(tabletop(), 10)
    assert math.isnan(keeper.status().achieved.gmac)
    for exit_index in (0, 0, 5, 2):
        keeper.book(step_under(keeper, exit_index))
    expected = sum(table.language(layers) for layers in (2, 2, 12, 6)) / 4
    assert keeper.status().achieved.gmac == pytest.approx(expected)
    assert keeper.status().achieved.steps == 4


def test_a_booked_step_says_what_it_cost():
    keeper, table = new_keeper(tokens=10), cost_table(tabletop(), 10)
    cost = keeper.book(step_under(keeper, 1))
    assert cost.language_gmac == pytest.approx(table.language(4))
    assert cost.language_gmac_full == pytest.approx(table.language(12))
    assert cost.total_gmac == pytest.approx(table.vision + table.language(4) + 3 * table.head)


def test_memory_is_that_of_all_layers_of_the_language_model():
    # The paper: 12 layers of the 3B in float32 take 6 GB with visual side and embedding, 3.9 GiB without.
    assert new_keeper(openflamingo_3b()).status().resident_gib == pytest.approx(
        12 * (50.3 + 36.7) * 1e6 * 4 / 2**30, rel=0.01
    )
    assert new_keeper(openflamingo_3b()).status().resident_layers == 12


# Averages: solved from the calibration


def run(keeper: BudgetKeeper, deltas: np.ndarray, slowness: float = 1.0) -> list:
    """Runs steps over these deltas (N, exits), each with the rule at that time. Returns their costs."""
    costs, tokens = [], keeper.status().tokens
    for row in deltas:
        rule = keeper.rule
        index = int(exits_taken(row[None, : len(rule.exits)], rule.thresholds)[0])
        costs.append(keeper.book(step_under(keeper, index, slowness, tokens)))
    return costs


def timed_keeper(**others) -> BudgetKeeper:
    """A keeper with measured latencies, as after the warm-up."""
    keeper = new_keeper(**others)
    for index in range(len(keeper.rule.exits)):
        keeper.latency.observe(step_under(keeper, index))
    return keeper


AVERAGES = ("average_gmac", "average_fraction", "average_ms")
ALL = (*AVERAGES, "peak_gmac", "memory_gib", "deadline_ms")


@pytest.mark.parametrize(
    "share", [0.05, 0.6, *(pytest.param(share, marks=pytest.mark.long) for share in (0.3, 0.9))]
)
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_is_kept_on_samples_like_the_calibrated_ones(name, share):
    keeper = timed_keeper(calibrated=calibration(4000))
    low, high = feasible(keeper, name)
    budget = Budget(**{name: low + share * (high - low)}, governor=False)
    keeper.check(budget)
    keeper.set(budget)
    assert keeper.status().binding == name
    run(keeper, samples(4000, seed=1)[0])
    done = keeper.status().achieved
    achieved = {"average_gmac": done.gmac, "average_fraction": done.fraction, "average_ms": done.ms}[name]
    # Both sides are 4000 samples. If one step in ten goes deeper than the first exit, chance is 2%.
    assert achieved == pytest.approx(getattr(budget, name), rel=0.05 if share < 0.1 else 0.03)


def test_the_expected_cost_is_told():
    keeper = timed_keeper(calibrated=calibration())
    low, high = feasible(keeper, "average_gmac")
    keeper.set(Budget(average_gmac=(low + high) / 2))
    assert keeper.status().expected_gmac == pytest.approx((low + high) / 2, rel=5e-3)
    assert low < keeper.status().expected_gmac <= (low + high) / 2 * (1 + 1e-12)
    assert feasible(keeper, "average_ms")[0] < keeper.status().expected_ms < feasible(keeper, "average_ms")[1]


def test_the_governor_keeps_the_mean_in_another_world_and_without_it_it_is_off():
    worlds = {}
    for governed in (True, False):
        keeper = new_keeper(calibrated=calibration(4000))
        low, high = feasible(keeper, "average_gmac")
        budget = Budget(average_gmac=low + 0.4 * (high - low), governor=governed)
        keeper.set(budget)
        costs = np.array([cost.language_gmac for cost in run(keeper, samples(1500, seed=2, scale=1.6)[0])])
        windows = np.convolve(costs[200:], np.ones(200) / 200, mode="valid")
        worlds[governed] = np.abs(windows / budget.average_gmac - 1).max()
    assert worlds[True] < 0.05 < worlds[False]


@pytest.mark.parametrize("second", ["average_gmac", "average_ms"])
@pytest.mark.parametrize("looser", [1.0, 1.01, 1.25])
@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_two_averages_do_not_hold_each_other_back(second, looser, scale):
    keeper = timed_keeper(calibrated=calibration(4000))
    fraction = 0.4
    other = feasible(keeper, "average_gmac")[1] * fraction
    if second == "average_ms":
        probes = np.interp(12 * fraction, [2, 12], [2, 7])
        other = 5 + 2 * 12 * fraction + probes
    keeper.set(Budget(average_fraction=fraction, **{second: looser * other}))
    run(keeper, samples(2000, seed=3, scale=scale)[0])
    assert keeper.status().achieved.fraction == pytest.approx(fraction, rel=0.05)
    assert keeper.status().binding


def test_what_is_clamped_spends_no_savings():
    keeper = new_keeper(tokens=4, calibrated=CALIBRATION)
    keeper.set(Budget(average_gmac=2 * feasible(keeper)[0]))
    run(keeper, np.zeros((100, 6), np.float32))  # all of them stop at the first exit, far below the budget
    assert keeper.status().correction > 1.5
    keeper.set_tokens(32)
    assert keeper.status().clamped == ("average_gmac",)
    costs = run(keeper, np.ones((20, 6), np.float32))
    assert {round(cost.fraction, 3) for cost in costs} == {round(2 / 12, 3)}


def test_a_budget_that_has_become_infeasible_refuses_only_itself():
    keeper = new_keeper(tokens=4, calibrated=CALIBRATION)
    low = feasible(keeper)[0]
    keeper.set(Budget(average_gmac=low * 1.001))
    keeper.set_tokens(32)
    asked = Budget(average_gmac=low * 1.001, peak_gmac=1.0)
    keeper.check(asked, ["peak_gmac"])
    with pytest.raises(UserError, match="budget.average_gmac"):
        keeper.check(asked, ["average_gmac", "peak_gmac"])


def test_a_budget_id_names_what_is_asked_for_and_not_the_governors_corrections():
    keeper = new_keeper(calibrated=calibration())
    keeper.set(Budget(average_fraction=0.4))
    first, thresholds = keeper.budget_id, keeper.rule.thresholds
    run(keeper, samples(50, scale=3.0)[0])
    assert keeper.budget_id == first
    assert keeper.rule.thresholds != thresholds and keeper.status().correction < 1.0
    keeper.set(Budget(average_fraction=0.5))
    assert keeper.budget_id != first and keeper.status().correction == 1.0


def test_a_budget_in_ms_that_takes_effect_with_the_first_latencies_gets_a_new_id():
    keeper = new_keeper(calibrated=calibration())
    keeper.set(Budget(average_ms=1e6))  # far above full depth: position 0 of the path
    first, own = keeper.budget_id, keeper.rule.thresholds
    run(keeper, np.ones((REFRESH, 6), np.float32))
    assert keeper.rule.thresholds != own
    assert keeper.budget_id == first + 1


def test_another_instruction_keeps_account_and_correction_and_solves_anew():
    keeper = new_keeper(tokens=10, calibrated=calibration())
    keeper.set(Budget(average_gmac=0.5 * feasible(keeper)[1]))
    run(keeper, samples(50, scale=3.0)[0])
    before = keeper.status()
    keeper.set_tokens(12)
    after = keeper.status()
    assert after.achieved == before.achieved
    assert before.correction < 1.0 and after.correction == pytest.approx(before.correction, abs=0.1)
    assert after.budget_id != before.budget_id
    assert after.expected_gmac == pytest.approx(before.expected_gmac, rel=5e-3), (
        "the same GMAC buy less depth"
    )


@given(
    shares=st.dictionaries(st.sampled_from(ALL), st.floats(0.0, 1.3), min_size=1),
    tokens=token_counts,
    deltas=st.lists(st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6), min_size=1, max_size=30),
)
def test_several_budgets_hold_together_and_no_peak_is_ever_passed(shares, tokens, deltas):
    keeper = timed_keeper(tokens=tokens, calibrated=CALIBRATION)
    asked = {}
    for name, share in shares.items():
        low, high = feasible(keeper, name)
        asked[name] = (low + share * (high - low)) * (1 + 1e-9)
    budget = Budget(**asked)
    keeper.check(budget)
    keeper.set(budget)
    prices = {name: keeper._exit_costs()[name] for name in asked}
    status = keeper.status()
    assert not status.clamped
    for cost in run(keeper, np.array(deltas, np.float32)):
        assert cost.language_gmac <= asked.get("peak_gmac", math.inf)
    for name in set(asked) & {"peak_gmac", "memory_gib", "deadline_ms"}:
        assert prices[name][len(status.rule.exits) - 1] <= asked[name]
    for name in set(asked) & {"average_gmac"}:
        assert status.expected_gmac <= asked[name] * (1 + 1e-9)
    for name in set(asked) & {"average_ms"}:
        assert status.expected_ms <= asked[name] * (1 + 1e-9)


CALIBRATION = calibration()


@pytest.mark.parametrize("name", ALL)
def test_every_budget_below_the_first_exit_is_refused_with_the_feasible_range_and_one_far_above_does_not_bind(
    name,
):
    keeper = timed_keeper(calibrated=CALIBRATION)
    low, high = feasible(keeper, name)
    before = repr(keeper.status())
    for wrong in (0.9 * low, -1.0, math.nan):
        with pytest.raises(UserError, match=rf"budget.{name} is .* ask for \S+ to \S+, or 0"):
            keeper.check(Budget(**{name: wrong}))
    assert repr(keeper.status()) == before
    keeper.check(Budget(**{name: 1000 * high}))
    keeper.set(Budget(**{name: 1000 * high}))
    status = keeper.status()
    assert status.rule.exits == tabletop().exits and status.binding == "" and not status.clamped
    if name in AVERAGES:
        assert set(status.rule.thresholds[:-1]) == {NEVER}, "full depth was asked for"


def test_an_average_without_calibration_and_milliseconds_without_latency_name_the_remedy():
    with pytest.raises(UserError, match="has no calibration: run `python -m deer_vla_ros calibrate`"):
        new_keeper().check(Budget(average_fraction=0.5))
    with pytest.raises(UserError, match="no latency was measured on this device yet: use a budget in GMAC"):
        new_keeper().check(Budget(deadline_ms=50.0))


def test_a_calibration_that_lacks_rows_for_the_depth_is_told_when_an_average_is_asked_for():
    shallow = calibration(exits=(1, 3, 5))
    keeper = new_keeper(calibrated=shallow)
    keeper.check(Budget(peak_gmac=1.0))
    with pytest.raises(
        UserError,
        match=r"rows for the exits at layers \(1, 3, 5\), the network has .*"
        r"run `python -m deer_vla_ros calibrate`",
    ):
        keeper.check(Budget(average_fraction=0.5))


def test_memory_keeps_layers_up_to_the_deepest_exit_that_fits():
    keeper = new_keeper()
    low, high = feasible(keeper, "memory_gib")

    def within(memory_gib: float) -> int:
        return layers_within(tabletop(), layer_bytes(tabletop(), torch.float32), memory_gib)

    assert within(0.0) == within(high) == 12
    assert within(low) == 2
    assert within(low / 2) == 2, "at least the first exit"
    assert within(high * 3.5 / 12) == 2, "no layer is kept that no exit needs"
    keeper.set_resident(6)
    assert keeper.rule.exits == (1, 3, 5)
    assert keeper.status().resident_layers == 6 and keeper.status().resident_gib == pytest.approx(high / 2)


def test_a_deadline_bounds_the_depth_and_slower_steps_bound_it_further():
    keeper = timed_keeper()
    low, high = feasible(keeper, "deadline_ms")
    keeper.set(Budget(deadline_ms=(low + high) / 2))
    before = keeper.rule.exits
    assert 1 < len(before) < 6
    first = keeper.budget_id
    run(keeper, np.ones((8 * REFRESH, 6), np.float32), slowness=1.5)
    assert len(keeper.rule.exits) < len(before)
    assert keeper.budget_id != first


def test_missed_deadlines_are_counted():
    keeper = timed_keeper()
    keeper.set(Budget(deadline_ms=feasible(keeper, "deadline_ms")[0] * 1.01))
    run(keeper, np.ones((10, 6), np.float32))
    assert keeper.status().achieved.deadline_misses == 0
    run(keeper, np.ones((4, 6), np.float32), slowness=3.0)
    assert keeper.status().achieved.deadline_misses == 4
    assert keeper.status().achieved.recent_miss_rate == pytest.approx(4 / 200)


def test_odd_thresholds_are_told():
    few = new_keeper(calibrated=calibration(50))
    few.set(Budget(average_fraction=0.5))
    assert "computed from only 50 samples" in few.status().notes[0]
    tied = dataclasses.replace(CALIBRATION, deltas=np.round(CALIBRATION.deltas * 100) / 100)
    keeper = new_keeper(calibrated=tied)
    keeper.set(Budget(average_fraction=0.5))
    assert any("a small change of the budget" in note for note in keeper.status().notes)


def test_before_the_first_instruction_a_budget_is_feasible_that_could_be():
    keeper = BudgetKeeper(tabletop(), "l2", (0.1,) * 6, layer_bytes(tabletop(), torch.float32), CALIBRATION)
    short = cost_table(tabletop(), 6).language(4)
    keeper.check(Budget(average_gmac=short))
    keeper.set(Budget(average_gmac=short))
    keeper.set_tokens(32)
    assert keeper.status().clamped == ("average_gmac",)
    with pytest.raises(UserError):
        keeper.check(Budget(average_gmac=short))


def test_no_average_means_the_checkpoints_own_thresholds():
    keeper = new_keeper(calibrated=CALIBRATION)
    keeper.set(Budget(average_fraction=0.5))
    keeper.set(Budget())
    assert keeper.rule.thresholds == (1, 2, 3, 4, 5, 6)
    assert ALWAYS not in keeper.rule.thresholds
