"""The guard: it shortens a motion until the limits of step, speed, acceleration, workspace and leash hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.motion import motion_between, moved
from deer_vla_ros.control.types import Limit, Pose, Twist
from deer_vla_ros.errors import UserError

RAMP_SHARE = 1 / 3
"""Share of the limits that the first steps after a hold may use."""
RATES = (
    "max_linear_speed_m_s",
    "max_angular_speed_rad_s",
    "max_linear_acceleration_m_s2",
    "max_angular_acceleration_rad_s2",
)


@dataclass(frozen=True)
class GuardLimits:
    """The limits of a motion, in the action frame.

    max_translation_m, max_rotation_rad: the most that one step may move the target. leash_m, leash_rad: the
    largest distance of the target from the measured pose. workspace_min, workspace_max: corners (3,) [m] of
    the box in which targets stay. The max_*_speed_* and max_*_acceleration_* values limit the target's
    velocity and its change; 0: no limit. ramp_in_steps: number of steps after a hold that may use only
    RAMP_SHARE of the limits of step and speed.
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
                raise UserError(f"guard.{name} is {value}: give a positive number")
        for name in (*RATES, "ramp_in_steps"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"guard.{name} is {value}: give a positive number, or 0")
        for name in ("workspace_min", "workspace_max"):
            corner = getattr(self, name)
            if len(corner) != 3 or not all(map(math.isfinite, corner)):
                raise UserError(f"guard.{name} is {corner}: give x, y and z, finite")
        if any(low >= high for low, high in zip(self.workspace_min, self.workspace_max)):
            raise UserError(
                f"guard.workspace_min {self.workspace_min} is not below "
                f"guard.workspace_max {self.workspace_max} on every axis"
            )

    def loosened_from(self, before: GuardLimits) -> list[str]:
        """Names of the limits that allow more than they do in `before`."""
        return [
            field.name
            for field in fields(self)
            if _allows_more(field.name, getattr(self, field.name), getattr(before, field.name))
        ]


@dataclass(frozen=True)
class StepTiming:
    """The time of one step.

    seconds: since the last target was given, at most one control period. before: velocity of the target in
    the last step; zero after a hold. in_ramp: whether this is one of the first steps after a hold.
    """

    seconds: float
    before: Twist
    in_ramp: bool


@dataclass(frozen=True)
class Guarded:
    """The result of `guard`.

    start: the pose at which this step's motion begins. target: the pose that the arm may be given. limits:
    the limits that changed the motion. arm_moved: the arm is so far from its last target that the leash alone
    would move the target by more than a step allows; the caller must hold instead.
    """

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]
    arm_moved: bool


def is_beyond_workspace(limits: GuardLimits, measured: Pose) -> bool:
    """Whether the arm is further outside the box than the leash reaches, so that no target in the box is near
    enough."""
    return bool(
        np.linalg.norm(measured.position - _nearest_inside(limits, measured.position)) > limits.leash_m
    )


def is_near(limits: GuardLimits, pose: Pose, measured: Pose) -> bool:
    """Whether `pose` is within one step and within the leash of the measured pose."""
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
    """Shortens the motion from the last target until every limit holds. All arguments must be finite.

    translation (3,) [m], rotation: the motion that the policy wants, along the fixed axes of the action
    frame. timing: None leaves out the limits of speed and acceleration and the ramp. The caller must not pass
    an arm that `is_beyond_workspace`.

    A last target outside the box (the arm was there when control began) moves straight into the box, whatever
    the policy wants; its distance from the box never grows.

    The box and the leash are convex, and each point below is reached from a point inside both. So shortening
    for one of them never breaks the other, nor the limit per step. These limits may slow the target down
    faster than the limit of acceleration allows.
    """
    low = np.minimum(limits.workspace_min, last_target.position)
    high = np.maximum(limits.workspace_max, last_target.position)
    # If the arm was moved away, the step starts at the point of the leash that is nearest to the last target.
    inside = np.clip(measured.position, low, high)
    position, start_moved_by_leash = _towards(inside, last_target.position, measured.position, limits.leash_m)
    quaternion, start_turned_by_leash = _within(measured, last_target, limits.leash_rad)
    start = Pose(position, quaternion)
    dragged, turned = motion_between(last_target, start)
    metres, radians = _step_limits(limits, timing)
    left_m, left_rad = metres - float(np.linalg.norm(dragged)), radians - float(turned.magnitude())

    nearest = _nearest_inside(limits, start.position)
    starts_outside = not np.array_equal(nearest, start.position)
    if starts_outside:
        translation = nearest - start.position
    translation, rotation, acceleration_acted = _accelerated(limits, timing, translation, rotation)
    translation, translation_limit = _shortened(
        translation, left_m, limits.max_translation_m, timing, Limit.TRANSLATION
    )
    turn, rotation_limit = _shortened(
        rotation.as_rotvec(), left_rad, limits.max_rotation_rad, timing, Limit.ROTATION
    )
    wanted = moved(start, translation, Rotation.from_rotvec(turn))

    boxed = np.clip(wanted.position, low, high)
    position, end_moved_by_leash = _towards(start.position, boxed, measured.position, limits.leash_m)
    quaternion, end_turned_by_leash = _within(measured, wanted, limits.leash_rad)

    box_acted = not np.array_equal(boxed, wanted.position)
    leash_acted = start_moved_by_leash or start_turned_by_leash or end_moved_by_leash or end_turned_by_leash
    acted = (
        Limit.WORKSPACE if starts_outside else None,
        Limit.ACCELERATION if acceleration_acted else None,
        None if starts_outside else translation_limit,  # the way into the box usually takes several steps
        rotation_limit,
        Limit.WORKSPACE if box_acted else None,
        Limit.LEASH if leash_acted else None,
    )
    return Guarded(
        start,
        Pose(position, quaternion),
        limits=tuple(dict.fromkeys(limit for limit in acted if limit is not None)),
        arm_moved=min(left_m, left_rad) < 0,
    )


def _nearest_inside(limits: GuardLimits, position: np.ndarray) -> np.ndarray:
    return np.clip(position, limits.workspace_min, limits.workspace_max)


def _allows_more(name: str, now: object, before: object) -> bool:
    """Whether a limit's new value allows more than the one before.

    For RATES, 0 means no limit. A smaller ramp or a smaller lower corner allows more.
    """
    if name in RATES:
        return (now or math.inf) > (before or math.inf)
    if name == "workspace_min":
        return any(new < old for new, old in zip(now, before))
    if name == "workspace_max":
        return any(new > old for new, old in zip(now, before))
    return now < before if name == "ramp_in_steps" else now > before


def _step_limits(limits: GuardLimits, timing: StepTiming | None) -> tuple[float, float]:
    """The most that this step may move the target by the limits per step and of speed, [m] and [rad]."""
    metres, radians = limits.max_translation_m, limits.max_rotation_rad
    if timing is not None and limits.max_linear_speed_m_s:
        metres = min(metres, limits.max_linear_speed_m_s * timing.seconds)
    if timing is not None and limits.max_angular_speed_rad_s:
        radians = min(radians, limits.max_angular_speed_rad_s * timing.seconds)
    return metres, radians


def _accelerated(
    limits: GuardLimits, timing: StepTiming | None, translation: np.ndarray, rotation: Rotation
) -> tuple[np.ndarray, Rotation, bool]:
    """The nearest motion that keeps the limits of acceleration, and whether it differs from the given one."""
    if timing is None:
        return translation, rotation, False
    seconds, turn, translation_changed, turn_changed = timing.seconds, rotation.as_rotvec(), False, False
    if limits.max_linear_acceleration_m_s2:
        most = limits.max_linear_acceleration_m_s2 * seconds**2
        translation, translation_changed = _near(translation, timing.before.linear * seconds, most)
    if limits.max_angular_acceleration_rad_s2:
        most = limits.max_angular_acceleration_rad_s2 * seconds**2
        turn, turn_changed = _near(turn, timing.before.angular * seconds, most)
    return translation, Rotation.from_rotvec(turn), translation_changed or turn_changed


def _near(vector: np.ndarray, centre: np.ndarray, radius: float) -> tuple[np.ndarray, bool]:
    """The point nearest to `vector` within `radius` of `centre`, and whether it differs from `vector`."""
    distance = float(np.linalg.norm(vector - centre))
    if distance <= radius:
        return vector, False
    return centre + (vector - centre) * (radius / distance), True


def _shortened(
    motion: np.ndarray, left: float, per_step: float, timing: StepTiming | None, step_limit: Limit
) -> tuple[np.ndarray, Limit | None]:
    """`motion` (3,), at most `left` long (in the ramp, its share of `left`), and the limit that shortened it.

    left: what the leash has left over of the limits per step and of speed; negative if it used more than all.
    per_step: the limit per step alone; `step_limit` is its name.
    """
    share = RAMP_SHARE if timing is not None and timing.in_ramp else 1.0
    most, length = max(left * share, 0.0), float(np.linalg.norm(motion))
    if length <= most:
        return motion, None
    if length <= max(left, 0.0):
        limit = Limit.RAMP_IN
    elif length > per_step or timing is None:
        limit = step_limit
    else:
        limit = Limit.SPEED
    return motion * (most / length), limit


def _towards(
    start: np.ndarray, end: np.ndarray, anchor: np.ndarray, radius: float
) -> tuple[np.ndarray, bool]:
    """The last point from `start` towards `end` within `radius` of `anchor`, and whether it is not `end`.

    `start` must be within `radius` of `anchor`.
    """
    if np.linalg.norm(end - anchor) <= radius:
        return end, False
    way, offset = end - start, start - anchor
    # The larger solution t of |offset + t * way| = radius.
    a, b, c = way @ way, offset @ way, min(offset @ offset - radius**2, 0.0)
    if a == 0.0:
        return start, True
    return start + way * np.clip((-b + math.sqrt(b * b - a * c)) / a, 0.0, 1.0), True


def _within(anchor: Pose, pose: Pose, radius_rad: float) -> tuple[np.ndarray, bool]:
    """Quaternion (4,) of the orientation nearest to `pose` within `radius_rad` of `anchor`, and whether it
    differs from that of `pose`."""
    _, rotation = motion_between(anchor, pose)
    angle = rotation.magnitude()
    if angle <= radius_rad:
        return pose.quaternion, False
    shorter = Rotation.from_rotvec(rotation.as_rotvec() * (radius_rad / angle))
    return moved(anchor, np.zeros(3), shorter).quaternion, True
