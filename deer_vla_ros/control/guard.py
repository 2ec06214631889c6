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

    max_translation_m, max_rotation_rad: the most that a target may move in one step.
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
        corners = (*self.workspace_min, *self.workspace_max)
        if len(corners) != 6 or not all(map(math.isfinite, corners)):
            raise UserError(
                f"guard.workspace_min {self.workspace_min} and guard.workspace_max {self.workspace_max}: give x, y, z each, finite"
            )
        if any(low >= high for low, high in zip(self.workspace_min, self.workspace_max)):
            raise UserError(
                f"guard.workspace_min {self.workspace_min} is not below guard.workspace_max {self.workspace_max} on every axis"
            )


@dataclass(frozen=True)
class Guarded:
    """A target that the arm may be given; start: where the step's motion begins; limits: what shortened it."""

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]


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
    shortened: list[Limit] = []
    low = np.minimum(limits.workspace_min, last_target.position)
    high = np.maximum(limits.workspace_max, last_target.position)
    # Should the arm have been moved away, the step starts as near to the last target as the leash reaches.
    inside = np.clip(measured.position, low, high)
    start = Pose(
        _towards(inside, last_target.position, measured.position, limits.leash_m),
        _within(measured, last_target, limits.leash_rad),
    )

    distance = float(np.linalg.norm(translation))
    if distance > limits.max_translation_m:
        translation = translation * (limits.max_translation_m / distance)
        shortened.append(Limit.TRANSLATION)
    angle = rotation.magnitude()
    if angle > limits.max_rotation_rad:
        rotation = Rotation.from_rotvec(rotation.as_rotvec() * (limits.max_rotation_rad / angle))
        shortened.append(Limit.ROTATION)
    wanted = moved(start, translation, rotation)

    boxed = np.clip(wanted.position, low, high)
    if not np.array_equal(boxed, wanted.position):
        shortened.append(Limit.WORKSPACE)
    target = Pose(_towards(start.position, boxed, measured.position, limits.leash_m), _within(measured, wanted, limits.leash_rad))
    if target.position is not boxed or target.quaternion is not wanted.quaternion:
        shortened.append(Limit.LEASH)
    return Guarded(start, target, tuple(shortened))


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
