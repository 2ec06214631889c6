"""The process of the fake robot: cameras, a measured pose and an arm, all of which can misbehave.

The soak command starts it. The requests on stdin are {"quirk": NAME, "on": BOOL}, {"push": [x, y, z],
"seconds": NUMBER} and {"displace": [x, y, z]}, with lengths in metres. The answer is the time from which the
request is in force [ns, wall clock].
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image

from deer_vla_ros.lab.soak import jsonlines, quirks
from deer_vla_ros.lab.soak.arm import Arm
from deer_vla_ros.ros.messages import SECOND, image_message, pose_message, stamp
from deer_vla_ros.ros.process import ros_process

POSE_HZ = 30
SILENT_TICKS = 15
"""For this many ticks at the start the robot publishes only the arm's pose, so that the observer knows it
before any motion."""
HEARD_WITHIN_S = 10.0
CAMERA_EVERY = 3
"""One pair of images for this many poses, which gives 10 Hz."""
SIZES = {"gripper": 48, "static": 64}
FRAME = "base"
TRUE_POSE = "soak/true_pose"
BEST_EFFORT = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


class Robot(Node):
    """The fake robot. It does all its work in `tick`, which is called at POSE_HZ."""

    def __init__(self, publishes_clock: bool):
        super().__init__("soak_robot")
        self._arm = Arm()
        self._edits: dict[str, Any] = {}  # The quirks in force, by name.
        self._random = np.random.default_rng(0)
        self._ticks = 0
        self._offset_ns = 0
        self._stopped_at_ns: int | None = None
        self._moving = False
        self._images = {
            name: self.create_publisher(Image, f"camera/{name}/image_raw", BEST_EFFORT) for name in SIZES
        }
        self._poses = self.create_publisher(PoseStamped, "ee_pose", 10)
        self._truth = self.create_publisher(PoseStamped, TRUE_POSE, 10)
        self._clock = self.create_publisher(Clock, "/clock", BEST_EFFORT) if publishes_clock else None
        self._ears: list[Any] = []
        self._listen()

    def _listen(self) -> None:
        self._ears = [
            self.create_subscription(PoseStamped, "target_pose", self._on_target, 10),
            self.create_subscription(TwistStamped, "target_twist", self._on_twist, 10),
        ]

    def _on_twist(self, message: TwistStamped) -> None:
        linear, angular = message.twist.linear, message.twist.angular
        self._moving = any((linear.x, linear.y, linear.z, angular.x, angular.y, angular.z))
        if not self._moving:
            self._arm.target = None

    def _on_target(self, message: PoseStamped) -> None:
        if self._moving and "arm_stuck" not in self._edits:
            position, turned = message.pose.position, message.pose.orientation
            self._arm.target = (
                np.array([position.x, position.y, position.z]),
                np.array([turned.x, turned.y, turned.z, turned.w]),
            )

    # --- Requests.

    def obey(self, request: dict[str, Any]) -> None:
        """Carries out one request of the soak command."""
        if "push" in request:
            self._arm.push(np.array(request["push"]), request["seconds"])
        elif "displace" in request:
            self._arm.displace(np.array(request["displace"]))
        elif request["on"]:
            self._begin(request["quirk"])
        else:
            self._end(request["quirk"])

    def _begin(self, name: str) -> None:
        self._edits[name] = (quirks.IMAGE_QUIRKS | quirks.POSE_QUIRKS).get(name, lambda: None)()
        if name == "arm_stuck":
            self._arm.target = None
        elif name == "commands_unheard":
            for ear in self._ears:
                self.destroy_subscription(ear)
            self._arm.target, self._moving = None, False
        elif name == "clock_stops":
            self._stopped_at_ns = self._now_ns()
        elif name in quirks.CLOCK_QUIRKS:
            sign = 1 if name == "clock_jumps_forward" else -1
            self._offset_ns += int(sign * quirks.CLOCK_JUMP_S * SECOND)

    def _end(self, name: str) -> None:
        self._edits.pop(name, None)
        if name == "commands_unheard":
            self._listen()
        elif name == "clock_stops" and self._stopped_at_ns is not None:
            self._offset_ns, self._stopped_at_ns = self._stopped_at_ns - time.time_ns(), None

    # --- The robot's regular work.

    def tick(self) -> None:
        """Publishes one measured pose, and every CAMERA_EVERY-th time a pair of images."""
        self._arm.advance(1 / POSE_HZ)
        now_ns = self._now_ns()
        if self._clock:
            self._clock.publish(Clock(clock=stamp(now_ns)))
        self._truth.publish(pose_message(self._arm, FRAME, now_ns))
        self._ticks += 1
        if self._ticks < SILENT_TICKS:
            return
        pose = pose_message(self._arm, FRAME, now_ns)
        for name, edit in self._edits.items():
            if name in quirks.POSE_QUIRKS and pose is not None:
                pose = edit(pose)
        if pose is not None:
            self._poses.publish(pose)
        if self._ticks % CAMERA_EVERY == 0:
            for camera, size in SIZES.items():
                self._publish_image(camera, size, now_ns)

    def await_observer(self) -> None:
        """Waits until the observer receives the arm's pose, at most HEARD_WITHIN_S."""
        deadline = time.monotonic() + HEARD_WITHIN_S
        while not self._truth.get_subscription_count() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _publish_image(self, camera: str, size: int, now_ns: int) -> None:
        pixels = self._random.integers(0, 255, (size, size, 3), dtype=np.uint8)
        image = image_message(pixels, f"{camera}_camera", now_ns)
        for name, edit in self._edits.items():
            if name in quirks.IMAGE_QUIRKS and image is not None:
                image = edit(camera, image)
        if image is not None:
            self._images[camera].publish(image)

    def _now_ns(self) -> int:
        return self._stopped_at_ns or time.time_ns() + self._offset_ns


def main() -> None:
    """Runs the robot until its stdin ends or a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--clock", action="store_true", help="publish /clock, and stamp everything with it")
    args = parser.parse_args()
    lines = jsonlines.requests()
    with ros_process([]) as stop:
        robot = Robot(args.clock)
        executor = SingleThreadedExecutor()
        executor.add_node(robot)
        robot.await_observer()
        jsonlines.tell(ready=True)
        due = time.monotonic()
        while not stop.is_set():
            requests = jsonlines.waiting(lines)
            if jsonlines.ENDED in requests:
                break
            for request in requests:
                robot.obey(request)
                jsonlines.tell(id=request["id"], at=time.time_ns())
            while (left := due - time.monotonic()) > 0:
                executor.spin_once(timeout_sec=left)
            robot.tick()
            # At most one late tick is caught up.
            due = max(due + 1 / POSE_HZ, time.monotonic() - 1 / POSE_HZ)
        executor.shutdown()
        robot.destroy_node()


if __name__ == "__main__":
    main()
