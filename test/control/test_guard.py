"""The guard's promises, for any motion from anywhere."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from poses import angle_between, distance_between, poses, rotations, vectors
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.guard import GuardLimits, guard, is_beyond_workspace
from deer_vla_ros.control.motion import moved
from deer_vla_ros.control.types import Limit, Pose
from deer_vla_ros.errors import UserError

LIMITS = GuardLimits(
    max_translation_m=0.05,
    max_rotation_rad=0.2,
    leash_m=0.1,
    leash_rad=0.5,
    workspace_min=(-0.5, -0.5, 0.0),
    workspace_max=(0.5, 0.5, 0.8),
)
HOME = Pose(np.array([0.1, 0.0, 0.4]), np.array([1.0, 0.0, 0.0, 0.0]))
STILL = Rotation.identity()
EPSILON = 1e-6


def outside_by(position: np.ndarray) -> np.ndarray:
    """(3,) metres beyond the workspace box on each axis."""
    return np.maximum(np.maximum(LIMITS.workspace_min - position, position - LIMITS.workspace_max), 0)


situations = st.tuples(poses, poses).filter(lambda pair: not is_beyond_workspace(LIMITS, pair[1]))
"""A last target anywhere, and an arm that is not beyond the workspace."""


@given(situations, vectors, rotations)
def test_a_target_is_never_beyond_the_leash(situation, translation, rotation):
    last, measured = situation
    target = guard(LIMITS, last, measured, translation, rotation).target
    assert distance_between(target, measured) <= LIMITS.leash_m + EPSILON
    assert angle_between(target, measured) <= LIMITS.leash_rad + EPSILON


@given(situations, vectors, rotations)
def test_a_target_never_moves_more_than_one_step_from_the_last_one(situation, translation, rotation):
    last, measured = situation
    result = guard(LIMITS, last, measured, translation, rotation)
    if not result.arm_moved:
        assert distance_between(result.target, last) <= LIMITS.max_translation_m + EPSILON
        assert angle_between(result.target, last) <= LIMITS.max_rotation_rad + EPSILON


@given(situations, vectors, rotations)
def test_a_target_that_is_not_the_plain_motion_says_why(situation, translation, rotation):
    last, measured = situation
    result = guard(LIMITS, last, measured, translation, rotation)
    plain = moved(last, translation, rotation)
    changed = distance_between(result.target, plain) > EPSILON or angle_between(result.target, plain) > 1e-5
    outside = (outside_by(result.target.position) > 0).any()
    assert bool(result.limits) or not (changed or outside)


@given(situations, vectors, rotations)
def test_a_target_never_goes_further_out_of_the_workspace_than_the_last_one(situation, translation, rotation):
    last, measured = situation
    result = guard(LIMITS, last, measured, translation, rotation)
    assert (outside_by(result.target.position) <= outside_by(last.position) + EPSILON).all()


@given(situations)
def test_the_step_starts_at_the_last_target_where_the_leash_allows_it(situation):
    last, measured = situation
    start = guard(LIMITS, last, measured, np.zeros(3), STILL).start
    if distance_between(last, measured) <= LIMITS.leash_m:
        np.testing.assert_array_equal(start.position, last.position)


@given(poses)
def test_an_arm_is_beyond_the_workspace_where_no_point_of_the_box_is_on_the_leash(measured):
    nearest = np.linalg.norm(outside_by(measured.position))
    assert is_beyond_workspace(LIMITS, measured) == (nearest > LIMITS.leash_m)


@given(vectors, rotations)
def test_an_arm_inside_the_workspace_stays_inside(translation, rotation):
    result = guard(LIMITS, HOME, HOME, translation, rotation)
    assert (outside_by(result.target.position) == 0).all()


@given(situations, vectors, rotations)
def test_every_target_is_finite_and_of_unit_length(situation, translation, rotation):
    target = guard(LIMITS, *situation, translation, rotation).target
    assert np.isfinite(target.position).all()
    assert np.linalg.norm(target.quaternion) == pytest.approx(1.0, abs=1e-9)


def test_a_small_motion_within_every_limit_passes_as_it_is():
    result = guard(LIMITS, HOME, HOME, np.array([0.01, 0.0, -0.01]), Rotation.from_rotvec([0, 0, 0.1]))
    np.testing.assert_allclose(result.target.position, HOME.position + [0.01, 0.0, -0.01])
    assert angle_between(result.target, HOME) == pytest.approx(0.1)
    assert result.limits == ()


@pytest.mark.parametrize(
    ("translation", "rotation", "limit"),
    [
        ([0.2, 0, 0], STILL, Limit.TRANSLATION),
        ([0, 0, 0], Rotation.from_rotvec([0, 1.0, 0]), Limit.ROTATION),
    ],
)
def test_what_shortened_a_motion_is_named(translation, rotation, limit):
    assert guard(LIMITS, HOME, HOME, np.array(translation), rotation).limits == (limit,)


def test_a_motion_out_of_the_box_stops_at_its_wall():
    near_floor = Pose(np.array([0.1, 0.0, 0.01]), HOME.quaternion)
    result = guard(LIMITS, near_floor, near_floor, np.array([0.02, 0.0, -0.03]), STILL)
    np.testing.assert_allclose(result.target.position, [0.12, 0.0, 0.0], atol=1e-12)
    assert result.limits == (Limit.WORKSPACE,)


def test_an_arm_outside_the_box_may_come_back_without_a_jump():
    outside = Pose(np.array([0.6, 0.0, 0.4]), HOME.quaternion)
    inward = guard(LIMITS, outside, outside, np.array([-0.03, 0.0, 0.0]), STILL)
    outward = guard(LIMITS, outside, outside, np.array([0.03, 0.0, 0.0]), STILL)
    np.testing.assert_allclose(inward.target.position, [0.57, 0.0, 0.4])
    np.testing.assert_allclose(outward.target.position, outside.position)


def test_a_blocked_arm_keeps_its_target_on_the_leash():
    target = HOME
    for _ in range(20):
        target = guard(LIMITS, target, HOME, np.array([0.03, 0.0, 0.0]), STILL).target
    assert distance_between(target, HOME) == pytest.approx(LIMITS.leash_m)


def test_an_arm_that_is_pushed_slowly_takes_its_target_along():
    target, pushed = HOME, HOME
    for _ in range(30):
        pushed = Pose(pushed.position + [0.0, 0.01, 0.0], HOME.quaternion)
        result = guard(LIMITS, target, pushed, np.zeros(3), STILL)
        assert not result.arm_moved
        target = result.target
    assert distance_between(target, pushed) == pytest.approx(LIMITS.leash_m)
    assert result.limits == (Limit.LEASH,)


def test_an_arm_that_was_moved_far_away_gets_no_target_there():
    elsewhere = Pose(HOME.position + [0.0, 0.3, 0.0], HOME.quaternion)
    assert guard(LIMITS, HOME, elsewhere, np.zeros(3), STILL).arm_moved


def test_a_target_outside_the_box_is_always_reported():
    outside = Pose(np.array([0.55, 0.0, 0.4]), HOME.quaternion)
    assert guard(LIMITS, outside, outside, np.array([-0.01, 0.0, 0.0]), STILL).limits == (Limit.WORKSPACE,)


@pytest.mark.parametrize(
    "change",
    [
        {"max_translation_m": 0.0},
        {"leash_rad": float("nan")},
        {"workspace_min": (0.6, -0.5, 0.0)},
        {"workspace_max": (0.5, 0.5)},
        {"workspace_max": (0.5, 0.5, float("inf"))},
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"guard.{next(iter(change))}"):
        GuardLimits(**{**LIMITS.__dict__, **change})
