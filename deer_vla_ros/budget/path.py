"""A path of thresholds from full depth to the first exit: the order in which they rise as the budget falls.

Along the path each threshold only rises. So, on the same deltas, a cheaper point never goes deeper: the cost
is monotone, and a looser budget never exits earlier. The order is greedy: the next threshold to rise is the
one that adds the least deviation from the full-depth action per saved cost, measured on calibration samples.
Thresholds are quantiles of the calibrated deltas, so that exits with different scales are comparable.
"""

from __future__ import annotations

import math

import numpy as np

ALWAYS, NEVER = 1e8, -1e8
"""Thresholds that stop every step, and no step."""
LEVELS = 12
"""Number of quantiles that a threshold may take at the corners of the path. More would fit noise."""
SHAPE_SAMPLES, SHARE_SAMPLES = 3000, 20_000
"""Number of samples for finding the order, and for counting the shares."""


class ThresholdPath:
    """A path of thresholds. Positions go from 0 (full depth) to `end` (every step takes the first exit).

    Between two corners, the quantiles and the shares of the exits are interpolated.
    """

    def __init__(self, columns: np.ndarray, levels: np.ndarray, shares: np.ndarray):
        """columns (exits - 1, N): calibrated deltas of each exit but the last, sorted. levels
        (corners, exits - 1): quantiles, rising along the path. shares (corners, exits): measured shares of
        the steps that each exit takes. The share of deeper steps is made to fall along the path, so that the
        expected cost falls too.
        """
        self._columns, self.levels = columns, levels
        deeper = 1.0 - np.cumsum(shares, axis=1)  # share of the steps that go deeper than each exit
        deeper = np.minimum.accumulate(np.clip(deeper, 0.0, 1.0), axis=0)
        self.corner_shares = -np.diff(deeper, axis=1, prepend=1.0)

    @classmethod
    def ordered(cls, deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> ThresholdPath:
        """The path for samples (N, exits): deltas from the exit before, deviations from the full-depth pose.

        costs (exits,): ascending. The shares are counted on single samples. In closed loop, a step's exit
        changes the next step's deltas: measure the shares there, and make a path with the same levels.
        """
        columns = np.sort(deltas[:, :-1].T, axis=1)
        stride = max(1, len(deltas) // SHAPE_SAMPLES)
        levels = _greedy_levels(deltas[::stride, :-1], deviations[::stride], costs)
        path = cls(columns, levels, np.zeros((len(levels), len(costs))))
        counted = np.asfortranarray(
            deltas[:: max(1, len(deltas) // SHARE_SAMPLES)]
        )  # is read one exit at a time
        return cls(
            columns,
            levels,
            np.array([exit_shares(counted, path.thresholds(corner)) for corner in range(len(levels))]),
        )

    @property
    def end(self) -> float:
        return float(len(self.levels) - 1)

    def thresholds(self, position: float) -> tuple[float, ...]:
        """One threshold per exit. Positions beyond the path are its ends."""
        quantiles = self._between(self.levels, position)
        return (*(self._threshold(index, quantile) for index, quantile in enumerate(quantiles)), ALWAYS)

    def shares(self, position: float) -> np.ndarray:
        """(exits,) The expected share of the steps that each exit takes."""
        return self._between(self.corner_shares, position)

    def position_within(self, costs: np.ndarray, mean: float) -> float:
        """The deepest position whose expected cost is within `mean`; `end` if none is. costs (exits,)."""
        return float(np.interp(-mean, -(self.corner_shares @ costs), np.arange(len(self.levels))))

    def _between(self, corners: np.ndarray, position: float) -> np.ndarray:
        position = min(max(position, 0.0), self.end)
        before = int(position)
        after = min(before + 1, len(corners) - 1)
        return corners[before] + (position - before) * (corners[after] - corners[before])

    def _threshold(self, index: int, quantile: float) -> float:
        """The delta that a share `quantile` of exit `index`'s samples does not exceed (with ties, more)."""
        column = self._columns[index]
        count = math.ceil(quantile * len(column) - 1e-9)
        if count == 0:
            return NEVER
        return ALWAYS if count >= len(column) else float(column[count - 1])


def exits_taken(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """(N,) The index of the exit that each sample (N, exits) takes; the last if no earlier exit stops it."""
    stops = deltas <= np.asarray(thresholds, dtype=deltas.dtype)
    stops[:, -1] = True
    return stops.argmax(1)


def exit_shares(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """(exits,) The share of the samples (N, exits) that each exit takes."""
    left, counts = np.ones(len(deltas), dtype=bool), [len(deltas)]
    for index, threshold in enumerate(thresholds[:-1]):
        left &= ~(deltas[:, index] <= threshold)
        counts.append(int(np.count_nonzero(left)))
    return -np.diff([*counts, 0]) / len(deltas)


def _greedy_levels(deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """(corners, exits - 1) Quantiles, from 0 for all exits to 1 for the first exit."""
    samples, exits = deltas.shape
    bounds = -(-np.arange(1, LEVELS) * samples // LEVELS)
    order = np.argsort(deltas, axis=0, kind="stable")
    # groups[exit][level]: the samples that stop at the exit when its threshold rises above that level
    groups = [np.split(order[:, exit], bounds) for exit in range(exits)]
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
        if np.isfinite(price).any():  # else no sample would stop earlier at any exit: all thresholds rise
            rising = [price.argmin()]
        for exit in rising:
            group = groups[exit][levels[exit]]
            taken[group] = np.minimum(taken[group], exit)
            levels[exit] += 1
        path.append(levels.copy())
    return np.array(path) / LEVELS
