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
            raise UserError(f"guard.workspace_min {self.workspace_min} and guard.workspace_max {self.workspace_max}: give x, y, z each, finite")
        if any(low >= high for low, high in zip(self.workspace_min, self.workspace_max)):
            raise UserError(f"guard.workspace_min {self.workspace_min} is not below guard.workspace_max {self.workspace_max} on every axis")


@dataclass(frozen=True)
class Guarded:
    """A target that the arm may be given; start: where the step's motion begins; limits: what shortened it."""

    start: Pose
    target: Pose
    limits: tuple[Limit, ...]


def guard(limits: GuardLimits, last_target: Pose, measured: Pose, translation: np.ndarray, rotation: Rotation) -> Guarded:
    """The motion from the last target, shortened until every limit holds. All arguments are finite.

    The step starts at the last target, pulled onto the leash should the arm have been moved. A box that the start lies outside
    of (the arm was there already) lets the target come back in, never further out, and never makes it jump.
    """
    shortened: list[Limit] = []
    start = _pull_to(measured, last_target, limits.leash_m, limits.leash_rad)

    distance = float(np.linalg.norm(translation))
    if distance > limits.max_translation_m:
        translation = translation * (limits.max_translation_m / distance)
        shortened.append(Limit.TRANSLATION)
    angle = rotation.magnitude()
    if angle > limits.max_rotation_rad:
        rotation = Rotation.from_rotvec(rotation.as_rotvec() * (limits.max_rotation_rad / angle))
        shortened.append(Limit.ROTATION)
    target = moved(start, translation, rotation)

    low = np.minimum(limits.workspace_min, start.position)
    high = np.maximum(limits.workspace_max, start.position)
    inside = np.clip(target.position, low, high)
    if not np.array_equal(inside, target.position):
        target = Pose(inside, target.quaternion)
        shortened.append(Limit.WORKSPACE)

    leashed = _pull_to(measured, target, limits.leash_m, limits.leash_rad)
    if leashed is not target:
        target = leashed
        shortened.append(Limit.LEASH)
    return Guarded(start, target, tuple(shortened))


def _pull_to(anchor: Pose, pose: Pose, radius_m: float, radius_rad: float) -> Pose:
    """`pose` itself where it is within both radii of `anchor`, else the nearest pose on the way there that is."""
    translation, rotation = motion_between(anchor, pose)
    distance, angle = float(np.linalg.norm(translation)), rotation.magnitude()
    if distance <= radius_m and angle <= radius_rad:
        return pose
    if distance > radius_m:
        translation = translation * (radius_m / distance)
    if angle > radius_rad:
        rotation = Rotation.from_rotvec(rotation.as_rotvec() * (radius_rad / angle))
    return moved(anchor, translation, rotation)
