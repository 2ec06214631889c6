"""The guard: it changes a motion so that it keeps the limits of step, speed, acceleration, workspace and
leash.

The workspace is a box along the axes of the action frame. The leash is the region of all poses within leash_m
and leash_rad of the measured pose. A hold is a stop of the arm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.motion import motion_between, moved
from deer_vla_ros.control.types import Limit, Pose, Twist
from deer_vla_ros.errors import UserError

RAMP_SHARE = 1 / 3
"""Share of what a step may move and turn, after the leash moved the start, that a step of the ramp may use.
"""
RATES = (
    "max_linear_speed_m_s",
    "max_angular_speed_rad_s",
    "max_linear_acceleration_m_s2",
    "max_angular_acceleration_rad_s2",
)
"""Names of the limits of speed and acceleration. The value 0 means that there is no such limit."""


@dataclass(frozen=True)
class GuardLimits:
    """The limits of a motion, in the action frame (the frame of the policy's actions).

    max_translation_m, max_rotation_rad: the step limits, which are the most that one step may move and turn
    the target. leash_m, leash_rad: the largest distance of the target from the measured pose. workspace_min,
    workspace_max: corners (3,) [m] of the box in which targets stay. max_*_speed_* [m/s], [rad/s] and
    max_*_acceleration_* [m/s2], [rad/s2]: limits of the target's velocity and of its change; the value 0
    means that there is no limit. ramp_in_steps: number of steps after a hold that are part of the ramp; the
    caller counts them (`StepTiming.in_ramp`).

    Raises UserError if a value is not finite, if a step limit or the leash is not above 0, if a limit of
    speed or acceleration or ramp_in_steps is below 0, if a corner has not three numbers, or if workspace_min
    is not below workspace_max on every axis.
    """

    max_translation_m: float
    max_rotation_rad: float
    leash_m: float
    leash_rad: float
    workspace_min: tuple[float, float, float]
    workspace_max: tuple[float, float, float]
    max_linear_speed_m_s: float = 0.0
    max_angular_speed_rad_s: float = 0.0
    max_linear_acceleration_m_s2: float = 0.0
    max_angular_acceleration_rad_s2: float = 0.0
    ramp_in_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("max_translation_m", "max_rotation_rad", "leash_m", "leash_rad"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"guard.{name} is {value}: give a finite number above 0")
        for name in (*RATES, "ramp_in_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"guard.{name} is {value}: give a finite number, 0 or above")
        for name in ("workspace_min", "workspace_max"):
            corner = getattr(self, name)
            if len(corner) != 3 or not all(map(math.isfinite, corner)):
                raise UserError(f"guard.{name} is {corner}: give three finite numbers x, y, z [m]")
        if any(low >= high for low, high in zip(self.workspace_min, self.workspace_max)):
            raise UserError(
                f"guard.workspace_min {self.workspace_min} must be below guard.workspace_max "
                f"{self.workspace_max} on every axis: change one of them"
            )

    def loosened_from(self, old: GuardLimits) -> list[str]:
        """Returns the names of the limits that allow more than they do in `old`."""
        return [
            field.name
            for field in fields(self)
            if _allows_more(field.name, getattr(self, field.name), getattr(old, field.name))
        ]


@dataclass(frozen=True)
class StepTiming:
    """The time of one step.

    seconds: the time since the last target was given [s]; the caller never gives more than one control
    period. last_velocity: velocity of the target in the last step, in the action frame; zero after a hold.
    in_ramp: whether this is one of the first `ramp_in_steps` steps after a hold.
    """

    seconds: float
    last_velocity: Twist
    in_ramp: bool


@dataclass(frozen=True)
class Guarded:
    """The result of `guard`.

    start: the pose at which this step's motion begins; it is the last target, unless the leash moved it.
    target: the pose to command. limits: the limits that changed the motion. arm_moved: the arm is so far from
    the last target that the leash alone would move the target by more than this step allows. The caller must
    then hold and must not use `target`.
    """

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]
    arm_moved: bool


def is_beyond_workspace(limits: GuardLimits, measured: Pose) -> bool:
    """Whether the measured position is more than leash_m outside the box. No target in the box is then within
    the leash."""
    return bool(
        np.linalg.norm(measured.position - _nearest_inside(limits, measured.position)) > limits.leash_m
    )


def is_near(limits: GuardLimits, pose: Pose, measured: Pose) -> bool:
    """Whether `pose` differs from the measured pose by no more than the step limits and the leash. A pose
    that was commanded before may then be commanded again."""
    metres, radians = measured.apart(pose)
    return metres <= min(limits.max_translation_m, limits.leash_m) and radians <= min(
        limits.max_rotation_rad, limits.leash_rad
    )


def guard(
    limits: GuardLimits,
    last_target: Pose,
    measured: Pose,
    translation: np.ndarray,
    rotation: Rotation,
    timing: StepTiming | None = None,
) -> Guarded:
    """Changes the motion from the last target so that it keeps the limits.

    last_target, measured: poses in the action frame. translation (3,) [m], rotation: the motion that the
    policy wants, along and about the fixed axes of the action frame (`motion.moved`). timing: None leaves out
    the limits of speed and acceleration and the ramp.

    The caller checks two things before, and `guard` does not: all numbers are finite, and
    `is_beyond_workspace` is False.

    If the start is outside the box (the arm was there when control began), the target moves towards the
    nearest point of the box. The policy's translation is then ignored, its rotation is still used. The target
    never gets farther from the box.

    The box, widened so that it contains the last target, and the leash are convex, and the start is in both.
    Clipping to the box and cutting at the leash never make the way from the start longer. So they break
    neither each other nor the step limit. Only the acceleration may exceed its limit: where the leash moves
    the start, and where another limit stops the target.
    """
    low = np.minimum(limits.workspace_min, last_target.position)
    high = np.maximum(limits.workspace_max, last_target.position)
    # If the arm was moved away from the last target, the step starts where the way to the last target leaves
    # the leash. The way begins at the point of the widened box that is nearest to the measured position.
    inside = np.clip(measured.position, low, high)
    position, start_moved_by_leash = _towards(inside, last_target.position, measured.position, limits.leash_m)
    quaternion, start_turned_by_leash = _turned_within(measured, last_target, limits.leash_rad)
    start = Pose(position, quaternion)
    dragged, turned = motion_between(last_target, start)
    metres, radians = _allowances(limits, timing)
    remaining_m = metres - float(np.linalg.norm(dragged))
    remaining_rad = radians - float(turned.magnitude())

    nearest = _nearest_inside(limits, start.position)
    starts_outside = not np.array_equal(nearest, start.position)
    if starts_outside:
        translation = nearest - start.position
    translation, rotation, acceleration_acted = _accelerated(limits, timing, translation, rotation)
    in_ramp = timing is not None and timing.in_ramp
    translation, translation_limit = _shortened(
        translation, remaining_m, metres, limits.max_translation_m, in_ramp, Limit.TRANSLATION
    )
    turn, rotation_limit = _shortened(
        rotation.as_rotvec(), remaining_rad, radians, limits.max_rotation_rad, in_ramp, Limit.ROTATION
    )
    wanted = moved(start, translation, Rotation.from_rotvec(turn))

    boxed = np.clip(wanted.position, low, high)
    position, end_moved_by_leash = _towards(start.position, boxed, measured.position, limits.leash_m)
    quaternion, end_turned_by_leash = _turned_within(measured, wanted, limits.leash_rad)

    box_acted = not np.array_equal(boxed, wanted.position)
    leash_acted = start_moved_by_leash or start_turned_by_leash or end_moved_by_leash or end_turned_by_leash
    acted = (
        Limit.WORKSPACE if starts_outside else None,
        Limit.ACCELERATION if acceleration_acted else None,
        # The way into the box usually takes several steps, so what shortens it is expected and not reported.
        None if starts_outside else translation_limit,
        rotation_limit,
        Limit.WORKSPACE if box_acted else None,
        Limit.LEASH if leash_acted else None,
    )
    return Guarded(
        start,
        Pose(position, quaternion),
        limits=tuple(dict.fromkeys(limit for limit in acted if limit is not None)),
        arm_moved=min(remaining_m, remaining_rad) < 0,
    )


def _nearest_inside(limits: GuardLimits, position: np.ndarray) -> np.ndarray:
    """Returns the point (3,) of the box that is nearest to `position` (3,), both [m]."""
    return np.clip(position, limits.workspace_min, limits.workspace_max)


def _allows_more(name: str, new: object, old: object) -> bool:
    """Whether a limit's new value allows more than the old one.

    For RATES, 0 means that there is no limit. Fewer ramp steps, and a smaller value on any axis of
    workspace_min, allow more.
    """
    if name in RATES:
        return (new or math.inf) > (old or math.inf)
    if name == "workspace_min":
        return any(after < before for after, before in zip(new, old))
    if name == "workspace_max":
        return any(after > before for after, before in zip(new, old))
    return new < old if name == "ramp_in_steps" else new > old


def _allowances(limits: GuardLimits, timing: StepTiming | None) -> tuple[float, float]:
    """Returns how far this step may move [m] and turn [rad] the target: by the step limit, or by the speed
    limit times the step's time if that is less."""
    metres, radians = limits.max_translation_m, limits.max_rotation_rad
    if timing is not None and limits.max_linear_speed_m_s:
        metres = min(metres, limits.max_linear_speed_m_s * timing.seconds)
    if timing is not None and limits.max_angular_speed_rad_s:
        radians = min(radians, limits.max_angular_speed_rad_s * timing.seconds)
    return metres, radians


def _accelerated(
    limits: GuardLimits, timing: StepTiming | None, translation: np.ndarray, rotation: Rotation
) -> tuple[np.ndarray, Rotation, bool]:
    """Returns the nearest motion that keeps the limits of acceleration, and whether it differs from the given
    one."""
    if timing is None:
        return translation, rotation, False
    seconds, turn, translation_changed, turn_changed = timing.seconds, rotation.as_rotvec(), False, False
    if limits.max_linear_acceleration_m_s2:
        most = limits.max_linear_acceleration_m_s2 * seconds**2
        translation, translation_changed = _nearest_in_ball(
            translation, timing.last_velocity.linear * seconds, most
        )
    if limits.max_angular_acceleration_rad_s2:
        most = limits.max_angular_acceleration_rad_s2 * seconds**2
        turn, turn_changed = _nearest_in_ball(turn, timing.last_velocity.angular * seconds, most)
    return translation, Rotation.from_rotvec(turn), translation_changed or turn_changed


def _nearest_in_ball(vector: np.ndarray, centre: np.ndarray, radius: float) -> tuple[np.ndarray, bool]:
    """Returns the point (3,) nearest to `vector` within `radius` of `centre`, and whether it differs from
    `vector`. All have one unit, [m] or [rad]."""
    distance = float(np.linalg.norm(vector - centre))
    if distance <= radius:
        return vector, False
    return centre + (vector - centre) * (radius / distance), True


def _shortened(
    motion: np.ndarray, remaining: float, allowance: float, per_step: float, in_ramp: bool, step_limit: Limit
) -> tuple[np.ndarray, Limit | None]:
    """Shortens `motion` (3,) to the length `remaining`, or to RAMP_SHARE of it in the ramp.

    Returns the motion and one limit that shortened it: RAMP_IN if it was not longer than `remaining`; None if
    it was not longer than the allowance, because then the leash shortened it; the step limit if it was longer
    than that; otherwise SPEED. None also if nothing was shortened.

    remaining: what remains of the allowance after the leash moved the start; negative if the leash needed
    more than the allowance. allowance: the smaller of the step limit and the speed limit times the step's
    time. per_step: the step limit alone; `step_limit` is its name. All lengths have one unit, [m] or [rad].
    """
    share = RAMP_SHARE if in_ramp else 1.0
    most, length = max(remaining * share, 0.0), float(np.linalg.norm(motion))
    if length <= most:
        return motion, None
    if length <= max(remaining, 0.0):
        limit = Limit.RAMP_IN
    elif length <= allowance:
        limit = None
    else:
        limit = step_limit if length > per_step else Limit.SPEED
    return motion * (most / length), limit


def _towards(
    start: np.ndarray, end: np.ndarray, centre: np.ndarray, radius: float
) -> tuple[np.ndarray, bool]:
    """Goes from `start` straight to `end` and stops where the distance from `centre` would become larger than
    `radius`. Returns that point (3,), and whether it stopped before `end`. All are in [m].

    `start` must be within `radius` of `centre`.
    """
    if np.linalg.norm(end - centre) <= radius:
        return end, False
    way, offset = end - start, start - centre
    # The larger solution t of |offset + t * way| = radius.
    a, b, c = way @ way, offset @ way, min(offset @ offset - radius**2, 0.0)
    if a == 0.0:
        return start, True
    return start + way * np.clip((-b + math.sqrt(b * b - a * c)) / a, 0.0, 1.0), True


def _turned_within(centre: Pose, pose: Pose, radius_rad: float) -> tuple[np.ndarray, bool]:
    """Turns the orientation of `pose` towards that of `centre` until the angle between them is at most
    radius_rad. Returns the quaternion (4,) x y z w, and whether it was turned."""
    _, rotation = motion_between(centre, pose)
    angle = rotation.magnitude()
    if angle <= radius_rad:
        return pose.quaternion, False
    shorter = Rotation.from_rotvec(rotation.as_rotvec() * (radius_rad / angle))
    return moved(centre, np.zeros(3), shorter).quaternion, True
