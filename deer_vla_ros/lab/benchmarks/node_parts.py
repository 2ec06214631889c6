"""Which processes are measured against each other? Cameras, a bare relay, a listener, and something that keeps a core busy.

Each function is a process of its own, started by `benchmark_run`, and returns after SIGINT or SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from threading import Event
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros.msg import PolicyStep
from deer_vla_ros.ros.messages import LATCHED, NEWEST, image_message, nanoseconds, stamp
from deer_vla_ros.ros.process import ros_process

NAMESPACE = "deer_vla_benchmark"
"""Of all topics: whatever else is in the ROS domain, no robot obeys what is commanded here."""
FRAME = "base"
CAMERA_HZ = 30.0
CAMERA_SIZE = (480, 640)
KEEP_ALL = 100
"""Depth of the listener's queues: it must miss nothing that was published."""


def camera() -> None:
    """Publishes both cameras, the measured pose and the instruction.

    Gripper image first: it has arrived when the static image comes, so that the node waits for nothing that the relay does not
    wait for, and yet pays for taking both. Static first would flatter the node, which would step on the older gripper image.
    The measured pose carries the static image's stamp, so that the listener knows every frame that went out.
    """
    with ros_process([]) as stop:
        node = rclpy.create_node("cameras", namespace=NAMESPACE)
        images = {
            name: node.create_publisher(Image, f"camera/{name}/image_raw", qos_profile_sensor_data)
            for name in ("gripper", "static")
        }
        pixels = np.random.default_rng(0).integers(0, 255, (*CAMERA_SIZE, 3), dtype=np.uint8)
        image = image_message(
            pixels, "camera", 0
        )  # made once: a driver hands on a buffer that the hardware has filled
        poses = node.create_publisher(PoseStamped, "ee_pose", KEEP_ALL)
        pose = PoseStamped()
        pose.header.frame_id = FRAME
        pose.pose.position.x, pose.pose.position.z, pose.pose.orientation.w = 0.4, 0.3, 1.0
        instructions = node.create_publisher(String, "instruction", LATCHED)
        instructions.publish(String(data="lift the red block"))
        period, due = 1 / CAMERA_HZ, time.monotonic()
        while not stop.wait(max(0.0, due - time.monotonic())):
            for publisher in images.values():
                image.header.stamp = stamp(time.time_ns())
                publisher.publish(image)
            pose.header.stamp = image.header.stamp
            poses.publish(pose)
            due += period
            while due < time.monotonic():  # a camera that is late drops a frame, it does not catch up
                due += period
        node.destroy_node()


def relay() -> None:
    """The least that a Python node can do between an image and a command: take it as the policy node does, answer with a pose."""

    def wire(node: Node) -> None:
        poses = node.create_publisher(PoseStamped, "relay_pose", 10)

        def answer(image: Image) -> None:
            pose = PoseStamped()
            pose.header = image.header
            poses.publish(pose)

        node.create_subscription(Image, "camera/static/image_raw", answer, NEWEST)

    _spin("relay", wire)


def listener() -> None:
    """Prints `[what, stamp, arrival, ...]` for every small message; times in ns of one clock, and no image anywhere near."""
    sys.stdout.reconfigure(line_buffering=True)

    def tell(what: str, message: Any, *figures: float) -> None:
        print(json.dumps([what, nanoseconds(message.header.stamp), time.time_ns(), *figures]))

    def wire(node: Node) -> None:
        for what, topic in (("relay", "relay_pose"), ("command", "target_pose"), ("camera", "ee_pose")):
            node.create_subscription(
                PoseStamped, topic, lambda message, what=what: tell(what, message), KEEP_ALL
            )
        node.create_subscription(
            PolicyStep,
            "deer_vla/step",
            lambda step: tell("step", step, step.total_ms, step.static_age_ms),
            KEEP_ALL,
        )

    _spin("listener", wire)


def load() -> None:
    """Keeps one core busy."""
    stop = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.is_set():
        pass


def _spin(name: str, wire) -> None:
    """A node that lives as the policy node does: one thread, one executor."""
    with ros_process([]) as stop:
        node = rclpy.create_node(name, namespace=NAMESPACE)
        wire(node)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
        executor.shutdown()
        node.destroy_node()
