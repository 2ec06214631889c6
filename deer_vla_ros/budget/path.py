"""In which order do thresholds rise as the budget falls? One nested path of thresholds, from full depth to the first exit.

Along the path every threshold only rises, so on the same deltas a cheaper point never goes deeper: cost is monotone, and a looser
budget never exits earlier. The order is greedy: at each point that exit's threshold rises which adds the least deviation from the
full-depth action per cost saved, measured on calibration samples. Thresholds are quantiles of the calibrated deltas, which gives
exits of different scale the same measure.
"""

from __future__ import annotations

import math

import numpy as np

from deer_vla_ros.budget.families import ALWAYS, NEVER, exit_shares

LEVELS = 12
"""Quantiles that a threshold may take at the corners of the path. More find noise."""
SHAPE_SAMPLES, SHARE_SAMPLES = 3000, 20_000
"""Samples that the order is found on, and that shares are counted on."""


class ThresholdPath:
    """A path of thresholds. A position on it goes from 0, full depth, to `end`, where every step takes the first exit.

    Between two corners, quantiles are interpolated, and so are the shares of the exits.
    """

    def __init__(self, columns: np.ndarray, levels: np.ndarray, shares: np.ndarray):
        """columns (exits - 1, N): calibrated deltas of each exit but the last, sorted. levels (corners, exits - 1): quantiles, rising
        along the path. shares (corners, exits): of the steps that each exit takes, as measured; made to fall along the path, so that
        expected cost does too.
        """
        self._columns, self.levels = columns, levels
        deeper = 1.0 - np.cumsum(shares, axis=1)  # share of the steps that go deeper than each exit
        deeper = np.minimum.accumulate(np.clip(deeper, 0.0, 1.0), axis=0)
        self.corner_shares = -np.diff(deeper, axis=1, prepend=1.0)

    @classmethod
    def ordered(cls, deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> ThresholdPath:
        """The path for samples (N, exits): deltas from the exit before, deviations from full depth; costs (exits,), rising.

        Shares are those of the samples, each taken for itself: in closed loop, where a step's exit changes the next step's deltas,
        measure them and make a path of the same levels.
        """
        columns = np.sort(deltas[:, :-1].T, axis=1)
        stride = max(1, len(deltas) // SHAPE_SAMPLES)
        levels = _greedy_levels(deltas[::stride, :-1], deviations[::stride], costs)
        path = cls(columns, levels, np.zeros((len(levels), len(costs))))
        counted = np.asfortranarray(deltas[:: max(1, len(deltas) // SHARE_SAMPLES)])  # read an exit at a time
        return cls(
            columns,
            levels,
            np.array([exit_shares(counted, path.thresholds(corner)) for corner in range(len(levels))]),
        )

    @property
    def end(self) -> float:
        return float(len(self.levels) - 1)

    def thresholds(self, position: float) -> tuple[float, ...]:
        """One per exit; positions beyond the path are its ends."""
        quantiles = self._between(self.levels, position)
        return (*(self._threshold(index, quantile) for index, quantile in enumerate(quantiles)), ALWAYS)

    def shares(self, position: float) -> np.ndarray:
        """(exits,) expected share of the steps that each exit takes."""
        return self._between(self.corner_shares, position)

    def position_within(self, costs: np.ndarray, mean: float) -> float:
        """The deepest position of an expected cost (exits,) within `mean`; `end` where even that is dearer."""
        return float(np.interp(-mean, -(self.corner_shares @ costs), np.arange(len(self.levels))))

    def _between(self, corners: np.ndarray, position: float) -> np.ndarray:
        position = min(max(position, 0.0), self.end)
        before = int(position)
        after = min(before + 1, len(corners) - 1)
        return corners[before] + (position - before) * (corners[after] - corners[before])

    def _threshold(self, index: int, quantile: float) -> float:
        """The delta that `quantile` of exit number `index`'s samples are not above; of few samples or ties rather more of them."""
        column = self._columns[index]
        count = math.ceil(quantile * len(column) - 1e-9)
        if count == 0:
            return NEVER
        return ALWAYS if count >= len(column) else float(column[count - 1])


def _greedy_levels(deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(corners, exits - 1) quantiles, from zeros to one for the first exit."""
    samples, exits = deltas.shape
    bounds = -(-np.arange(1, LEVELS) * samples // LEVELS)
    order = np.argsort(deltas, axis=0, kind="stable")
    groups = [
        np.split(order[:, exit], bounds) for exit in range(exits)
    ]  # [exit][level]: who stops there when that level is left
    levels, taken = np.zeros(exits, dtype=np.int64), np.full(samples, exits)
    path = [levels.copy()]
    while exits and levels[0] < LEVELS:
        price = np.full(exits, np.inf)
        rising = np.flatnonzero(levels < LEVELS)
        for exit in rising:
            stopping = groups[exit][levels[exit]]
            stopping = stopping[taken[stopping] > exit]
            if len(stopping):
                were = taken[stopping]
                added = deviations[stopping, exit] - deviations[stopping, were]
                price[exit] = added.sum() / (costs[were] - costs[exit]).sum()
        if np.isfinite(
            price
        ).any():  # else the level of each exit holds nobody who would go on: the next ones might
            rising = [price.argmin()]
        for exit in rising:
            group = groups[exit][levels[exit]]
            taken[group] = np.minimum(taken[group], exit)
            levels[exit] += 1
        path.append(levels.copy())
    return np.array(path) / LEVELS
