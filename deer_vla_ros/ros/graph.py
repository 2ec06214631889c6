"""Who else is on our topics? Publishers that cannot reach us, and others that command our arm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSCompatibility, qos_check_compatible
from rclpy.subscription import Subscription
from rclpy.topic_endpoint_info import TopicEndpointInfo


@dataclass(frozen=True)
class Neighbours:
    """publishers: how many there are on each topic we listen to. problems: one sentence each, with the remedy."""

    publishers: dict[str, int]
    problems: tuple[str, ...]


def neighbours(node: Node, subscriptions: Iterable[Subscription], commands: Iterable[Publisher]) -> Neighbours:
    """Looks at the ROS graph as it is now. commands: the publishers that no other node should share a topic with."""
    by_topic: dict[str, list[Subscription]] = {}
    for subscription in subscriptions:
        by_topic.setdefault(subscription.topic_name, []).append(subscription)
    counts, problems = {}, []
    for topic, ours in by_topic.items():
        theirs = node.get_publishers_info_by_topic(topic)
        counts[topic] = len(theirs)
        problems += [problem for publisher in theirs if (problem := _mismatch(topic, publisher, ours))]
    for publisher in commands:
        names = [_name(other) for other in node.get_publishers_info_by_topic(publisher.topic_name)]
        if len(names) > 1:
            problems.append(
                f"{publisher.topic_name} is commanded by {len(names)} publishers ({', '.join(sorted(names))}): stop all but one"
            )
    return Neighbours(counts, tuple(problems))


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
