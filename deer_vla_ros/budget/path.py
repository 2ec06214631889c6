"""The threshold path: the order in which the exits' thresholds rise as the budget falls.

A delta is the difference between the actions of an exit and of the exit before it; for the first exit, of the
layer before it. A step stops at the first
exit whose delta is at most its threshold, and at the last exit otherwise. At the beginning of the path every
step goes to the last exit; at its end every step stops at the first one.

Along the path each threshold only rises. So on the same deltas no step goes deeper at a later position: the
cost falls along the path, and a larger budget never makes a step stop earlier. The order is greedy: the next
threshold to rise is the one that adds the least deviation from the full-depth pose per saved cost, measured
on calibration samples (a sample is one recorded step). Thresholds are quantiles of the calibration samples'
deltas, so that exits with different scales are comparable.
"""

from __future__ import annotations

import math

import numpy as np

ALWAYS, NEVER = 1e8, -1e8
"""ALWAYS is a threshold that no delta exceeds: every step stops. NEVER is below every delta: no step stops.
"""
LEVELS = 12
"""At the corners of the path the quantile of each threshold is a whole number of 1 / LEVELS. More levels
would fit noise."""
SHAPE_SAMPLES, SHARE_SAMPLES = 3000, 20_000
"""At least this many samples (all, if there are fewer), and less than twice as many, are used to find the
order, and to count the shares."""


class ThresholdPath:
    """A path of thresholds. Positions go from 0 (full depth) to `end` (every step stops at the first exit).

    A corner is a position that is a whole number. Between two corners, the thresholds' quantiles and the
    exits' shares are interpolated.
    """

    def __init__(self, columns: np.ndarray, levels: np.ndarray, shares: np.ndarray):
        """columns (exits - 1, N): the samples' deltas at each exit but the last, sorted. levels (corners,
        exits - 1): quantiles from 0 to 1, rising along the path. shares (corners, exits): measured shares of
        the steps that stop at each exit. The share of the steps that go deeper than an exit is limited to its
        value at the corner before. So the expected cost never rises along the path, even if the measured
        shares are noisy.
        """
        self._columns, self.levels = columns, levels
        deeper = 1.0 - np.cumsum(shares, axis=1)  # share of the steps that go deeper than each exit
        deeper = np.minimum.accumulate(np.clip(deeper, 0.0, 1.0), axis=0)
        self.corner_shares = -np.diff(deeper, axis=1, prepend=1.0)

    @classmethod
    def ordered(cls, deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> ThresholdPath:
        """Finds the path for N samples.

        deltas (N, exits): finite. deviations (N, exits): how far each exit's pose is from the full-depth pose
        [normalised action]. costs (exits,): of a step that stops at each exit, in any unit, strictly
        ascending.

        The shares are counted on single samples. In closed loop the exit of a step changes the deltas of the
        next one. Calibration therefore measures the shares in closed loop at the thresholds of each corner,
        and makes a second path with the same levels and those shares.
        """
        columns = np.sort(deltas[:, :-1].T, axis=1)
        stride = max(1, len(deltas) // SHAPE_SAMPLES)
        levels = _greedy_levels(deltas[::stride, :-1], deviations[::stride], costs)
        path = cls(columns, levels, np.zeros((len(levels), len(costs))))
        # exit_shares reads the deltas of one exit after the other: this order in memory is faster.
        counted = np.asfortranarray(deltas[:: max(1, len(deltas) // SHARE_SAMPLES)])
        return cls(
            columns,
            levels,
            np.array([exit_shares(counted, path.thresholds(corner)) for corner in range(len(levels))]),
        )

    @property
    def end(self) -> float:
        """The last position, which is the number of corners minus 1."""
        return float(len(self.levels) - 1)

    def thresholds(self, position: float) -> tuple[float, ...]:
        """Returns one threshold for each exit. A position below 0 counts as 0, one above `end` as `end`."""
        quantiles = self._between(self.levels, position)
        return (*(self._threshold(index, quantile) for index, quantile in enumerate(quantiles)), ALWAYS)

    def shares(self, position: float) -> np.ndarray:
        """Returns the expected share (exits,) of the steps that stop at each exit."""
        return self._between(self.corner_shares, position)

    def position_within(self, costs: np.ndarray, mean: float) -> float:
        """Returns the position at which the expected cost of a step is `mean`: 0 if full depth costs less,
        `end` if every position costs more. costs (exits,): of the exits, in the unit of `mean`."""
        return float(np.interp(-mean, -(self.corner_shares @ costs), np.arange(len(self.levels))))

    def _between(self, corners: np.ndarray, position: float) -> np.ndarray:
        position = min(max(position, 0.0), self.end)
        before = int(position)
        after = min(before + 1, len(corners) - 1)
        return corners[before] + (position - before) * (corners[after] - corners[before])

    def _threshold(self, index: int, quantile: float) -> float:
        """Returns the smallest threshold that at least the share `quantile` of the samples do not exceed at
        this exit. Equal deltas can make the share larger. Quantile 0 gives NEVER, and 1 gives ALWAYS."""
        column = self._columns[index]
        count = math.ceil(quantile * len(column) - 1e-9)
        if count == 0:
            return NEVER
        return ALWAYS if count >= len(column) else float(column[count - 1])


def exits_taken(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """Returns the index (N,) of the exit at which each sample (N, exits) stops. The last threshold is not
    used."""
    stops = deltas <= np.asarray(thresholds, dtype=deltas.dtype)
    stops[:, -1] = True
    return stops.argmax(1)


def exit_shares(deltas: np.ndarray, thresholds: tuple[float, ...]) -> np.ndarray:
    """Returns the share (exits,) of the samples (N, exits) that stop at each exit. The last threshold is not
    used. N is at least 1."""
    going_on, counts = np.ones(len(deltas), dtype=bool), [len(deltas)]
    for index, threshold in enumerate(thresholds[:-1]):
        going_on &= ~(deltas[:, index] <= threshold)
        counts.append(int(np.count_nonzero(going_on)))
    return -np.diff([*counts, 0]) / len(deltas)


def _greedy_levels(deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Returns quantiles (corners, exits - 1). They begin with 0 for every exit and end with 1 for the first
    exit; the others may still be below 1 there. deltas (N, exits - 1): without those of the last exit."""
    samples, early_exits = deltas.shape
    bounds = -(-np.arange(1, LEVELS) * samples // LEVELS)
    order = np.argsort(deltas, axis=0, kind="stable")
    # groups[exit][level]: the samples that begin to stop at the exit when its level rises from `level` by 1.
    groups = [np.split(order[:, exit], bounds) for exit in range(early_exits)]
    levels, taken = np.zeros(early_exits, dtype=np.int64), np.full(samples, early_exits)
    path = [levels.copy()]
    while early_exits and levels[0] < LEVELS:
        price = np.full(early_exits, np.inf)
        rising = np.flatnonzero(levels < LEVELS)
        for exit in rising:
            stopping = groups[exit][levels[exit]]
            stopping = stopping[taken[stopping] > exit]
            if len(stopping):
                before = taken[stopping]
                added = deviations[stopping, exit] - deviations[stopping, before]
                price[exit] = added.sum() / (costs[before] - costs[exit]).sum()
        # If no rise makes a sample stop earlier, all thresholds that can still rise do so.
        if np.isfinite(price).any():
            rising = [price.argmin()]
        for exit in rising:
            group = groups[exit][levels[exit]]
            taken[group] = np.minimum(taken[group], exit)
            levels[exit] += 1
        path.append(levels.copy())
    return np.array(path) / LEVELS
