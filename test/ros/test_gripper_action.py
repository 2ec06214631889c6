"""Tests of gripper commands through ros2_control's actions, with an action server in another process.

control_msgs is not on PyPI. If it is not installed, its two gripper actions are generated here from their
definitions.
"""

import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from action_msgs.msg import GoalStatus
from harness import START_TIMEOUT, Client, Process, spawn, spawn_python, wait_until
from paths import ROOT
from rclpy.task import Future
from rig import Rig
from std_srvs.srv import SetBool

from deer_vla_ros.ros import gripper

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("control_msgs") is not None
SOURCES = sorted(path for path in (HERE / "gripper_actions").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def client():
    with Client("gripper_action_test") as client:
        yield client


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Environment variables of a process that has control_msgs."""
    if INSTALLED:
        return dict(os.environ)
    folder = ROOT / "build" / "test_control_msgs"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers build it once, and later runs use it again
        prefix = folder / hashlib.sha256(b"".join(map(Path.read_bytes, SOURCES))).hexdigest()[:16]
        if not (prefix / "complete").exists():
            generate(folder / "cmake", prefix)
            (prefix / "complete").touch()
    packages = next(prefix.glob("lib/python3*/site-packages"))
    paths = {"PYTHONPATH": packages, "LD_LIBRARY_PATH": prefix / "lib", "AMENT_PREFIX_PATH": prefix}
    return {
        **os.environ,
        **{name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()},
    }


def generate(build: Path, prefix: Path) -> None:
    """Generates the Python messages of the two actions."""
    shutil.rmtree(build, ignore_errors=True)
    for command in (
        f"cmake -S {HERE / 'gripper_actions'} -B {build} "
        f"-DCMAKE_INSTALL_PREFIX={prefix} -DCMAKE_PREFIX_PATH={sys.prefix} "
        f"-DPython3_EXECUTABLE={sys.executable} -DBUILD_TESTING=OFF",
        f"cmake --build {build} -j2",
        f"cmake --install {build}",
    ):
        done = subprocess.run(command.split(), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def darken(name: str, image) -> None:
    image.data = bytes(len(image.data))


def server_of(action: str, namespace: str, manner: str, environment: dict[str, str]):
    """A gripper controller in a process of its own, which is killed at the end."""
    return spawn_python(str(HERE / "gripper_server.py"), action, f"{namespace}/hand", manner, env=environment)


@contextlib.contextmanager
def steady_policy(client, environment: dict[str, str], namespace: str) -> Iterator[tuple[Process, Rig]]:
    """A policy node that commands the same gripper value again and again through the action `hand`."""
    rig = Rig(client, f"{namespace}/")
    rig.edit_image = darken
    given = {"gripper_interface": "gripper_command", "gripper_action": "hand"}
    given |= {"gripper_open": 0.08, "gripper_closed": 0.01}
    arguments = [part for name, value in given.items() for part in ("-p", f"action.{name}:={value}")]
    command = ("node", "--ros-args", "-r", f"__ns:=/{namespace}", *arguments)
    with spawn(*command, env=environment) as node, rig.running():
        rig.instruct("lift the red block")
        yield node, rig


@pytest.mark.parametrize(
    ("interface", "action", "parameters", "goal"),
    [
        ("gripper_command", "GripperCommand", {"gripper_max_effort": 12.0}, "[{}, 12.0]"),
        pytest.param(
            "parallel_gripper_command",
            "ParallelGripperCommand",
            {"gripper_joint": "finger"},
            "[['finger'], {}]",
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_gripper_action_gets_a_goal_per_change_and_again_when_it_was_refused_or_not_answered(
    client, environment, interface, action, parameters, goal
):
    rig = Rig(client, f"{interface}/")
    noise = rig.edit_image
    # With constant images the policy always commands the same value. While a goal without an answer is given
    # up, no other goal then takes its place.
    rig.edit_image = darken
    given = {
        "gripper_interface": interface,
        "gripper_action": "hand",
        "gripper_open": 0.08,
        "gripper_closed": 0.01,
        **parameters,
    }
    arguments = [part for name, value in given.items() for part in ("-p", f"action.{name}:={value}")]
    with (
        spawn("node", "--ros-args", "-r", f"__ns:=/{interface}", *arguments, env=environment) as node,
        rig.running(),
    ):
        rig.instruct("lift the red block")
        wait_until(
            lambda: "no server of action hand: start the gripper controller" in node.output(),
            START_TIMEOUT,
            "a warning",
        )
        with server_of(action, interface, "hesitates", environment) as server:
            wait_until(
                lambda: "hand did not answer within" in node.output(),
                START_TIMEOUT,
                "giving up a goal that is not answered",
            )
            wait_until(lambda: server.output().count("accepted") > 1, START_TIMEOUT, "the same goal again")
            rig.edit_image = noise
            rig.await_steps(20)
            goals = server.output().splitlines()
        assert "hand refused the goal" in node.output()
        refused = sum(goal.startswith("refused ") for goal in goals)
        assert 0 < refused < len(goals) and all(goal.startswith("refused ") for goal in goals[:refused])
        told = [line.split(" ", 1)[1] for line in goals]
        lost = node.output().count("hand did not answer within")
        assert set(told) <= {goal.format(0.08), goal.format(0.01)}
        again = sum(
            before == after for before, after in zip(told[refused:], told[refused + 1 :], strict=False)
        )
        assert again <= lost, "but for what was not answered, only changes are sent"
        assert not rig.grippers, "the topic is silent"
        assert node.stop() == 0


def test_a_gripper_server_that_was_killed_and_starts_again_is_told_again(client, environment):
    with steady_policy(client, environment, "killed") as (_, rig):
        told = []
        for _ in range(2):  # The second server starts before DDS has noticed the end of the first.
            with server_of("GripperCommand", "killed", "obeys", environment) as server:
                told.append(wait_until(server.output, START_TIMEOUT, "a goal").splitlines()[0])
                rig.await_steps(30)  # Until then the node has the answer, or has sent the goal again.
        assert told[0] == told[1]


def test_a_goal_that_is_aborted_is_sent_three_times_and_then_only_when_a_person_has_looked(
    client, environment
):
    with steady_policy(client, environment, "aborted") as (node, rig):
        with server_of("GripperCommand", "aborted", "aborts", environment) as server:
            wait_until(lambda: "hand aborted the goal" in node.output(), START_TIMEOUT, "a warning")
            wait_until(lambda: "try 3 of 3: see the gripper" in node.output(), START_TIMEOUT, "an error")
            # On a busy machine an answer may be lost. The node says so, and sends that goal once more.
            sent = 3 + node.output().count("hand did not answer within")
            rig.await_steps(20)
            assert len(server.output().splitlines()) == sent
            rig.cameras_on = False  # A hold that ends by itself changes nothing.
            rig.await_hold()
            rig.cameras_on = True
            rig.await_steps(20)
            assert len(server.output().splitlines()) == sent
            assert client.call(SetBool, "aborted/deer_vla/hold", SetBool.Request(data=False)).success
            wait_until(lambda: len(server.output().splitlines()) > sent, START_TIMEOUT, "the goal again")
        assert node.running()


@pytest.mark.skipif(INSTALLED, reason="control_msgs is installed here")
def test_a_gripper_action_without_control_msgs_is_a_failing_configure_that_names_the_remedy(client):
    with spawn(
        "node", "--ros-args", "-r", "__ns:=/grip", "-p", "action.gripper_interface:=gripper_command"
    ) as process:
        wait_until(
            lambda: "install ros-jazzy-control-msgs, or use 'topic'" in process.output(),
            START_TIMEOUT,
            "the remedy",
        )
        assert process.stop() == 0


# --- Single goals, with a fake server.


class Clock:
    """A fake of the module `time`. The test sets its time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Handle:
    """A fake goal handle, accepted or refused. The test gives its result."""

    def __init__(self, accepted: bool):
        self.accepted, self.result = accepted, Future()

    def get_result_async(self) -> Future:
        return self.result

    def ends(self, status: int, stalled: bool = False) -> None:
        self.result.set_result(SimpleNamespace(status=status, result=SimpleNamespace(stalled=stalled)))


class Server:
    """A fake action client. It keeps the values and futures of all goals that were sent."""

    def __init__(self, node, kind, name):
        self.values, self.answers, self.is_there, self.identities = [], [], True, [b"first"]

    def server_is_ready(self) -> bool:
        return self.is_there

    def send_goal_async(self, goal) -> Future:
        self.values.append(goal.command.position)
        self.answers.append(Future())
        return self.answers[-1]

    def accepts(self) -> Handle:
        return self.answers_with(True)

    def answers_with(self, accepted: bool) -> Handle:
        handle = Handle(accepted)
        self.answers[-1].set_result(handle)
        return handle

    def destroy(self) -> None: ...


class Log:
    def __init__(self):
        self.warnings, self.errors = [], []

    def warning(self, text: str, **_) -> None:
        self.warnings.append(text)

    def error(self, text: str, **_) -> None:
        self.errors.append(text)


@pytest.fixture
def hand(monkeypatch) -> SimpleNamespace:
    """An ActionGripper with a fake `clock`, `server` and `log`."""
    goal = lambda: SimpleNamespace(command=SimpleNamespace(position=0.0, max_effort=0.0))  # noqa: E731
    clock, log = Clock(), Log()
    monkeypatch.setattr(gripper, "time", clock)
    monkeypatch.setattr(gripper, "ActionClient", Server)
    monkeypatch.setattr(gripper, "action_type", lambda interface: SimpleNamespace(Goal=goal))

    def infos(topic: str) -> list:
        assert topic == "hand/_action/status"
        return [SimpleNamespace(endpoint_gid=list(each)) for each in server.identities]

    node = SimpleNamespace(get_logger=lambda: log, get_publishers_info_by_topic=infos, executor=None)
    made = gripper.ActionGripper(node, "gripper_command", "hand", "", 0.0)
    server = made._client
    return SimpleNamespace(send=made.send, gripper=made, server=server, clock=clock, log=log)


def test_a_goal_that_is_reached_is_sent_once(hand):
    for _ in range(5):
        hand.send(0.08)
    hand.server.accepts().ends(GoalStatus.STATUS_SUCCEEDED)
    hand.clock.now = 100.0
    hand.send(0.08)
    assert hand.server.values == [0.08] and not hand.log.warnings + hand.log.errors


@pytest.mark.parametrize("status", gripper.FAILURES)
def test_a_goal_that_fails_is_sent_again_after_a_pause_and_three_times_at_most(hand, status):
    for tries in (1, 2, 3):
        hand.send(0.08)
        assert hand.server.values == [0.08] * tries
        hand.server.accepts().ends(status)
        hand.send(0.08)
        assert hand.server.values == [0.08] * tries, "there is a pause"
        hand.clock.now += gripper.PAUSE_S
    hand.send(0.08)
    assert hand.server.values == [0.08] * 3
    assert len(hand.log.warnings) == 2
    (error,) = hand.log.errors
    assert "the goal 0.08, try 3 of 3: see the gripper controller's log" in error


def given_up(hand) -> None:
    for _ in range(gripper.MAX_TRIES):
        hand.send(0.08)
        hand.server.accepts().ends(GoalStatus.STATUS_ABORTED)
        hand.clock.now += gripper.PAUSE_S


def test_a_goal_that_was_given_up_is_sent_again_when_the_value_changes_or_a_person_has_looked(hand):
    given_up(hand)
    hand.send(0.01)
    hand.send(0.08)
    assert hand.server.values[3:] == [0.01, 0.08]
    given_up(hand)
    sent = len(hand.server.values)
    hand.send(0.08)
    assert len(hand.server.values) == sent
    hand.gripper.resume()
    hand.send(0.08)
    assert len(hand.server.values) == sent + 1


def test_a_goal_that_is_preempted_by_the_next_one_is_no_failure(hand):
    hand.send(0.08)
    first = hand.server.accepts()
    hand.send(0.01)
    second = hand.server.accepts()
    first.ends(GoalStatus.STATUS_CANCELED)
    second.ends(GoalStatus.STATUS_SUCCEEDED)
    hand.clock.now = 100.0
    hand.send(0.01)
    assert hand.server.values == [0.08, 0.01] and not hand.log.warnings + hand.log.errors


def test_a_grasp_that_the_controller_ends_as_stalled_is_no_failure(hand):
    hand.send(0.01)
    hand.server.accepts().ends(GoalStatus.STATUS_ABORTED, stalled=True)
    hand.clock.now = 100.0
    hand.send(0.01)
    assert hand.server.values == [0.01] and not hand.log.warnings + hand.log.errors


def test_a_server_that_was_away_is_told_again(hand):
    hand.send(0.08)
    hand.server.accepts().ends(GoalStatus.STATUS_SUCCEEDED)
    hand.server.is_there = False
    hand.send(0.08)
    assert "no server of action hand" in hand.log.warnings[0]
    hand.server.is_there = True
    hand.send(0.08)
    assert hand.server.values == [0.08, 0.08]


def test_a_server_that_restarts_between_two_sends_is_told_again_once(hand):
    hand.send(0.08)
    hand.server.accepts()  # No result follows, because that server has ended.
    hand.server.identities = [b"first", b"second"]  # DDS still lists the first one.
    for _ in range(3):
        hand.clock.now += gripper.LOOK_S
        hand.send(0.08)
    hand.server.accepts().ends(GoalStatus.STATUS_SUCCEEDED)
    hand.server.identities = [b"second"]
    hand.clock.now += gripper.LOOK_S
    hand.send(0.08)
    assert hand.server.values == [0.08, 0.08]


def test_what_arrives_after_the_gripper_was_closed_changes_nothing(hand):
    hand.send(0.08)
    hand.gripper.close()
    hand.server.answers_with(False)
    assert not hand.log.errors


def test_results_that_arrive_in_another_thread_while_values_are_sent_lose_no_value(hand):
    """Every change becomes a goal, in order, for any answers to the earlier goals."""
    rng, stop = random.Random(0), threading.Event()

    def answer() -> None:
        done = 0
        while not stop.is_set() or done < len(hand.server.answers):
            if done < len(hand.server.answers):
                handle = Handle(rng.random() < 0.8)
                hand.server.answers[done].set_result(handle)
                handle.ends(rng.choice((GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_ABORTED)))
                done += 1

    thread = threading.Thread(target=answer)
    thread.start()
    values = [rng.choice((0.01, 0.08)) for _ in range(2000)]
    for value in values:
        hand.send(value)
    stop.set()
    thread.join()
    assert changes(hand.server.values) == changes(values)


def changes(values: list[float]) -> list[float]:
    return [value for value, _ in itertools.groupby(values)]
