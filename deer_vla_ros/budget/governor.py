"""How is the achieved mean kept on the requested one, when the world differs from the calibration?

By integral feedback. Every step's overspending, relative to the budget, is summed up; the sum moves the budget that thresholds are
solved for, and with it the calibrated quantiles they stand at. The sum of overspending is what the mean over any window is made of:
bounded, it keeps every window near the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

GAIN = 0.1
"""Share of the budget by which one step's whole budget too much lowers the next ones: forgotten in about ten steps."""


@dataclass
class Governor:
    """One budget's governor: give it every step's cost, ask it what to solve for.

    target: the budget. low, high: cost of the cheapest and of the dearest step, in the target's unit; what is solved for stays
    between them, and the sum never grows where that could not be (anti-windup). It begins with a new request, a new activation and
    whenever it is switched off and on; it lasts over instructions, episodes and holds.
    """

    target: float
    low: float
    high: float
    _overspent: float = 0.0

    @property
    def factor(self) -> float:
        """What the budget is multiplied by: 1 while all is as calibrated."""
        return 1.0 - GAIN * self._overspent

    @property
    def effective(self) -> float:
        """The budget to solve thresholds for."""
        return min(max(self.target * self.factor, self.low), self.high)

    def note(self, cost: float, binds: bool = True) -> None:
        """One step's cost. binds: whether this budget decided the thresholds; of one that does not, saving is not remembered."""
        change = cost / self.target - 1.0
        if not binds and change < 0:
            change = max(change, -self._overspent) if self._overspent > 0 else 0.0
        lowest, highest = (1.0 - self.high / self.target) / GAIN, (1.0 - self.low / self.target) / GAIN
        self._overspent = min(max(self._overspent + change, min(lowest, 0.0)), max(highest, 0.0))
