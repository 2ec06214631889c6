"""Tests of when a node may begin to command the arm beside others, with a fake ROS graph and clock."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from geometry_msgs.msg import PoseStamped

from deer_vla_ros.control.types import HoldReason
from deer_vla_ros.ros import graph

LISTED, HEARD, NOBODY = HoldReason.OTHER_PUBLISHER, HoldReason.OTHER_COMMANDER, None


class Graph:
    """A fake node that lists the publishers of a topic. `names`: the names of their nodes."""

    def __init__(self):
        self.names = ["deer_vla"]
        self.on_command = None

    def get_name(self) -> str:
        return "deer_vla"

    def get_namespace(self) -> str:
        return "/"

    def get_publishers_info_by_topic(self, topic: str) -> list:
        return [SimpleNamespace(node_namespace="/", node_name=name) for name in self.names]

    def create_subscription(self, kind, topic, callback, depth) -> object:
        self.on_command = callback
        return object()

    def destroy_subscription(self, subscription) -> None:
        self.on_command = None


@pytest.fixture
def look(monkeypatch) -> SimpleNamespace:
    """The object under test as `others`, made at time 0, and its `node`.

    `at(seconds)` gives its result at that time.
    """
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(graph, "time", SimpleNamespace(monotonic=lambda: clock.now))
    node = Graph()
    publisher = SimpleNamespace(topic_name="/target_pose", msg_type=PoseStamped)
    others = graph.OtherCommanders(node, [publisher], is_ours=lambda stamp_ns: stamp_ns == 5)

    def at(seconds: float) -> HoldReason | None:
        clock.now = seconds
        return others.found()

    def begin(seconds: float) -> None:
        clock.now = seconds
        others.begin()

    return SimpleNamespace(others=others, node=node, at=at, begin=begin)


def command(nanosec: int) -> PoseStamped:
    message = PoseStamped()
    message.header.stamp.nanosec = nanosec
    return message


def test_a_process_that_has_just_joined_waits_until_others_can_be_found(look):
    look.begin(0.5)
    assert [look.at(seconds) for seconds in (0.6, 3.9, 4.1)] == [LISTED, LISTED, NOBODY]


def test_a_process_that_joined_long_ago_begins_at_once(look):
    look.begin(60.0)
    assert look.at(60.0) is NOBODY


def test_one_that_is_found_late_is_still_waited_for(look):
    look.begin(0.5)
    look.at(3.9)
    look.node.names.append("another")
    assert [look.at(seconds) for seconds in (4.1, 6.9, 7.1)] == [LISTED, LISTED, NOBODY]


def test_one_that_is_listed_and_says_nothing_is_nobody_after_a_while(look):
    look.node.names.append("another")
    look.begin(60.0)
    assert [look.at(seconds) for seconds in (60.1, 62.9, 63.1)] == [LISTED, LISTED, NOBODY]
    assert not look.others.listens


def test_one_that_is_heard_commands_until_it_has_been_silent_for_long_enough(look):
    look.node.names.append("another")
    look.begin(60.0)
    look.at(61.0)
    look.node.on_command(command(7))
    assert [look.at(seconds) for seconds in (61.1, 63.9, 64.1)] == [HEARD, HEARD, NOBODY]


def test_own_commands_are_not_those_of_another(look):
    look.node.names.append("another")
    look.begin(60.0)
    look.node.on_command(command(5))
    assert look.at(60.1) is LISTED


def test_the_own_watchdog_is_nobody_else(look):
    look.node.names.append("deer_vla_watchdog")
    look.begin(60.0)
    assert look.at(60.1) is NOBODY


def test_the_node_is_made_before_torch_is_loaded():
    """DDS already discovers other nodes while torch is loaded: the time counts from the node's start."""
    code = "import sys; import deer_vla_ros.ros.policy_node; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
