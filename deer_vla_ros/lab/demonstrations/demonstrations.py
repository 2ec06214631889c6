"""Demonstrations by the scripted expert, in sessions of several tasks without a reset between them.

Episodes therefore begin as in instruction chains: the arm can be anywhere and can hold a block. Bursts of
noise disturb most episodes; the recorded action is the expert's answer to the disturbed state, without noise.
With a policy, the policy acts first and then the expert takes over (DAgger, Ross et al. 2011, arXiv
1011.0686). This gives frames of the policy's own mistakes with the expert's answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from deer_vla_ros.inference.types import Action, Observation
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.state import TableState, Views
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import RELEASED_M, TASKS, Task
from deer_vla_ros.lab.sim.things import things

STEP_LIMIT = 80
SESSION_TASKS = 8
NOISE = 0.35
"""Standard deviation of the mean of a burst of noise, in units of the action."""

BURSTS = 0.12
"""Probability that a burst begins, per step."""

_RARE = {"place_in_drawer": 5.0, "stack_block": 5.0, "take_out_of_drawer": 4.0, "unstack_block": 3.0}
"""How much more often a possible task is chosen than others; these tasks are seldom possible."""

_RARE_OF_A_POLICY = {
    **_RARE,
    **{task.name: 4.0 for task in TASKS if task.name.startswith(("lift_nearest", "lift_farthest"))},
}
"""The same if a policy acts first.

The expert's frames serve every task, because all tasks are labelled. The policy's mistakes occur only in the
given task.
"""

Driver = Callable[[Observation], Action]
"""A policy that follows one instruction."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of one state: the expert's action for every task, in the order of TASKS, and all things.

    The arrays are rows of training.frames.ARRAYS.
    """

    actions: np.ndarray
    valid: np.ndarray
    points: np.ndarray
    yaws: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Moment:
    """The situation before one step.

    tcp (7,): measured pose, position [m] and quaternion xyzw. joints (9,): as Table.joint_positions.
    gripper_open: the last gripper command of this episode; before the first one, whether the gripper is wide
    open.
    """

    views: Views
    tcp: np.ndarray
    joints: np.ndarray
    gripper_open: bool
    state: TableState
    labels: Labels


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One task, from the state after the task before, until success or until STEP_LIMIT steps."""

    task: Task
    moments: tuple[Moment, ...]
    succeeded: bool


def demonstrations(
    count: int, seed: int, driver: Callable[[str], Driver] | None = None
) -> Iterator[Demonstration]:
    """Yields `count` episodes that are useful for training; they depend only on the arguments.

    driver: makes the policy that acts first, from an instruction. None: only the expert acts, and its
    failures are left out.
    """
    with closing(_episodes(seed, driver)) as episodes:
        yield from islice((episode for episode in episodes if episode.succeeded or driver), count)


def _episodes(seed: int, driver: Callable[[str], Driver] | None) -> Iterator[Demonstration]:
    """Yields episodes without end."""
    random = np.random.default_rng(seed)
    with Table(seed) as table:
        while True:
            table.reset(int(random.integers(2**31)), varied=True)
            for _ in range(SESSION_TASKS):
                state = table.state()
                possible = [task for task in TASKS if task.possible(state)]
                if not possible:
                    break
                rare = _RARE_OF_A_POLICY if driver else _RARE
                weights = np.array([rare.get(task.name, 1.0) for task in possible])
                task = possible[random.choice(len(possible), p=weights / weights.sum())]
                episode = record_episode(table, task, random, driver)
                yield episode
                if not episode.succeeded:
                    break


def record_episode(
    table: Table, task: Task, random: np.random.Generator, new_driver: Callable[[str], Driver] | None = None
) -> Demonstration:
    """Does one task from the current state of the table."""
    arm, before, moments = TableArm(table), table.state(), []
    disturbance = Disturbance(random, probability=BURSTS if random.random() < 0.75 else 0.0)
    driver, own_steps, gripper_open = None, 0, before.opening > RELEASED_M
    if new_driver:
        driver = new_driver(str(random.choice(task.phrasings)))
        own_steps = int(random.integers(5, 60))
    for step in range(STEP_LIMIT):
        state = table.state()
        views, tcp, labels = table.render(), arm.measured(), _labels(table, task, state)
        moments.append(Moment(views, tcp, table.joint_positions(), gripper_open, state, labels))
        if driver and step < own_steps:
            action = driver(Observation(views.static, views.gripper, tcp))
            pose, gripper_open = action.pose, action.gripper > 0
        else:
            wanted = labels.actions[TASKS.index(task)]
            pose, gripper_open = np.clip(wanted[:6] + disturbance.draw(), -1, 1), bool(wanted[6] > 0)
        arm.step(pose, gripper_open)
        if task.succeeded(before, table.state()):
            return Demonstration(task, tuple(moments), True)
    return Demonstration(task, tuple(moments), False)


def _labels(table: Table, current: Task, state: TableState) -> Labels:
    actions = np.zeros((len(TASKS), 7), np.float32)
    valid = np.zeros(len(TASKS), bool)
    for i, task in enumerate(TASKS):
        if not (task is current or task.possible(state) or task.goes_on(state)):
            continue
        intent = act(task.name, state)
        valid[i], actions[i] = True, [*intent.pose, 1.0 if intent.open else -1.0]
    there = things(state)
    pixels = [
        [table.pixel(camera, position) for camera in ("static", "gripper")] for position in there.positions
    ]
    return Labels(
        actions,
        valid,
        there.positions.astype(np.float32),
        there.yaws.astype(np.float32),
        np.array(pixels, np.float32),
    )


class Disturbance:
    """Bursts of noise on actions: a constant offset for a few steps, with smaller noise in each step."""

    def __init__(self, random: np.random.Generator, probability: float):
        self._random, self._probability = random, probability
        self._left, self._push = 0, np.zeros(6)

    def draw(self) -> np.ndarray:
        """Returns the noise (6,) for this step's action."""
        if self._left == 0 and self._random.random() < self._probability:
            self._left = int(self._random.integers(2, 6))
            self._push = self._random.normal(0.0, NOISE, 6)
        if self._left == 0:
            return np.zeros(6)
        self._left -= 1
        return self._push + self._random.normal(0.0, NOISE / 2, 6)
