"""Tests of the things on the table: the gripper can move them as the tasks require."""

import dataclasses

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from deer_vla_ros.lab.sim.scene import DRAWER_PLACE
from deer_vla_ros.lab.sim.state import COLOURS
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.things import NAMES, things
from deer_vla_ros.lab.training.frames import THINGS

DOWN = Rotation.from_quat([1.0, 0.0, 0.0, 0.0])
OPEN, CLOSED = 0.08, 0.0

DRAWER_HANDLE_X = 0.57 - 0.005 - 0.088  # [m], for a closed drawer; an open one has a smaller value.
DRAWER_Y = -0.28
SLIDER_X, SLIDER_RIGHT_Y = 0.64, -0.10
BUTTON = np.array([0.38, 0.26, 0.05])
SWITCH_X, SWITCH_OFF_Y = 0.62, 0.22


def go(table: Table, x: float, y: float, z: float, yaw: float = 0.0, seconds: float = 1.5) -> None:
    table.set_target(np.array([x, y, z]), (Rotation.from_euler("z", yaw) * DOWN).as_quat())
    table.advance(seconds)


def grip(table: Table, opening: float) -> None:
    table.set_gripper(opening)
    table.advance(0.7)


def table_with(condition) -> Table:
    """A table with the first arrangement, of the seeds 0, 1, ..., that fulfils `condition(state)`."""
    table = Table()
    for seed in range(50):
        table.reset(seed)
        if condition(table.state()):
            return table
    raise AssertionError("no arrangement of 50 fulfils the condition")


def yaw_of(quaternion: np.ndarray) -> float:
    return Rotation.from_quat(quaternion).as_euler("xyz")[2]


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_block_can_be_grasped_and_lifted_10_cm(colour, seed):
    table = Table(seed)
    block = table.state().block(colour)
    x, y, z = block.position
    yaw = yaw_of(block.quaternion)
    go(table, x, y, z + 0.10, yaw)
    go(table, x, y, z, yaw)
    grip(table, CLOSED)
    go(table, x, y, z + 0.12, yaw)
    table.advance(2.0)
    assert table.state().block(colour).position[2] - z > 0.10


def test_a_block_can_be_stacked_on_another_and_stays_there():
    table = table_with(lambda state: True)
    red, blue = table.state().red, table.state().blue
    go(table, *(red.position + [0, 0, 0.10]), yaw_of(red.quaternion))
    go(table, *red.position, yaw_of(red.quaternion))
    grip(table, CLOSED)
    go(table, *(red.position + [0, 0, 0.15]), yaw_of(red.quaternion))
    above = [*blue.position[:2], 0.15]
    go(table, *above, yaw_of(blue.quaternion))
    go(table, *above[:2], 0.071, yaw_of(blue.quaternion))
    grip(table, OPEN)
    go(table, *above, yaw_of(blue.quaternion))
    state = table.state()
    np.testing.assert_allclose(state.red.position - state.blue.position, [0, 0, 0.046], atol=0.006)


def test_a_block_can_be_put_into_the_open_drawer_which_then_closes_around_it():
    table = table_with(lambda state: state.drawer > 0.12)
    pink = table.state().pink
    inside_x = 0.57 - 0.005 - table.state().drawer - 0.010
    go(table, *(pink.position + [0, 0, 0.10]), yaw_of(pink.quaternion))
    go(table, *pink.position, yaw_of(pink.quaternion))
    grip(table, CLOSED)
    go(table, *(pink.position + [0, 0, 0.15]), yaw_of(pink.quaternion))
    go(table, inside_x, DRAWER_Y, 0.15, seconds=2.0)
    go(table, inside_x, DRAWER_Y, 0.05)
    grip(table, OPEN)
    go(table, inside_x, DRAWER_Y, 0.20)
    grip(table, CLOSED)
    go(table, 0.28, DRAWER_Y, 0.20)
    go(table, 0.28, DRAWER_Y, 0.075)
    go(table, DRAWER_HANDLE_X - 0.005, DRAWER_Y, 0.075, seconds=3.0)
    state = table.state()
    assert state.drawer < 0.02
    assert abs(state.pink.position[1] - DRAWER_Y) < 0.06 and 0.50 < state.pink.position[0] < 0.65
    assert state.pink.position[2] < 0.04


def test_the_drawer_is_pulled_open_by_its_handle():
    table = table_with(lambda state: state.drawer < 0.01)
    go(table, DRAWER_HANDLE_X, DRAWER_Y, 0.18)
    go(table, DRAWER_HANDLE_X, DRAWER_Y, 0.078)
    grip(table, CLOSED)
    go(table, DRAWER_HANDLE_X - 0.12, DRAWER_Y, 0.078)
    assert table.state().drawer > 0.10


@pytest.mark.parametrize("start_left", [True, False])
def test_the_slider_is_pushed_to_the_other_side(start_left):
    table = table_with(lambda state: (state.slider > 0.1) == start_left)
    side = 1 if start_left else -1
    knob_y = SLIDER_RIGHT_Y + table.state().slider
    grip(table, CLOSED)
    go(table, SLIDER_X, knob_y + side * 0.06, 0.15, seconds=2.0)
    go(table, SLIDER_X, knob_y + side * 0.06, 0.055)
    go(table, SLIDER_X, knob_y - side * 0.17, 0.055, seconds=2.0)
    assert (table.state().slider < 0.05) if start_left else (table.state().slider > 0.15)


@pytest.mark.parametrize("lit", [True, False])
def test_pressing_the_button_toggles_the_led_once_per_press(lit):
    table = table_with(lambda state: state.led is lit)
    grip(table, CLOSED)
    go(table, *(BUTTON + [0, 0, 0.08]))
    assert table.state().led is lit
    go(table, *(BUTTON - [0, 0, 0.02]))
    assert table.state().led is not lit
    table.advance(1.0)
    assert table.state().led is not lit
    go(table, *(BUTTON + [0, 0, 0.08]))
    assert table.state().led is not lit
    go(table, *(BUTTON - [0, 0, 0.02]))
    assert table.state().led is lit


@pytest.mark.parametrize("lit", [True, False])
def test_moving_the_switch_turns_the_lamp_on_or_off(lit):
    table = table_with(lambda state: state.lamp is lit)
    side = 1 if lit else -1
    knob_y = SWITCH_OFF_Y + table.state().switch
    grip(table, CLOSED)
    go(table, SWITCH_X, knob_y + side * 0.05, 0.15, seconds=2.0)
    go(table, SWITCH_X, knob_y + side * 0.05, 0.04)
    go(table, SWITCH_X, knob_y - side * 0.06, 0.04)
    assert table.state().lamp is not lit


def test_what_nobody_touches_stays_where_it_is():
    table = Table(seed=5)
    before = table.state()
    table.advance(5.0)
    after = table.state()
    for colour in COLOURS:
        np.testing.assert_allclose(after.block(colour).position, before.block(colour).position, atol=1e-3)
    assert (after.drawer, after.slider, after.switch) == pytest.approx(
        (before.drawer, before.slider, before.switch), abs=1e-3
    )
    assert (after.led, after.lamp) == (before.led, before.lamp)


def test_an_unknown_colour_is_refused_by_name():
    with pytest.raises(ValueError, match="'green'.*red, blue, pink"):
        Table().state().block("green")


def test_things_are_where_tasks_act_upon_them():
    with Table() as table:
        table.reset(3)
        state = table.state()
        there = things(state)
        assert (
            there.positions.shape == (len(NAMES), 3)
            and there.yaws.shape == (len(NAMES),)
            and len(NAMES) == THINGS
        )
        for colour, position, yaw in zip(COLOURS, there.positions, there.yaws):
            assert np.array_equal(position, state.block(colour).position)
            quarter = (yaw - yaw_of(state.block(colour).quaternion)) % (np.pi / 2)
            assert min(quarter, np.pi / 2 - quarter) < 1e-6
        grip(table, CLOSED)
        go(table, *there.positions[NAMES.index("button")][:2], 0.12)
        go(table, *there.positions[NAMES.index("button")][:2], 0.02)
        assert table.state().led != state.led, "that is where the button is"


def test_what_no_camera_can_see_is_nowhere():
    with Table() as table:
        table.reset(3)
        state = table.state()

    def with_red(position, drawer):
        block = dataclasses.replace(state.block("red"), position=np.array(position))
        return things(dataclasses.replace(state, red=block, drawer=drawer)).positions[0]

    assert np.isnan(with_red([*DRAWER_PLACE, 0.04], 0.0)).all(), "in the shut drawer"
    assert np.isfinite(with_red([*(DRAWER_PLACE - [0.12, 0.0]), 0.04], 0.12)).all(), "in the open one"
    assert np.isnan(with_red([0.4, 1.5, -0.8], 0.0)).all(), "beside the table"
