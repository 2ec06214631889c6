"""Conversion of times, poses, twists and images to ROS messages and back.

Node, watchdog, table and recordings share them, so this file loads no torch.
"""

from __future__ import annotations

import array
from typing import Protocol

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped, TwistStamped
from sensor_msgs.msg import Image

from deer_vla_ros.control.types import MeasuredPose, Pose, Twist

SECOND = 1_000_000_000
"""Nanoseconds in a second."""


class HasPose(Protocol):
    """Anything with a pose. position: (3,) [m]. quaternion: (4,), as x y z w."""

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
    data = array.array("B")  # rclpy checks any other type number by number
    data.frombytes(np.ascontiguousarray(pixels).data)
    message.data = data
    return message


def measured_pose(message: PoseStamped) -> MeasuredPose:
    """The pose of a message, with its frame and its stamp [ns]."""
    position, orientation = message.pose.position, message.pose.orientation
    pose = Pose(
        np.array([position.x, position.y, position.z]),
        np.array([orientation.x, orientation.y, orientation.z, orientation.w]),
    )
    return MeasuredPose(pose, message.header.frame_id, nanoseconds(message.header.stamp))


def twist_message(twist: Twist, frame_id: str, stamp_ns: int) -> TwistStamped:
    """A twist along the axes of `frame_id`, stamped."""
    message = TwistStamped()
    message.header.frame_id, message.header.stamp = frame_id, stamp(stamp_ns)
    for vector, values in ((message.twist.linear, twist.linear), (message.twist.angular, twist.angular)):
        vector.x, vector.y, vector.z = map(float, values)
    return message
