"""Tests of budgets that are set during control: the next step keeps them, or the error names the range."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diagnostic_msgs.msg import DiagnosticArray
from harness import Client, spawn, wait_until
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParametersAtomically
from rig import Rig

from deer_vla_ros.budget.keeper import BudgetKeeper
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.inference.types import Action, PolicyStep, StageTimes, StopReason
from deer_vla_ros.model.config import tabletop
from deer_vla_ros.model.network import layer_bytes
from deer_vla_ros.ros.telemetry import budget_problems

NAMESPACE = "thrifty"
RANGES = {
    "average_gmac": "gmac",
    "average_fraction": None,
    "average_ms": "ms",
    "peak_gmac": "gmac",
    "memory_gib": "gib",
    "deadline_ms": "deadline_ms",
}
"""The budget parameters, and the field of ~/budget with their feasible range."""


@pytest.fixture(scope="module")
def client():
    with Client("budget_test") as client:
        yield client


@pytest.fixture(scope="module")
def rig(client):
    rig = Rig(client, f"{NAMESPACE}/")
    with spawn("node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}") as process, rig.running():
        client.await_active(process, f"{NAMESPACE}/deer_vla")
        rig.instruct("lift the red block")
        rig.await_steps(5)
        yield rig


@pytest.fixture(autouse=True)
def nothing_asked_for(client, rig):
    yield
    assert ask(client, **dict.fromkeys(RANGES, 0.0)).successful
    wait_until(lambda: rig.budgets[-1].resident_layers == 12, what="all layers")
    rig.await_steps(2)


def ask(client: Client, **budgets: float):
    """Sets all given budgets in one request, as `ros2 param set` does with one."""
    parameters = [
        Parameter(
            name=f"budget.{name}",
            value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value),
        )
        for name, value in budgets.items()
    ]
    request = SetParametersAtomically.Request(parameters=parameters)
    return client.call(
        SetParametersAtomically, f"{NAMESPACE}/deer_vla/set_parameters_atomically", request
    ).result


def feasible(rig: Rig, name: str) -> tuple[float, float]:
    status = rig.budgets[-1]
    if RANGES[name] is None:
        return status.feasible_min_gmac / status.feasible_max_gmac, 1.0
    return getattr(status, f"feasible_min_{RANGES[name]}"), getattr(status, f"feasible_max_{RANGES[name]}")


@pytest.mark.parametrize("name", RANGES)
def test_a_budget_set_live_is_obeyed_told_and_loses_no_step(client, rig, name):
    low, high = feasible(rig, name)
    before = rig.steps[-1]
    asked = low + 0.3 * (high - low)
    assert ask(client, **{name: asked}).successful
    accepted = len(rig.steps)
    status = wait_until(
        lambda: (found := [b for b in rig.budgets if getattr(b, f"requested_{name}") == asked]) and found[0],
        what="the status",
    )
    steps = rig.await_steps(10)
    steps = rig.steps[accepted + 1 :]  # One step may have been in progress when the service answered.
    assert {step.episode for step in steps} == {before.episode}, "the temporal state is kept"
    numbers = [step.step for step in rig.steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "no step is lost"
    assert steps[0].budget_id == status.budget_id != before.budget_id
    if name.startswith("average"):
        assert status.binding == name
        assert status.feasible_min_gmac < status.expected_gmac < status.feasible_max_gmac
        assert math.isclose(status.correction, 1.0, abs_tol=1e-6)
    else:
        assert status.deepest_exit_layer < 11
        assert all(step.layers_run <= status.deepest_exit_layer + 1 for step in steps)
    if name == "memory_gib":
        assert wait_until(lambda: rig.budgets[-1].resident_layers < 12, what="fewer layers")
        assert rig.budgets[-1].resident_gib <= asked
    if name == "peak_gmac":
        assert all(step.language_gmac <= asked for step in steps)


@pytest.mark.parametrize("name", RANGES)
def test_a_budget_below_the_first_exit_is_refused_with_the_feasible_range_and_nothing_changes(
    client, rig, name
):
    before = rig.steps[-1].budget_id
    for wrong in (0.5 * feasible(rig, name)[0], math.nan):
        result = ask(client, **{name: wrong})
        assert not result.successful
        assert (
            f"budget.{name} is" in result.reason
            and "ask for" in result.reason
            and "or 0 for no limit" in result.reason
        )
    assert {step.budget_id for step in rig.await_steps(3)} == {before}


def test_several_are_set_together_or_not_at_all(client, rig):
    before = rig.steps[-1].budget_id
    gmac, memory = feasible(rig, "peak_gmac"), feasible(rig, "memory_gib")
    assert not ask(client, peak_gmac=gmac[1], memory_gib=memory[0] / 2).successful
    assert {step.budget_id for step in rig.await_steps(3)} == {before}
    assert ask(client, peak_gmac=gmac[1] / 2, memory_gib=memory[1], average_fraction=0.3).successful
    status = wait_until(
        lambda: rig.budgets[-1].requested_average_fraction == 0.3 and rig.budgets[-1], what="the status"
    )
    assert (status.requested_peak_gmac, status.requested_memory_gib) == (gmac[1] / 2, memory[1])
    assert status.deepest_exit_layer == 5 and status.binding == "average_fraction"


def test_one_far_above_full_depth_is_accepted_and_does_not_bind(client, rig):
    assert ask(client, average_gmac=1000.0, peak_gmac=1000.0).successful
    status = wait_until(
        lambda: rig.budgets[-1].requested_average_gmac == 1000.0 and rig.budgets[-1], what="the status"
    )
    assert status.binding == "" and status.deepest_exit_layer == 11
    assert {step.layers_run for step in rig.await_steps(5)[1:]} == {12}


def test_a_longer_instruction_clamps_a_budget_that_it_makes_infeasible_and_that_is_told(client, rig):
    low, _ = feasible(rig, "average_gmac")
    assert ask(client, average_gmac=low * 1.001).successful
    rig.instruct("please be so kind as to lift the small red block that lies upon the table there")
    status = wait_until(
        lambda: list(rig.budgets[-1].clamped) == ["average_gmac"] and rig.budgets[-1], what="the clamp"
    )
    assert status.feasible_min_gmac > low * 1.001
    wait_until(lambda: rig.steps[-1].tokens == status.tokens, what="a step under it")
    guard = Parameter(
        name="guard.leash_m", value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=0.1)
    )
    service = f"{NAMESPACE}/deer_vla/set_parameters_atomically"
    request = SetParametersAtomically.Request(parameters=[guard])
    assert client.call(SetParametersAtomically, service, request).result.successful, (
        "a clamp refuses nothing else"
    )
    assert {step.layers_run for step in rig.await_steps(5)} == {2}
    rig.instruct("lift the red block")
    wait_until(lambda: not rig.budgets[-1].clamped, what="no clamp")


def test_every_step_ran_under_a_budget_that_was_told_before(client, rig):
    def is_accepted() -> bool:
        middle = sum(feasible(rig, "deadline_ms")) / 2
        return ask(client, deadline_ms=middle, average_ms=middle).successful

    wait_until(is_accepted, what="a budget in the range that was told; a busy machine moves the range")
    rig.await_steps(60)  # The node checks latencies again every 25 steps.
    told = {status.budget_id for status in rig.budgets}
    assert {step.budget_id for step in rig.steps} <= told


def test_diagnostics_carry_requested_and_achieved(client, rig):
    assert ask(client, average_fraction=0.3).successful
    heard = client.listen(DiagnosticArray, "/diagnostics")

    def values() -> dict[str, str]:
        return {pair.key: pair.value for array in heard[-1:] for pair in array.status[0].values}

    wait_until(lambda: values().get("budget.average_fraction") == "0.3", what="diagnostics of the budget")
    rig.await_steps(15)
    assert 0.16 < float(values()["budget.achieved_fraction"]) < 0.7
    assert {
        "budget.achieved_gmac",
        "budget.achieved_ms",
        "budget.correction",
        "budget.resident_layers",
    } <= set(values())


def test_a_deadline_that_is_missed_more_than_rarely_is_a_problem_and_one_miss_is_not():
    def problems(misses: int) -> list[str]:
        keeper = BudgetKeeper(tabletop(), "l2", (0.1,) * 6, layer_bytes(tabletop(), torch.float32))
        keeper.set(Budget(deadline_ms=10.0))
        for number in range(200):
            total = 20.0 if number < misses else 5.0
            times = StageTimes(preprocess=1.0, vision=1.0, language=total - 3.0, head=1.0)
            action = Action(np.zeros(6, np.float32), 0.5)
            keeper.book(PolicyStep(action, (1,), 0, StopReason.DEEPEST, (0.1,), (1e8,), 2, 10, times))
        return budget_problems(SimpleNamespace(problem="", status=keeper.status()))

    assert not any("budget.deadline_ms" in problem and "longer" in problem for problem in problems(2))
    assert any(
        "1.5% of the newest steps took longer than budget.deadline_ms (10 ms)" in problem
        for problem in problems(3)
    )
