"""Tests of bad inputs over real DDS: the arm holds, the reason is named, and a good input ends the hold."""

import array
import math
import time

import numpy as np
import pytest
from diagnostic_msgs.msg import DiagnosticArray
from harness import Client, spawn, wait_until
from rclpy.qos import QoSProfile
from rclpy.time import Time
from rig import PERIOD_S, Rig, moves
from std_msgs.msg import String

from deer_vla_ros.ros.messages import SECOND, nanoseconds

NAMESPACE = "faulty"


@pytest.fixture(scope="module")
def client():
    with Client("bad_inputs_test") as client:
        yield client


@pytest.fixture(scope="module")
def node(client):
    with spawn("node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}") as process:
        client.await_active(process, f"{NAMESPACE}/deer_vla")
        yield process


@pytest.fixture(scope="module")
def healthy(client, node):
    rig = Rig(client, f"{NAMESPACE}/")
    with rig.running():
        yield rig


@pytest.fixture
def rig(healthy):
    """A robot that the node controls. After the test it works correctly again."""
    healthy.instruct("lift the red block")
    healthy.await_steps(2)
    yield healthy
    healthy.edit_image = lambda name, image: None
    healthy.edit_pose = lambda pose: None
    healthy.instruct("lift the red block")
    healthy.await_steps(2)


def holds_because(rig: Rig, node, reason: str) -> None:
    """Waits for a hold that begins after now, and checks that the node names `reason`."""
    rig.await_hold()
    wait_until(lambda: reason in node.output().rpartition("holding: ")[2], what=f"'{reason}'")


def restamped(seconds: float):
    def edit(name, image) -> None:
        image.header.stamp = Time(
            nanoseconds=nanoseconds(image.header.stamp) + int(seconds * SECOND)
        ).to_msg()

    return edit


def with_stamp(stamp_ns: int):
    def edit(name, image) -> None:
        image.header.stamp = Time(nanoseconds=stamp_ns).to_msg()

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (with_stamp(0), "the static frame's stamp is zero"),
        (with_stamp(1_000 * SECOND), "the newest static frame is older"),
        (restamped(+5.0), "the static frame's stamp lies in the future"),
        (restamped(-5.0), "the newest static frame is older"),
        (
            lambda name, image: name == "gripper" and restamped(-5.0)(name, image),
            "the newest gripper frame is older",
        ),
        (
            lambda name, image: name == "gripper" and restamped(-0.15)(name, image),
            "further apart than inputs.max_skew_s",
        ),
    ],
    ids=["zero", "of another clock", "future", "backwards", "one camera behind", "skewed"],
)
def test_stamps_that_cannot_be_acted_upon_hold(rig, node, edit, reason):
    rig.edit_image = edit
    holds_because(rig, node, reason)


def test_a_frozen_stamp_holds(rig, node):
    rig.edit_image = with_stamp(time.time_ns())
    holds_because(rig, node, "the newest static frame is older")


def resized(height: int, width: int):
    def edit(name, image) -> None:
        image.height, image.width = height, width

    return edit


def truncated(name, image) -> None:
    image.data = image.data[: len(image.data) // 2]


def encoded(encoding: str):
    def edit(name, image) -> None:
        image.encoding = encoding

    return edit


@pytest.mark.parametrize(
    ("camera", "edit", "cause"),
    [
        ("static", encoded("16UC1"), "encoding '16UC1' is a depth image and not supported"),
        ("gripper", encoded(""), "encoding '' is not supported"),
        ("static", truncated, "bytes"),
        ("gripper", resized(0, 0), "0"),
        ("static", resized(10**6, 10**6), "1000000"),
    ],
    ids=["unknown encoding", "no encoding", "truncated", "no size", "absurd size"],
)
def test_an_image_that_cannot_be_read_is_named_with_its_cause_and_holds(rig, node, camera, edit, cause):
    begin, topic = len(node.output()), f"camera/{camera}/image_raw: "
    rig.edit_image = lambda name, image: edit(name, image) if name == camera else None
    # For each camera, the node logs such a line once in five seconds.
    wait_until(lambda: topic in node.output()[begin:], what=f"the line that names the {camera} camera")
    rig.await_hold()
    told = [line for line in node.output()[begin:].splitlines() if topic in line]
    assert len(told) == 1 and cause in told[0].partition("image_raw: ")[2], node.output()[begin:]


@pytest.mark.parametrize(
    ("encoding", "channels"),
    [("rgb8", 3), ("bgr8", 3), ("rgba8", 4), ("bgra8", 4), ("mono8", 1), ("8UC3", 3), ("yuv422_yuy2", 2)],
)
def test_images_of_every_encoding_with_padded_rows_in_both_byte_orders_are_acted_upon(
    rig, encoding, channels
):
    def edit(name, image) -> None:
        image.encoding, image.is_bigendian = encoding, True
        image.step = channels * image.width + 7
        image.data = array.array("B", bytes(range(256)) * (image.step * image.height // 256 + 1))[
            : image.step * image.height
        ]

    rig.edit_image = edit
    time.sleep(PERIOD_S)
    assert all(step.verdict != step.VERDICT_HELD for step in rig.await_steps(5))


def test_a_grey_camera_is_named_once(rig, node):
    def edit(name, image) -> None:
        if name == "static":
            image.encoding, image.step = "mono8", image.width
            image.data = array.array("B", bytes(image.step * image.height))

    begin = len(node.output())
    rig.edit_image = edit
    wait_until(lambda: "image_raw: the camera is grey" in node.output(), what="the line on the grey camera")
    rig.await_steps(5)
    told = [line for line in node.output()[begin:].splitlines() if "the camera is grey" in line]
    assert all("camera/static/image_raw" in line for line in told) and len(told) <= 1, told


def no_number(pose) -> None:
    pose.pose.position.y = math.nan


def no_unit_quaternion(pose) -> None:
    pose.pose.orientation.w = 1.0


def other_frame(pose) -> None:
    pose.header.frame_id = "camera"


def old(pose) -> None:
    pose.header.stamp.sec -= 5


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (no_number, "not finite, not of unit length"),
        (no_unit_quaternion, "not finite, not of unit length"),
        (other_frame, "in another frame"),
        (old, "older than inputs.max_pose_age_s"),
    ],
)
def test_with_a_measured_pose_that_cannot_be_built_upon_no_target_is_published_but_the_reason(
    rig, node, edit, reason
):
    rig.edit_pose = edit
    holds_because(rig, node, reason)
    targets, twists = len(rig.targets), len(rig.twists)
    wait_until(lambda: len(rig.twists) >= twists + 5, what="repeats of the hold")
    assert len(rig.targets) == targets
    assert not any(map(moves, rig.twists[twists:]))


def test_a_hold_is_repeated_at_the_control_rate(rig):
    rig.instruct("   \n ")  # An instruction without words means hold.
    rig.await_hold()
    begin = len(rig.twists)
    wait_until(lambda: len(rig.twists) >= begin + 21, what="repeats")
    stamps = [nanoseconds(twist.header.stamp) for twist in rig.twists[begin : begin + 21]]
    assert np.median(np.diff(stamps)) == pytest.approx(0.1 * SECOND, rel=0.15)


def test_an_instruction_of_a_plain_publisher_is_heard_too(rig, client):
    publisher = client.publisher(String, f"{NAMESPACE}/instruction", QoSProfile(depth=1))
    publisher.publish(String(data="open the drawer"))
    wait_until(lambda: rig.steps[-1].instruction == "open the drawer", what="a step under it")
    client.node.destroy_publisher(publisher)


def test_diagnostics_tell_rate_latency_holds_drops_and_units_once_a_second(rig, client):
    heard = client.listen(DiagnosticArray, "/diagnostics")
    rig.await_steps(30)
    wait_until(lambda: len(heard) >= 3, what="arrays")
    arrays = [array for array in heard if array.status[0].name.startswith("deer_vla")]
    stamps = [nanoseconds(array.header.stamp) for array in arrays]
    assert np.median(np.diff(stamps)) == pytest.approx(SECOND, rel=0.2)
    before, values = ({pair.key: pair.value for pair in array.status[0].values} for array in arrays[-2:])
    steps_per_s = (int(values["steps"]) - int(before["steps"])) / (stamps[-1] - stamps[-2]) * SECOND
    assert 0 < float(values["rate_hz"]) == pytest.approx(steps_per_s, rel=0.5)
    percentiles = [float(values[f"stamp_to_publish_ms.p{p}"]) for p in (50, 95, 99)]
    assert 0 < percentiles[0] <= percentiles[1] <= percentiles[2]
    assert int(values["holds.NO_INSTRUCTION"]) >= 1 and int(values["dropped"]) >= 0
    assert values["action.frame"] == "base" and float(values["action.translation_m"]) == 0.03
    assert {"action.rotation_rad", "action.gripper_open", "action.gripper_closed"} <= set(values)
