"""What does the simulated table say? Its images, TCP pose and joints as messages."""

from __future__ import annotations

import array

import numpy as np
from builtin_interfaces.msg import Time
from sensor_msgs.msg import Image, JointState

from deer_vla_ros.sim.table import Table

BASE_FRAME = "base"


def image_message(pixels: np.ndarray, stamp: Time, frame: str) -> Image:
    """rgb8 Image of an (H, W, 3) uint8 array."""
    height, width, _ = pixels.shape
    message = Image(height=height, width=width, encoding="rgb8", step=3 * width)
    message.header.stamp, message.header.frame_id = stamp, frame
    # rclpy takes an array.array as it is, and checks anything else number by number.
    message.data = array.array("B", pixels.tobytes())
    return message


def joints_message(table: Table, stamp: Time) -> JointState:
    """Measured positions and velocities: rad and rad/s of the arm, m and m/s of the fingers."""
    message = JointState(name=list(table.joint_names))
    message.header.stamp = stamp
    message.position = table.joint_positions().tolist()
    message.velocity = table.joint_velocities().tolist()
    return message
