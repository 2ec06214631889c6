"""Tests of the inverse kinematics: steps lead to the pose within the limits, for any start and target."""

import mujoco
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deer_vla_ros.lab.sim.kinematics import (
    ARM_FILE,
    HOME_JOINTS,
    JOINT_SPEED_LIMIT,
    ArmKinematics,
    rotation_vector,
)

DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
LOWER, UPPER = mujoco.MjModel.from_xml_path(str(ARM_FILE)).jnt_range[:7].T
SECONDS = 0.01

finite = st.floats(-1e3, 1e3)
joints_inside_limits = st.lists(st.floats(0.0, 1.0), min_size=7, max_size=7).map(
    lambda shares: LOWER + np.array(shares) * (UPPER - LOWER)
)


@pytest.fixture(scope="module")
def arm():
    return ArmKinematics()


def wxyz(rotation: Rotation) -> np.ndarray:
    return np.roll(rotation.as_quat(), 1)


def test_forward_kinematics_is_the_pandas(arm):
    # The Panda's DH table, all joints at zero: the flange is at x 0.088, z 0.333 + 0.316 + 0.384 - 0.107.
    # The TCP is 0.1034 m below it.
    position, quaternion = arm.forward(np.zeros(7))
    np.testing.assert_allclose(position, [0.088, 0.0, 0.926 - 0.1034], atol=1e-9)
    assert (Rotation.from_quat(np.roll(quaternion, -1)) * DOWN.inv()).magnitude() == pytest.approx(
        np.pi / 4, abs=1e-6
    )


@settings(max_examples=25)
@given(
    radius=st.floats(0.33, 0.68), bearing=st.floats(-0.5, 0.5), height=st.floats(0.01, 0.30),
    yaw=st.floats(-1.4, 1.4), roll=st.floats(-0.2, 0.2), pitch=st.floats(-0.2, 0.2),
)  # fmt: skip
def test_every_pose_over_the_table_is_reached(arm, radius, bearing, height, yaw, roll, pitch):
    position = np.array([radius * np.cos(bearing), radius * np.sin(bearing), height])
    quaternion = wxyz(Rotation.from_euler("z", yaw) * Rotation.from_euler("xy", [roll, pitch]) * DOWN)
    joints = HOME_JOINTS
    for _ in range(400):
        joints = arm.step(joints, position, quaternion, SECONDS)
    reached, orientation = arm.forward(joints)
    assert np.linalg.norm(reached - position) < 0.002
    assert np.degrees(np.linalg.norm(rotation_vector(quaternion, orientation))) < 0.5


@settings(max_examples=60)
@given(
    joints=joints_inside_limits, position=st.tuples(finite, finite, finite),
    angles=st.tuples(*[st.floats(-np.pi, np.pi)] * 3),
)  # fmt: skip
def test_joint_range_and_speed_hold_for_any_target_from_any_posture(arm, joints, position, angles):
    quaternion = wxyz(Rotation.from_euler("xyz", angles))
    for _ in range(20):
        following = arm.step(joints, np.array(position), quaternion, SECONDS)
        assert (LOWER - 1e-9 <= following).all() and (following <= UPPER + 1e-9).all()
        assert np.abs(following - joints).max() <= JOINT_SPEED_LIMIT * SECONDS * (1 + 1e-9)
        joints = following


@given(first=st.tuples(*[st.floats(-np.pi, np.pi)] * 3), second=st.tuples(*[st.floats(-np.pi, np.pi)] * 3))
def test_rotation_vector_turns_the_current_orientation_into_the_target(first, second):
    target, current = Rotation.from_euler("xyz", first), Rotation.from_euler("xyz", second)
    turned = Rotation.from_rotvec(rotation_vector(wxyz(target), wxyz(current))) * current
    assert (turned * target.inv()).magnitude() < 1e-6
