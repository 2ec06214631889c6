"""Times, poses and images as messages, for node, watchdog and table; it imports nothing of the policy."""

from __future__ import annotations

import array
from typing import Protocol

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import Image

SECOND = 1_000_000_000
"""Nanoseconds."""


class HasPose(Protocol):
    """position (3,) [m]; quaternion (4,) x y z w."""

    position: np.ndarray
    quaternion: np.ndarray


def nanoseconds(stamp: Time) -> int:
    """A stamp as integer nanoseconds."""
    return stamp.sec * SECOND + stamp.nanosec


def stamp(nanoseconds: int) -> Time:
    """Integer nanoseconds as a stamp."""
    return Time(sec=nanoseconds // SECOND, nanosec=nanoseconds % SECOND)


def pose_message(pose: HasPose, frame_id: str, stamp_ns: int) -> PoseStamped:
    """A pose in `frame_id`, stamped."""
    message = PoseStamped()
    message.header.frame_id, message.header.stamp = frame_id, stamp(stamp_ns)
    position, orientation = message.pose.position, message.pose.orientation
    position.x, position.y, position.z = map(float, pose.position)
    orientation.x, orientation.y, orientation.z, orientation.w = map(float, pose.quaternion)
    return message


def image_message(pixels: np.ndarray, frame_id: str, stamp_ns: int) -> Image:
    """(H, W, 3) uint8 RGB as an rgb8 image, stamped."""
    height, width, _ = pixels.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.header.frame_id, message.header.stamp = frame_id, stamp(stamp_ns)
    data = array.array("B")  # rclpy takes an array.array as it is, and checks anything else number by number
    data.frombytes(np.ascontiguousarray(pixels).data)
    message.data = data
    return message
