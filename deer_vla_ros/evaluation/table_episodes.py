"""What do the cameras of the simulated table see while an arm strolls about? Episodes to calibrate and to measure budgets on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from deer_vla_ros.budget.calibration import Episode
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.sim.table import Table
from deer_vla_ros.sim.tasks import TASKS

INSTRUCTIONS = tuple(phrasing for task in TASKS for phrasing in task.phrasings)
"""What the table can be asked for."""


def instruction_of(seed: int) -> str:
    """The instruction of the episode of that seed: all of them in turn."""
    return INSTRUCTIONS[seed % len(INSTRUCTIONS)]


def table_observations(seed: int, steps: int) -> list[Observation]:
    """Both cameras' views of one arrangement while the arm strolls about, 10 per second."""
    random = np.random.default_rng(seed)
    observations = []
    with Table(seed) as table:
        start = table.tcp_pose()
        target = np.array(start.position)
        for _ in range(steps):
            target = start.position + np.clip(target - start.position + random.normal(0, 0.02, 3), -0.12, 0.12)
            table.set_target(target, start.quaternion)
            table.advance(0.1)
            views, pose = table.render(), table.tcp_pose()
            observations.append(Observation(views.static, views.gripper, np.concatenate([pose.position, pose.quaternion])))
    return observations


def table_episodes(
    seeds: range, steps: int, alter: Callable[[Observation], Observation] = lambda observation: observation
) -> Iterator[Episode]:
    """One episode per seed, of `steps` steps; instructions in turn. alter: another world than the one recorded."""
    for seed in seeds:
        observations = [alter(observation) for observation in table_observations(seed, steps)]
        yield Episode(instruction_of(seed), observations)
