"""The gripper told through ros2_control's actions, against an action server in another process.

control_msgs is not on PyPI: where it is not installed, its two gripper actions are generated here from their definitions.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import START_TIMEOUT, Client, spawn, spawn_python, wait_until
from rig import Rig

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("control_msgs") is not None


@pytest.fixture(scope="module")
def client():
    with Client("gripper_action_test") as client:
        yield client


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a process that has control_msgs."""
    if INSTALLED:
        return dict(os.environ)
    build, prefix = tmp_path_factory.mktemp("build"), tmp_path_factory.mktemp("prefix")
    for command in (
        f"cmake -S {HERE / 'gripper_actions'} -B {build} -DCMAKE_INSTALL_PREFIX={prefix} -DCMAKE_PREFIX_PATH={sys.prefix} "
        f"-DPython3_EXECUTABLE={sys.executable} -DBUILD_TESTING=OFF",
        f"cmake --build {build} -j2",
        f"cmake --install {build}",
    ):
        done = subprocess.run(command.split(), capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    packages = next(prefix.glob("lib/python3*/site-packages"))
    paths = {"PYTHONPATH": packages, "LD_LIBRARY_PATH": prefix / "lib", "AMENT_PREFIX_PATH": prefix}
    return {**os.environ, **{name: f"{path}{os.pathsep}{os.environ.get(name, '')}" for name, path in paths.items()}}


def darken(name: str, image) -> None:
    image.data = bytes(len(image.data))


@pytest.mark.parametrize(
    ("interface", "action", "parameters", "goal"),
    [
        ("gripper_command", "GripperCommand", {"gripper_max_effort": 12.0}, "[{}, 12.0]"),
        ("parallel_gripper_command", "ParallelGripperCommand", {"gripper_joint": "finger"}, "[['finger'], {}]"),
    ],
)
def test_a_gripper_action_gets_a_goal_per_change_and_again_when_it_was_refused_or_not_answered(
    client, environment, interface, action, parameters, goal
):
    rig = Rig(client, f"{interface}/")
    noise = rig.edit_image
    # Of images that do not change the policy wants one thing: while it is given up, no other goal takes the place of one without answer.
    rig.edit_image = darken
    given = {"gripper_interface": interface, "gripper_action": "hand", "gripper_open": 0.08, "gripper_closed": 0.01, **parameters}
    arguments = [part for name, value in given.items() for part in ("-p", f"action.{name}:={value}")]
    with (
        spawn("node", "--ros-args", "-r", f"__ns:=/{interface}", *arguments, env=environment) as node,
        rig.running(),
    ):
        rig.instruct("lift the red block")
        wait_until(lambda: "no server of action hand: start the gripper controller" in node.output(), START_TIMEOUT, "a warning")
        with spawn_python(str(HERE / "gripper_server.py"), action, f"{interface}/hand", env=environment) as server:
            wait_until(
                lambda: "hand did not answer within" in node.output(), START_TIMEOUT, "giving up a goal that is not answered"
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
        again = sum(before == after for before, after in zip(told[refused:], told[refused + 1 :], strict=False))
        assert again <= lost, "but for what was not answered, only changes are sent"
        assert not rig.grippers, "the topic is silent"
        assert node.stop() == 0


@pytest.mark.skipif(INSTALLED, reason="control_msgs is installed here")
def test_a_gripper_action_without_control_msgs_is_a_failing_configure_that_names_the_remedy(client):
    with spawn("node", "--ros-args", "-r", "__ns:=/grip", "-p", "action.gripper_interface:=gripper_command") as process:
        wait_until(lambda: "install ros-jazzy-control-msgs, or use 'topic'" in process.output(), START_TIMEOUT, "the remedy")
        assert process.stop() == 0
