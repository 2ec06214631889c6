"""Checks of the ROS graph: publishers that cannot reach this node, and other nodes that command its arm."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
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
"""How long DDS may take to find a publisher [s]: Fast DDS repeats lost announcements after 3 s."""
SILENT_S = 3.0
"""A publisher that is silent for this time [s] does not command the arm: DDS still lists the publishers of a
killed node for 20 s, and a node that is not active has publishers, too."""
UNKNOWN = "_NODE_NAME_UNKNOWN_"
"""The name that rmw gives to a node while it knows the node's publisher only. It may be another commander."""


@dataclass(frozen=True)
class Neighbours:
    """publishers: their number, by subscribed topic. problems: one sentence each, with the remedy."""

    publishers: dict[str, int]
    problems: tuple[str, ...]


def neighbours(
    node: Node, subscriptions: Iterable[Subscription], commands: Iterable[Publisher]
) -> Neighbours:
    """Reads the ROS graph as it is now. commands: our publishers, which should be alone on their topics."""
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
                f"{publisher.topic_name} is commanded by {len(names)} publishers "
                f"({', '.join(sorted(names))}): stop all but one"
            )
    return Neighbours(counts, tuple(problems))


def watchdog_name(node: Node) -> str:
    """The name of the node's watchdog, which is in the same namespace."""
    return f"{node.get_name()}_watchdog"


def commanders(node: Node, topic: str) -> list[str]:
    """Full names of the nodes that publish on `topic`, without our watchdog. Names may repeat."""
    watchdog = f"{node.get_namespace().rstrip('/')}/{watchdog_name(node)}"
    names = [_name(publisher) for publisher in node.get_publishers_info_by_topic(topic)]
    return [name for name in names if name != watchdog]


class OtherCommanders:
    """Finds out whether another node commands the arm when this node begins to.

    A process that has just joined the network does not know the other nodes yet, so this node commands
    nothing for the first FOUND_WITHIN_S. If another publisher is listed, this node waits SILENT_S for a
    message from it. A publisher that sends a message commands the arm.
    """

    def __init__(self, node: Node, commands: Iterable[Publisher], is_ours: Callable[[int], bool]):
        """Create it when the process joins the network. commands: our publishers of stamped commands.

        is_ours: whether this node or its watchdog has recently published a command with this stamp [ns].
        """
        self._node, self._commands, self._is_ours = node, list(commands), is_ours
        self._subscriptions: list[Subscription] = []
        self._joined = time.monotonic()
        self._began = 0.0
        self._heard_at = -SILENT_S

    @property
    def listens(self) -> bool:
        """Whether this object is itself a subscriber of our commands."""
        return bool(self._subscriptions)

    def listen(self) -> None:
        """Subscribes to the command topics. Call it before this node commands anything."""
        if not self._subscriptions:
            self._subscriptions = [
                self._node.create_subscription(publisher.msg_type, publisher.topic_name, self._on_command, 10)
                for publisher in self._commands
            ]

    def begin(self) -> None:
        """Begins the check: this node begins to command."""
        self.listen()
        self._began = time.monotonic()

    def close(self) -> None:
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions = []

    def found(self) -> HoldReason | None:
        """The reason not to move the arm, None if there is none. Call it from the executor's thread.

        The check ends SILENT_S after `begin` (or after FOUND_WITHIN_S, if that is later), or as long after
        another commander's last message. The subscriptions end with it.
        """
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
        if not self._is_ours(nanoseconds(message.header.stamp)):
            self._heard_at = time.monotonic()


def _mismatch(topic: str, publisher: TopicEndpointInfo, ours: list[Subscription]) -> str:
    """Why `publisher` reaches none of our subscriptions on its topic; empty if it reaches one."""
    expected = type_name(ours[0].msg_type)
    if publisher.topic_type != expected:
        what = f"{topic}: {_name(publisher)} publishes {publisher.topic_type}"
        return f"{what}, the node listens to {expected}: remap one of them"
    answers = [qos_check_compatible(publisher.qos_profile, subscription.qos_profile) for subscription in ours]
    if any(compatibility != QoSCompatibility.ERROR for compatibility, _ in answers):
        return ""
    reason = answers[0][1].strip("; ")
    return f"{topic}: {_name(publisher)} is not heard ({reason}): publish with reliability RELIABLE"


def type_name(message_type: type) -> str:
    """`sensor_msgs/msg/Image` for sensor_msgs.msg.Image."""
    package, kind = message_type.__module__.split(".")[:2]
    return f"{package}/{kind}/{message_type.__name__}"


def _name(endpoint: TopicEndpointInfo) -> str:
    return f"{endpoint.node_namespace.rstrip('/')}/{endpoint.node_name}"
