"""Tests of the table node as a process: over DDS it behaves like a robot towards a client."""

import signal
import subprocess
import sys
import time
from typing import NamedTuple

import numpy as np
import pytest
from geometry_msgs.msg import PoseStamped
from harness import Client, Process, spawn, wait_until
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue, SetParametersResult
from rcl_interfaces.srv import SetParameters
from rclpy.qos import qos_profile_sensor_data
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger

from deer_vla_ros.lab.sim.table import Table

HOME = np.array([0.40, 0.0, 0.26])


class Robot(NamedTuple):
    """A running table, and lists that grow with the messages that a client receives from it."""

    process: Process
    client: Client
    static: list
    gripper_views: list
    poses: list
    joints: list
    target: object
    gripper: object

    def position(self) -> np.ndarray:
        point = self.poses[-1].pose.position
        return np.array([point.x, point.y, point.z])

    def opening(self) -> float:
        return sum(self.joints[-1].position[7:])

    def fresh(self, messages: list, count: int = 1) -> list:
        """Waits for the next `count` messages and returns them."""
        start = len(messages)
        wait_until(lambda: len(messages) >= start + count, 10.0, f"{count} new messages")
        return messages[start : start + count]


def namespace(name: str) -> tuple[str, ...]:
    """ROS arguments for a namespace: a test may start a table of its own while the shared one runs."""
    return "--ros-args", "-r", f"__ns:=/{name}"


def connect(process: Process, client: Client) -> Robot:
    robot = Robot(
        process=process,
        client=client,
        static=client.listen(Image, "camera/static/image_raw", qos_profile_sensor_data),
        gripper_views=client.listen(Image, "camera/gripper/image_raw", qos_profile_sensor_data),
        poses=client.listen(PoseStamped, "ee_pose"),
        joints=client.listen(JointState, "joint_states"),
        target=client.publisher(PoseStamped, "target_pose"),
        gripper=client.publisher(Float64MultiArray, "gripper_command"),
    )
    for messages in (robot.static, robot.gripper_views, robot.poses, robot.joints):
        wait_until(lambda messages=messages: messages, 20.0, "the first messages of every topic")
    return robot


@pytest.fixture(scope="module")
def shared():
    with spawn("sim", "--seed", "3", *namespace("shared")) as process, Client(namespace="shared") as client:
        yield connect(process, client)


@pytest.fixture
def robot(shared):
    """The shared table after a reset."""
    assert shared.client.call(Trigger, "table/reset").success
    return shared


def pose(x: float, y: float, z: float, frame: str = "base") -> PoseStamped:
    message = PoseStamped()
    message.header.frame_id = frame
    message.pose.position.x, message.pose.position.y, message.pose.position.z = x, y, z
    message.pose.orientation.x, message.pose.orientation.w = 1.0, 0.0
    return message


def seconds(message) -> float:
    stamp = message.clock if isinstance(message, Clock) else message.header.stamp
    return stamp.sec + 1e-9 * stamp.nanosec


def pixels(message: Image) -> np.ndarray:
    return np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)


def set_parameter(client: Client, name: str, value: ParameterValue) -> SetParametersResult:
    request = SetParameters.Request(parameters=[Parameter(name=name, value=value)])
    return client.call(SetParameters, "table/set_parameters", request).results[0]


def integer(value: int) -> ParameterValue:
    return ParameterValue(type=ParameterType.PARAMETER_INTEGER, integer_value=value)


def test_image_pairs_arrive_at_10_hz(robot):
    stamps = [seconds(message) for message in robot.fresh(robot.static, 25)]
    assert np.median(np.diff(stamps)) == pytest.approx(0.1, abs=0.01)
    assert (stamps[-1] - stamps[0]) / 24 > 0.095  # a busy machine may be late


def test_both_images_of_a_pair_carry_the_same_stamp_and_say_which_camera_they_are(robot):
    static = robot.fresh(robot.static, 3)[-1]
    wait_until(
        lambda: any(m.header.stamp == static.header.stamp for m in robot.gripper_views), 5.0, "its partner"
    )
    partner = next(m for m in robot.gripper_views if m.header.stamp == static.header.stamp)
    assert (static.height, static.width, static.step, static.encoding) == (200, 200, 600, "rgb8")
    assert (partner.height, partner.width, partner.step, partner.encoding) == (84, 84, 252, "rgb8")
    assert (static.header.frame_id, partner.header.frame_id) == ("static_camera", "gripper_camera")


def test_poses_and_joints_come_at_50_hz_in_the_base_frame(robot):
    poses = robot.fresh(robot.poses, 100)
    stamps = [seconds(message) for message in poses]
    assert np.median(np.diff(stamps)) == pytest.approx(0.02, rel=0.1)
    assert poses[0].header.frame_id == "base"
    assert robot.joints[-1].name[0] == "panda_joint1" and len(robot.joints[-1].position) == 9


def test_the_arm_goes_to_the_target_pose_and_stays_there(robot):
    robot.target.publish(pose(0.50, 0.10, 0.20))
    wait_until(lambda: np.linalg.norm(robot.position() - [0.50, 0.10, 0.20]) < 0.005, 5.0, "arrival")
    robot.fresh(robot.poses, 25)
    assert np.linalg.norm(robot.position() - [0.50, 0.10, 0.20]) < 0.005


def test_a_target_in_another_frame_is_refused_with_the_remedy(robot):
    robot.target.publish(pose(0.50, 0.10, 0.20, frame="world"))
    wait_until(lambda: "target_pose is in frame 'world'" in robot.process.output(), 5.0, "the refusal")
    assert "the table takes 'base'" in robot.process.output()
    robot.fresh(robot.poses, 25)
    assert np.linalg.norm(robot.position() - HOME) < 0.005


def test_a_target_that_is_not_finite_is_refused_and_the_table_goes_on(robot):
    robot.target.publish(pose(float("nan"), 0.10, 0.20))
    wait_until(lambda: "target_pose refused" in robot.process.output(), 5.0, "the refusal")
    robot.target.publish(pose(0.45, 0.0, 0.20))
    wait_until(lambda: np.linalg.norm(robot.position() - [0.45, 0.0, 0.20]) < 0.005, 5.0, "arrival")


def test_the_gripper_follows_its_command(robot):
    robot.gripper.publish(Float64MultiArray(data=[0.03]))
    wait_until(lambda: robot.opening() == pytest.approx(0.03, abs=0.001), 5.0, "an opening of 3 cm")
    robot.gripper.publish(Float64MultiArray(data=[0.08]))
    wait_until(lambda: robot.opening() == pytest.approx(0.08, abs=0.001), 5.0, "an opening of 8 cm")


def test_a_gripper_command_outside_its_range_is_clamped_with_a_warning(robot):
    robot.gripper.publish(Float64MultiArray(data=[-1.0]))
    wait_until(lambda: robot.opening() == pytest.approx(0.0, abs=0.002), 5.0, "a closed gripper")
    assert "gripper_command -1 m clamped" in robot.process.output()


def test_a_gripper_command_of_two_numbers_is_refused(robot):
    robot.gripper.publish(Float64MultiArray(data=[0.0, 0.0]))
    wait_until(lambda: "gripper_command has 2 numbers" in robot.process.output(), 5.0, "the refusal")
    robot.fresh(robot.joints, 25)
    assert robot.opening() == pytest.approx(0.08, abs=0.002)


def test_reset_brings_the_arm_home_without_turning_time_back(robot):
    robot.target.publish(pose(0.50, 0.10, 0.20))
    wait_until(lambda: np.linalg.norm(robot.position() - HOME) > 0.05, 5.0, "a motion")
    assert robot.client.call(Trigger, "table/reset").success
    robot.fresh(robot.poses, 10)
    assert np.linalg.norm(robot.position() - HOME) < 0.005
    for messages in (robot.static, robot.poses, robot.joints):
        assert (np.diff([seconds(message) for message in messages]) > 0).all()


def test_a_new_seed_counts_from_the_next_reset_on(robot):
    assert set_parameter(robot.client, "seed", integer(12)).successful
    assert robot.client.call(Trigger, "table/reset").success
    shown = pixels(robot.fresh(robot.static, 2)[-1]).astype(int)
    with Table(seed=12) as expected, Table(seed=3) as other:
        assert np.abs(shown - expected.render().static).mean() < 0.5
        assert np.abs(shown - other.render().static).mean() > 0.5


def test_what_cannot_change_while_running_is_refused(robot):
    rate = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=20.0)
    assert not set_parameter(robot.client, "camera.rate_hz", rate).successful
    assert not set_parameter(robot.client, "seed", integer(-1)).successful


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_table_with_status_0(number):
    with spawn("sim", *namespace("ended")) as process, Client(namespace="ended") as client:
        images = client.listen(Image, "camera/static/image_raw", qos_profile_sensor_data)
        wait_until(lambda: images, 20.0, "the first image")
        assert process.stop(number) == 0
        assert process.output() == ""


LOCKSTEP = (*namespace("lockstep"), "-p", "clock.publish:=true", "-p", "clock.mode:=lockstep")


def stands_still(messages: list, seconds_of_silence: float = 0.4) -> bool:
    """Whether there are messages, and no further one comes for `seconds_of_silence`."""
    count = len(messages)
    end = time.monotonic() + seconds_of_silence
    while len(messages) == count and time.monotonic() < end:
        time.sleep(0.01)
    return 0 < count == len(messages)


def answer_to(image: Image) -> PoseStamped:
    message = pose(*HOME)
    message.header.stamp = image.header.stamp
    return message


@pytest.fixture
def lockstep():
    """A table in lock step that waits for an answer.

    It consists of the table's process, a client, the camera pairs so far, and a publisher.
    """
    with (
        spawn("sim", *LOCKSTEP, "-p", "clock.lockstep_timeout_s:=0.1") as process,
        Client(namespace="lockstep") as client,
    ):
        pairs = client.listen(Image, "camera/gripper/image_raw", qos_profile_sensor_data)
        target = client.publisher(PoseStamped, "target_pose", timeout=20.0)
        wait_until(lambda: pairs, 20.0, "the first camera pair")
        patience = ParameterValue(type=ParameterType.PARAMETER_DOUBLE, double_value=60.0)
        assert set_parameter(client, "clock.lockstep_timeout_s", patience).successful
        wait_until(lambda: stands_still(pairs), 10.0, "the table to wait for an answer")
        yield process, client, pairs, target


def test_in_lock_step_only_the_answer_to_the_last_pair_lets_time_go_on(lockstep):
    _, _, pairs, target = lockstep
    count = len(pairs)
    target.publish(answer_to(Image()))
    assert stands_still(pairs)
    target.publish(answer_to(pairs[-1]))
    wait_until(lambda: len(pairs) > count, 5.0, "the next pair")
    assert stands_still(pairs)
    assert len(pairs) == count + 1
    assert seconds(pairs[-1]) == pytest.approx(seconds(pairs[-2]) + 0.1, abs=1e-6)


def test_a_reset_in_lock_step_shows_the_new_arrangement_at_a_later_time(lockstep):
    _, client, pairs, _ = lockstep
    old = pixels(pairs[-1]).astype(float)

    def new_pairs() -> list[Image]:
        return [image for image in pairs if np.abs(pixels(image) - old).mean() > 0.5]

    assert client.call(Trigger, "table/reset").success
    wait_until(new_pairs, 5.0, "the pair after the reset")
    assert stands_still(pairs)
    assert new_pairs() == pairs[-1:]  # an old pair may have been on its way
    assert seconds(pairs[-1]) == pytest.approx(seconds(pairs[-2]) + 0.1, abs=1e-6)


def test_lock_step_runs_faster_than_real_time_and_its_clock_never_goes_back(lockstep):
    process, client, pairs, target = lockstep
    clocks = client.listen(Clock, "/clock")
    count, arrivals = len(pairs), []
    client.node.create_subscription(
        Image,
        "camera/static/image_raw",
        lambda image: (arrivals.append(time.monotonic()), target.publish(answer_to(image))),
        qos_profile_sensor_data,
    )
    target.publish(answer_to(pairs[-1]))
    wait_until(lambda: len(pairs) >= count + 60, 20.0, "60 answered pairs")
    # Pairs are 0.1 s apart in ROS time. The fastest quarter counts, because a busy machine pauses at times.
    assert np.percentile(np.diff(arrivals), 25) < 0.1 / 1.5
    np.testing.assert_allclose(np.diff([seconds(image) for image in pairs]), 0.1, atol=1e-6)
    assert len(clocks) > 100 and (np.diff([seconds(clock) for clock in clocks]) > 0).all()
    assert process.stop() == 0


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("clock.mode:=fast", "paced or lockstep"), ("clock.factor:=0.0", "0.01"), ("seed:=many", "seed")],
)
def test_a_wrong_parameter_ends_the_table_with_one_line_that_says_why(argument, reason):
    with spawn("sim", "--ros-args", "-p", argument) as process:
        assert process.wait(20.0) == 1
        assert process.output().startswith("error: ") and reason in process.output()
        assert process.output().count("\n") == 1


def test_the_table_process_loads_no_torch():
    program = (
        "import sys, threading, rclpy; rclpy.init(); from deer_vla_ros.lab.sim.table_node import TableNode; "
        "TableNode(threading.Event()); "
        "print([m for m in sys.modules if m.split('.')[0] == 'torch' or "
        "m.startswith(('deer_vla_ros.model', 'deer_vla_ros.inference', 'deer_vla_ros.control.'))])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "['deer_vla_ros.control.types']", "it has the type of a pose only"
