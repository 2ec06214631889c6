"""How is the arm told? One command becomes the messages that `action.mode` and `action.gripper_interface` ask for."""

from __future__ import annotations

from typing import Any

from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.lifecycle import LifecycleNode
from rclpy.publisher import Publisher
from std_msgs.msg import Float64MultiArray

from deer_vla_ros.control.types import Command
from deer_vla_ros.ros.conversions import twist_message
from deer_vla_ros.ros.gripper import ActionGripper, Gripper, TopicGripper
from deer_vla_ros.ros.stamped import pose_message


class Outputs:
    """The arm's and the gripper's commands. Publishers exist from the start; the gripper's action from `open` to `close`."""

    def __init__(self, node: LifecycleNode, mode: str, gripper_interface: str):
        def publisher(kind: type, topic: str, wanted: bool) -> Publisher | None:
            return node.create_lifecycle_publisher(kind, topic, 10) if wanted else None

        self._node = node
        self._target = publisher(PoseStamped, "target_pose", mode != "twist")
        self._twist = publisher(TwistStamped, "target_twist", mode != "pose")
        self._gripper_topic = publisher(Float64MultiArray, "gripper_command", gripper_interface == "topic")
        self._gripper: Gripper | None = None

    @property
    def publishers(self) -> list[Publisher]:
        """What no other node should publish on."""
        return [publisher for publisher in (self._target, self._twist, self._gripper_topic) if publisher]

    def open(self, given: dict[str, Any]) -> None:
        """Makes the gripper's side ready; raises UserError where control_msgs is needed and missing."""
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
        """One command, in `frame_id`."""
        if command.gripper is not None:
            self._gripper.send(command.gripper)
        if self._twist:
            self._twist.publish(twist_message(command.twist, frame_id, command.stamp_ns))
        if self._target and command.target is not None:  # last: a simulator in lock step goes on when it has this one
            self._target.publish(pose_message(command.target, frame_id, command.stamp_ns))
