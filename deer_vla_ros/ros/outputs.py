"""Publishes the commands of arm and gripper, as `action.mode` and `action.gripper_interface` select."""

from __future__ import annotations

from collections import deque
from typing import Any

from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode
from rclpy.publisher import Publisher
from std_msgs.msg import Float64MultiArray

from deer_vla_ros.control.continuity import Continuity
from deer_vla_ros.control.types import Command
from deer_vla_ros.ros.gripper import ActionGripper, Gripper, TopicGripper
from deer_vla_ros.ros.messages import pose_message, twist_message

REMEMBERED = 256
"""How many stamps of our own commands are kept, to recognise the commands of other nodes."""


class Outputs:
    """The publishers exist from the start, the gripper's action client from `open` to `close`."""

    def __init__(self, node: LifecycleNode, mode: str, gripper_interface: str):
        def publisher(kind: type, topic: str, wanted: bool) -> Publisher | None:
            return node.create_lifecycle_publisher(kind, topic, 10) if wanted else None

        self._node = node
        self.target = publisher(PoseStamped, "target_pose", mode != "twist")
        self.twist = publisher(TwistStamped, "target_twist", mode != "pose")
        self._gripper_topic = publisher(Float64MultiArray, "gripper_command", gripper_interface == "topic")
        self._gripper: Gripper | None = None
        self.continuity = Continuity()
        self.stamps: deque[int] = deque(maxlen=REMEMBERED)

    @property
    def publishers(self) -> list[Publisher]:
        """The publishers on whose topics no other node should publish."""
        return [publisher for publisher in (self.target, self.twist, self._gripper_topic) if publisher]

    def listeners(self) -> int:
        """The number of subscriptions to the arm's commands, on the topic that has most of them."""
        return max(publisher.get_subscription_count() for publisher in (self.target, self.twist) if publisher)

    def open(self, given: dict[str, Any]) -> None:
        """Makes the gripper ready. given: all parameter values. UserError if control_msgs is missing."""
        if self._gripper_topic:
            self._gripper = TopicGripper(self._gripper_topic)
        else:
            names = ("gripper_interface", "gripper_action", "gripper_joint", "gripper_max_effort")
            self._gripper = ActionGripper(self._node, *(given[f"action.{name}"] for name in names))

    def close(self) -> None:
        if isinstance(self._gripper, ActionGripper):
            self._gripper.close()
        self._gripper = None

    def publish(self, command: Command, frame_id: str) -> None:
        """Publishes a command, in `frame_id`. The caller lets no other thread publish meanwhile."""
        command = self.continuity.passed(command)
        self.stamps.append(command.stamp_ns)
        if self._gripper_topic:
            self._tell_gripper(command)
        if self.twist:
            self.twist.publish(twist_message(command.twist, frame_id, command.stamp_ns))
        # The target is the last one of the arm's messages: a simulator in lock step goes on when it has it.
        if self.target and command.target is not None:
            self.target.publish(pose_message(command.target, frame_id, command.stamp_ns))
        if not self._gripper_topic:
            self._tell_gripper(command)  # after the arm, because a goal takes longer to send than a message

    def _tell_gripper(self, command: Command) -> None:
        if command.gripper is not None:
            self._gripper.send(command.gripper)

    def resume(self) -> None:
        """A person has looked at the arm: a gripper goal that was given up is sent again."""
        gripper = self._gripper
        if gripper is not None:
            gripper.resume()

    def wait_until_heard(self, seconds: float) -> None:
        """Waits until every reliable subscription has the newest commands, at most `seconds` in total."""
        for publisher in self.publishers:
            publisher.wait_for_all_acked(Duration(seconds=seconds / len(self.publishers)))
