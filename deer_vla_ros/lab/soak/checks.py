"""The checks of one command: each function returns the violations of one promise."""

from __future__ import annotations

import math

import numpy as np

from deer_vla_ros.lab.soak.geometry import angle_between, distance, outside_by, twist_between
from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand, HeardPose, Limits, Violation

ROUNDING = 1e-6
"""The allowed rounding error of computations [m, rad]."""
QUATERNION_LENGTH = 1e-3
"""The allowed deviation of a target's quaternion from unit length: a hold repeats a measured pose, perhaps in
float32."""
BURST = 1.3
"""The way of one second may be longer than the mean rate allows by this factor, because frames jitter."""
DELIVERY_S = 0.2
"""The most time that the middleware takes on a busy machine. The node answers only for longer delays."""
ALLOWED_TWIST_ERROR = 1e-5
"""The allowed difference between a twist and its targets, per step [m, rad]."""


def finite(command: HeardCommand) -> list[Violation]:
    """Checks that all numbers are finite."""
    parts = (command.position, command.quaternion, command.linear, command.angular)
    if all(part is None or np.isfinite(part).all() for part in parts):
        return []
    return [Violation(command.said_ns, "not_finite", math.nan, 0.0, "a number of the command is not finite")]


def target(
    limits: Limits, command: HeardCommand, near: list[HeardPose], last_motion: HeardCommand | None
) -> list[Violation]:
    """Checks the promises of every target, moving or not: a unit quaternion, inside the workspace, near the
    arm.

    near: the poses where the arm may be. last_motion: the last command, if it moved the arm.
    """
    if command.position is None:
        return []
    found = []
    length = float(np.linalg.norm(command.quaternion))
    if abs(length - 1) > QUATERNION_LENGTH:
        message = "the target's quaternion is not of unit length"
        found.append(Violation(command.said_ns, "quaternion_length", length, 1.0, message))
    found += _box(limits, command, near, last_motion)
    return found + (_leash(limits, command, near) if near else [])


def _box(
    limits: Limits, command: HeardCommand, near: list[HeardPose], last_motion: HeardCommand | None
) -> list[Violation]:
    """Checks the workspace. An arm outside it may be brought back, and must not be sent further out."""
    box = (limits.workspace_min, limits.workspace_max)
    places = [pose.position for pose in near] + ([last_motion.position] if last_motion else [])
    allowed = max((outside_by(place, *box) for place in places), default=0.0)
    value = outside_by(command.position, *box)
    if value <= allowed + ROUNDING:
        return []
    return [Violation(command.said_ns, "box", value, allowed, "the target is outside the workspace box [m]")]


def _leash(limits: Limits, command: HeardCommand, near: list[HeardPose]) -> list[Violation]:
    """Checks that the target is near one of the poses, in distance and in angle.

    If none is near, the violation names the pose that exceeds the limits least.
    """

    def excess(pose: HeardPose) -> tuple[float, float]:
        metres = distance(command.position, pose.position) - limits.leash_m
        return metres, angle_between(command.quaternion, pose.quaternion) - limits.leash_rad

    metres, radians = min((excess(pose) for pose in near), key=max)
    kinds = (("leash_m", metres, limits.leash_m, "m"), ("leash_rad", radians, limits.leash_rad, "rad"))
    return [
        Violation(
            command.said_ns,
            what,
            over + limit,
            limit,
            f"the target is too far from every pose heard [{unit}]",
        )
        for what, over, limit, unit in kinds
        if over > ROUNDING
    ]


def fresh(limits: Limits, command: HeardCommand) -> list[Violation]:
    """Checks the age of a motion's inputs, when it leaves the node and when it arrives."""
    limit = limits.max_age_s + limits.late_s
    left = (command.clock_ns - command.stamp_ns) / SECOND
    arrived = left + (command.heard_ns - command.said_ns) / SECOND
    if left > limit:
        message = "a motion left the node long after its frames were taken [s]"
        return [Violation(command.said_ns, "stale", left, limit, message)]
    if arrived > limit + DELIVERY_S:
        message = "a motion arrived long after its frames were taken [s]"
        return [Violation(command.said_ns, "stale", arrived, limit + DELIVERY_S, message)]
    return []


def speed(limits: Limits, command: HeardCommand) -> list[Violation]:
    """Checks that the twist is not faster than one step per period."""
    found = []
    for what, vector, step, unit in (
        ("speed_m", command.linear, limits.max_translation_m, "m/s"),
        ("speed_rad", command.angular, limits.max_rotation_rad, "rad/s"),
    ):
        value, limit = float(np.linalg.norm(vector)), step * limits.rate_hz
        if value > limit + ROUNDING * limits.rate_hz:
            found.append(Violation(command.said_ns, what, value, limit, f"the twist is too fast [{unit}]"))
    return found


def start(limits: Limits, command: HeardCommand, near: list[HeardPose]) -> list[Violation]:
    """Checks that the first motion after a hold is at most one step away from the arm.

    Unknown poses give no violation.
    """
    if not near:
        return []

    def excess(pose: HeardPose) -> float:
        metres = distance(command.position, pose.position) / limits.max_translation_m
        return max(metres, angle_between(command.quaternion, pose.quaternion) / limits.max_rotation_rad)

    steps = min(map(excess, near))
    if steps <= 1 + 1e-4:
        return []
    message = "the first motion after a hold begins away from the measured pose [steps]"
    return [Violation(command.said_ns, "start", steps, 1.0, message)]


def moved_by(command: HeardCommand, last: HeardCommand) -> tuple[float, float]:
    """The way [m] and the turn [rad] from the last target to this one."""
    return distance(command.position, last.position), angle_between(command.quaternion, last.quaternion)


def step(limits: Limits, command: HeardCommand, last: HeardCommand) -> list[Violation]:
    """Checks two motions in a row: the limits of one step, and that the twist agrees with the targets."""
    metres, radians = moved_by(command, last)
    found = []
    if metres > limits.max_translation_m + ROUNDING:
        message = "two targets are further apart than one step allows [m]"
        found.append(Violation(command.said_ns, "step_m", metres, limits.max_translation_m, message))
    if radians > limits.max_rotation_rad + ROUNDING:
        message = "two targets are turned against each other by more than one step allows [rad]"
        found.append(Violation(command.said_ns, "step_rad", radians, limits.max_rotation_rad, message))
    return found + _agreement(limits, command, last)


def _agreement(limits: Limits, command: HeardCommand, last: HeardCommand) -> list[Violation]:
    linear = command.linear / limits.rate_hz - (command.position - last.position)
    angular = command.angular / limits.rate_hz - twist_between(last.quaternion, command.quaternion)
    value = max(float(np.linalg.norm(linear)), float(np.linalg.norm(angular)))
    if value <= ALLOWED_TWIST_ERROR:
        return []
    message = "the twist is not the way from the last target to this one [m or rad per step]"
    return [Violation(command.said_ns, "twist", value, ALLOWED_TWIST_ERROR, message)]


def travel(limits: Limits, command: HeardCommand, metres: float, radians: float) -> list[Violation]:
    """Checks the way of one second, so that small steps do not come too often. metres, radians: that way."""
    found = []
    for what, value, step_limit, unit in (
        ("travel_m", metres, limits.max_translation_m, "m"),
        ("travel_rad", radians, limits.max_rotation_rad, "rad"),
    ):
        limit = step_limit * limits.rate_hz * BURST
        if value > limit + ROUNDING:
            message = f"the targets of one second make a way that is too long [{unit}]"
            found.append(Violation(command.said_ns, what, value, limit, message))
    return found
