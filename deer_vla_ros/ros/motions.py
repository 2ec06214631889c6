"""Measured poses and twists, from messages and to messages. The watchdog uses it, so it imports no torch."""

from __future__ import annotations

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped

from deer_vla_ros.control.types import MeasuredPose, Pose, Twist
from deer_vla_ros.ros.stamped import nanoseconds, stamp


def measured_pose(message: PoseStamped) -> MeasuredPose:
    position, orientation = message.pose.position, message.pose.orientation
    pose = Pose(
        np.array([position.x, position.y, position.z]),
        np.array([orientation.x, orientation.y, orientation.z, orientation.w]),
    )
    return MeasuredPose(pose, message.header.frame_id, nanoseconds(message.header.stamp))


def twist_message(twist: Twist, frame_id: str, stamp_ns: int) -> TwistStamped:
    message = TwistStamped()
    message.header.frame_id, message.header.stamp = frame_id, stamp(stamp_ns)
    for vector, values in ((message.twist.linear, twist.linear), (message.twist.angular, twist.angular)):
        vector.x, vector.y, vector.z = map(float, values)
    return message
