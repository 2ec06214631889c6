"""The gripper's commands: a topic, or goals of an action that ros2_control's gripper controllers serve."""

from __future__ import annotations

import functools
import importlib
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

from action_msgs.msg import GoalStatus
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
"""How long the answer to a goal may take [s]. A server needs less. DDS can lose an answer while two processes
still discover each other."""
MAX_TRIES, PAUSE_S = 3, 1.0
"""How often a goal is sent that the server accepts but does not reach, and the pause between tries [s]."""
LOOK_S = 0.5
"""Period of the check whether the action's server is still the same [s]."""
FAILURES = {
    GoalStatus.STATUS_ABORTED: "aborted",
    GoalStatus.STATUS_CANCELED: "canceled",
    GoalStatus.STATUS_UNKNOWN: "lost",
}


class Gripper(Protocol):
    """Takes the command value of every tick. A repeated value changes nothing on the robot."""

    def send(self, value: float) -> None: ...

    def resume(self) -> None:
        """A person has looked at the arm: a goal that was given up is sent again."""


class TopicGripper:
    """Publishes every value on `gripper_command`, as a forward position controller takes it."""

    def __init__(self, publisher: Any):
        self._publisher = publisher

    def send(self, value: float) -> None:
        self._publisher.publish(Float64MultiArray(data=[float(value)]))

    def resume(self) -> None:
        pass  # every value is sent anyway


@dataclass(frozen=True)
class SentGoal:
    """The goal that was sent last. number: counts goals. sent_at: time.monotonic() [s]. servers: their
    ids."""

    value: float
    number: int
    sent_at: float
    servers: frozenset[bytes]
    is_answered: bool = False
    is_over: bool = False
    """The goal was refused or has failed: it has no effect any more."""


class ActionGripper:
    """Sends a goal when the value changes. It sends the same goal again when

    - the server refused it or did not answer;
    - the server aborted it, or somebody else canceled it: at most MAX_TRIES times, PAUSE_S apart;
    - the server was away, or another one has started: a new server does not know old goals.

    `send` does not wait, because waiting for the fingers would delay a step. A new goal replaces the one
    before, whose result is then ignored. A goal that is aborted because the fingers touch something
    (`stalled`) is no failure: controllers end a grasp in this way.
    """

    def __init__(self, node: Node, interface: str, action: str, joint: str, max_effort: float):
        """action: its name. joint: for ParallelGripperCommand. max_effort: for GripperCommand [N]; 0: the
        controller's own."""
        self._node, self._interface, self._joint, self._max_effort = node, interface, joint, max_effort
        self._type = action_type(interface)
        self._client = ActionClient(node, self._type, action)
        self._name = action
        # The lock guards the goal's state: answers do not arrive in the thread of `send`.
        self._lock = threading.Lock()
        self._told: SentGoal | None = None
        self._number = 0
        self._failures = 0
        self._failed_at = 0.0
        self._answer: Future | None = None
        self._servers: frozenset[bytes] = frozenset()
        self._looked_at = -LOOK_S

    def send(self, value: float) -> None:
        """Sends a goal if one is due, and warns if there is no server. It does not wait."""
        if not self._client.server_is_ready():
            self.forget()
            remedy = "start the gripper controller, or set action.gripper_action"
            self._node.get_logger().warning(
                f"gripper: no server of action {self._name}: {remedy}", throttle_duration_sec=THROTTLE_S
            )
            return
        now = time.monotonic()
        # Not at every step: the query may wait while a process joins or leaves the graph.
        if now - self._looked_at >= LOOK_S:
            self._looked_at, self._servers = now, self._find_servers()
        with self._lock:
            if not self._is_due(value, self._servers):
                return
            self._number += 1
            number = self._number
            self._told = SentGoal(value, number, now, self._servers)
        self._answer = self._client.send_goal_async(self._goal(value))
        self._answer.add_done_callback(functools.partial(self._on_answer, number))

    def resume(self) -> None:
        with self._lock:
            self._failures = 0

    def forget(self) -> None:
        """Makes the next `send` send a goal, whatever was sent before."""
        with self._lock:
            self._told = None
            self._failures = 0
            self._number += 1  # answers and results of earlier goals are ignored

    def close(self) -> None:
        self.forget()
        self._client.destroy()

    def _goal(self, value: float) -> Any:
        goal = self._type.Goal()
        if self._interface == "parallel_gripper_command":
            goal.command = JointState(name=[self._joint] if self._joint else [], position=[float(value)])
        else:
            goal.command.position, goal.command.max_effort = float(value), float(self._max_effort)
        return goal

    def _find_servers(self) -> frozenset[bytes]:
        """The identities of the action's servers. DDS takes seconds to notice that a server was killed. If
        a new one starts meanwhile, `server_is_ready` stays true, but the new one has another identity."""
        found = self._node.get_publishers_info_by_topic(f"{self._name}/_action/status")
        return frozenset(bytes(each.endpoint_gid) for each in found)

    def _is_due(self, value: float, servers: frozenset[bytes]) -> bool:
        """Whether a goal has to be sent now. The caller holds the lock."""
        told = self._told
        if told is None or value != told.value or servers - told.servers:
            self._failures = 0
            return True
        if told.is_over:
            wait_s = PAUSE_S if self._failures else 0.0
            return self._failures < MAX_TRIES and time.monotonic() - self._failed_at >= wait_s
        return self._is_lost(told)

    def _is_lost(self, told: SentGoal) -> bool:
        """Whether the goal's answer is overdue. If it is, this goal is given up."""
        if told.is_answered or time.monotonic() - told.sent_at < ANSWER_S:
            return False
        what = f"gripper: {self._name} did not answer within {ANSWER_S:g} s"
        self._node.get_logger().warning(f"{what}: the goal is sent again")
        if self._answer is not None:  # cancelled in the executor's thread: never while an answer is handled
            executor = self._node.executor
            executor.create_task(self._answer.cancel) if executor else self._answer.cancel()
        return True

    def _change(self, number: int, **what: bool) -> bool:
        """Updates the goal of this number; False if it is not the newest one. The caller holds the lock."""
        if self._told is None or self._told.number != number:
            return False
        self._told = replace(self._told, **what)
        return True

    def _on_answer(self, number: int, answer: Future) -> None:
        if answer.cancelled():
            return
        handle = answer.result()
        with self._lock:
            if not self._change(number, is_answered=True, is_over=not handle.accepted):
                return
        if handle.accepted:
            handle.get_result_async().add_done_callback(functools.partial(self._on_result, number))
        else:
            self._node.get_logger().error(
                f"gripper: {self._name} refused the goal: is the value one of its joint's?",
                throttle_duration_sec=THROTTLE_S,
            )

    def _on_result(self, number: int, future: Future) -> None:
        if future.cancelled():
            return
        response = future.result()
        how = FAILURES.get(response.status)
        if how is None or response.result.stalled:
            return
        with self._lock:
            if not self._change(number, is_over=True):
                return
            self._failures += 1
            self._failed_at = time.monotonic()
            failures, value = self._failures, self._told.value
        if failures < MAX_TRIES:
            again = f"it is sent again after {PAUSE_S:g} s"
            self._node.get_logger().warning(f"gripper: {self._name} {how} the goal {value:g}: {again}")
        else:
            what = f"gripper: {self._name} {how} the goal {value:g}, try {failures} of {MAX_TRIES}"
            again = "it is sent again when the value changes, ~/hold is lifted or a new instruction comes"
            self._node.get_logger().error(f"{what}: see the gripper controller's log; {again}")


def action_type(interface: str) -> Any:
    """The action's class. Raises UserError if control_msgs is not installed."""
    try:
        return getattr(importlib.import_module("control_msgs.action"), ACTIONS[interface])
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"action.gripper_interface is '{interface}', but control_msgs has no {ACTIONS[interface]} here "
            f"({error}): install ros-jazzy-control-msgs, or use 'topic'"
        ) from error
