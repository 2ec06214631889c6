"""Tests of chains: they are feasible, repeatable and scored correctly.

The expert takes the network's place and completes each one.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.scoring.approach import Approach
from deer_vla_ros.lab.scoring.chain_run import Chain, LaneDecision, run_chains
from deer_vla_ros.lab.scoring.table_chains import (
    FIRST_SEED,
    MOST_TRIALS,
    SINGLES_FROM,
    TableStart,
    chain_seed,
    draw_chain,
    draw_single,
    phrasings,
    single_seed,
)
from deer_vla_ros.lab.scoring.table_scene import TableScene
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.state import TableState
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.tasks import BY_NAME, TASKS

DOWN = np.array([1.0, 0.0, 0.0, 0.0])


class ExpertDriver:
    """A driver that runs the scripted expert. It uses the task's name and not the text."""

    def __init__(self):
        self.tasks, self.begun = {}, []

    def begin(self, lane, task, instruction):
        self.tasks[lane] = task
        self.begun.append((lane, task, instruction))
        return 0

    def decide(self, scenes):
        intents = {lane: act(self.tasks[lane], scene.table.state()) for lane, scene in scenes.items()}
        return {lane: LaneDecision(intent.pose, intent.open) for lane, intent in intents.items()}


class IdleDriver(ExpertDriver):
    """A driver that does not move the arm."""

    def decide(self, scenes):
        return {lane: LaneDecision(np.zeros(6), True) for lane in scenes}


@pytest.fixture(scope="module")
def scenes() -> list[TableScene]:
    return [TableScene() for _ in range(3)]


@pytest.fixture(scope="module")
def draws(scenes) -> list:
    return [draw_chain(scene.table, chain_seed(0, index)) for index, scene in enumerate(scenes)]


@pytest.fixture(scope="module")
def chains(draws) -> list:
    return [draw.worded(phrasings("both")) for draw in draws]


# The draw of chains.


def test_the_expert_in_the_place_of_the_network_follows_every_chain_to_its_end(chains, scenes):
    driver, ended = ExpertDriver(), []
    results = run_chains(chains, scenes, driver, 80, lambda: ended.append(1))
    assert [sum(attempt.succeeded for attempt in attempts) for attempts in results] == [5, 5, 5]
    assert len(ended) == 3
    for lane, (chain, attempts) in enumerate(zip(chains, results)):
        assert [attempt.task for attempt in attempts] == list(chain.tasks)
        assert [text for at, _, text in driver.begun if at == lane] == list(chain.instructions)
        assert [attempt.position for attempt in attempts] == [0, 1, 2, 3, 4]
        for attempt in attempts:
            assert attempt.feasible and 0 < attempt.steps <= 80
            assert attempt.exits == {-1: attempt.steps}
            assert (attempt.approached is None) == (BY_NAME[attempt.task].block is None)


def test_a_chain_depends_on_its_seed_alone_whatever_the_table_did_before(draws, chains, scenes):
    assert draw_chain(scenes[2].table, draws[0].seed) == draws[0]
    again = run_chains(chains[:1], scenes[2:], ExpertDriver(), 80)
    assert again == run_chains(chains[:1], [TableScene()], ExpertDriver(), 80)
    assert len({(chain.start.table_seed, chain.tasks) for chain in chains}) == 3


def test_other_words_make_the_same_chain_and_no_task_comes_twice_in_a_row(draws, chains):
    for kind, field in (("training", "phrasings"), ("held-out", "held_out")):
        spoken = draws[0].worded(phrasings(kind))
        assert (spoken.tasks, spoken.start) == (chains[0].tasks, chains[0].start)
        assert set(spoken.wordings) == {kind}
        for task, instruction in zip(spoken.tasks, spoken.instructions):
            assert instruction in getattr(BY_NAME[task], field)
    assert {wording for chain in chains for wording in chain.wordings} == {"training", "held-out"}
    for chain in chains:
        assert len(chain.tasks) == 5 and chain.start.prefix == ()
        assert all(one != next_one for one, next_one in zip(chain.tasks, chain.tasks[1:]))
        for task, instruction, wording in zip(chain.tasks, chain.instructions, chain.wordings):
            known = BY_NAME[task].held_out if wording == "held-out" else BY_NAME[task].phrasings
            assert instruction in known


def test_chains_have_the_tasks_that_were_asked_for_and_none_else(scenes):
    asked = ("move_slider_left", "move_slider_right", "open_drawer")
    assert set(draw_chain(scenes[0].table, chain_seed(2, 0), asked).tasks) <= set(asked)
    with pytest.raises(UserError, match="among the tasks open_drawer: none of them may follow itself"):
        draw_chain(scenes[0].table, chain_seed(2, 0), ["open_drawer"])


@pytest.mark.parametrize(("chains", "most"), [(6, 0.4), pytest.param(20, 0.33, marks=pytest.mark.long)])
def test_relations_are_asked_for_as_often_as_other_tasks_though_they_seldom_make_sense(scenes, chains, most):
    drawn = [draw_chain(scenes[0].table, chain_seed(1, index)) for index in range(chains)]
    tasks = [task for chain in drawn for task in chain.tasks]
    relations = sum(task.startswith(("lift_nearest", "lift_farthest")) for task in tasks)
    share = 6 / 27  # two standard deviations of this many tasks are allowed
    assert 2 * share - most < relations / len(tasks) < most


@pytest.mark.parametrize(
    "task",
    [
        "place_in_drawer",
        "take_out_of_drawer",
        *(pytest.param(task, marks=pytest.mark.long) for task in ("stack_block", "push_red_block_left")),
    ],
)
def test_a_single_instruction_can_be_followed_after_what_led_to_it(task, scenes):
    draw = draw_single(scenes[0].table, task, single_seed(0, task, 0))
    assert draw.tasks == (task,) and len(draw.start.prefix) <= 3
    assert draw_single(scenes[1].table, task, draw.seed) == draw
    single = draw.worded(phrasings("held-out"))
    ((attempt,),) = run_chains([single], scenes[:1], ExpertDriver(), 80)
    assert attempt.succeeded and attempt.instruction in BY_NAME[task].held_out
    assert attempt.wording == "held-out"


@given(
    runs=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    numbers=st.tuples(st.integers(0, SINGLES_FROM - 1), st.integers(0, SINGLES_FROM - 1)),
    task=st.sampled_from([task.name for task in TASKS]),
    trial=st.integers(0, MOST_TRIALS - 1),
)
def test_no_two_chains_share_a_seed_and_none_is_one_of_training(runs, numbers, task, trial):
    seeds = [chain_seed(run, number) for run, number in zip(runs, numbers)]
    assert (seeds[0] == seeds[1]) == ((runs[0], numbers[0]) == (runs[1], numbers[1]))
    single = single_seed(runs[0], task, trial)
    assert single not in seeds and min(single, *seeds) >= FIRST_SEED
    assert single < chain_seed(runs[0] + 1, 0)


# The result of attempts.


def test_a_chain_ends_at_its_first_failure_after_the_steps_it_was_given(chains, scenes):
    driver = IdleDriver()
    results = run_chains(chains, scenes, driver, 3)
    for chain, attempts in zip(chains, results):
        (attempt,) = attempts
        assert (attempt.task, attempt.succeeded, attempt.feasible, attempt.steps) == (
            chain.tasks[0],
            False,
            True,
            3,
        )
    assert len(driver.begun) == 3


def test_what_is_not_possible_when_it_is_asked_for_is_a_failure_without_steps(scenes):
    shut = next(index for index in range(99) if _is_shut(scenes[0].table, index))
    chain = Chain(TableStart(shut), ("open_drawer",) * 2, ("open the drawer",) * 2, ("training",) * 2)
    ((first, second),) = run_chains([chain], scenes[:1], ExpertDriver(), 80)
    assert first.succeeded
    assert (second.succeeded, second.feasible, second.steps, second.exits, second.approached) == (
        False,
        False,
        0,
        {},
        None,
    )


def _is_shut(table: Table, seed: int) -> bool:
    table.reset(seed, varied=True)
    return BY_NAME["open_drawer"].possible(table.state())


# The approached block.


def state(tcp, opening: float = 0.08, **blocks) -> TableState:
    """A state with blocks in a row, 0.2 m apart, except those that are given. tcp: (3,) [m]."""
    centres = {"red": (0.4, 0.0, 0.023), "blue": (0.4, 0.2, 0.023), "pink": (0.4, -0.2, 0.023), **blocks}
    poses = {colour: Pose(np.array(centre), np.array([0, 0, 0, 1.0])) for colour, centre in centres.items()}
    return TableState(
        **poses,
        drawer=0.0,
        slider=0.0,
        led=False,
        lamp=False,
        switch=0.0,
        tcp=Pose(np.array(tcp), DOWN),
        opening=opening,
    )


def approached(*states: TableState) -> str | None:
    approach = Approach(states[0])
    for each in states[1:]:
        approach.see(each)
    return approach.block


HIGH = state((0.4, 0.1, 0.2))


def test_the_first_block_that_the_arm_comes_down_to_is_approached():
    over_red, at_red, at_blue = state((0.4, 0.0, 0.15)), state((0.4, 0.03, 0.05)), state((0.4, 0.2, 0.05))
    assert approached(HIGH, over_red, at_blue) == "blue", "passing over a block is not coming to it"
    assert approached(HIGH, at_red, over_red, at_blue) == "red"
    assert approached(HIGH, state((0.4, 0.1, 0.02)), at_blue) == "blue", "down, but 0.1 m from both"
    assert approached(HIGH, over_red) is None


def test_the_block_at_which_the_last_task_ended_counts_only_if_the_arm_comes_to_no_other():
    at_red, up = state((0.4, 0.03, 0.03)), state((0.4, 0.03, 0.13))
    at_blue = state((0.4, 0.2, 0.05))
    assert approached(at_red, at_red, at_red) == "red"
    assert approached(at_red, state((0.4, 0.05, 0.09)), at_red, up, at_blue) == "blue"
    assert approached(at_red, up, at_red, up, at_blue) == "red", "it left and came back"


def test_a_held_block_that_is_put_down_is_not_approached():
    carried = state((0.4, 0.0, 0.1), opening=0.046, red=(0.4, 0.0, 0.1))
    released = state((0.4, 0.0, 0.06), red=(0.4, 0.0, 0.05))
    assert approached(carried, released, state((0.4, 0.0, 0.13)), state((0.4, 0.2, 0.05))) == "blue"


def test_of_two_blocks_near_the_fingers_the_one_that_is_moved_most_is_approached():
    start = state((0.4, 0.1, 0.2), blue=(0.45, 0.06, 0.023))
    between = state((0.42, 0.05, 0.05), blue=(0.45, 0.06, 0.023))
    assert approached(start, between) == "blue", "the nearest, where none is moved"
    pushed = state((0.42, -0.01, 0.05), blue=(0.452, 0.061, 0.023), red=(0.4, -0.06, 0.023))
    assert approached(start, between, pushed) == "red"
