"""In which order do thresholds rise as the budget falls? One nested path of thresholds, from full depth to the first exit.

Along the path every threshold only rises, so on the same deltas a cheaper point never goes deeper: cost is monotone, and a looser
budget never exits earlier. The order is greedy: at each point that exit's threshold rises which adds the least deviation from the
full-depth action per cost saved, measured on calibration samples. Thresholds are quantiles of the calibrated deltas, which gives
exits of different scale the same measure.
"""

from __future__ import annotations

import numpy as np

from deer_vla_ros.budget.families import ALWAYS, NEVER, exit_shares

LEVELS = 12
"""Quantiles that a threshold may take while the order is found; between them the path is continuous. More find noise."""
SHAPE_SAMPLES = 3000
"""Samples that the order is found on; costs are always those of all samples."""
BISECTIONS = 16

Limit = tuple[np.ndarray, float]
"""A cost per exit (exits,), rising with depth, and what its mean may be."""


class ThresholdPath:
    """The path of one calibration. A position on it goes from 0, full depth, to `end`, where every step takes the first exit."""

    def __init__(self, deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray):
        """deltas, deviations (N, exits): of each exit, from the exit before and from full depth; costs (exits,), rising.

        The last exit is the deepest allowed, which is taken wherever no exit before it stops.
        """
        self._deltas = deltas
        self._sorted = np.sort(deltas[:, :-1].T, axis=1)
        stride = max(1, len(deltas) // SHAPE_SAMPLES)
        self._levels, self._corner_shares = _greedy(deltas[::stride, :-1], deviations[::stride], costs)

    @property
    def end(self) -> float:
        return float(len(self._levels) - 1)

    def thresholds(self, position: float) -> tuple[float, ...]:
        """One per exit; positions beyond the path are its ends."""
        position = min(max(position, 0.0), self.end)
        before = int(position)
        after = min(before + 1, len(self._levels) - 1)
        quantiles = self._levels[before] + (position - before) * (self._levels[after] - self._levels[before])
        return (*(self._threshold(index, quantile) for index, quantile in enumerate(quantiles)), ALWAYS)

    def shares(self, position: float) -> np.ndarray:
        """(exits,) share of the samples that each exit takes."""
        return exit_shares(self._deltas, self.thresholds(position))

    def position_within(self, limits: list[Limit]) -> float:
        """The deepest position whose expected cost keeps every limit; `end` where even that does not.

        Cost falls along the path, so bisection finds it.
        """

        def keeps(position: float) -> bool:
            shares = self.shares(position)
            return all(shares @ costs <= limit for costs, limit in limits)

        if keeps(0.0):
            return 0.0
        low, high = 0.0, self.end
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if keeps(middle) else (middle, high)
        return high

    def position_near(self, costs: np.ndarray, mean: float) -> float:
        """About the position of that expected cost, at once: between the corners of the path cost is taken to be linear."""
        return float(np.interp(-mean, -(self._corner_shares @ costs), np.arange(len(self._levels))))

    def _threshold(self, index: int, quantile: float) -> float:
        """The delta that `quantile` of exit number `index`'s samples are not above."""
        column = self._sorted[index]
        count = int(quantile * len(column) + 1e-9)
        if count == 0:
            return NEVER
        return ALWAYS if count >= len(column) else float(column[count - 1])


def _greedy(deltas: np.ndarray, deviations: np.ndarray, costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners of the path: quantiles (corners, exits - 1), from zeros to one for the first exit; shares (corners, exits)."""
    samples, exits = deltas.shape
    ranks = np.argsort(np.argsort(deltas, axis=0, kind="stable"), axis=0, kind="stable")
    bins = ranks * LEVELS // samples  # a sample stops at an exit whose level is above its bin
    levels, taken = np.zeros(exits, dtype=np.int64), np.full(samples, exits)
    path, shares = [levels.copy()], [np.bincount(taken, minlength=exits + 1)]
    while exits and levels[0] < LEVELS:
        saved = costs[taken][:, None] - costs[:-1]
        added = deviations[:, :-1] - np.take_along_axis(deviations, taken[:, None], axis=1)
        moving = (bins == levels) & (taken[:, None] > np.arange(exits))
        gain, loss = (moving * saved).sum(0), (moving * added).sum(0)
        useful = (gain > 0) & (levels < LEVELS)
        if useful.any():
            levels[np.where(useful, loss / np.where(useful, gain, 1.0), np.inf).argmin()] += 1
        else:  # the level of each exit holds nobody who would go on: the next ones might
            levels = np.minimum(levels + 1, LEVELS)
        stops = bins < levels
        taken = np.where(stops.any(1), stops.argmax(1), exits)
        path.append(levels.copy())
        shares.append(np.bincount(taken, minlength=exits + 1))
    return np.array(path) / LEVELS, np.array(shares) / samples
