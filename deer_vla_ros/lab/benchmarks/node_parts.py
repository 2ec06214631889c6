"""The processes of the latency benchmark beside the policy node: cameras, a minimal relay, a listener and a
CPU load.

Each public function runs in a process of its own, which `node_run` starts, and returns after SIGINT or
SIGTERM.
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
from deer_vla_ros.ros.messages import image_message, nanoseconds, stamp
from deer_vla_ros.ros.process import ros_process
from deer_vla_ros.ros.qos import LATCHED, NEWEST

NAMESPACE = "deer_vla_benchmark"
"""The namespace of all topics: no robot in the same ROS domain obeys the commands of this benchmark."""
FRAME = "base"
CAMERA_HZ = 30.0
CAMERA_SIZE = (480, 640)
KEEP_ALL = 100
"""Depth of the listener's queues: it must not miss any message."""


def camera() -> None:
    """Publishes both cameras' images, the measured pose and the instruction.

    The gripper image goes first and has arrived when the static image comes. The node then waits for the same
    image as the relay, and still has the cost of receiving both. In the other order the figures would be too
    good, because the node would act on the older gripper image. The measured pose has the static image's
    stamp, so that the listener knows every published frame.
    """
    with ros_process([]) as stop:
        node = rclpy.create_node("cameras", namespace=NAMESPACE)
        images = {
            name: node.create_publisher(Image, f"camera/{name}/image_raw", qos_profile_sensor_data)
            for name in ("gripper", "static")
        }
        pixels = np.random.default_rng(0).integers(0, 255, (*CAMERA_SIZE, 3), dtype=np.uint8)
        # The message is made once, as a camera driver passes on a buffer that the hardware has filled.
        image = image_message(pixels, "camera", 0)
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
            while due < time.monotonic():  # A late camera drops frames; it does not publish them later.
                due += period
        node.destroy_node()


def relay() -> None:
    """Answers every static image with a pose: the least that a Python node can do between an image and a
    command.

    It subscribes with the same quality of service as the policy node.
    """

    def wire(node: Node) -> None:
        poses = node.create_publisher(PoseStamped, "relay_pose", 10)

        def answer(image: Image) -> None:
            pose = PoseStamped()
            pose.header = image.header
            poses.publish(pose)

        node.create_subscription(Image, "camera/static/image_raw", answer, NEWEST)

    _spin("relay", wire)


def listener() -> None:
    """Prints a line `[what, stamp, arrival, ...]` for every pose and step. All times are in ns of the wall
    clock.

    It does not subscribe to images, which would delay it.
    """
    sys.stdout.reconfigure(line_buffering=True)

    def write_line(what: str, message: Any, *figures: float) -> None:
        print(json.dumps([what, nanoseconds(message.header.stamp), time.time_ns(), *figures]))

    def wire(node: Node) -> None:
        for what, topic in (("relay", "relay_pose"), ("command", "target_pose"), ("camera", "ee_pose")):
            node.create_subscription(
                PoseStamped, topic, lambda message, what=what: write_line(what, message), KEEP_ALL
            )
        node.create_subscription(
            PolicyStep,
            "deer_vla/step",
            lambda step: write_line("step", step, step.total_ms, step.static_age_ms),
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
    """Runs a node with one thread and one executor, like the policy node. wire: adds its topics."""
    with ros_process([]) as stop:
        node = rclpy.create_node(name, namespace=NAMESPACE)
        wire(node)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.1)
        executor.shutdown()
        node.destroy_node()
