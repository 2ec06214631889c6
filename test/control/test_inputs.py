"""Tests of the input gate: a step may use only fresh inputs that belong together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.control.inputs import InputGate, InputLimits
from deer_vla_ros.control.types import Camera, Frame, HoldReason, MeasuredPose, Pose

MS = 1_000_000
NOW = 10_000 * MS
LIMITS = InputLimits(max_age_ns=300 * MS, max_pose_age_ns=300 * MS, max_skew_ns=50 * MS)
IMAGE = np.zeros((4, 4, 3), np.uint8)


def pose(
    stamp_ns: int = NOW, frame: str = "base", position=(0.4, 0, 0.3), quaternion=(1, 0, 0, 0)
) -> MeasuredPose:
    return MeasuredPose(Pose(np.array(position, float), np.array(quaternion, float)), frame, stamp_ns)


def gate(
    static: int | None = NOW, gripper: int | None = NOW, measured: MeasuredPose | None = None
) -> InputGate:
    """A gate with an instruction, a pose and frames with these stamps."""
    result = InputGate(LIMITS, "base")
    result.put_instruction("lift the red block")
    result.put_pose(measured or pose())
    for camera, stamp in ((Camera.STATIC, static), (Camera.GRIPPER, gripper)):
        if stamp is not None:
            result.put_frame(camera, Frame(IMAGE, stamp))
    return result


def reasons(gate: InputGate, now_ns: int = NOW) -> set[HoldReason]:
    return set(gate.judge(gate.snapshot(), now_ns))


def test_fresh_inputs_that_belong_together_pass():
    assert reasons(gate()) == set()


def test_nothing_at_all_names_everything_that_is_missing():
    assert reasons(InputGate(LIMITS, "base")) == {
        HoldReason.NO_INSTRUCTION,
        HoldReason.NO_STATIC_FRAME,
        HoldReason.NO_GRIPPER_FRAME,
        HoldReason.NO_POSE,
    }


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_no_input_older_than_its_limit_is_ever_acted_upon(static_age, gripper_age, pose_age):
    found = reasons(gate(NOW - static_age * MS, NOW - gripper_age * MS, pose(NOW - pose_age * MS)))
    assert (HoldReason.STATIC_STALE in found) == (static_age > 300)
    assert (HoldReason.GRIPPER_STALE in found) == (gripper_age > 300)
    assert (HoldReason.POSE_STALE in found) == (pose_age > 300)
    if not found:
        assert abs(static_age - gripper_age) <= 50


def test_cameras_too_far_apart_hold():
    assert reasons(gate(NOW, NOW - 51 * MS)) == {HoldReason.SKEW}
    assert reasons(gate(NOW, NOW - 50 * MS)) == set()


def test_a_camera_that_is_a_moment_late_does_not_hold():
    waiting = gate(NOW, NOW)
    waiting.put_frame(Camera.STATIC, Frame(IMAGE, NOW + 100 * MS))
    assert reasons(waiting, NOW + 110 * MS) == set()
    pair = waiting.snapshot().pair
    assert (pair[0].stamp_ns, pair[1].stamp_ns) == (NOW, NOW)


def test_a_camera_that_stays_behind_holds_once_the_last_pair_is_old():
    lagging = gate(NOW, NOW)
    held = []
    for i in range(1, 5):
        now = NOW + i * 100 * MS
        lagging.put_frame(Camera.STATIC, Frame(IMAGE, now))
        lagging.put_frame(Camera.GRIPPER, Frame(IMAGE, now - 60 * MS))
        lagging.put_pose(pose(now))
        held.append(reasons(lagging, now))
    assert held == [set(), set(), set(), {HoldReason.SKEW}]


def test_frames_without_a_stamp_hold_and_say_so():
    assert reasons(gate(0, 0)) == {HoldReason.STATIC_UNSTAMPED, HoldReason.GRIPPER_UNSTAMPED}


def test_stamps_of_another_clock_hold():
    assert HoldReason.STATIC_IN_FUTURE in reasons(gate(NOW + 60 * MS, NOW + 60 * MS))
    assert HoldReason.POSE_IN_FUTURE in reasons(gate(measured=pose(NOW + 60 * MS)))


@pytest.mark.parametrize(
    ("measured", "reason"),
    [
        (pose(frame="world"), HoldReason.POSE_FRAME),
        (pose(position=(0, float("nan"), 0)), HoldReason.POSE_INVALID),
        (pose(quaternion=(1, 0, 0, float("nan"))), HoldReason.POSE_INVALID),
        (pose(quaternion=(0, 0, 0, 0)), HoldReason.POSE_INVALID),
        (pose(quaternion=(1, 1, 0, 0)), HoldReason.POSE_INVALID),
        (pose(position=(0, 0, 0)), HoldReason.POSE_INVALID),
        (pose(position=(0.4, 1e300, 0.3)), HoldReason.POSE_INVALID),
        (pose(position=(0.4, 0, -101)), HoldReason.POSE_INVALID),
    ],
)
def test_a_pose_that_cannot_be_built_upon_holds(measured, reason):
    assert reasons(gate(measured=measured)) == {reason}


def test_an_instruction_of_spaces_is_none():
    spaces = gate()
    spaces.put_instruction("   \n")
    assert reasons(spaces) == {HoldReason.NO_INSTRUCTION}


def test_pairs_replaced_before_a_tick_saw_them_are_counted_as_dropped():
    camera = gate(NOW, NOW)
    camera.mark_seen(camera.snapshot().pair)
    for i in (1, 2, 3):
        for which in Camera:
            camera.put_frame(which, Frame(IMAGE, NOW + i * 100 * MS))
    assert camera.snapshot().dropped == 2


def put_poses(*poses: MeasuredPose) -> InputGate:
    result = gate()
    for each in poses:
        result.put_pose(each)
    return result


@pytest.mark.parametrize(
    "between",
    [(), (pose(NOW + 20 * MS, position=(float("nan"), 0, 0)),), (pose(NOW + 20 * MS, frame="camera"),)],
    ids=["at once", "with no number between", "with another frame between"],
)
def test_a_pose_that_no_arm_can_have_reached_is_a_jump_whatever_comes_between(between):
    far, turned = pose(NOW + 40 * MS, position=(0.4, 0.5, 0.3)), pose(NOW + 40 * MS, quaternion=(0, 1, 0, 0))
    for jumped in (far, turned):
        assert reasons(put_poses(*between, jumped), NOW + 40 * MS) == {HoldReason.POSE_JUMPED}
    assert reasons(put_poses(*between, pose(NOW + 40 * MS, position=(0.45, 0, 0.3))), NOW + 40 * MS) == set()


def test_the_other_sign_of_a_quaternion_is_no_jump():
    assert reasons(put_poses(pose(NOW + 10 * MS, quaternion=(-1, 0, 0, 0))), NOW + 10 * MS) == set()


def test_what_is_demanded_holds_for_as_long_as_it_stands():
    held = gate()
    held.demand_hold(HoldReason.NOT_ENABLED, True)
    held.demand_hold(HoldReason.WATCHDOG_LOST, True)
    held.request_hold(True)
    assert reasons(held) == {HoldReason.NOT_ENABLED, HoldReason.WATCHDOG_LOST, HoldReason.REQUESTED}
    held.demand_hold(HoldReason.WATCHDOG_LOST, False)
    held.request_hold(False)
    assert reasons(held) == {HoldReason.NOT_ENABLED}


def test_lifting_a_hold_or_another_instruction_is_a_clearance_and_nothing_else_is():
    kept = gate()

    def clears(action) -> bool:
        before = kept.snapshot().clearances
        action()
        return kept.snapshot().clearances > before

    assert clears(lambda: kept.request_hold(False))
    assert not clears(lambda: kept.request_hold(True))
    assert not clears(lambda: kept.put_instruction(" lift the red block "))
    assert clears(lambda: kept.put_instruction("open the drawer"))
    assert not clears(lambda: kept.put_instruction(""))
    assert clears(lambda: kept.put_instruction("open the drawer"))
    assert not clears(kept.forget)
    assert not clears(lambda: kept.put_instruction("open the drawer"))
