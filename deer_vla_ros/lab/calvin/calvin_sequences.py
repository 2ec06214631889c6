"""The chains of CALVIN's LH-MTLC benchmark: five tasks each, and the state of the table in which they begin.

The chains and the start states are those of CALVIN's own evaluation (`calvin_agent/evaluation`, Mees et al.
2022, arXiv 2112.03227), to the bit. It draws them from numpy's legacy random stream, which never changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from deer_vla_ros.errors import UserError, shown
from deer_vla_ros.lab.scoring.chain_run import CHAIN_LENGTH
from deer_vla_ros.untrusted import read_json

COLOURS = ("red", "blue", "pink")
BLOCKS = tuple(f"{colour}_block" for colour in COLOURS)


@dataclass(frozen=True)
class CalvinState:
    """Where the things of CALVIN's table are. The order of the fields is CALVIN's: `start_of` depends on it.

    led, lightbulb: 1 is on. slider: "left" or "right". drawer: "open" or "closed". Blocks: "table",
    "slider_left" or "slider_right" (which half of the sliding cabinet). grasped: 1 while a block is held.
    """

    led: int
    lightbulb: int
    slider: str
    drawer: str
    red_block: str
    blue_block: str
    pink_block: str
    grasped: int = 0


@dataclass(frozen=True)
class CalvinSequence:
    """A chain: the state in which it begins, and the names of its five tasks."""

    state: CalvinState
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class TaskRule:
    """What a task needs and what it changes.

    category: a generated chain takes each of its tasks from another one. changes: one pair for each way to
    carry it out. The first of a pair gives the values of a state that it needs (a tuple: any of these), and
    the second those that it leaves.
    """

    category: int
    changes: tuple[tuple[Mapping[str, Any], Mapping[str, Any]], ...]


def _task_rules() -> dict[str, TaskRule]:
    """The rules of CALVIN's 34 tasks by name, in the order in which CALVIN numbers them."""
    free, held = {"grasped": 0}, {"grasped": 1}
    in_slider = ("slider_right", "slider_left")
    rules = {}
    for motion in ("rotate", "push"):
        for block in BLOCKS:
            for side in ("right", "left"):
                needed = {block: "table", **free}
                rules[f"{motion}_{block}_{side}"] = TaskRule(1, ((needed, {block: "table"}),))

    def switch(name: str, category: int, thing: str, before: Any, after: Any) -> None:
        rules[name] = TaskRule(category, (({thing: before, **free}, {thing: after}),))

    switch("move_slider_left", 2, "slider", "right", "left")
    switch("move_slider_right", 2, "slider", "left", "right")
    switch("open_drawer", 3, "drawer", "closed", "open")
    switch("close_drawer", 3, "drawer", "open", "closed")
    for block in BLOCKS:
        lifted = {block: "grasped", **held}
        # A block can be lifted from a half of the cabinet while the door is on the other side.
        from_slider = tuple(
            ({block: f"slider_{half}", "slider": door, **free}, lifted)
            for half, door in (("left", "right"), ("right", "left"))
        )
        from_drawer = {block: "drawer", "drawer": "open", **free}
        rules[f"lift_{block}_table"] = TaskRule(4, (({block: "table", **free}, lifted),))
        rules[f"lift_{block}_slider"] = TaskRule(5, from_slider)
        rules[f"lift_{block}_drawer"] = TaskRule(6, ((from_drawer, lifted),))
    rules["place_in_slider"] = TaskRule(
        7,
        tuple(
            ({block: "grasped", "slider": side, **held}, {block: f"slider_{side}", **free})
            for block in BLOCKS
            for side in ("right", "left")
        ),
    )
    rules["place_in_drawer"] = TaskRule(
        7,
        tuple(({block: "grasped", "drawer": "open", **held}, {block: "drawer", **free}) for block in BLOCKS),
    )
    pairs = [(top, bottom) for top in BLOCKS for bottom in BLOCKS if top != bottom]
    rules["stack_block"] = TaskRule(
        10,
        tuple(
            (
                {top: "grasped", bottom: "table", **held},
                {top: "stacked_top", bottom: "stacked_bottom", **free},
            )
            for top, bottom in pairs
        ),
    )
    rules["unstack_block"] = TaskRule(
        11,
        tuple(
            ({top: "stacked_top", bottom: "stacked_bottom", **free}, {top: "table", bottom: "table"})
            for top, bottom in pairs
        ),
    )
    for light in ("lightbulb", "led"):
        switch(f"turn_on_{light}", 8, light, 0, 1)
        switch(f"turn_off_{light}", 8, light, 1, 0)
    rules["push_into_drawer"] = TaskRule(
        9,
        tuple(
            (
                {**dict.fromkeys(BLOCKS, in_slider), block: "table", "drawer": "open", **free},
                {block: "drawer", **free},
            )
            for block in BLOCKS
        ),
    )
    return rules


TASK_RULES = _task_rules()

START_VALUES: Mapping[str, tuple[Any, ...]] = {
    "led": (0, 1),
    "lightbulb": (0, 1),
    "slider": ("right", "left"),
    "drawer": ("closed", "open"),
    **dict.fromkeys(BLOCKS, ("table", "slider_right", "slider_left")),
    "grasped": (0,),
}
"""What each thing can be where a chain begins, in CALVIN's order."""


def _places_are_free(state: CalvinState) -> bool:
    """Whether one or two blocks lie on the table, and at most one in each half of the cabinet."""
    places = [getattr(state, block) for block in BLOCKS]
    return len(set(places)) > 1 and all(places.count(half) < 2 for half in ("slider_right", "slider_left"))


START_STATES = tuple(
    filter(_places_are_free, (CalvinState(*values) for values in product(*START_VALUES.values())))
)
"""Every state in which a chain can begin, in CALVIN's order."""


def possible(state: CalvinState, task: str) -> bool:
    """Whether the task, one of TASK_RULES, can be asked for in this state, and can be carried out in one way
    only."""
    return _after(state, task) is not None


def states_for(task: str) -> tuple[CalvinState, ...]:
    """The start states in which the task, one of TASK_RULES, can be asked for alone. There are none for a
    task that needs a held block, a stack, or a block in the drawer."""
    return tuple(state for state in START_STATES if possible(state, task))


def first_impossible(sequence: CalvinSequence) -> int | None:
    """The position of the first task that cannot be asked for when all tasks before it were carried out; None
    if every task can."""
    state: CalvinState | None = sequence.state
    for position, task in enumerate(sequence.tasks):
        state = _after(state, task)
        if state is None:
            return position
    return None


@functools.cache
def _after(state: CalvinState, task: str) -> CalvinState | None:
    """The state when the task was carried out; None if it is not possible, or if the result is not clear."""
    results = [
        changed
        for needed, changed in TASK_RULES[task].changes
        if all(
            getattr(state, thing) in (value if isinstance(value, tuple) else (value,))
            for thing, value in needed.items()
        )
    ]
    return dataclasses.replace(state, **results[0]) if len(results) == 1 else None


@functools.lru_cache(maxsize=4)
def generate(count: int) -> tuple[CalvinSequence, ...]:
    """The chains that CALVIN's own `get_sequences(count)` gives, in its order; 1,000 are the benchmark's.

    Another count gives other chains, not the first of these. 1,000 chains take about 25 s: 5.5 million draws
    are tried, and most of their tasks cannot follow each other.
    """
    names = tuple(TASK_RULES)
    categories = [rule.category for rule in TASK_RULES.values()]
    in_order = np.arange(len(names))
    drawn = np.empty_like(in_order)
    found = []
    for number, state in enumerate(START_STATES):
        random = np.random.RandomState(number)
        is_first = [possible(state, name) for name in names]
        # CALVIN shares the chains out among the states; the first states get one more.
        missing = count // len(START_STATES) + (number < count % len(START_STATES))
        while missing:
            # The same draw as random.choice(names, CHAIN_LENGTH, replace=False), in a quarter of its time.
            drawn[:] = in_order
            random.shuffle(drawn)
            chosen = drawn[:CHAIN_LENGTH].tolist()
            if not is_first[chosen[0]] or len({categories[each] for each in chosen}) < CHAIN_LENGTH:
                continue
            sequence = CalvinSequence(state, tuple(names[each] for each in chosen))
            if first_impossible(sequence) is None:
                found.append(sequence)
                missing -= 1
    np.random.RandomState(0).shuffle(found)
    return tuple(found)


def read(path: Path, known: Collection[str]) -> tuple[CalvinSequence, ...]:
    """The chains of a JSON file: a list of [state, [five tasks]], as `eval_sequences.json` of RoboFlamingo
    and DeeR-VLA.

    known: the names of the simulator's tasks. Raises UserError, which names the chain, for everything that is
    wrong in the file.
    """
    remedy = "give a list of [state, [five tasks]], such as RoboFlamingo's eval_sequences.json"
    entries = read_json(path, remedy)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} holds {shown(entries)}: {remedy}")
    return tuple(_sequence(entry, f"{path}, chain {at}", known) for at, entry in enumerate(entries))


def _sequence(entry: Any, where: str, known: Collection[str]) -> CalvinSequence:
    """One chain of a file. Raises UserError."""
    if not isinstance(entry, list) or len(entry) != 2:
        raise UserError(f"{where} is {shown(entry)}: give [state, [five tasks]]")
    state, tasks = _state(entry[0], where), entry[1]
    if not isinstance(tasks, list) or len(tasks) != CHAIN_LENGTH:
        raise UserError(f"{where}: the tasks are {shown(tasks)}: give a list of {CHAIN_LENGTH}")
    for task in tasks:
        if not isinstance(task, str) or task not in TASK_RULES or task not in known:
            raise UserError(
                f"{where}: {shown(task)} is no task of CALVIN: give one such as {min(TASK_RULES)}"
            )
    sequence = CalvinSequence(state, tuple(tasks))
    position = first_impossible(sequence)
    if position is not None:
        raise UserError(
            f"{where}: {tasks[position]} is not possible in the state that the tasks before it leave: change "
            "the chain"
        )
    return sequence


def _state(values: Any, where: str) -> CalvinState:
    """The start state that a file describes. Raises UserError."""
    if not isinstance(values, dict) or set(values) != set(START_VALUES):
        raise UserError(f"{where}: the state is {shown(values)}: give {', '.join(START_VALUES)}")
    for thing, allowed in START_VALUES.items():
        # `start_of` depends on the text of each value, and True and 1.0 have other texts than 1.
        if type(values[thing]) is not type(allowed[0]) or values[thing] not in allowed:
            choices = " or ".join(map(repr, allowed))
            raise UserError(f"{where}: {thing} is {shown(values[thing])}: a chain begins with {choices}")
    state = CalvinState(**values)
    if not _places_are_free(state):
        raise UserError(
            f"{where}: the three blocks have no place: at most one in each half of the slider and two on the "
            "table"
        )
    return state


_NEUTRAL_ROBOT = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),
    1.0,
)
_IN_SLIDER = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
_ON_TABLE = (
    (5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
    (2.29995412e-01, -1.19995140e-01, 4.59990010e-01),
)
_SLIDER_LEFT_M, _DRAWER_OPEN_M, _SWITCH_ON = 0.28, 0.22, 0.088


def start_of(state: CalvinState) -> tuple[np.ndarray, np.ndarray]:
    """What CALVIN's simulator is reset to where a chain begins: robot_obs (15,) and scene_obs (24,), float64.

    robot_obs: TCP position [m] and Euler angles [rad], opening of the gripper [m], seven joints [rad], and
    the gripper's last command. scene_obs: slider, drawer, button, switch, light bulb, LED, and position [m]
    and Euler angles [rad] of the red, blue and pink block, all in the frame of CALVIN's world. The place of
    a block on the table and the blocks' rotations are random, and always the same for the same state.
    """
    random = np.random.RandomState(pyhash_fnv1_32(str(dataclasses.asdict(state).values())))
    table = list(_ON_TABLE)
    random.shuffle(table)
    scene = np.zeros(24)
    scene[0] = _SLIDER_LEFT_M * (state.slider == "left")
    scene[1] = _DRAWER_OPEN_M * (state.drawer == "open")
    scene[3] = _SWITCH_ON * state.lightbulb
    scene[4], scene[5] = state.lightbulb, state.led
    # The blue block takes the second place only beside the red one, and the pink block always.
    on_table = {"red_block": 0, "blue_block": int(state.red_block == "table"), "pink_block": 1}
    for begin, block in zip((6, 12, 18), BLOCKS):
        place = getattr(state, block)
        scene[begin : begin + 3] = _IN_SLIDER.get(place, table[on_table[block]])
        scene[begin + 5] = random.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(_NEUTRAL_ROBOT), scene


def pyhash_fnv1_32(text: str) -> int:
    """What `pyhash.fnv1_32()(text)` gives, which CALVIN uses.

    It is FNV-1 of 32 bits over UTF-16 without a byte order mark, and begins at 0 instead of FNV's offset.
    """
    value = 0
    for byte in text.encode("utf-16-le"):
        value = (value * 0x01000193 % 2**32) ^ byte
    return value
