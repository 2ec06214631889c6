"""May the arm make this motion? Finite numbers, limits per step, a leash to the measured pose, a workspace box."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.motion import motion_between, moved
from deer_vla_ros.control.types import Limit, Pose
from deer_vla_ros.errors import UserError


@dataclass(frozen=True)
class GuardLimits:
    """All in the action frame.

    max_translation_m, max_rotation_rad: the most that a target may move in one step, from the last target on.
    leash_m, leash_rad: the furthest that a target may be from the measured pose.
    workspace_min, workspace_max: corners (3,) [m] of the box that targets stay in.
    """

    max_translation_m: float
    max_rotation_rad: float
    leash_m: float
    leash_rad: float
    workspace_min: tuple[float, float, float]
    workspace_max: tuple[float, float, float]

    def __post_init__(self) -> None:
        for name in ("max_translation_m", "max_rotation_rad", "leash_m", "leash_rad"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"guard.{name} is {value}: give a positive number")
        for name in ("workspace_min", "workspace_max"):
            corner = getattr(self, name)
            if len(corner) != 3 or not all(map(math.isfinite, corner)):
                raise UserError(f"guard.{name} is {corner}: give x, y and z, finite")
        if any(low >= high for low, high in zip(self.workspace_min, self.workspace_max)):
            raise UserError(
                f"guard.workspace_min {self.workspace_min} is not below guard.workspace_max {self.workspace_max} on every axis"
            )


@dataclass(frozen=True)
class Guarded:
    """A target that the arm may be given; start: where the step's motion begins; limits: what shortened it.

    arm_moved: the arm is so far from its last target that the leash alone would move it by more than a step allows; hold instead.
    """

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]
    arm_moved: bool


def is_beyond_workspace(limits: GuardLimits, measured: Pose) -> bool:
    """Whether the arm is further outside the box than the leash reaches: no target in the box is then near enough to be given."""
    nearest = np.clip(measured.position, limits.workspace_min, limits.workspace_max)
    return bool(np.linalg.norm(measured.position - nearest) > limits.leash_m)


def guard(limits: GuardLimits, last_target: Pose, measured: Pose, translation: np.ndarray, rotation: Rotation) -> Guarded:
    """The motion from the last target, shortened until every limit holds. All arguments are finite.

    Not for an arm that `is_beyond_workspace`. A last target outside the box (the arm was there when control began) may come back
    in, never go further out, and never jumps. Box and leash are convex and every point below is reached from one inside both, so
    shortening for one never breaks the other, nor the limit per step.
    """
    low = np.minimum(limits.workspace_min, last_target.position)
    high = np.maximum(limits.workspace_max, last_target.position)
    # Should the arm have been moved away, the step starts as near to the last target as the leash reaches.
    start = Pose(
        _towards(np.clip(measured.position, low, high), last_target.position, measured.position, limits.leash_m),
        _within(measured, last_target, limits.leash_rad),
    )
    dragged, turned = motion_between(last_target, start)
    left_m = limits.max_translation_m - float(np.linalg.norm(dragged))
    left_rad = limits.max_rotation_rad - float(turned.magnitude())

    shortened: list[Limit] = []
    distance, angle = float(np.linalg.norm(translation)), float(rotation.magnitude())
    if distance > max(left_m, 0.0):
        translation = translation * (max(left_m, 0.0) / distance)
        shortened.append(Limit.TRANSLATION)
    if angle > max(left_rad, 0.0):
        rotation = Rotation.from_rotvec(rotation.as_rotvec() * (max(left_rad, 0.0) / angle))
        shortened.append(Limit.ROTATION)
    wanted = moved(start, translation, rotation)

    boxed = np.clip(wanted.position, low, high)
    target = Pose(_towards(start.position, boxed, measured.position, limits.leash_m), _within(measured, wanted, limits.leash_rad))
    is_outside = ((target.position < limits.workspace_min) | (target.position > limits.workspace_max)).any()
    if is_outside or not np.array_equal(boxed, wanted.position):
        shortened.append(Limit.WORKSPACE)
    is_leashed = target.position is not boxed or target.quaternion is not wanted.quaternion
    if is_leashed or start.position is not last_target.position or start.quaternion is not last_target.quaternion:
        shortened.append(Limit.LEASH)
    return Guarded(start, target, tuple(shortened), arm_moved=min(left_m, left_rad) < 0)


def _towards(start: np.ndarray, end: np.ndarray, anchor: np.ndarray, radius: float) -> np.ndarray:
    """`end` itself where it is within `radius` of `anchor`, else the last point on the way from `start`, which is, that is too."""
    if np.linalg.norm(end - anchor) <= radius:
        return end
    way, offset = end - start, start - anchor
    # |offset + t * way| = radius, its larger solution t
    a, b, c = way @ way, offset @ way, min(offset @ offset - radius**2, 0.0)
    if a == 0.0:
        return start
    return start + way * np.clip((-b + math.sqrt(b * b - a * c)) / a, 0.0, 1.0)


def _within(anchor: Pose, pose: Pose, radius_rad: float) -> np.ndarray:
    """`pose`'s own quaternion where it is within `radius_rad` of `anchor`, else that of the nearest orientation that is."""
    _, rotation = motion_between(anchor, pose)
    angle = rotation.magnitude()
    if angle <= radius_rad:
        return pose.quaternion
    shorter = Rotation.from_rotvec(rotation.as_rotvec() * (radius_rad / angle))
    return moved(anchor, np.zeros(3), shorter).quaternion
