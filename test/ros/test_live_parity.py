"""Tests that the running node and a replay in lock step make the same decisions on a recording.

The recording is played over real DDS, with `/clock`. The replay follows the inputs that the live `~/step`
messages name, because a single dropped frame changes the temporal state. In the middle the test changes the
budget, as `ros2 param set` does; in the replay the recorded parameter event changes it.
"""

import time

import pytest
from deer_vla_ros.msg import PolicyStep
from geometry_msgs.msg import PoseStamped
from harness import Client, spawn, wait_until
from paths import TABLE_RECORDING
from rcl_interfaces.msg import Parameter, ParameterEvent, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from rclpy.qos import qos_profile_parameter_events, qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import type_of
from deer_vla_ros.bag.golden import decisions
from deer_vla_ros.bag.recording import Record, Recording, decode
from deer_vla_ros.bag.request import request
from deer_vla_ros.bag.rows import row_of
from deer_vla_ros.bag.run import FOLLOWED, run
from deer_vla_ros.errors import UserError
from deer_vla_ros.ros.messages import SECOND, stamp
from deer_vla_ros.ros.qos import LATCHED

TABLE = TABLE_RECORDING
PLAYED = {
    "/camera/static/image_raw": (Image, qos_profile_sensor_data),
    "/camera/gripper/image_raw": (Image, qos_profile_sensor_data),
    "/ee_pose": (PoseStamped, 10),
    "/instruction": (String, LATCHED),
}
HEARD = {
    "/deer_vla/step": (PolicyStep, 100),
    "/parameter_events": (ParameterEvent, qos_profile_parameter_events),
}
CLOCK_S = 0.01
SECONDS = 5.0
SPEED = 0.5
"""Recorded seconds for each second on the wall, so that a busy machine misses few frames."""


class Player:
    """Publishes recorded messages at their times with /clock, and keeps the node's messages."""

    def __init__(self, client: Client, records: list[Record]):
        self.records, self.heard = records, []
        self._now_ns = records[0].time_ns - SECOND
        self._client = client
        node = client.node
        for topic, (kind, qos) in HEARD.items():
            node.create_subscription(
                kind, topic, lambda data, topic=topic: self._hear(topic, data), qos, raw=True
            )
        self._publishers = {
            topic: client.publisher(kind, topic, qos) for topic, (kind, qos) in PLAYED.items()
        }
        self._clock = client.publisher(Clock, "/clock")

    def _hear(self, topic: str, data: bytes) -> None:
        self.heard.append(Record(topic, type_of(HEARD[topic][0]), self._now_ns, bytes(data)))

    def play(self, in_the_middle) -> None:
        """Plays the recording at SPEED, with a second of silence before and after it."""
        began, first_ns = time.monotonic(), self._now_ns
        coming, middle = list(self.records), len(self.records) // 2
        end_ns = self.records[-1].time_ns + SECOND
        while self._now_ns < end_ns:
            self._now_ns = first_ns + round((time.monotonic() - began) * SPEED * SECOND)
            self._clock.publish(Clock(clock=stamp(self._now_ns)))
            while coming and coming[0].time_ns <= self._now_ns:
                each = coming.pop(0)
                self._publishers[each.topic].publish(each.data)
                if len(coming) == middle:
                    in_the_middle()
            time.sleep(CLOCK_S)


def test_what_was_decided_live_is_decided_again_in_lock_step(tmp_path):
    with Recording(TABLE) as recording:
        played = list(recording.messages(set(PLAYED), None, recording.start_ns + round(SECONDS * SECOND)))

    with (
        Client("player") as client,
        spawn("node", "--ros-args", "-p", "use_sim_time:=true", "-p", "control.rehearsal:=true") as node,
    ):
        client.await_active(node, "deer_vla")
        player = Player(client, played)

        def cheaper() -> None:
            value = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=0.6)
            asked = SetParameters.Request(parameters=[Parameter(name="budget.average_fraction", value=value)])
            client.node.create_client(SetParameters, "deer_vla/set_parameters").call_async(asked)

        player.play(cheaper)
        wait_until(
            lambda: any(each.topic == "/parameter_events" for each in player.heard),
            what="the parameter event",
        )

    live = [decode(each) for each in player.heard if each.topic == "/deer_vla/step"]
    assert len(live) >= 20, "a machine too busy for half of the frames tests nothing"
    bag = BagFile(tmp_path / "live")
    for topic, kind in {**{each.topic: each.type for each in (*played, *player.heard)}}.items():
        bag.declare(topic, kind)
    for each in sorted((*played, *player.heard), key=lambda each: each.time_ns):
        bag.write(each.topic, each.data, each.time_ns)
    bag.close()

    rows = []
    result = run(request(tmp_path / "live", follow=True), "again", on_row=rows.append)
    assert not result.differences and not result.tally.skipped
    assert len(result.steps) == len(live) and result.parameter_events >= 1
    for ours, theirs in zip(rows, map(row_of, live)):
        for name in FOLLOWED:
            assert str(ours[name]) == str(theirs[name]), name
    shares = [row["language_gmac"] / row["language_gmac_full"] for row in rows]
    assert sum(shares[-8:]) > sum(shares[:8]), "the budget was changed in the middle"
    assert len(decisions(tmp_path / "live", follow=True, budget="average_fraction=0.3")) == len(live)


def test_a_recording_without_steps_cannot_be_followed():
    with pytest.raises(UserError, match="has no topic deer_vla/step to follow"):
        decisions(TABLE, follow=True)
