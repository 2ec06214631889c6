"""The account of what the steps under a budget really cost."""

from __future__ import annotations

from collections import deque

import numpy as np

from deer_vla_ros.budget.types import Achieved

RECENT = 200
"""Number of steps that the recent means and the recent rate of misses cover."""


class BudgetAccount:
    """Means over all steps, and over the newest RECENT steps. Its size does not grow with the steps."""

    def __init__(self) -> None:
        self._spent, self._steps, self._misses = np.zeros(3), 0, 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._recent_misses: deque[bool] = deque(maxlen=RECENT)

    @property
    def steps(self) -> int:
        return self._steps

    def enter(self, gmac: float, fraction: float, ms: float, missed: bool) -> None:
        """Enters one step.

        gmac, fraction: its language part, in GMAC and as a share of full depth. ms: time of the whole step.
        missed: whether it missed the deadline.
        """
        self._steps += 1
        self._spent += (gmac, fraction, ms)
        self._recent.append((gmac, ms))
        self._misses += missed
        self._recent_misses.append(missed)

    def achieved(self) -> Achieved:
        steps, nan = self._steps, float("nan")
        gmac, fraction, ms = self._spent / steps if steps else (nan, nan, nan)
        recent = np.mean(self._recent, axis=0) if steps else (nan, nan)
        return Achieved(
            steps=steps,
            gmac=float(gmac),
            fraction=float(fraction),
            ms=float(ms),
            recent_gmac=float(recent[0]),
            recent_ms=float(recent[1]),
            deadline_misses=self._misses,
            recent_miss_rate=sum(self._recent_misses) / RECENT,
        )
