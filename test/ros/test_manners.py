"""Tests of a node's inputs, outputs and neighbours over real DDS, as a robotics engineer expects them."""

import re
from pathlib import Path

import pytest
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from harness import START_TIMEOUT, Client, spawn, wait_until
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import GetParameters, SetParametersAtomically
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from rig import Rig, moves
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image
from slow_network import save_slow
from std_msgs.msg import String
from std_srvs.srv import SetBool

from deer_vla_ros.ros.graph import type_name
from deer_vla_ros.ros.interface import INPUTS, OUTPUTS, SERVICES
from deer_vla_ros.ros.messages import nanoseconds

NAMESPACE = "manners"


@pytest.fixture(scope="module")
def client():
    with Client("manners_test") as client:
        yield client


@pytest.fixture(scope="module")
def node(client):
    with spawn("node", "--ros-args", "-r", f"__ns:=/{NAMESPACE}") as process:
        client.await_active(process, f"{NAMESPACE}/deer_vla")
        yield process


@pytest.fixture(scope="module")
def diagnostics(client):
    return client.listen(DiagnosticArray, "/diagnostics")


@pytest.fixture
def rig(client, node):
    rig = Rig(client, f"{NAMESPACE}/")
    with rig.running():
        rig.instruct("lift the red block")
        rig.await_steps()
        yield rig
        rig.instruct("")
        rig.await_hold()


def newest_status(diagnostics: list, key: str) -> DiagnosticStatus | None:
    """The newest status that has a value whose name contains `key`."""
    found = [
        status
        for array in diagnostics
        for status in array.status
        if any(key in pair.key for pair in status.values)
    ]
    return found[-1] if found else None


# --- Inputs.


def test_without_any_frame_the_node_is_active_holds_and_says_how_many_publish(node, diagnostics):
    """It is the first test, so that no rig has published a frame to the node."""
    key = f"publishers./{NAMESPACE}/camera/static/image_raw"
    status = wait_until(
        lambda: (s := newest_status(diagnostics, key)) and s.level == DiagnosticStatus.WARN and s,
        10.0,
        "a warning",
    )
    assert "no frame of the static camera yet" in status.message
    assert {pair.key: pair.value for pair in status.values}[key] == "0"


def test_a_publisher_of_another_type_is_reported_with_the_remedy(rig, node):
    report = (
        "/stranger publishes sensor_msgs/msg/CompressedImage, "
        "the node listens to sensor_msgs/msg/Image: remap"
    )
    with Client("stranger") as stranger:  # One ROS context may use a topic with one type only.
        stranger.node.create_publisher(CompressedImage, f"{NAMESPACE}/camera/static/image_raw", 10)
        wait_until(lambda: report in node.output(), what="the report")


def test_a_publisher_that_cannot_be_heard_is_reported_with_the_remedy(rig, client, node):
    quality = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    publisher = client.node.create_publisher(String, f"{NAMESPACE}/instruction", quality)
    wait_until(lambda: "publish with reliability RELIABLE" in node.output(), what="the report")
    client.node.destroy_publisher(publisher)


def test_a_second_commander_is_reported(rig, client, node, diagnostics):
    publisher = client.node.create_publisher(PoseStamped, f"{NAMESPACE}/target_pose", 10)
    wait_until(
        lambda: f"/{NAMESPACE}/target_pose is commanded by 2 publishers" in node.output(), what="the report"
    )
    key = f"publishers./{NAMESPACE}/ee_pose"
    wait_until(lambda: newest_status(diagnostics, key).level == DiagnosticStatus.WARN, what="the warning")
    client.node.destroy_publisher(publisher)
    wait_until(lambda: newest_status(diagnostics, key).level == DiagnosticStatus.OK, what="all well again")


def test_an_overlong_instruction_is_cut_with_a_warning(rig, node):
    rig.instruct("push " * 1000)
    wait_until(lambda: "instruction of 5000 characters cut to 500" in node.output(), what="the warning")
    wait_until(lambda: rig.steps[-1].instruction == ("push " * 100).strip(), what="a step under it")


def test_cameras_may_change_their_resolution_and_be_reliable_or_best_effort(rig):
    rig.sizes = {"static": 96, "gripper": 80}
    rig.await_steps(3)
    rig.sizes = {"static": 40, "gripper": 32}
    rig.await_steps(3)
    rig.make_cameras(reliable=True)
    rig.await_steps(10)


def test_the_same_text_again_does_not_restart_the_episode(rig):
    episode = rig.await_steps()[0].episode
    rig.instruct("  lift the red block\n")
    assert {step.episode for step in rig.await_steps(5)} == {episode}


def test_compressed_images_are_heard_and_a_corrupt_one_is_named_and_holds(client):
    rig = Rig(client, "squeezed/", compressed=True)
    parameters = ("-p", "inputs.image_transport:=compressed", "-p", "action.mode:=twist")
    with spawn("node", "--ros-args", "-r", "__ns:=/squeezed", *parameters) as process, rig.running():
        rig.instruct("open the drawer")
        rig.await_steps(3, START_TIMEOUT)
        assert client.node.count_publishers("squeezed/target_pose") == 0, "action.mode is twist"
        rig.edit_image = lambda name, image: setattr(image, "data", image.data[: len(image.data) // 2])
        rig.await_hold()
        assert "camera/static/image_raw/compressed: " in process.output()
        rig.edit_image = lambda name, image: None
        rig.await_steps(3)


class TimedRig(Rig):
    """A robot with simulated time."""

    seconds = 100.0

    def now(self) -> Time:
        self.seconds += 0.1
        self.clock.publish(Clock(clock=Time(seconds=self.seconds).to_msg()))
        return Time(seconds=self.seconds)


def test_simulated_time_works_and_its_jump_back_is_a_hold_until_a_person_has_cleared_it(client):
    rig = TimedRig(client, "timed/")
    rig.clock = client.node.create_publisher(Clock, "/clock", 10)
    with (
        spawn("node", "--ros-args", "-r", "__ns:=/timed", "-p", "use_sim_time:=true") as process,
        rig.running(),
    ):
        rig.instruct("open the drawer")
        before = rig.await_steps(5, START_TIMEOUT)[-1]
        assert nanoseconds(before.header.stamp) < 10_000 * 10**9, "stamps are simulated time"
        rig.seconds = 50.0
        wait_until(lambda: "the clock jumped backwards" in process.output(), what="the hold")
        rig.await_hold()
        assert client.call(SetBool, "timed/deer_vla/hold", SetBool.Request(data=False)).success
        after = wait_until(
            lambda: [s for s in rig.steps if s.episode > before.episode], 20.0, "a new episode"
        )[0]
        assert nanoseconds(after.header.stamp) < nanoseconds(before.header.stamp)


# --- Other nodes.


def test_the_running_node_has_the_topics_and_services_that_the_reference_names(client, node):
    def absolute(name: str) -> str:
        return name if name.startswith("/") else f"/{NAMESPACE}/{name.replace('~', 'deer_vla')}"

    graph = client.node
    heard = dict(graph.get_subscriber_names_and_types_by_node("deer_vla", f"/{NAMESPACE}"))
    said = dict(graph.get_publisher_names_and_types_by_node("deer_vla", f"/{NAMESPACE}"))
    served = dict(graph.get_service_names_and_types_by_node("deer_vla", f"/{NAMESPACE}"))
    for table, running in ((INPUTS, heard), (OUTPUTS, said), (SERVICES, served)):
        for entry in table:
            if getattr(entry, "when", "") not in (
                "inputs.image_transport: compressed",
                "control.enable_timeout_s above 0",
            ):
                assert running[absolute(entry.name)] == [type_name(entry.type)]
    ours = {name for name in said if not re.search(r"rosout|parameter_events|transition_event", name)}
    assert ours == {absolute(topic.name) for topic in OUTPUTS}


def test_two_nodes_in_two_namespaces_do_not_hear_each_other(rig, client, node):
    other = Rig(client, "neighbour/")
    with spawn("node", "--ros-args", "-r", "__ns:=/neighbour") as process, other.running():
        other.instruct("open the drawer")
        steps = other.await_steps(5, START_TIMEOUT)
        assert {step.instruction for step in steps} == {"open the drawer"}
        assert {step.instruction for step in rig.await_steps(5)} == {"lift the red block"}
        assert "commanded by" not in process.output()


# --- Faults that a review found.


@pytest.fixture(scope="module")
def slow_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint whose vision tower takes longer per step than the greatest allowed age of a frame."""
    return save_slow(tmp_path_factory.mktemp("slow"), 256)


def test_a_step_that_takes_too_long_is_overruled_and_a_signal_still_holds_at_once(client, slow_checkpoint):
    rig = Rig(client, "slow/")
    with (
        spawn("node", "--ros-args", "-r", "__ns:=/slow", "-p", f"model.path:={slow_checkpoint}") as process,
        rig.running(),
    ):
        client.await_active(process, "slow/deer_vla")
        rig.instruct("open the drawer")
        wait_until(lambda: "the inference took so long" in process.output(), START_TIMEOUT, "the watchdog")
        begin = len(rig.twists)
        wait_until(lambda: len(rig.twists) >= begin + 10, what="holds while it computes")
        assert not any(map(moves, rig.twists[begin:]))
        assert process.stop(timeout=8.0) == 0
        assert not moves(rig.twists[-1])


def test_several_parameters_are_set_together_or_not_at_all_and_looser_limits_only_in_a_hold(
    rig, client, node
):
    def arrays(**values: list[float]) -> SetParametersAtomically.Request:
        kind = ParameterType.PARAMETER_DOUBLE_ARRAY
        return SetParametersAtomically.Request(
            parameters=[
                Parameter(name=f"guard.{name}", value=ParameterValue(type=kind, double_array_value=value))
                for name, value in values.items()
            ]
        )

    def box() -> list:
        request = GetParameters.Request(names=["guard.workspace_min", "guard.workspace_max"])
        return [
            list(value.double_array_value)
            for value in client.call(GetParameters, f"{NAMESPACE}/deer_vla/get_parameters", request).values
        ]

    service, before = f"{NAMESPACE}/deer_vla/set_parameters_atomically", box()
    for wrong in ([0.9, 0.9], [-2.0, -2.0, -2.0]):
        result = client.call(
            SetParametersAtomically, service, arrays(workspace_min=[-0.5, -0.5, 0.0], workspace_max=wrong)
        ).result
        assert not result.successful and "guard.workspace_m" in result.reason
        assert box() == before
    far = arrays(workspace_min=[2.0] * 3, workspace_max=[3.0] * 3)

    def reason() -> str:
        """Why the looser box is refused. Where a busy machine made the arm hold just then, the box is set
        back."""
        rig.await_steps(1)
        result = client.call(SetParametersAtomically, service, far).result
        if result.successful:
            back = arrays(workspace_min=before[0], workspace_max=before[1])
            assert client.call(SetParametersAtomically, service, back).result.successful
            rig.instruct("")
            rig.instruct("lift the red block")
        return result.reason

    refused = wait_until(reason, 60.0, "a refusal")
    assert "guard.workspace_max would allow more while the arm moves" in refused
    assert box() == before
    rig.instruct("")
    rig.await_hold()
    assert client.call(SetParametersAtomically, service, far).result.successful
    assert "limit changed: guard.workspace_max is [3.0, 3.0, 3.0]" in node.output()
    rig.instruct("lift the red block")
    rig.await_hold()
    assert client.call(
        SetParametersAtomically, service, arrays(workspace_min=before[0], workspace_max=before[1])
    ).result.successful
    rig.await_steps(3)


def test_the_overlay_shows_what_the_policy_sees(rig, client):
    pictures = client.listen(Image, f"{NAMESPACE}/deer_vla/overlay", 1)
    picture = wait_until(lambda: pictures and pictures[-1], what="an overlay")
    assert (picture.height, picture.width, picture.encoding) == (480, 640, "rgb8")
    assert len(set(picture.data)) > 20, "not a blank picture"
