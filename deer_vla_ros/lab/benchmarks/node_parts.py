"""The processes of the latency benchmark beside the policy node: cameras, a minimal relay, a listener and a
CPU load.

Each public function runs in a process of its own, which `node_run` starts, and returns after SIGINT or
SIGTERM.
"""

from __future__ import annotations

import itertools
import json
import signal
import sys
import time
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from PIL import Image as Picture
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros.control.types import Pose
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.scoring.table_episodes import table_episodes
from deer_vla_ros.msg import PolicyStep
from deer_vla_ros.ros.messages import image_message, nanoseconds, pose_message, stamp
from deer_vla_ros.ros.process import ros_process
from deer_vla_ros.ros.qos import LATCHED, NEWEST

NAMESPACE = "deer_vla_benchmark"
"""The namespace of all topics: no robot in the same ROS domain obeys the commands of this benchmark."""
FRAME = "base"
CAMERA_HZ = 30.0
CAMERA_SIZE = (480, 640)
SEED, STEPS = 500_000, 40
"""Of the demonstration that the cameras show: its table was not used in training. Its first steps."""
KEEP_ALL = 100
"""Depth of the listener's queues: it must not miss any message."""


def camera(noise: bool = False) -> None:
    """Publishes both cameras' images, the measured pose and the instruction.

    The cameras show a demonstration at the simulated table, forwards and backwards, one step per frame.
    noise: they show the same random image in every frame, on which the network does not agree with itself.

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
        poses = node.create_publisher(PoseStamped, "ee_pose", KEEP_ALL)
        instructions = node.create_publisher(String, "instruction", LATCHED)
        instruction, seen = _noise() if noise else _demonstration()
        # All messages are made before, as a camera driver passes on a buffer that the hardware has filled.
        messages = [_messages(observation) for observation in (*seen, *seen[-2:0:-1])]
        instructions.publish(String(data=instruction))
        period, due = 1 / CAMERA_HZ, time.monotonic()
        for shown, pose in itertools.cycle(messages):
            if stop.wait(max(0.0, due - time.monotonic())):
                break
            for name, publisher in images.items():
                shown[name].header.stamp = stamp(time.time_ns())
                publisher.publish(shown[name])
            pose.header.stamp = shown["static"].header.stamp
            poses.publish(pose)
            due += period
            while due < time.monotonic():  # A late camera drops frames; it does not publish them later.
                due += period
        node.destroy_node()


def _noise() -> tuple[str, list[Observation]]:
    """An instruction, and one observation of random images."""
    pixels = np.random.default_rng(0).integers(0, 255, (*CAMERA_SIZE, 3), dtype=np.uint8)
    return "lift the red block", [Observation(pixels, pixels, np.array([0.4, 0.0, 0.3, 0.0, 0.0, 0.0, 1.0]))]


def _demonstration() -> tuple[str, list[Observation]]:
    """The instruction and the observations of a demonstration, their images as a camera of CAMERA_SIZE would
    see them."""
    episode = next(iter(table_episodes(range(SEED, SEED + 1), STEPS)))
    return episode.instruction, [
        Observation(_framed(each.static), _framed(each.gripper), each.tcp) for each in episode.observations
    ]


def _framed(image: np.ndarray) -> np.ndarray:
    """A square image, scaled to the height of CAMERA_SIZE, with black borders to its left and right."""
    height, width = CAMERA_SIZE
    framed = np.zeros((height, width, 3), np.uint8)
    left = (width - height) // 2
    framed[:, left : left + height] = Picture.fromarray(image).resize((height, height))
    return framed


def _messages(observation: Observation) -> tuple[dict[str, Image], PoseStamped]:
    """The images, by camera, and the measured pose, without stamps."""
    images = {"gripper": observation.gripper, "static": observation.static}
    tcp = Pose(observation.tcp[:3], observation.tcp[3:])
    return {name: image_message(image, "camera", 0) for name, image in images.items()}, pose_message(
        tcp, FRAME, 0
    )


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
            lambda step: write_line("step", step, step.total_ms, step.static_age_ms, step.layers_run),
            KEEP_ALL,
        )

    _spin("listener", wire)


def load() -> None:
    """Keeps one core busy."""
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    while not signals:
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
