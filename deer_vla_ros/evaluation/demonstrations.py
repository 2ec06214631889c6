"""How does the scripted expert show the tasks? Sessions of tasks one after another, without resetting the table in between.

So episodes begin as they will in instruction chains: the arm anywhere, perhaps with a block in its hand. Most are disturbed by
bursts of noise, and the expert's clean answer to the disturbed state is what is recorded. With a policy, the policy acts first and
the expert takes over (DAgger, Ross et al. 2011, arXiv 1011.0686): frames of the policy's own mistakes, with the expert's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deer_vla_ros.evaluation.table_arm import TableArm
from deer_vla_ros.inference.preprocess import resize_and_crop
from deer_vla_ros.inference.types import Action, Observation
from deer_vla_ros.sim.expert import act
from deer_vla_ros.sim.table import Table
from deer_vla_ros.sim.tasks import TASKS, Task
from deer_vla_ros.training.frames import ShardWriter

STEP_LIMIT = 80
DEMOS_PER_SHARD = 100
SESSION_TASKS = 8
NOISE = 0.35
"""Standard deviation of a burst's mean, in units of the action."""

_RARE = {"place_in_drawer": 5.0, "stack_block": 5.0, "take_out_of_drawer": 4.0, "unstack_block": 3.0}
"""How much more often than others a task is chosen where it is possible: it seldom is."""

PHRASINGS = {task.name: list(task.phrasings) for task in TASKS}

Driver = Callable[[Observation], Action]
"""A policy that has been told the instruction."""


@dataclass(frozen=True)
class Session:
    """What the frames of a shard are recorded with.

    image_size: pixels, as the network takes them. driver: makes the policy that acts first, from an instruction; None: the expert
    alone acts.
    """

    image_size: int
    driver: Callable[[str], Driver] | None = None


def record_shard(folder: Path, seed: int, demos: int, session: Session) -> tuple[int, int]:
    """Records `demos` episodes into a new shard; (frames, failed episodes). Depends on nothing but its arguments."""
    random = np.random.default_rng(seed)
    writer = ShardWriter(folder, tuple(task.name for task in TASKS), session.image_size, {"seed": seed, "phrasings": PHRASINGS})
    frames = failed = 0
    with Table(seed) as table:
        while writer.episodes < demos:
            table.reset(int(random.integers(2**31)), varied=True)
            for _ in range(SESSION_TASKS):
                state = table.state()
                possible = [task for task in TASKS if task.possible(state)]
                weights = np.array([_RARE.get(task.name, 1.0) for task in possible])
                if not possible or writer.episodes == demos:
                    break
                task = possible[random.choice(len(possible), p=weights / weights.sum())]
                episode, succeeded = record_episode(table, task, random, session)
                if not succeeded:
                    failed += 1
                if succeeded or session.driver:
                    writer.add_episode(episode)
                    frames += len(episode)
                if not succeeded:
                    break
    writer.close()
    return frames, failed


def record_episode(table: Table, task: Task, random: np.random.Generator, session: Session) -> tuple[list[dict], bool]:
    """One task until it succeeds or STEP_LIMIT steps are over: its frames, and whether it succeeded."""
    arm, before, frames = TableArm(table), table.state(), []
    disturbance = _Disturbance(random, probability=0.12 if random.random() < 0.75 else 0.0)
    driver, own_steps = None, 0
    if session.driver:
        driver = session.driver(str(random.choice(task.phrasings)))
        own_steps = int(random.integers(5, 60))
    for step in range(STEP_LIMIT):
        views = table.render()
        frame = {
            "images": np.stack([resize_and_crop(image, session.image_size) for image in (views.static, views.gripper)]),
            "tcp": arm.measured(),
            "task": TASKS.index(task),
            **_labels(table, task),
        }
        frames.append(frame)
        wanted = frame["actions"][frame["task"]]
        if driver and step < own_steps:
            action = driver(Observation(views.static, views.gripper, arm.measured()))
            arm.step(action.pose, action.gripper > 0)
        else:
            arm.step(np.clip(wanted[:6] + disturbance.draw(), -1, 1), wanted[6] > 0)
        if task.succeeded(before, table.state()):
            return frames, True
    return frames, False


def _labels(table: Table, current: Task) -> dict[str, np.ndarray]:
    """What the expert would do now, for every task."""
    state = table.state()
    actions = np.zeros((len(TASKS), 7), np.float32)
    points, pixels = np.zeros((len(TASKS), 3), np.float32), np.zeros((len(TASKS), 2, 2), np.float32)
    valid = np.zeros(len(TASKS), bool)
    for i, task in enumerate(TASKS):
        if task is not current and not task.possible(state):
            continue
        intent = act(task.name, state)
        valid[i], points[i] = True, intent.point
        actions[i] = [*intent.pose, 1.0 if intent.open else -1.0]
        pixels[i] = [table.pixel(camera, intent.point) for camera in ("static", "gripper")]
    return {"actions": actions, "points": points, "pixels": pixels, "valid": valid}


class _Disturbance:
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
