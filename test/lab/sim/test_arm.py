"""Tests of the simulated arm: it follows its targets, and it never jumps, for any target."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from deer_vla_ros.lab.sim.kinematics import JOINT_SPEED_LIMIT
from deer_vla_ros.lab.sim.table import Table

FREE_SPEED = 1.15 * JOINT_SPEED_LIMIT
COLLIDING_SPEED = 2.0 * JOINT_SPEED_LIMIT  # A contact with the table pushes the light joints of the wrist.
DOWN = np.array([1.0, 0.0, 0.0, 0.0])
ANY_FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture
def table():
    return Table(seed=1)


def fastest_joint(table: Table, seconds: float) -> float:
    """Advances the table and returns the highest joint speed measured meanwhile [rad/s]."""
    fastest = 0.0
    for _ in range(round(seconds / 0.01)):
        table.advance(0.01)
        assert np.isfinite(table.joint_positions()).all()
        fastest = max(fastest, np.abs(table.joint_velocities()[:7]).max())
    return fastest


@pytest.mark.parametrize(
    "position", [(0.33, -0.2, 0.15), (0.45, 0.25, 0.12), (0.62, 0.0, 0.30), (0.60, -0.25, 0.15)]
)
@pytest.mark.parametrize("yaw", [-1.2, 0.0, 1.2])
def test_the_tcp_settles_on_its_target(table, position, yaw):
    rotation = Rotation.from_euler("z", yaw) * Rotation.from_quat(DOWN)
    table.set_target(np.array(position), rotation.as_quat())
    table.advance(3.0)
    measured = table.tcp_pose()
    assert np.linalg.norm(measured.position - position) < 0.005
    assert np.degrees((Rotation.from_quat(measured.quaternion) * rotation.inv()).magnitude()) < 2.0


def test_a_target_on_the_other_side_is_approached_within_the_speed_limit(table):
    table.set_target(np.array([0.35, 0.45, 0.3]), DOWN)
    assert fastest_joint(table, 3.0) < FREE_SPEED
    table.set_target(np.array([0.35, -0.45, 0.3]), DOWN)
    assert 0.5 * JOINT_SPEED_LIMIT < fastest_joint(table, 3.0) < FREE_SPEED


def test_without_a_command_the_arm_stays_at_home(table):
    home = table.tcp_pose().position
    table.advance(2.0)
    assert np.linalg.norm(table.tcp_pose().position - home) < 1e-3


@pytest.mark.parametrize(
    "position", [(0.45, 0.0, -1.0), (-0.6, 0.0, 0.3), (3.0, 0.0, 0.3), (0.0, 0.0, 0.1), (1e30, -1e30, 1e30)]
)
def test_an_unreachable_target_neither_jumps_nor_stops_the_arm_from_coming_back(table, position):
    table.set_target(np.array(position), DOWN)
    assert fastest_joint(table, 3.0) < COLLIDING_SPEED
    table.set_target(np.array([0.40, 0.0, 0.26]), DOWN)
    assert fastest_joint(table, 6.0) < COLLIDING_SPEED
    assert np.linalg.norm(table.tcp_pose().position - [0.40, 0.0, 0.26]) < 0.005


@settings(max_examples=15)
@example([(0.0, 0.0, -5.0, 1.0, 0.0, 0.0, 0.0)] * 3)
@given(targets=st.lists(st.tuples(*[ANY_FLOAT] * 3, *[ANY_FLOAT] * 4), min_size=3, max_size=3))
def test_any_sequence_of_finite_targets_keeps_the_speed_limit(targets):
    table = Table(seed=2)
    for target in targets:
        if any(target[3:]):
            table.set_target(np.array(target[:3]), np.array(target[3:]))
        assert fastest_joint(table, 0.3) < COLLIDING_SPEED


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("entry", range(7))
def test_a_target_that_is_not_finite_is_refused_and_the_last_one_kept(table, wrong, entry):
    table.set_target(np.array([0.5, 0.1, 0.2]), DOWN)
    target = np.array([0.4, 0.0, 0.3, *DOWN])
    target[entry] = wrong
    with pytest.raises(ValueError, match="not finite"):
        table.set_target(target[:3], target[3:])
    table.advance(2.0)
    assert np.linalg.norm(table.tcp_pose().position - [0.5, 0.1, 0.2]) < 0.005


def test_a_quaternion_without_length_is_refused(table):
    with pytest.raises(ValueError, match="no rotation"):
        table.set_target(np.array([0.4, 0.0, 0.3]), np.zeros(4))


def test_a_target_of_another_shape_is_refused(table):
    with pytest.raises(ValueError, match="3 \\+ 4 numbers"):
        table.set_target(np.zeros(4), DOWN)


def test_a_quaternion_of_any_length_means_its_direction(table):
    table.set_target(np.array([0.5, 0.1, 0.2]), 1e200 * DOWN)
    table.advance(2.0)
    assert abs(table.tcp_pose().quaternion @ DOWN) > 0.9999


def test_the_gripper_opens_and_closes_at_its_speed(table):
    table.set_gripper(0.0)
    table.advance(0.2)
    assert 0.03 < table.state().opening < 0.05
    table.advance(0.6)
    assert table.state().opening < 0.002
    table.set_gripper(0.05)
    table.advance(0.8)
    assert table.state().opening == pytest.approx(0.05, abs=0.001)


def test_a_gripper_command_outside_its_range_is_clamped(table):
    table.set_gripper(-3.0)
    table.advance(1.0)
    assert table.state().opening == pytest.approx(0.0, abs=0.002)
    table.set_gripper(9.0)
    table.advance(1.0)
    assert table.state().opening == pytest.approx(0.08, abs=0.002)


def test_a_gripper_command_that_is_not_finite_is_refused(table):
    with pytest.raises(ValueError, match="not finite"):
        table.set_gripper(np.nan)


def test_time_shorter_than_a_physics_step_is_carried_over():
    one, many = Table(seed=4), Table(seed=4)
    for table in (one, many):
        table.set_target(np.array([0.5, 0.1, 0.2]), DOWN)
    one.advance(0.5)
    for _ in range(250):
        many.advance(0.002)
    np.testing.assert_array_equal(one.joint_positions(), many.joint_positions())
