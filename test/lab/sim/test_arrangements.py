"""Tests of arrangements: the seed decides how the table looks, and both cameras show it."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deer_vla_ros.lab.sim.scene import BLOCK_AREA, BLOCK_DISTANCE
from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.table import Table

DOWN = np.array([1.0, 0.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def table():
    with Table() as table:
        yield table


def numbers(state: TableState) -> np.ndarray:
    """All numbers of a state in one array."""
    return np.concatenate([np.hstack([part]).ravel() for part in _leaves(dataclasses.astuple(state))])


def _leaves(value):
    if isinstance(value, tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def test_the_same_seed_and_commands_give_the_same_states_and_images():
    runs = []
    for _ in range(2):
        with Table(seed=11) as table:
            table.set_target(np.array([0.5, 0.1, 0.05]), DOWN)
            table.set_gripper(0.0)
            table.advance(1.0)
            runs.append((numbers(table.state()), table.render()))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    np.testing.assert_array_equal(runs[0][1].static, runs[1][1].static)
    np.testing.assert_array_equal(runs[0][1].gripper, runs[1][1].gripper)


def test_a_reset_with_a_seed_forgets_everything_before_it(table):
    table.reset(seed=8)
    first = numbers(table.state())
    table.set_target(np.array([0.4, 0.0, 0.02]), DOWN)
    table.advance(1.0)
    table.reset(seed=8)
    np.testing.assert_array_equal(numbers(table.state()), first)
    table.advance(1.0)
    assert np.linalg.norm(table.tcp_pose().position - [0.40, 0.0, 0.26]) < 1e-3


def test_a_reset_without_a_seed_is_the_next_arrangement_of_the_sequence(table):
    table.reset(seed=8)
    table.reset()
    second = numbers(table.state())
    other = Table(seed=8)
    assert not np.array_equal(numbers(other.state()), second)
    other.reset()
    np.testing.assert_array_equal(numbers(other.state()), second)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_blocks_start_apart_and_inside_their_area(table, seed):
    table.reset(seed)
    centres = np.array([table.state().block(colour).position[:2] for colour in COLOURS])
    assert (BLOCK_AREA[:, 0] <= centres).all() and (centres <= BLOCK_AREA[:, 1]).all()
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert np.linalg.norm(centres[a] - centres[b]) >= BLOCK_DISTANCE


def test_both_positions_of_everything_occur_among_the_arrangements(table):
    seen = {"drawer": set(), "slider": set(), "led": set(), "lamp": set()}
    for seed in range(40):
        table.reset(seed)
        state = table.state()
        seen["drawer"].add(state.drawer > 0.06)
        seen["slider"].add(state.slider > 0.1)
        seen["led"].add(state.led)
        seen["lamp"].add(state.lamp)
    assert all(values == {True, False} for values in seen.values()), seen


def test_images_have_the_sizes_of_the_two_cameras(table):
    views = table.render()
    assert (views.static.shape, views.static.dtype) == ((200, 200, 3), np.uint8)
    assert (views.gripper.shape, views.gripper.dtype) == ((84, 84, 3), np.uint8)


IS_COLOUR = {
    "red": lambda r, g, b: (r > 120) & (g < 60) & (b < 60),
    "blue": lambda r, g, b: (b > 120) & (r < 80) & (g < 100),
    "pink": lambda r, g, b: (r > 150) & (b > 110) & (g < 140) & (r > b),
}


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("seed", range(4))
def test_each_block_is_visible_in_the_static_view_and_from_above_in_the_gripper_view(table, colour, seed):
    table.reset(seed)
    assert IS_COLOUR[colour](*np.moveaxis(table.render().static.astype(int), 2, 0)).sum() > 30
    table.set_target(table.state().block(colour).position + [0.0, 0.0, 0.12], DOWN)
    table.advance(1.5)
    assert IS_COLOUR[colour](*np.moveaxis(table.render().gripper.astype(int), 2, 0)).sum() > 100


def test_lights_show_in_the_static_view(table):
    green = {}
    for seed in range(20):
        table.reset(seed)
        r, g, b = np.moveaxis(table.render().static.astype(int), 2, 0)
        green[table.state().led] = int(((g > 200) & (r < 120) & (b < 160)).sum())
    assert green[True] > 20 and green[False] == 0


def test_a_closed_table_can_render_again():
    table = Table(seed=3)
    first = table.render().static
    table.close()
    np.testing.assert_array_equal(table.render().static, first)
    table.close()


@pytest.mark.parametrize("backend", ["bogus", "glfw"])
def test_without_a_usable_opengl_the_error_names_the_remedy(backend):
    program = (
        "from deer_vla_ros.errors import UserError\n"
        "try:\n from deer_vla_ros.lab.sim.table import Table\n Table().render()\n"
        "except UserError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"} | {"MUJOCO_GL": backend}
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert f"MUJOCO_GL={backend}" in shown.stdout and "apt-get install -y libegl1" in shown.stdout


def test_the_table_needs_neither_torch_nor_ros():
    program = (
        "import sys; from deer_vla_ros.lab.sim.table import Table; Table().advance(0.1); "
        "print([m for m in ('torch', 'rclpy', 'transformers') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
