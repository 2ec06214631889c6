"""How is the achieved mean kept on the requested one, when the world differs from the calibration?

By integral feedback. Every step's overspending, in budgets, is summed up; the sum moves the budget that thresholds are solved for, and
with it the calibrated quantiles they stand at. What a window of steps spends beyond its budget is the difference of two such sums:
bounded, they keep every window near the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

AUTHORITY = 4.0
"""Budgets overspent at which only the first exit is asked for, and saved at which full depth is.

A window of 200 steps is then within 2 * AUTHORITY / 200 = 4% of its budget, but for what MEMORY forgets.
"""
MEMORY = 6.0
"""The most that is remembered, either way (anti-windup): what a world without remedy costs beyond it is forgotten."""


@dataclass
class Governor:
    """One budget's governor: give it every step's cost, ask it what to solve for.

    target: the budget. low, high: cost of the cheapest and of the dearest step, in the target's unit; what is solved for stays
    between them. overspent: the sum. It begins with a new request and a new activation; it lasts over instructions, episodes and holds.
    """

    target: float
    low: float
    high: float
    overspent: float = 0.0

    def note(self, cost: float) -> None:
        """One step's cost."""
        self.overspent = min(max(self.overspent + cost / self.target - 1.0, -MEMORY), MEMORY)

    def effective(self, overspent: float) -> float:
        """The budget to solve thresholds for, at a sum of overspending: the target while all is as calibrated.

        Of several budgets the largest sum is everybody's: one that is far from its limit must not hold back the one that decides.
        """
        share = min(max(overspent / AUTHORITY, -1.0), 1.0)
        return self.target - share * (self.target - self.low if share > 0 else self.high - self.target)
