"""Tests of CALVIN's chains: equal to those of its own evaluation, possible, and read from published files."""

import ast
import dataclasses
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.calvin.calvin_sequences import (
    CHAIN_LENGTH,
    START_STATES,
    TASK_RULES,
    CalvinSequence,
    CalvinState,
    first_impossible,
    generate,
    possible,
    pyhash_fnv1_32,
    read,
    start_of,
    states_for,
)

OF_20 = [
    [
        [0, 0, "right", "open", "slider_right", "table", "table", 0],
        [
            "close_drawer",
            "move_slider_left",
            "rotate_pink_block_left",
            "turn_on_led",
            "lift_red_block_slider",
        ],
    ],
    [
        [0, 0, "right", "closed", "table", "table", "slider_left", 0],
        [
            "push_blue_block_right",
            "open_drawer",
            "turn_on_led",
            "lift_blue_block_table",
            "place_in_drawer",
        ],
    ],
]
"""The first of what CALVIN's own get_sequences(20) gave with numpy 2.4."""
SHA256 = {
    20: "5ef1327c0a351c2d0deba53ec0e7422daf365ec18c07c89579c8d82f442f4bcd",
    # Also the content of the published eval_sequences.json.
    1000: "840cb992c69ce9b6d59f6020966b6300c15233f8e0b9667b6486c1962424d308",
}
"""Of the JSON of all that get_sequences(count) gave."""

# What CALVIN's own get_env_state_for_initial_condition gave with pyhash 0.9.3, numpy 1.24 and Python 3.8.
LEFT, RIGHT = (-0.240851662, 0.0924044687, 0.460990009), (0.070341633, 0.0924044687, 0.460990009)
NEAR, FAR = (0.0500000896, -0.120000177, 0.459990009), (0.229995412, -0.11999514, 0.45999001)
STARTS = [
    (
        (1, 1, "left", "open", "slider_left", "table", "slider_right"),
        (0.28, 0.22, 0, 0.088, 1, 1),
        (LEFT, FAR, RIGHT),
        (1.8859410064104645, 1.488143437705632, 1.4683986863194542),
    ),
    (
        (0, 0, "right", "closed", "table", "table", "slider_right"),
        (0, 0, 0, 0, 0, 0),
        (FAR, NEAR, RIGHT),
        (1.4418709252147632, 1.4098806994949187, 1.5630616199523633),
    ),
    (
        (0, 1, "right", "open", "slider_right", "table", "table"),
        (0, 0.22, 0, 0.088, 1, 0),
        (RIGHT, NEAR, FAR),
        (1.2686726037357103, 1.6762565323283403, 1.30266998238651),
    ),
]


def as_json(sequences) -> str:
    """The chains as the published file has them."""
    return json.dumps([[dataclasses.asdict(each.state), each.tasks] for each in sequences])


def sha256(sequences) -> str:
    return hashlib.sha256(as_json(sequences).encode()).hexdigest()


def test_chains_are_those_of_calvins_generator():
    sequences = generate(20)
    for (values, tasks), sequence in zip(OF_20, sequences):
        assert sequence == CalvinSequence(CalvinState(*values), tuple(tasks))
    assert sha256(sequences) == SHA256[20]


@pytest.mark.long
def test_the_benchmarks_chains_are_the_published_ones():
    assert sha256(generate(1000)) == SHA256[1000]


def test_no_chains_are_none():
    assert generate(0) == ()


def test_every_generated_chain_is_possible_and_mixed():
    for sequence in generate(20):
        assert sequence.state in START_STATES
        assert first_impossible(sequence) is None
        assert len({TASK_RULES[task].category for task in sequence.tasks}) == CHAIN_LENGTH


def test_a_chain_is_impossible_from_the_task_on_that_lacks_its_condition():
    state = CalvinState(0, 0, "left", "closed", "table", "table", "slider_left")
    tasks = ("open_drawer", "lift_red_block_table", "place_in_drawer", "close_drawer")
    assert first_impossible(CalvinSequence(state, tasks)) is None
    assert first_impossible(CalvinSequence(state, (*tasks, "lift_red_block_drawer"))) == 4, "it is closed"
    # The door covers the half in which the pink block is.
    assert first_impossible(CalvinSequence(state, ("lift_pink_block_slider",))) == 0
    assert first_impossible(CalvinSequence(state, ("move_slider_right", "lift_pink_block_slider"))) is None


@given(st.sampled_from(START_STATES), st.sampled_from(sorted(TASK_RULES)))
@settings(deadline=None)
def test_a_switch_is_possible_only_once(state, task):
    """After a task that changes a light, the drawer or the slider, the same task is not possible."""
    if task.startswith(("turn_", "open_", "close_", "move_")) and possible(state, task):
        assert first_impossible(CalvinSequence(state, (task, task))) == 1


def test_states_in_which_a_task_can_be_asked_for_alone():
    counts = {task: len(states_for(task)) for task in TASK_RULES}
    never = {task for task, count in counts.items() if not count}
    assert never == {
        *(f"lift_{colour}_block_drawer" for colour in ("red", "blue", "pink")),
        *("place_in_slider", "place_in_drawer", "stack_block", "unstack_block"),
    }
    assert counts["open_drawer"] == len(START_STATES) / 2
    assert counts["push_into_drawer"] == 48
    assert all(possible(state, "push_into_drawer") for state in states_for("push_into_drawer"))


def test_the_hash_is_that_of_pyhash():
    """The values are from pyhash's own tests and README."""
    assert pyhash_fnv1_32("test") == 3910690890
    assert pyhash_fnv1_32("") == 0


@pytest.mark.parametrize("state, things, places, angles", STARTS)
def test_starts_are_those_of_calvins_evaluation(state, things, places, angles):
    robot, scene = start_of(CalvinState(*state))
    blocks = [[*place, 0, 0, angle] for place, angle in zip(places, angles)]
    assert (scene == np.concatenate([things, *blocks])).all()
    assert (robot.shape, robot.dtype, scene.dtype) == ((15,), np.float64, np.float64)
    assert (robot[0], robot[14]) == (0.02586889, 1.0)


def test_starts_keep_blocks_apart():
    for state in START_STATES:
        _, scene = start_of(state)
        places = scene[6:].reshape(3, 6)[:, :3]
        assert min(np.linalg.norm(places[a] - places[b]) for a, b in ((0, 1), (0, 2), (1, 2))) > 0.15
        assert scene[0] == (0.28 if state.slider == "left" else 0)


def test_a_published_file_is_read(tmp_path):
    path = tmp_path / "eval_sequences.json"
    path.write_text(as_json(generate(20)))
    assert read(path, TASK_RULES) == generate(20)


def _state(**changes):
    def change(entries):
        entries[3][0].update(changes)

    return change


def _task(name):
    def change(entries):
        entries[3][1][0] = name

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda entries: entries.clear(), "holds []"),
        (lambda entries: entries[3].append(1), "chain 3 is [{"),
        (lambda entries: entries[3][0].pop("led"), "chain 3: the state is {"),
        (_state(shelf="empty"), "chain 3: the state is {"),
        (_state(led=True), "chain 3: led is True: a chain begins with 0 or 1"),
        (_state(led=1.0), "chain 3: led is 1.0"),
        (_state(slider="up"), "chain 3: slider is 'up': a chain begins with 'right' or 'left'"),
        (_state(pink_block=["table"]), "chain 3: pink_block is ['table']"),
        (_state(grasped=1), "chain 3: grasped is 1"),
        (_state(red_block="table", blue_block="table", pink_block="table"), "the three blocks have no place"),
        (lambda entries: entries[3][1].pop(), "chain 3: the tasks are ["),
        (_task("juggle"), "chain 3: 'juggle' is no task of CALVIN"),
        (_task(7), "chain 3: 7 is no task"),
        (_task("stack_block"), "chain 3: stack_block is not possible"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_in_one_line(tmp_path, change, said):
    path = tmp_path / "sequences.json"
    entries = json.loads(as_json(generate(20)))
    change(entries)
    path.write_text(json.dumps(entries))
    with pytest.raises(UserError) as raised:
        read(path, TASK_RULES)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_task_that_this_simulator_lacks_is_refused(tmp_path):
    path = tmp_path / "sequences.json"
    path.write_text(as_json(generate(20)))
    with pytest.raises(UserError, match="is no task of CALVIN"):
        read(path, set(TASK_RULES) - {"open_drawer"})


@pytest.mark.parametrize(
    "content, said", [(b"{", "not JSON"), (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")]
)
def test_what_is_no_json_is_refused(tmp_path, content, said):
    path = tmp_path / "sequences.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read(path, TASK_RULES)


@pytest.mark.skipif("DEER_VLA_CALVIN_ROOT" not in os.environ, reason="no clone of CALVIN is named")
def test_the_rules_are_those_of_a_clone():
    """CALVIN's module is read, not imported: it would need torch and pyhash."""
    path = Path(os.environ["DEER_VLA_CALVIN_ROOT"], "calvin_models/calvin_agent/evaluation")
    theirs = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in ast.parse((path / "multistep_sequences.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id in ("tasks", "task_categories")
    }
    ours = {
        name: [
            {
                "condition": {thing: set(np.atleast_1d(value).tolist()) for thing, value in needed.items()},
                "effect": dict(changed),
            }
            for needed, changed in rule.changes
        ]
        for name, rule in TASK_RULES.items()
    }
    for changes in theirs["tasks"].values():
        for each in changes:
            each["condition"] = {k: set(np.atleast_1d(v).tolist()) for k, v in each["condition"].items()}
    assert list(ours) == list(theirs["tasks"]), "the order decides what is drawn"
    assert ours == theirs["tasks"]
    assert {name: rule.category for name, rule in TASK_RULES.items()} == theirs["task_categories"]
