"""Made-up deltas and deviations: some steps are hard at every exit, deep exits are near full depth."""

import functools

import numpy as np

from deer_vla_ros.budget.calibration import Calibration
from deer_vla_ros.budget.path import ThresholdPath

EXITS = (1, 3, 5, 7, 9, 11)


def samples(
    count: int = 2000, exits: int = 6, seed: int = 0, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Deltas and deviations, (count, exits) each."""
    random = np.random.default_rng(seed)
    hardness = random.gamma(2.0, 0.5, (count, 1))
    deltas = (
        scale * 0.02 * hardness * random.gamma(3.0, 0.3, (count, exits)) * np.linspace(1.0, 0.6, exits)
    ).astype(np.float32)
    steps_left = np.cumsum(deltas[:, :0:-1], axis=1)[:, ::-1]
    return deltas, np.concatenate((0.6 * steps_left, np.zeros((count, 1))), axis=1)


@functools.cache
def calibration(
    count: int = 2000, exits: tuple[int, ...] = EXITS, seed: int = 0, scale: float = 1.0
) -> Calibration:
    """A calibration of such samples. Its poses deviate from full depth along one axis."""
    deltas, deviations = samples(count, len(exits), seed, scale)
    poses = np.zeros((count, len(exits), 6), np.float32)
    poses[:, :, 0] = deviations * np.sqrt(6)
    numbers = np.arange(count, dtype=np.int32)
    costs = np.arange(1.0, len(exits) + 1)
    paths = [
        ThresholdPath.ordered(deltas[:, :n], deviations[:, :n], costs[:n]) for n in range(1, len(exits) + 1)
    ]
    return Calibration(
        exits=exits,
        delta="l2",
        deltas=deltas,
        poses=poses,
        gripper=np.full((count, len(exits)), 0.5, np.float32),
        episodes=numbers // 50,
        steps=numbers % 50,
        tokens=np.full(count, 10, np.int32),
        window_deltas=deltas[:0],
        paths={n: (path.levels, path.corner_shares) for n, path in enumerate(paths, 1)},
        provenance={"source": "made up"},
    )
