"""Motions of the tool centre point (TCP) in the action frame: from actions, between poses, as velocities."""

from __future__ import annotations

import warnings

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.types import Pose, Twist
from deer_vla_ros.model.action_space import ActionSpace


def motion_of(action: np.ndarray, space: ActionSpace) -> tuple[np.ndarray, Rotation]:
    """Translation (3,) [m] and rotation of a normalised action (6,), along fixed axes of the action frame.

    The last three values are XYZ Euler angles about fixed axes ("xyz" in scipy).
    """
    translation = np.asarray(action[:3], dtype=np.float64) * space.translation_m
    angles = np.asarray(action[3:6], dtype=np.float64) * space.rotation_rad
    return translation, Rotation.from_euler("xyz", angles)


def moved(pose: Pose, translation: np.ndarray, rotation: Rotation) -> Pose:
    """`pose` after a motion along the axes of its reference frame: the rotation multiplies from the left."""
    return Pose(pose.position + translation, (rotation * Rotation.from_quat(pose.quaternion)).as_quat())


def motion_between(start: Pose, end: Pose) -> tuple[np.ndarray, Rotation]:
    """The translation and rotation with which `moved` gets from `start` to `end`."""
    rotation = Rotation.from_quat(end.quaternion) * Rotation.from_quat(start.quaternion).inv()
    return end.position - start.position, rotation


def between(start: Pose, end: Pose, share: float) -> Pose:
    """The pose after this share (0..1) of the motion from `start` to `end`: straight, and about one axis."""
    translation, rotation = motion_between(start, end)
    return moved(start, share * translation, Rotation.from_rotvec(share * rotation.as_rotvec()))


def euler_of(quaternion: np.ndarray) -> np.ndarray:
    """XYZ Euler angles (3,) about fixed axes [rad] of a quaternion (4,) xyzw. In gimbal lock, one of the
    possible solutions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Rotation.from_quat(quaternion).as_euler("xyz")


def twist_of(start: Pose, end: Pose, seconds: float) -> Twist:
    """The constant velocity that moves from `start` to `end` in `seconds`."""
    translation, rotation = motion_between(start, end)
    return Twist(translation / seconds, rotation.as_rotvec() / seconds)
