"""The governor: integral feedback that keeps the mean cost at the budget if steps cost more or less than
calibrated.

It sums up what each step spends beyond the budget, in units of the budget. The sum moves the budget for which
thresholds are solved. What any window of steps spends beyond the budget is the difference of two such sums;
the sums are bounded, so each window stays near the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

AUTHORITY = 4.0
"""The sum at which thresholds are solved for the first exit's cost; at its negative, for that of full depth.

A window of 200 steps is then within 2 * AUTHORITY / 200 = 4% of its budget, unless MEMORY bounds the sum.
"""
MEMORY = 6.0
"""The bound of the sum (anti-windup): it may be -MEMORY at least, and `Governor.most` at most."""


@dataclass
class Governor:
    """The governor of one average budget.

    target: the budget. low, high: cost of the cheapest and of the most expensive step, in the target's unit.
    overspent: the sum. A new request or activation resets it; instructions, episodes and holds do not.
    """

    target: float
    low: float
    high: float
    overspent: float = 0.0

    @property
    def most(self) -> float:
        """The upper bound of the sum. One step of full depth that begins below AUTHORITY never passes it, so
        nothing that thresholds can still repay is forgotten."""
        return max(MEMORY, AUTHORITY + self.high / self.target - 1.0)

    def note(self, cost: float) -> None:
        """Adds the cost of one step."""
        self.overspent = min(max(self.overspent + cost / self.target - 1.0, -MEMORY), self.most)

    def effective(self, overspent: float) -> float:
        """The budget to solve thresholds for at this sum, between low and high; the target at a sum of 0.

        With several budgets, all use the largest sum: a budget far from its limit must not hold back the one
        that decides.
        """
        share = min(max(overspent / AUTHORITY, -1.0), 1.0)
        return self.target - share * (self.target - self.low if share > 0 else self.high - self.target)
