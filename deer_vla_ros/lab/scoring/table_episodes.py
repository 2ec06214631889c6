"""Episodes of the simulated table, for the calibration of a checkpoint and for the measurement of budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from deer_vla_ros.budget.calibration import Episode
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.demonstrations.demonstrations import demonstrations


def table_episodes(
    seeds: range, steps: int, alter: Callable[[Observation], Observation] = lambda observation: observation
) -> Iterator[Episode]:
    """Yields demonstrations of the scripted expert: `steps` steps for every seed. The last demonstration of a
    seed is cut to fit.

    alter: changes every observation, to give another world than the recorded one.
    """
    for seed in seeds:
        random, left = np.random.default_rng([seed, 1]), steps
        for shown in demonstrations(steps, seed):
            moments = shown.moments[:left]
            seen = [Observation(moment.views.static, moment.views.gripper, moment.tcp) for moment in moments]
            yield Episode(
                str(random.choice(shown.task.phrasings)), [alter(observation) for observation in seen]
            )
            left -= len(moments)
            if left == 0:
                break
