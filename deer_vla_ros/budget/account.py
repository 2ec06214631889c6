"""What did the steps since the budget was asked for really cost?"""

from __future__ import annotations

from collections import deque

import numpy as np

from deer_vla_ros.budget.types import Achieved

RECENT = 200
"""Steps that the recent means cover, and that the rate of misses is a share of."""


class Account:
    """Means over all steps and over the newest; nothing grows with the number of steps."""

    def __init__(self) -> None:
        self._spent, self._steps, self._misses = np.zeros(3), 0, 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._recent_misses: deque[bool] = deque(maxlen=RECENT)

    @property
    def steps(self) -> int:
        return self._steps

    def enter(self, gmac: float, fraction: float, ms: float, missed: bool) -> None:
        """One step: its language part in GMAC and as a share of full depth, the whole of it in ms, and whether it was late."""
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
