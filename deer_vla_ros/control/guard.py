"""The guard: it shortens a motion until it keeps every limit of step, speed, acceleration, workspace and
leash."""

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
    """All in the action frame.

    max_translation_m, max_rotation_rad: the most that a target may move in one step, from the last target on.
    leash_m, leash_rad: the furthest that a target may be from the measured pose. workspace_min,
    workspace_max: corners (3,) [m] of the box that targets stay in. max_linear_speed_m_s and the three after
    it bound how fast the target moves and how fast that changes; 0: no limit. ramp_in_steps: so many steps
    after a hold may use only RAMP_SHARE of the limits per step and of speed.
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
                f"guard.workspace_min {self.workspace_min} is not below guard.workspace_max {self.workspace_max} on every axis"
            )

    def loosened_from(self, before: GuardLimits) -> list[str]:
        """Names of the limits that allow more than they did `before`."""
        return [
            field.name
            for field in fields(self)
            if _allows_more(field.name, getattr(self, field.name), getattr(before, field.name))
        ]


@dataclass(frozen=True)
class StepTiming:
    """seconds: since the last target was given, at most a control period. before: how fast the target moved
    then; zero after a hold. in_ramp: whether the step is one of the first after a hold."""

    seconds: float
    before: Twist
    in_ramp: bool


@dataclass(frozen=True)
class Guarded:
    """A target that the arm may be given; start: where the step's motion begins; limits: what changed it.

    arm_moved: the arm is so far from its last target that the leash alone would move it by more than a step
    allows; hold instead.
    """

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]
    arm_moved: bool


def is_beyond_workspace(limits: GuardLimits, measured: Pose) -> bool:
    """Whether the arm is further outside the box than the leash reaches: no target in the box is then near
    enough to be given."""
    return bool(
        np.linalg.norm(measured.position - _nearest_inside(limits, measured.position)) > limits.leash_m
    )


def is_near(limits: GuardLimits, pose: Pose, measured: Pose) -> bool:
    """Whether an arm that is told to go to `pose` moves by no more than one step, and stays on the leash."""
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
    """The motion from the last target, shortened until every limit holds. All arguments are finite.

    translation (3,) [m], rotation: what the policy wants, along the fixed axes of the action frame. timing:
    None leaves speed, acceleration and the ramp out.

    Not for an arm that `is_beyond_workspace`. A last target outside the box (the arm was there when control
    began) is brought straight in, whatever the policy wants; its distance from the box never grows. Box and
    leash are convex and every point below is reached from one inside both, so shortening for one never breaks
    the other, nor the limit per step. Slowing down for box, leash and step comes before the limit of
    acceleration.
    """
    low = np.minimum(limits.workspace_min, last_target.position)
    high = np.maximum(limits.workspace_max, last_target.position)
    # Should the arm have been moved away, the step starts as near to the last target as the leash reaches.
    inside = np.clip(measured.position, low, high)
    position, is_dragged = _towards(inside, last_target.position, measured.position, limits.leash_m)
    quaternion, is_turned = _within(measured, last_target, limits.leash_rad)
    start = Pose(position, quaternion)
    dragged, turned = motion_between(last_target, start)
    metres, radians = _step_limits(limits, timing)
    left_m, left_rad = metres - float(np.linalg.norm(dragged)), radians - float(turned.magnitude())

    found: list[Limit] = []
    nearest = _nearest_inside(limits, start.position)
    was_outside = not np.array_equal(nearest, start.position)
    if was_outside:
        translation = nearest - start.position
        found.append(Limit.WORKSPACE)
    translation, rotation = _accelerated(limits, timing, translation, rotation, found)
    told = [] if was_outside else found  # that the way back in takes several steps is no news
    translation = _shortened(translation, left_m, limits.max_translation_m, timing, told, Limit.TRANSLATION)
    turn = _shortened(rotation.as_rotvec(), left_rad, limits.max_rotation_rad, timing, found, Limit.ROTATION)
    wanted = moved(start, translation, Rotation.from_rotvec(turn))

    boxed = np.clip(wanted.position, low, high)
    position, is_held_back = _towards(start.position, boxed, measured.position, limits.leash_m)
    quaternion, is_turned_back = _within(measured, wanted, limits.leash_rad)
    if not np.array_equal(boxed, wanted.position):
        found.append(Limit.WORKSPACE)
    if is_dragged or is_turned or is_held_back or is_turned_back:
        found.append(Limit.LEASH)
    return Guarded(
        start, Pose(position, quaternion), tuple(dict.fromkeys(found)), arm_moved=min(left_m, left_rad) < 0
    )


def _nearest_inside(limits: GuardLimits, position: np.ndarray) -> np.ndarray:
    return np.clip(position, limits.workspace_min, limits.workspace_max)


def _allows_more(name: str, now: object, before: object) -> bool:
    """Whether a limit's new value allows more. 0 means no limit for RATES; a ramp or a lower corner allows
    more when it is less."""
    if name in RATES:
        return (now or math.inf) > (before or math.inf)
    if name == "workspace_min":
        return any(new < old for new, old in zip(now, before))
    if name == "workspace_max":
        return any(new > old for new, old in zip(now, before))
    return now < before if name == "ramp_in_steps" else now > before


def _step_limits(limits: GuardLimits, timing: StepTiming | None) -> tuple[float, float]:
    """The most that a target may move in this step by the limits per step and of speed, [m] and [rad]."""
    metres, radians = limits.max_translation_m, limits.max_rotation_rad
    if timing is not None and limits.max_linear_speed_m_s:
        metres = min(metres, limits.max_linear_speed_m_s * timing.seconds)
    if timing is not None and limits.max_angular_speed_rad_s:
        radians = min(radians, limits.max_angular_speed_rad_s * timing.seconds)
    return metres, radians


def _accelerated(
    limits: GuardLimits,
    timing: StepTiming | None,
    translation: np.ndarray,
    rotation: Rotation,
    found: list[Limit],
) -> tuple[np.ndarray, Rotation]:
    """The motion whose velocity differs from the last one by no more than the limits of acceleration allow."""
    if timing is None:
        return translation, rotation
    seconds, turn = timing.seconds, rotation.as_rotvec()
    if limits.max_linear_acceleration_m_s2:
        most = limits.max_linear_acceleration_m_s2 * seconds**2
        translation = _near(translation, timing.before.linear * seconds, most, found)
    if limits.max_angular_acceleration_rad_s2:
        most = limits.max_angular_acceleration_rad_s2 * seconds**2
        turn = _near(turn, timing.before.angular * seconds, most, found)
    return translation, Rotation.from_rotvec(turn)


def _near(vector: np.ndarray, centre: np.ndarray, radius: float, found: list[Limit]) -> np.ndarray:
    """`vector`, or the point nearest to it that is within `radius` of `centre`."""
    distance = float(np.linalg.norm(vector - centre))
    if distance <= radius:
        return vector
    found.append(Limit.ACCELERATION)
    return centre + (vector - centre) * (radius / distance)


def _shortened(
    motion: np.ndarray,
    left: float,
    per_step: float,
    timing: StepTiming | None,
    found: list[Limit],
    limit: Limit,
) -> np.ndarray:
    """`motion` (3,) with its length at most `left`, and in a ramp at most the ramp's share of `per_step`, and
    what shortened it.

    left: what the limits per step and of speed have left over; it is negative where the leash has used up
    more than all.
    """
    share = RAMP_SHARE if timing is not None and timing.in_ramp else 1.0
    most, length = max(left * share, 0.0), float(np.linalg.norm(motion))
    if length <= most:
        return motion
    if length > max(left, 0.0):
        found.append(limit if length > per_step or timing is None else Limit.SPEED)
    else:
        found.append(Limit.RAMP_IN)
    return motion * (most / length)


def _towards(
    start: np.ndarray, end: np.ndarray, anchor: np.ndarray, radius: float
) -> tuple[np.ndarray, bool]:
    """`end` where it is within `radius` of `anchor`, else the last point on the way from `start`, which is,
    that is too; and whether it is not `end`."""
    if np.linalg.norm(end - anchor) <= radius:
        return end, False
    way, offset = end - start, start - anchor
    # |offset + t * way| = radius, its larger solution t
    a, b, c = way @ way, offset @ way, min(offset @ offset - radius**2, 0.0)
    if a == 0.0:
        return start, True
    return start + way * np.clip((-b + math.sqrt(b * b - a * c)) / a, 0.0, 1.0), True


def _within(anchor: Pose, pose: Pose, radius_rad: float) -> tuple[np.ndarray, bool]:
    """`pose`'s own quaternion where it is within `radius_rad` of `anchor`, else that of the nearest
    orientation that is; and whether it is not its own."""
    _, rotation = motion_between(anchor, pose)
    angle = rotation.magnitude()
    if angle <= radius_rad:
        return pose.quaternion, False
    shorter = Rotation.from_rotvec(rotation.as_rotvec() * (radius_rad / angle))
    return moved(anchor, np.zeros(3), shorter).quaternion, True
