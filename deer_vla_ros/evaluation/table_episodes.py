"""What do the cameras of the simulated table see while an arm strolls about? Episodes to calibrate and to measure budgets on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from deer_vla_ros.budget.calibration import Episode
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.sim.table import Table

INSTRUCTIONS = (
    *(f"{verb} the {color} block" for verb in ("lift", "pick up", "grasp") for color in ("red", "blue", "pink")),
    *(f"push the {color} block to the {side}" for color in ("red", "blue", "pink") for side in ("left", "right")),
    *(f"{verb} the drawer" for verb in ("open", "close", "pull", "push")),
    *(f"move the slider to the {side}" for side in ("left", "right")),
    *(f"{verb} the {light}" for verb in ("turn on", "turn off", "switch on", "switch off") for light in ("led", "lamp", "light")),
    "stack the blocks on top of each other",
    "place the block in the drawer",
    "take the block out of the drawer",
)
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
            views = table.render()
            observations.append(Observation(views.static, views.gripper))
    return observations


def table_episodes(
    seeds: range, steps: int, alter: Callable[[Observation], Observation] = lambda observation: observation
) -> Iterator[Episode]:
    """One episode per seed, of `steps` steps; instructions in turn. alter: another world than the one recorded."""
    for seed in seeds:
        observations = [alter(observation) for observation in table_observations(seed, steps)]
        yield Episode(instruction_of(seed), observations)
