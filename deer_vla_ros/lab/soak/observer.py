"""The process of the observer: it receives the policy node's messages over DDS and judges every command by
its own limits.

The soak command starts it. The requests on stdin are `limits`, `fault`, `over`, `held`, `mute`, `deaf`,
`restarted`, `robot_gone` and `sum`. It writes to stdout every motion, hold, step, status and violation at
once, and a summary on request.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock

from deer_vla_ros.lab.soak import jsonlines
from deer_vla_ros.lab.soak.bench import Bench
from deer_vla_ros.lab.soak.geometry import is_pose
from deer_vla_ros.lab.soak.heard import SECOND, HeardPose, Limits
from deer_vla_ros.lab.soak.pairing import Half, Publishers
from deer_vla_ros.msg import PolicyStep
from deer_vla_ros.ros.messages import nanoseconds
from deer_vla_ros.ros.process import ros_process
from deer_vla_ros.ros.qos import NEWEST

KEEP_ALL = 1000
"""Depth of the queues: the observer must not miss any message."""
FRAME = "base"
TRUE_POSE = "soak/true_pose"
"""The topic of the arm's true pose from the fake robot; on `ee_pose` the robot may publish a wrong one."""
STALL_NS = SECOND // 10
"""The observer itself was stalled if it has not received messages for longer than this."""


class Observer(Node):
    """Converts messages to plain data for the bench. It does not judge them."""

    def __init__(self, bench: Bench):
        super().__init__("soak_observer")
        self._bench = bench
        self._publishers = {True: Publishers(), False: Publishers()}
        self._ears: list[Any] = []
        self.create_subscription(PoseStamped, "ee_pose", self._on_pose, NEWEST)
        self.create_subscription(PoseStamped, TRUE_POSE, self._on_pose, KEEP_ALL)
        self.create_subscription(PolicyStep, "deer_vla/step", self._on_step, KEEP_ALL)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, KEEP_ALL)
        self.create_subscription(Clock, "/clock", self._on_clock, NEWEST)
        self.listen()

    def listen(self) -> None:
        """Subscribes to the arm's commands."""
        self._ears = [
            self.create_subscription(TwistStamped, "target_twist", self._on_twist, KEEP_ALL),
            self.create_subscription(PoseStamped, "target_pose", self._on_target, KEEP_ALL),
        ]

    def be_deaf(self) -> None:
        """Ends the subscriptions to the arm's commands."""
        for ear in self._ears:
            self.destroy_subscription(ear)
        self._ears = []

    def _on_pose(self, message: PoseStamped, info: dict[str, int]) -> None:
        position, quaternion = _pose_arrays(message)
        if message.header.frame_id == FRAME and is_pose(position, quaternion):
            self._bench.pose(HeardPose(info["source_timestamp"], position, quaternion))

    def _on_twist(self, message: TwistStamped, info: dict[str, int]) -> None:
        linear, angular = message.twist.linear, message.twist.angular
        first = np.array([linear.x, linear.y, linear.z])
        second = np.array([angular.x, angular.y, angular.z])
        self._bench.half(self._half(message, info, True, first, second))

    def _on_target(self, message: PoseStamped, info: dict[str, int]) -> None:
        self._bench.half(self._half(message, info, False, *_pose_arrays(message)))

    def _half(self, message: Any, info: dict[str, int], is_twist: bool, *arrays: np.ndarray) -> Half:
        said_ns = info["source_timestamp"]
        publisher, after_loss = self._publishers[is_twist].of(info["publication_sequence_number"])
        return Half(
            is_twist=is_twist,
            said_ns=said_ns,
            heard_ns=max(info["received_timestamp"], said_ns),
            stamp_ns=nanoseconds(message.header.stamp),
            after_loss=after_loss,
            publisher=publisher,
            first=arrays[0],
            second=arrays[1],
        )

    def _on_step(self, message: PolicyStep, info: dict[str, int]) -> None:
        held = message.verdict == PolicyStep.VERDICT_HELD
        self._bench.step(info["source_timestamp"], held, list(message.reasons) if held else [])

    def _on_diagnostics(self, message: DiagnosticArray, info: dict[str, int]) -> None:
        for status in message.status:
            if status.name.endswith(": control"):
                self._bench.status(
                    info["source_timestamp"], int.from_bytes(status.level, "big"), status.message
                )

    def _on_clock(self, message: Clock, info: dict[str, int]) -> None:
        said_ns = info["source_timestamp"]
        self._bench.clock(said_ns, nanoseconds(message.clock) - said_ns)


def _pose_arrays(message: PoseStamped) -> tuple[np.ndarray, np.ndarray]:
    position, orientation = message.pose.position, message.pose.orientation
    quaternion = np.array([orientation.x, orientation.y, orientation.z, orientation.w])
    return np.array([position.x, position.y, position.z]), quaternion


def _obey(request: dict[str, Any], observer: Observer, bench: Bench) -> None:
    """Carries out one request of the soak command."""
    what = request["do"]
    if what == "limits":
        bench.set_limits(Limits(**request["limits"]))
    elif what == "fault":
        bench.fault(request["name"], request["at"])
    elif what == "over":
        bench.over(request["name"], request["at"])
    elif what == "held":
        bench.must_have_held(request["name"], request["begin"], request["end"], request["by_decisions"])
    elif what == "mute":
        bench.mute(request["begin"], request["end"])
    elif what == "deaf":
        observer.be_deaf() if request["on"] else observer.listen()
        bench.forget()
    elif what == "restarted":
        bench.forget()
    elif what == "robot_gone":
        bench.lose_arm()
    elif what == "sum":
        jsonlines.tell(summary=dataclasses.asdict(bench.summary()))


def main() -> None:
    """Runs the observer until its stdin ends or a signal comes."""
    lines = jsonlines.requests()
    with ros_process([]) as stop:
        bench = Bench(jsonlines.tell)
        observer = Observer(bench)
        executor = SingleThreadedExecutor()
        executor.add_node(observer)
        jsonlines.tell(ready=True)
        last_ns = time.time_ns()
        while not stop.is_set():
            executor.spin_once(timeout_sec=0.02)
            requests = jsonlines.waiting(lines)
            if jsonlines.ENDED in requests:
                break
            for request in requests:
                _obey(request, observer, bench)
            now_ns = time.time_ns()
            if now_ns - last_ns > STALL_NS:
                bench.stalled(last_ns, now_ns)
            last_ns = now_ns
            bench.judge_until(now_ns)
        executor.shutdown()
        observer.destroy_node()


if __name__ == "__main__":
    main()
