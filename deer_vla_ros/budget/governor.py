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
    between them. It begins with a new request and a new activation; it lasts over instructions, episodes and holds.
    """

    target: float
    low: float
    high: float
    overspent: float = 0.0

    @property
    def effective(self) -> float:
        """The budget to solve thresholds for: the target while all is as calibrated."""
        share = min(max(self.overspent / AUTHORITY, -1.0), 1.0)
        return self.target - share * (self.target - self.low if share > 0 else self.high - self.target)

    def note(self, cost: float, binds: bool = True) -> None:
        """One step's cost. binds: whether this budget decided the thresholds; what one that does not saves is not remembered."""
        overspent = self.overspent + cost / self.target - 1.0
        if not binds:
            overspent = max(overspent, min(self.overspent, 0.0))
        self.overspent = min(max(overspent, -MEMORY), MEMORY)
