"""Who else is on our topics: publishers that cannot reach us, and others that command our arm."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSCompatibility, qos_check_compatible
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo

from deer_vla_ros.control.types import HoldReason
from deer_vla_ros.ros.messages import nanoseconds

FOUND_WITHIN_S = 4.0
"""How long DDS may take to find a publisher: where the first announcements are lost, Fast DDS repeats them
after 3 s."""
SILENT_S = 3.0
"""How long a publisher may be silent before it counts as nobody: DDS keeps those of a killed node on its list
for 20 s, and a node that is not active has publishers, too."""
UNKNOWN = "_NODE_NAME_UNKNOWN_"
"""What rmw calls a publisher's node for the moment in which it knows the one and not yet the other. It may be
another commander."""


@dataclass(frozen=True)
class Neighbours:
    """publishers: how many there are on each topic we listen to. problems: one sentence each, with the
    remedy."""

    publishers: dict[str, int]
    problems: tuple[str, ...]


def neighbours(
    node: Node, subscriptions: Iterable[Subscription], commands: Iterable[Publisher]
) -> Neighbours:
    """Looks at the ROS graph as it is now. commands: the publishers that no other node should share a topic
    with."""
    by_topic: dict[str, list[Subscription]] = {}
    for subscription in subscriptions:
        by_topic.setdefault(subscription.topic_name, []).append(subscription)
    counts, problems = {}, []
    for topic, ours in by_topic.items():
        theirs = node.get_publishers_info_by_topic(topic)
        counts[topic] = len(theirs)
        problems += [problem for publisher in theirs if (problem := _mismatch(topic, publisher, ours))]
    for publisher in commands:
        names = [name for name in commanders(node, publisher.topic_name) if UNKNOWN not in name]
        if len(names) > 1:
            problems.append(
                f"{publisher.topic_name} is commanded by {len(names)} publishers ({', '.join(sorted(names))}): stop all but one"
            )
    return Neighbours(counts, tuple(problems))


def watchdog_name(node: Node) -> str:
    """The name of the node's watchdog, which is in the same namespace."""
    return f"{node.get_name()}_watchdog"


def commanders(node: Node, topic: str) -> list[str]:
    """Full names of the nodes that publish on `topic`; our own is among them, our watchdog is not. One name
    may stand there twice."""
    watchdog = f"{node.get_namespace().rstrip('/')}/{watchdog_name(node)}"
    names = [_name(publisher) for publisher in node.get_publishers_info_by_topic(topic)]
    return [name for name in names if name != watchdog]


class OtherCommanders:
    """Whether another node commands the arm at the time when we begin to.

    A process that has just joined the network knows nobody: nothing is commanded before FOUND_WITHIN_S have
    passed since then. A publisher that is only listed is given SILENT_S to say something. One that is heard
    commands.
    """

    def __init__(self, node: Node, commands: Iterable[Publisher], our_stamps: Collection[int]):
        """Made when the process joins the network. commands: our publishers of stamped commands. our_stamps:
        of our newest commands, by which others' are told apart."""
        self._node, self._commands, self._our_stamps = node, list(commands), our_stamps
        self._subscriptions: list[Subscription] = []
        self._joined = time.monotonic()
        self._began = 0.0
        self._heard_at = -SILENT_S

    @property
    def listens(self) -> bool:
        """Whether we hear our own commands, too, as one of their subscribers."""
        return bool(self._subscriptions)

    def listen(self) -> None:
        """From now on, before anything is commanded."""
        if not self._subscriptions:
            self._subscriptions = [
                self._node.create_subscription(publisher.msg_type, publisher.topic_name, self._on_command, 10)
                for publisher in self._commands
            ]

    def begin(self) -> None:
        """We begin to command."""
        self.listen()
        self._began = time.monotonic()

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def found(self) -> HoldReason | None:
        """What speaks against moving the arm; from the executor's thread."""
        if not self._subscriptions:
            return None
        now = time.monotonic()
        listed = any(len(commanders(self._node, publisher.topic_name)) > 1 for publisher in self._commands)
        if listed and now - self._heard_at < SILENT_S:
            return HoldReason.OTHER_COMMANDER
        if now - self._joined < FOUND_WITHIN_S:
            return HoldReason.OTHER_PUBLISHER
        if now - max(self._began, self._joined + FOUND_WITHIN_S) < SILENT_S:
            return HoldReason.OTHER_PUBLISHER if listed else None
        self.close()
        return None

    def _on_command(self, message: Any) -> None:
        if nanoseconds(message.header.stamp) not in self._our_stamps:
            self._heard_at = time.monotonic()


def _mismatch(topic: str, publisher: TopicEndpointInfo, ours: list[Subscription]) -> str:
    """Why `publisher` reaches none of our subscriptions on its topic; empty where it reaches one."""
    expected = type_name(ours[0].msg_type)
    if publisher.topic_type != expected:
        return f"{topic}: {_name(publisher)} publishes {publisher.topic_type}, the node listens to {expected}: remap one of them"
    answers = [qos_check_compatible(publisher.qos_profile, subscription.qos_profile) for subscription in ours]
    if any(compatibility != QoSCompatibility.ERROR for compatibility, _ in answers):
        return ""
    return f"{topic}: {_name(publisher)} is not heard ({answers[0][1].strip('; ')}): publish with reliability RELIABLE"


def type_name(message_type: type) -> str:
    """`sensor_msgs/msg/Image` for sensor_msgs.msg.Image."""
    package, kind = message_type.__module__.split(".")[:2]
    return f"{package}/{kind}/{message_type.__name__}"


def _name(endpoint: TopicEndpointInfo) -> str:
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"
