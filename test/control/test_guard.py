"""Property tests of the guard: its limits hold for any motion from any pose."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from poses import angle_between, distance_between, poses, rotations, vectors
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.guard import RAMP_SHARE, GuardLimits, StepTiming, guard, is_beyond_workspace
from deer_vla_ros.control.motion import moved, twist_of
from deer_vla_ros.control.types import Limit, Pose, Twist
from deer_vla_ros.errors import UserError

LIMITS = GuardLimits(
    max_translation_m=0.05,
    max_rotation_rad=0.2,
    leash_m=0.1,
    leash_rad=0.5,
    workspace_min=(-0.5, -0.5, 0.0),
    workspace_max=(0.5, 0.5, 0.8),
)
FAST = dataclasses.replace(
    LIMITS,
    max_linear_speed_m_s=0.4,
    max_angular_speed_rad_s=1.5,
    max_linear_acceleration_m_s2=2.0,
    max_angular_acceleration_rad_s2=8.0,
    ramp_in_steps=3,
)
HOME = Pose(np.array([0.1, 0.0, 0.4]), np.array([1.0, 0.0, 0.0, 0.0]))
STILL = Rotation.identity()
EPSILON = 1e-6


def outside_by(position: np.ndarray) -> np.ndarray:
    """(3,) The distance outside the workspace box on each axis [m]."""
    return np.maximum(np.maximum(LIMITS.workspace_min - position, position - LIMITS.workspace_max), 0)


situations = st.tuples(poses, poses).filter(lambda pair: not is_beyond_workspace(LIMITS, pair[1]))
"""Any last target, and a measured pose that is not beyond the workspace."""


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


@given(
    st.tuples(poses, vectors).map(
        lambda pair: (pair[0], Pose(pair[0].position + 0.05 * pair[1], pair[0].quaternion))
    ),
    vectors,
)
def test_an_arm_outside_comes_nearer_with_every_step_as_far_as_the_leash_allows(situation, translation):
    last, measured = situation
    if is_beyond_workspace(LIMITS, measured):
        return
    result = guard(LIMITS, last, measured, translation, STILL)
    before, after = (np.linalg.norm(outside_by(each.position)) for each in (last, result.target))
    assert after <= before + EPSILON
    if before > 0 and not result.arm_moved and Limit.LEASH not in result.limits:
        assert after <= max(before - LIMITS.max_translation_m, 0.0) + EPSILON


timings = st.builds(
    StepTiming,
    st.floats(0.01, 0.1),
    st.builds(Twist, vectors.map(lambda v: 0.3 * v), vectors.map(lambda v: v)),
    st.booleans(),
)


@given(situations, vectors, rotations, timings)
def test_no_target_moves_faster_than_the_limits_of_speed_allow(situation, translation, rotation, timing):
    last, measured = situation
    result = guard(FAST, last, measured, translation, rotation, timing)
    if not result.arm_moved:
        share = RAMP_SHARE if timing.in_ramp and Limit.LEASH not in result.limits else 1.0
        metres = min(FAST.max_translation_m, FAST.max_linear_speed_m_s * timing.seconds)
        radians = min(FAST.max_rotation_rad, FAST.max_angular_speed_rad_s * timing.seconds)
        assert distance_between(result.target, last) <= metres * share + EPSILON
        assert angle_between(result.target, last) <= radians * share + EPSILON


@given(poses, vectors, rotations, timings)
def test_no_velocity_changes_faster_than_the_limits_of_acceleration_allow_but_to_stay_inside(
    last, translation, rotation, timing
):
    limits = dataclasses.replace(FAST, ramp_in_steps=0, workspace_min=(-9.0,) * 3, workspace_max=(9.0,) * 3)
    timing = dataclasses.replace(timing, in_ramp=False)
    result = guard(
        limits, last, last, 0.01 * translation, Rotation.from_rotvec(0.01 * rotation.as_rotvec()), timing
    )
    if set(result.limits) <= {Limit.ACCELERATION}:
        now = twist_of(last, result.target, timing.seconds)
        most_m, most_rad = limits.max_linear_acceleration_m_s2, limits.max_angular_acceleration_rad_s2
        assert np.linalg.norm(now.linear - timing.last_velocity.linear) <= most_m * timing.seconds + EPSILON
        assert np.linalg.norm(now.angular - timing.last_velocity.angular) <= most_rad * timing.seconds + 1e-4


def test_each_limit_of_motion_in_time_is_named():
    still, fast = Twist.zero(), Twist(np.array([0.4, 0.0, 0.0]), np.zeros(3))
    wish = np.array([0.04, 0.0, 0.0])

    def limits_of(timing: StepTiming, **changes) -> tuple[Limit, ...]:
        return guard(dataclasses.replace(LIMITS, **changes), HOME, HOME, wish, STILL, timing).limits

    assert limits_of(StepTiming(0.1, still, False)) == ()
    assert limits_of(StepTiming(0.1, still, False), max_linear_speed_m_s=0.3) == (Limit.SPEED,)
    assert limits_of(StepTiming(0.1, still, False), max_linear_acceleration_m_s2=2.0) == (Limit.ACCELERATION,)
    assert limits_of(StepTiming(0.1, fast, False), max_linear_acceleration_m_s2=2.0) == ()
    assert limits_of(StepTiming(0.1, still, True)) == (Limit.RAMP_IN,)


def test_a_motion_that_only_the_leash_shortens_names_no_limit_of_speed():
    last = Pose(HOME.position + np.array([LIMITS.leash_m + 0.02, 0.0, 0.0]), HOME.quaternion)
    timing = StepTiming(0.1, Twist.zero(), in_ramp=False)
    back = np.array([-0.04, 0.0, 0.0])  # below the step limit of 0.05 m; the leash has used 0.02 m of it
    result = guard(LIMITS, last, HOME, back, STILL, timing)
    assert result.limits == (Limit.LEASH,)
    assert distance_between(result.target, last) == pytest.approx(0.05)


@given(st.sampled_from([field.name for field in dataclasses.fields(GuardLimits)]), st.floats(0.1, 0.9))
def test_a_limit_that_allows_more_than_before_is_found(name, share):
    tight = dataclasses.replace(FAST, ramp_in_steps=10)
    value = getattr(tight, name)
    wide = {
        "workspace_min": tuple(v - share for v in tight.workspace_min),
        "workspace_max": tuple(v + share for v in tight.workspace_max),
        "ramp_in_steps": 9,
    }.get(name, None if isinstance(value, tuple) else value * (1 + share))
    loose = dataclasses.replace(tight, **{name: wide})
    assert loose.loosened_from(tight) == [name]
    assert tight.loosened_from(loose) == [] == tight.loosened_from(tight)


def test_a_limit_taken_away_allows_more_and_a_new_one_less():
    free = dataclasses.replace(FAST, max_linear_speed_m_s=0.0)
    assert free.loosened_from(FAST) == ["max_linear_speed_m_s"] and FAST.loosened_from(free) == []


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


@pytest.mark.parametrize("wish", [[-0.03, 0.0, 0.0], [0.03, 0.0, 0.0], [0.0, 0.04, 0.0], [0.0, 0.0, 0.0]])
def test_an_arm_outside_the_box_is_brought_straight_in_without_a_jump_whatever_the_policy_wants(wish):
    outside = Pose(np.array([0.57, 0.0, 0.4]), HOME.quaternion)
    first = guard(LIMITS, outside, outside, np.array(wish), STILL)
    np.testing.assert_allclose(first.target.position, [0.52, 0.0, 0.4])
    assert first.limits == (Limit.WORKSPACE,)
    second = guard(LIMITS, first.target, first.target, np.array(wish), STILL)
    np.testing.assert_allclose(second.target.position, [0.5, 0.0, 0.4])


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
    outside = Pose(np.array([0.59, 0.0, 0.4]), HOME.quaternion)
    assert guard(LIMITS, outside, outside, np.array([-0.01, 0.0, 0.0]), STILL).limits == (Limit.WORKSPACE,)


@pytest.mark.parametrize(
    "change",
    [
        {"max_translation_m": 0.0},
        {"leash_rad": float("nan")},
        {"workspace_min": (0.6, -0.5, 0.0)},
        {"workspace_max": (0.5, 0.5)},
        {"max_linear_speed_m_s": -1.0},
        {"max_angular_acceleration_rad_s2": float("inf")},
        {"workspace_max": (0.5, 0.5, float("inf"))},
    ],
)
def test_limits_that_make_no_sense_are_refused_by_name(change):
    with pytest.raises(UserError, match=f"guard.{next(iter(change))}"):
        GuardLimits(**{**LIMITS.__dict__, **change})
