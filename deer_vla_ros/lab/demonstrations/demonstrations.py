"""How does the scripted expert show the tasks? Sessions of tasks one after another, without resetting the table in between.

So episodes begin as they will in instruction chains: the arm anywhere, perhaps with a block in its hand. Most are disturbed by
bursts of noise, and the expert's clean answer to the disturbed state is what is recorded. With a policy, the policy acts first and
the expert takes over (DAgger, Ross et al. 2011, arXiv 1011.0686): frames of the policy's own mistakes, with the expert's answers.
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
"""Standard deviation of a burst's mean, in units of the action."""

BURSTS = 0.12
"""Probability that one begins, per step."""

_RARE = {"place_in_drawer": 5.0, "stack_block": 5.0, "take_out_of_drawer": 4.0, "unstack_block": 3.0}
"""How much more often than others a task is chosen where it is possible: it seldom is."""

_RARE_OF_A_POLICY = {
    **_RARE,
    **{task.name: 4.0 for task in TASKS if task.name.startswith(("lift_nearest", "lift_farthest"))},
}
"""Where a policy acts first. Whatever the expert does, its frames are labelled for every task; a policy's mistakes come only with what it
was asked for."""

Driver = Callable[[Observation], Action]
"""A policy that has been told the instruction."""


@dataclass(frozen=True, eq=False)
class Labels:
    """What the expert would do in one state for every task, in the order of TASKS, and where everything is; the arrays are
    training.frames.ARRAYS' rows."""

    actions: np.ndarray
    valid: np.ndarray
    points: np.ndarray
    yaws: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Moment:
    """What is there before one step.

    tcp (7,): measured pose, position [m] and quaternion xyzw. joints (9,): as Table.joint_positions. gripper_open: what the gripper
    was last told in this episode, before its first step whether it is wide open.
    """

    views: Views
    tcp: np.ndarray
    joints: np.ndarray
    gripper_open: bool
    state: TableState
    labels: Labels


@dataclass(frozen=True, eq=False)
class Episode:
    """One task from where the one before left the table, until it succeeded or STEP_LIMIT steps were over."""

    task: Task
    moments: tuple[Moment, ...]
    succeeded: bool


def demonstrations(count: int, seed: int, driver: Callable[[str], Driver] | None = None) -> Iterator[Episode]:
    """`count` episodes worth learning from; they depend on nothing but the arguments.

    driver: makes the policy that acts first, from an instruction; None: the expert alone acts, and what it fails at is left out.
    """
    with closing(_episodes(seed, driver)) as episodes:
        yield from islice((episode for episode in episodes if episode.succeeded or driver), count)


def _episodes(seed: int, driver: Callable[[str], Driver] | None) -> Iterator[Episode]:
    """Without end."""
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
) -> Episode:
    """Does one task, from where the table is."""
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
            return Episode(task, tuple(moments), True)
    return Episode(task, tuple(moments), False)


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
    """Bursts of noise on an action: a push in one direction for a few steps, and a tremble on it."""

    def __init__(self, random: np.random.Generator, probability: float):
        self._random, self._probability = random, probability
        self._left, self._push = 0, np.zeros(6)

    def draw(self) -> np.ndarray:
        """(6,) to add to this step's action."""
        if self._left == 0 and self._random.random() < self._probability:
            self._left = int(self._random.integers(2, 6))
            self._push = self._random.normal(0.0, NOISE, 6)
        if self._left == 0:
            return np.zeros(6)
        self._left -= 1
        return self._push + self._random.normal(0.0, NOISE / 2, 6)
