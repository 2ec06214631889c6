"""Tests of CALVIN's real simulator. They run where DEER_VLA_CALVIN_ROOT names a clone of mees/calvin.

DEER_VLA_CALVIN_PYTHON names the Python that has its packages; without it, it is the Python of these tests.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calvin_arm import CLOSED, OPEN, ScriptedArm

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin.calvin_process import CalvinInstall, CalvinProcess
from deer_vla_ros.lab.calvin.calvin_sequences import CalvinState, start_of

ROOT = os.environ.get("DEER_VLA_CALVIN_ROOT")
pytestmark = pytest.mark.skipif(not ROOT, reason="DEER_VLA_CALVIN_ROOT is not set: there is no CALVIN here")

CLOSED_TABLE = CalvinState(0, 0, "right", "closed", "table", "table", "slider_right")
"""A start state of CALVIN's evaluation: the drawer closed, the slider right, red and blue on the table."""
LIT_TABLE = CalvinState(1, 1, "left", "open", "slider_left", "table", "slider_right")
STATES = (CLOSED_TABLE, LIT_TABLE)
BLOCKS = np.arange(6, 24).reshape(3, 6)
"""The places of the blocks' poses in scene_obs."""


@pytest.fixture(scope="module")
def install() -> CalvinInstall:
    install = CalvinInstall(Path(ROOT), os.environ.get("DEER_VLA_CALVIN_PYTHON", sys.executable))
    install.check()
    return install


@pytest.fixture(scope="module")
def simulator(install):
    with CalvinProcess(install) as simulator:
        yield simulator


def random_steps(simulator: CalvinProcess, state: CalvinState, steps: int, seed: int = 0) -> list[np.ndarray]:
    """Begins in the state, applies random actions, and returns all arrays of all views."""
    random = np.random.default_rng(seed)
    views = [simulator.begin(*start_of(state))]
    simulator.ask("open_drawer")
    for _ in range(steps):
        simulator.send(np.append(random.uniform(-1, 1, 6), random.choice([-1, 1])))
        views.append(simulator.receive()[0])
    return [array for view in views for array in vars(view).values()]


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def test_it_says_what_runs(simulator):
    about = simulator.about
    assert about.pybullet and about.numpy and about.python >= "3"
    assert len(about.tasks) == 34 and "lift_pink_block_drawer" in about.tasks


@pytest.mark.parametrize("state", STATES)
def test_a_published_state_is_reached(simulator, state):
    """The first simulated step lets the blocks settle: by up to 0.12 mm and 3 mrad."""
    robot, scene = start_of(state)
    view = simulator.begin(robot, scene)
    assert np.abs(view.robot_obs - robot).max() < 1e-4
    error = np.abs(view.scene_obs - scene)
    assert error[:6].max() < 1e-4
    assert error[BLOCKS[:, :2]].max() < 1e-4  # x and y
    assert error[BLOCKS[:, 2]].max() < 2e-4  # z
    assert error[BLOCKS[:, 5]].max() < 1e-3  # yaw
    assert error[BLOCKS[:, 3:5]].max() < 1e-2  # roll and pitch


def test_the_gripper_command_of_an_episode_is_forgotten_in_the_next(simulator):
    simulator.begin(*start_of(CLOSED_TABLE))
    simulator.ask("open_drawer")
    simulator.send(np.array([0, 0, 0, 0, 0, 0, CLOSED]))
    assert simulator.receive()[0].robot_obs[14] == CLOSED
    assert simulator.begin(*start_of(CLOSED_TABLE)).robot_obs[14] == OPEN


def test_an_error_of_calvin_env_is_told_and_the_next_episode_begins(simulator):
    robot, scene = start_of(CLOSED_TABLE)
    half_lit = np.where(np.arange(24) == 4, 0.5, scene)  # A light is on or off.
    with pytest.raises(UserError, match="^the CALVIN simulator failed: ValueError"):
        simulator.begin(robot, half_lit)
    assert np.abs(simulator.begin(robot, scene).robot_obs - robot).max() < 1e-4


def test_the_cameras_see_the_table_and_the_lights(simulator):
    dark, lit = (simulator.begin(*start_of(state)) for state in STATES)
    assert dark.static.std() > 20 and dark.gripper.std() > 20
    assert not np.array_equal(dark.static, lit.static)


def test_the_same_actions_give_the_same_bits_in_another_process_and_after_another_episode(install, simulator):
    random_steps(simulator, LIT_TABLE, 10, seed=1)
    after_an_episode = random_steps(simulator, CLOSED_TABLE, 30)
    with CalvinProcess(install) as fresh:
        assert equal(random_steps(fresh, CLOSED_TABLE, 30), after_an_episode)
    assert equal(random_steps(simulator, CLOSED_TABLE, 30), after_an_episode)


def test_egl_shows_the_same_state_in_other_colours(install, simulator):
    tiny = simulator.begin(*start_of(LIT_TABLE))
    with CalvinProcess(replace(install, renderer="egl")) as with_egl:
        try:
            print(with_egl.about)
        except UserError as error:
            pytest.skip(f"no EGL here: {error}")
        first, again = (with_egl.begin(*start_of(LIT_TABLE)) for _ in range(2))
    assert equal([first.robot_obs, first.scene_obs], [tiny.robot_obs, tiny.scene_obs])
    assert equal([first.static, first.gripper], [again.static, again.gripper])
    for image, other in ((first.static, tiny.static), (first.gripper, tiny.gripper)):
        assert 5 < np.abs(image.astype(float) - other).mean() < 40
        assert np.corrcoef(image.ravel(), other.ravel())[0, 1] > 0.8


def test_an_action_of_float16_moves_the_arm_as_one_of_float64_does(simulator):
    heights = []
    for kind in (np.float16, np.float64):
        simulator.begin(*start_of(CLOSED_TABLE))
        simulator.ask("open_drawer")
        simulator.send(np.array([0, 0, 0.3, 0, 0, 0, OPEN], kind))
        heights.append(simulator.receive()[0].robot_obs[2])
    rounded, exact = heights
    assert exact > start_of(CLOSED_TABLE)[0][2] + 0.001
    assert 0 < abs(rounded - exact) < 1e-5  # It is rounded: float16 has 11 bits.


def test_a_motion_that_opens_the_drawer_is_confirmed(simulator):
    arm = ScriptedArm(simulator, simulator.begin(*start_of(CLOSED_TABLE)))
    simulator.ask("open_drawer")
    arm.move((0.18, -0.30, 0.50), (0.18, -0.205, 0.50), (0.18, -0.205, 0.37), gripper=CLOSED)
    assert not any(arm.done) and arm.view.scene_obs[1] < 0.01
    arm.move((0.18, -0.40, 0.37), gripper=CLOSED)  # The fingers are behind the handle.
    assert arm.done[-1] and arm.view.scene_obs[1] > 0.12
    simulator.ask("open_drawer")
    arm.stay(1, CLOSED)
    assert not arm.done[-1]  # It was open already when this was asked.


def test_a_motion_that_moves_the_slider_is_confirmed(simulator):
    arm = ScriptedArm(simulator, simulator.begin(*start_of(CLOSED_TABLE)))
    simulator.ask("move_slider_left")
    arm.move((0.12, -0.12, 0.53), (0.12, -0.022, 0.53), gripper=CLOSED)
    assert not any(arm.done) and arm.view.scene_obs[0] < 0.01
    arm.move((-0.16, -0.022, 0.53), gripper=CLOSED)  # The fingers push the handle.
    assert arm.done[-1] and arm.view.scene_obs[0] > 0.15


def test_a_motion_that_lifts_a_block_is_confirmed(simulator):
    arm = ScriptedArm(simulator, simulator.begin(*start_of(CLOSED_TABLE)))
    simulator.ask("lift_red_block_table")
    x, y, z = arm.view.scene_obs[6:9]
    yaw = arm.view.scene_obs[11]
    arm.move((x, y, z + 0.06), (x, y, z - 0.005), gripper=OPEN, yaw=yaw)
    arm.stay(10, CLOSED)
    assert not any(arm.done)
    arm.move((x, y, z + 0.09), gripper=CLOSED)
    assert arm.done[-1] and arm.view.scene_obs[8] > z + 0.05


def test_a_folder_that_is_no_git_checkout_works(install, tmp_path):
    """As after a download of the archives. The commit is unknown then."""
    root = tmp_path / "calvin archive"
    ignored = shutil.ignore_patterns(".git", "tacto", "__pycache__", "calvin_table_[ABC]")
    shutil.copytree(install.root / "calvin_env", root / "calvin_env", ignore=ignored)
    shutil.copytree(install.root / "calvin_models/conf", root / "calvin_models/conf")
    with CalvinProcess(replace(install, root=root)) as simulator:
        assert simulator.about.calvin_env == ""
        robot, _ = start_of(CLOSED_TABLE)
        assert np.abs(simulator.begin(*start_of(CLOSED_TABLE)).robot_obs - robot).max() < 1e-4
