"""Tests of the tasks: the scripted expert does each one, disturbed or not; the success criteria are right."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from deer_vla_ros.control.types import Pose
from deer_vla_ros.lab.demonstrations.demonstrations import demonstrations
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.referee import Referee, task_called
from deer_vla_ros.lab.sim.scene import BLOCK_HALF
from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import BY_NAME, TASKS, held, stacked


def do(table, name, steps=80):
    """Lets the expert do a task. Returns whether it succeeded."""
    task, arm, before = BY_NAME[name], TableArm(table), table.state()
    for _ in range(steps):
        intent = act(name, table.state())
        arm.step(intent.pose, intent.open)
        if task.succeeded(before, table.state()):
            return True
    return False


@pytest.mark.long  # The test of `evaluate` draws every task once, and the expert has to do it there too.
def test_the_expert_does_every_task_again_and_again():
    """The expert is asked for each task several times, and does nearly all of them."""
    done, asked = Counter(), Counter()
    with Table() as table:
        for seed in range(40):
            random = np.random.default_rng(seed)
            table.reset(seed, varied=True)
            for _ in range(6):
                possible = [task.name for task in TASKS if task.possible(table.state())]
                weights = np.array([1.0 / (1 + asked[name]) for name in possible])
                name = possible[random.choice(len(possible), p=weights / weights.sum())]
                asked[name] += 1
                if not do(table, name):
                    break
                done[name] += 1
    assert all(asked[task.name] >= 2 for task in TASKS), asked
    assert sum(done.values()) >= 0.99 * sum(asked.values()) - 1, asked - done


def test_demonstrations_are_disturbed_and_done_all_the_same():
    episodes = list(demonstrations(6, seed=3))
    assert all(episode.succeeded for episode in episodes)
    again = list(demonstrations(3, seed=3))
    for one, two in zip(episodes, again):
        assert one.task is two.task and len(one.moments) == len(two.moments)
        assert np.array_equal(one.moments[-1].views.static, two.moments[-1].views.static)


def test_every_task_has_enough_wordings_and_none_is_shared():
    wordings = [text for task in TASKS for text in (*task.phrasings, *task.held_out)]
    assert len(wordings) == len(set(wordings))
    for task in TASKS:
        assert len(task.phrasings) >= 5 and len(task.held_out) >= 3, task.name
        assert all(task_called(text) is task for text in (*task.phrasings, *task.held_out))
    assert len(TASKS) >= 15 + 4 + 2


def test_a_block_goes_into_the_drawer_and_out_again():
    with Table() as table:
        table.reset(5)
        assert do(table, "open_drawer")
        assert do(table, "lift_pink_block")
        assert held(table.state()) == "pink"
        assert BY_NAME["place_in_drawer"].possible(table.state())
        assert do(table, "place_in_drawer")
        assert not BY_NAME["place_in_drawer"].possible(table.state())
        assert do(table, "close_drawer")
        assert do(table, "open_drawer")
        assert do(table, "take_out_of_drawer")


@pytest.mark.parametrize("degrees", [0, 20, 45])
def test_a_block_is_held_across_as_well(degrees):
    def turned(position, turn):
        return Pose(np.array(position), np.array([0.0, 0.0, np.sin(turn / 2), np.cos(turn / 2)]))

    down = Pose(np.array([0.4, 0.0, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
    red, away = turned([0.4, 0.0, 0.2], np.deg2rad(degrees)), turned([0.5, 0.1, 0.023], 0.0)
    width = 2 * BLOCK_HALF * (np.cos(np.deg2rad(degrees)) + np.sin(np.deg2rad(degrees)))
    state = TableState(red, away, away, 0.0, 0.0, False, False, 0.0, down, opening=width)
    assert held(state) == "red"
    assert held(dataclasses.replace(state, opening=width + 0.004)) is None, "the fingers do not touch it"
    assert held(dataclasses.replace(state, opening=0.02)) is None, "no block fits in there"


def standing(**centres) -> TableState:
    """A state of three blocks on the table, given by x and y, with the arm far above them."""
    down = Pose(np.array([0.4, 0.0, 0.3]), np.array([1.0, 0.0, 0.0, 0.0]))
    blocks = {
        name: Pose(np.array([*xy, BLOCK_HALF]), np.array([0.0, 0.0, 0.0, 1.0]))
        for name, xy in centres.items()
    }
    return TableState(
        **blocks, drawer=0.0, slider=0.0, led=False, lamp=False, switch=0.0, tcp=down, opening=0.08
    )


def test_a_relation_is_about_the_block_that_it_does_not_name():
    state = standing(red=(0.35, 0.0), blue=(0.45, 0.0), pink=(0.35, 0.16))
    nearest, farthest = BY_NAME["lift_nearest_to_red"], BY_NAME["lift_farthest_from_red"]
    assert nearest.possible(state) and nearest.block(state) == "blue"
    assert farthest.possible(state) and farthest.block(state) == "pink"
    assert BY_NAME["lift_nearest_to_pink"].block(state) == "red"

    def lifted(colour):
        up = Pose(np.array([0.4, 0.0, 0.2]), np.array([1.0, 0.0, 0.0, 0.0]))
        block = Pose(up.position, np.array([0.0, 0.0, 0.0, 1.0]))
        return dataclasses.replace(state, tcp=up, opening=2 * BLOCK_HALF, **{colour: block})

    assert [nearest.succeeded(state, lifted(colour)) for colour in ("red", "blue", "pink")] == [
        False,
        True,
        False,
    ]
    assert [farthest.succeeded(state, lifted(colour)) for colour in ("red", "blue", "pink")] == [
        False,
        False,
        True,
    ]
    assert not nearest.possible(lifted("pink")), "not all stand on the table"


@pytest.mark.parametrize(("hand", "is_right"), [("blue", True), ("pink", False), ("red", False)])
def test_demonstrations_go_on_with_a_block_in_the_hand(hand, is_right):
    state = standing(red=(0.40, 0.0), blue=(0.50, 0.0), pink=(0.40, 0.18))
    up = Pose(state.block(hand).position + [0.0, 0.0, 0.1], np.array([1.0, 0.0, 0.0, 0.0]))
    block = Pose(up.position, np.array([0.0, 0.0, 0.0, 1.0]))
    inside = dataclasses.replace(state, tcp=up, opening=2 * BLOCK_HALF, **{hand: block})
    nearest = BY_NAME["lift_nearest_to_red"]
    assert not nearest.goes_on(state) and not nearest.possible(inside) and nearest.goes_on(inside)
    assert act(nearest.name, inside).open is not is_right, "the right block is kept, a wrong one put back"
    assert [BY_NAME[f"lift_{colour}_block"].goes_on(inside) for colour in COLOURS] == [
        colour == hand for colour in COLOURS
    ]


def test_a_relation_that_is_not_clear_is_not_asked_for():
    close = standing(red=(0.40, 0.0), blue=(0.50, 0.0), pink=(0.40, 0.12))
    assert not BY_NAME["lift_nearest_to_red"].possible(close), "0.10 m and 0.12 m"
    assert not BY_NAME["lift_farthest_from_red"].possible(close)
    assert BY_NAME["lift_nearest_to_pink"].possible(close), "0.12 m and 0.16 m"


def test_blocks_are_stacked_and_unstacked():
    with Table() as table:
        table.reset(5)
        assert do(table, "lift_red_block")
        assert do(table, "stack_block")
        for _ in range(5):
            table.advance(0.1)
        upper, lower = stacked(table.state())
        assert upper == "red" and lower != "red"
        assert not BY_NAME[f"lift_{lower}_block"].possible(table.state())
        assert do(table, "unstack_block")
        assert stacked(table.state()) is None


def test_nothing_is_done_by_standing_still():
    with Table() as table:
        for seed in range(4):
            table.reset(seed, varied=True)
            before = table.state()
            table.advance(0.5)
            for task in TASKS:
                if task.possible(before):
                    assert not task.succeeded(before, table.state()), task.name


def test_the_referee_says_once_that_it_was_done():
    with Table() as table:
        table.reset(5)
        referee = Referee()
        assert referee.begin("Turn off  the led", table.state()) == ""
        assert not referee.succeeded(table.state())
        assert do(table, "turn_off_led")
        assert referee.succeeded(table.state())
        assert not referee.succeeded(table.state())
        assert "no task" in referee.begin("make me a sandwich", table.state())
        assert not referee.succeeded(table.state())


def test_what_was_so_before_is_not_counted_as_done():
    with Table() as table:
        table.reset(5)
        referee = Referee()
        assert "turn_on_led" in referee.begin("turn on the led", table.state())
        assert not referee.succeeded(table.state())
        assert do(table, "turn_off_led") and do(table, "turn_on_led")
        assert not referee.succeeded(table.state())


def test_a_point_is_where_the_camera_shows_it():
    with Table() as table:
        table.reset(3, varied=True)
        views, state = table.render(), table.state()
        x, y = (table.pixel("static", state.red.position) * views.static.shape[0]).astype(int)
        red, green, blue = views.static[y - 1 : y + 2, x - 1 : x + 2].reshape(-1, 3).mean(0)
        assert red > 1.5 * max(green, blue)
        assert np.isnan(table.pixel("gripper", state.tcp.position + [0, 0, 0.5])).all()
