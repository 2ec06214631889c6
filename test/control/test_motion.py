"""Tests of motions: a relative action is applied along the fixed axes of the action frame."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from poses import angle_between, distance_between, poses, rotations, vectors
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.motion import motion_between, motion_of, moved, twist_of
from deer_vla_ros.control.types import Pose
from deer_vla_ros.model.action_space import CALVIN, TABLETOP


def matrix(pose: Pose) -> np.ndarray:
    """The rotation matrix (3, 3)."""
    return Rotation.from_quat(pose.quaternion).as_matrix()


@given(poses, vectors, rotations)
def test_a_motion_turns_about_the_fixed_axes_whatever_the_orientation(pose, translation, rotation):
    result = moved(pose, translation, rotation)
    np.testing.assert_allclose(matrix(result), rotation.as_matrix() @ matrix(pose), atol=1e-9)
    np.testing.assert_allclose(result.position, pose.position + translation)


@given(poses, poses)
def test_the_motion_between_two_poses_leads_from_one_to_the_other(start, end):
    result = moved(start, *motion_between(start, end))
    assert distance_between(result, end) < 1e-9
    assert angle_between(result, end) < 1e-6


@given(poses, poses, st.floats(0.01, 1.0))
def test_a_twist_integrated_over_its_time_gives_the_motion(start, end, seconds):
    twist = twist_of(start, end, seconds)
    result = moved(start, twist.linear * seconds, Rotation.from_rotvec(twist.angular * seconds))
    assert distance_between(result, end) < 1e-9
    assert angle_between(result, end) < 1e-6


def test_a_pose_of_one_is_two_centimetres_and_a_twentieth_radian_in_calvin():
    translation, rotation = motion_of(np.array([1.0, 0, 0, 0, 0, 1.0]), CALVIN)
    np.testing.assert_allclose(translation, [0.02, 0, 0])
    np.testing.assert_allclose(rotation.as_rotvec(), [0, 0, 0.05])


def test_euler_angles_turn_about_fixed_x_then_y_then_z():
    space = dataclasses.replace(TABLETOP, rotation_rad=1.0)
    _, rotation = motion_of(np.array([0, 0, 0, 0.3, -0.4, 0.5]), space)
    x, y, z = (Rotation.from_rotvec(angle * axis) for angle, axis in zip((0.3, -0.4, 0.5), np.eye(3)))
    np.testing.assert_allclose(rotation.as_matrix(), (z * y * x).as_matrix(), atol=1e-12)


@given(poses, st.lists(st.floats(-1, 1), min_size=6, max_size=6))
def test_orientations_stay_unit_quaternions(pose, action):
    result = moved(pose, *motion_of(np.array(action), TABLETOP))
    assert np.linalg.norm(result.quaternion) == pytest.approx(1.0, abs=1e-9)
