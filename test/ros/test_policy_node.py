"""Tests of the policy node as a process over real DDS: commands, hold, recovery, parameters, its end."""

import math
import re

import numpy as np
import pytest
from deer_vla_ros.msg import PolicyStep
from harness import Client, spawn, wait_until
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, SetParameters
from rig import Rig, moves
from std_srvs.srv import SetBool, Trigger

from deer_vla_ros.ros.messages import nanoseconds


@pytest.fixture(scope="module")
def client():
    with Client("policy_node_test") as client:
        yield client


@pytest.fixture(scope="module")
def node(client):
    with spawn("node") as process:
        client.await_active(process, "deer_vla")
        yield process


@pytest.fixture
def rig(client, node):
    """A robot without faults and with a new instruction, which the node already controls."""
    rig = Rig(client)
    with rig.running():
        rig.instruct("lift the red block")
        rig.await_steps()
        yield rig
        rig.instruct("")
        rig.await_hold()


def set_parameter(client: Client, name: str, value: float):
    parameter = Parameter(
        name=name, value=ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=value)
    )
    return client.call(
        SetParameters, "deer_vla/set_parameters", SetParameters.Request(parameters=[parameter])
    ).results[0]


def test_a_message_in_gives_a_command_out(rig):
    step = rig.await_steps(2)[-1]
    assert step.instruction == "lift the red block"
    assert step.header.frame_id == "base"
    assert nanoseconds(step.header.stamp) == max(
        nanoseconds(step.static_stamp), nanoseconds(step.gripper_stamp)
    )
    target = wait_until(
        lambda: [t for t in rig.targets if t.header.stamp == step.header.stamp], what="the step's target"
    )[0]
    assert target.header.frame_id == "base"
    moved = [getattr(target.pose.position, axis) for axis in "xyz"] - rig.position
    assert 0 < np.linalg.norm(moved) <= 0.15 + 1e-9
    assert wait_until(
        lambda: [t for t in rig.twists if t.header.stamp == step.header.stamp and moves(t)], what="the twist"
    )
    assert rig.grippers[-1].data[0] in (0.0, 0.08)


def test_a_step_says_what_it_saw_how_deep_it_thought_and_what_that_cost(rig):
    step = rig.await_steps()[0]
    assert step.layers_run == step.exit_layers[step.exit_index] + 1
    probed = [delta for delta in step.deltas if not math.isnan(delta)]
    assert len(probed) == step.exit_index + 1
    if step.stop_reason == PolicyStep.STOP_AGREED:
        assert probed[-1] <= step.thresholds[step.exit_index]
    assert 0 < step.language_gmac <= step.language_gmac_full < step.total_gmac
    stages = step.preprocess_ms + step.vision_ms + step.language_ms + step.head_ms
    assert step.total_ms == pytest.approx(stages, rel=1e-3)
    assert step.stamp_to_publish_ms >= step.total_ms
    assert 0 <= step.static_age_ms < 300 and 0 <= step.skew_ms < 50
    assert step.budget_id == rig.budgets[-1].budget_id


def test_steps_come_at_the_control_rate_one_per_frame(rig):
    sent = []
    rig.edit_image = lambda name, image: name == "static" and sent.append(nanoseconds(image.header.stamp))
    steps = rig.await_steps(21)
    rig.edit_image = lambda name, image: None
    assert [b.step - a.step for a, b in zip(steps, steps[1:])] == [1] * 20
    between = np.diff([nanoseconds(step.static_stamp) for step in steps]) / 1e9
    # A busy machine may miss a frame, and the rig itself may send them later than every 0.1 s.
    assert between.min() > 0.0 and np.median(between) == pytest.approx(
        np.median(np.diff(sent)) / 1e9, rel=0.15
    )


def test_stale_cameras_hold_the_measured_pose_and_fresh_ones_resume(rig):
    rig.cameras_on = False
    held = rig.await_hold()
    assert [getattr(held.pose.position, axis) for axis in "xyz"] == list(rig.position)
    begin = len(rig.targets)
    wait_until(lambda: len(rig.targets) >= begin + 5, what="the hold, repeated")
    rig.cameras_on = True
    assert rig.await_steps(3)


def test_cameras_that_do_not_belong_together_hold_and_resume(rig):
    rig.gripper_lag_s = 5.0
    rig.await_hold()
    rig.gripper_lag_s = 0.0
    assert rig.await_steps(3)


def test_no_measured_pose_holds_and_resumes(rig):
    rig.pose_on = False
    rig.await_hold()
    rig.pose_on = True
    assert rig.await_steps(3)


def test_hold_and_reset_services(rig, client):
    episode = rig.await_steps()[0].episode
    assert client.call(SetBool, "deer_vla/hold", SetBool.Request(data=True)).success
    rig.await_hold()
    assert client.call(SetBool, "deer_vla/hold", SetBool.Request(data=False)).success
    assert rig.await_steps()[0].episode == episode
    assert client.call(Trigger, "deer_vla/reset").success
    wait_until(lambda: rig.steps[-1].episode == episode + 1, what="a new episode")


def test_a_peak_budget_is_obeyed_live_and_an_infeasible_one_is_refused_with_the_range(rig, client):
    rig.await_steps()
    status = rig.budgets[-1]
    refused = set_parameter(client, "budget.peak_gmac", status.feasible_min_gmac / 2)
    assert not refused.successful
    low, high = map(float, re.search(r"ask for (\S+) to (\S+), or 0", refused.reason).groups())
    assert status.feasible_min_gmac <= low == pytest.approx(status.feasible_min_gmac, rel=1e-3), (
        "rounded up, or it would be refused again"
    )
    assert high == pytest.approx(status.feasible_max_gmac, rel=1e-3)
    assert set_parameter(client, "budget.peak_gmac", status.feasible_min_gmac).successful
    capped = wait_until(
        lambda: [step for step in rig.steps if step.budget_id > status.budget_id],
        what="a step under the peak",
    )
    rig.await_steps(5)
    assert all(
        step.language_gmac <= status.feasible_min_gmac
        for step in rig.steps
        if step.budget_id > status.budget_id
    )
    assert capped[0].episode_step > 0, "the episode went on"
    assert rig.budgets[-1].requested_peak_gmac == status.feasible_min_gmac
    assert set_parameter(client, "budget.peak_gmac", 0.0).successful


@pytest.mark.parametrize(
    ("name", "value"), [("inputs.max_age_s", 100.0), ("guard.leash_m", -1.0), ("control.rate_hz", 20.0)]
)
def test_out_of_range_and_read_only_parameters_are_refused(client, node, name, value):
    assert not set_parameter(client, name, value).successful


def test_parameters_describe_themselves(client, node):
    request = DescribeParameters.Request(names=["inputs.max_skew_s", "budget.peak_gmac"])
    skew, peak = client.call(DescribeParameters, "deer_vla/describe_parameters", request).descriptors
    assert skew.description.endswith("[s]") and peak.description.endswith("[GMAC]")
    assert skew.floating_point_range[0].to_value == 1.0
    assert not peak.read_only
