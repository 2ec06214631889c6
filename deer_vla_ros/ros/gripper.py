"""How is the gripper told? As a topic, or as one of the two actions that ros2_control's gripper controllers serve."""

from __future__ import annotations

import importlib
import time
from typing import Any, Protocol

from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.task import Future
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray

from deer_vla_ros.errors import UserError

ACTIONS = {"parallel_gripper_command": "ParallelGripperCommand", "gripper_command": "GripperCommand"}
INTERFACES = ("topic", *ACTIONS)
THROTTLE_S = 5.0
ANSWER_S = 2.0
"""How long a goal's answer may take. Longer than any server takes to accept; DDS can lose an answer while two processes still find each other."""


class Gripper(Protocol):
    """Takes the command value of every tick; what is repeated changes nothing on the robot."""

    def send(self, value: float) -> None: ...


class TopicGripper:
    """Every value on `gripper_command`, as a forward position controller takes it."""

    def __init__(self, publisher: Any):
        self._publisher = publisher

    def send(self, value: float) -> None:
        self._publisher.publish(Float64MultiArray(data=[float(value)]))


class ActionGripper:
    """A goal when the value changes; one that was refused or not answered, or that no server was there for, is sent again.

    Goals are sent and forgotten: waiting for fingers must not delay a step, and a new goal preempts the one before.
    """

    def __init__(self, node: Node, interface: str, action: str, joint: str, max_effort: float):
        """action: name of the action; joint: for ParallelGripperCommand; max_effort [N], for GripperCommand, 0: the controller's."""
        self._node, self._interface, self._joint, self._max_effort = node, interface, joint, max_effort
        self._type = action_type(interface)
        self._client = ActionClient(node, self._type, action)
        self._name = action
        self._sent: float | None = None
        self._sent_at = 0.0
        self._answer: Future | None = None

    def send(self, value: float) -> None:
        if value == self._sent and not self._is_lost():
            return
        if not self._client.server_is_ready():
            self._node.get_logger().warning(
                f"gripper: no server of action {self._name}: start the gripper controller, or set action.gripper_action",
                throttle_duration_sec=THROTTLE_S,
            )
            return
        self._sent, self._sent_at = value, time.monotonic()
        self._answer = self._client.send_goal_async(self._goal(value))
        self._answer.add_done_callback(self._on_answer)

    def close(self) -> None:
        self._client.destroy()

    def _goal(self, value: float) -> Any:
        goal = self._type.Goal()
        if self._interface == "parallel_gripper_command":
            goal.command = JointState(name=[self._joint] if self._joint else [], position=[float(value)])
        else:
            goal.command.position, goal.command.max_effort = float(value), float(self._max_effort)
        return goal

    def _is_lost(self) -> bool:
        """Whether the goal that was sent waits for its answer for too long; it is then given up."""
        if self._answer is None or self._answer.done() or time.monotonic() - self._sent_at < ANSWER_S:
            return False
        self._node.get_logger().warning(f"gripper: {self._name} did not answer within {ANSWER_S:g} s: the goal is sent again")
        self._answer.cancel()
        return True

    def _on_answer(self, answer: Future) -> None:
        if not answer.cancelled() and not answer.result().accepted:
            self._sent = None
            self._node.get_logger().error(
                f"gripper: {self._name} refused the goal: is the value one of its joint's?", throttle_duration_sec=THROTTLE_S
            )


def action_type(interface: str) -> Any:
    """The action's class; raises UserError where control_msgs is not installed."""
    try:
        return getattr(importlib.import_module("control_msgs.action"), ACTIONS[interface])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"action.gripper_interface is '{interface}', but control_msgs has no {ACTIONS[interface]} here ({error}): "
            "install ros-jazzy-control-msgs, or use 'topic'"
        ) from error
