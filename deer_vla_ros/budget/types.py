"""What may a step cost, what did it cost, and what came of it? Plain frozen data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deer_vla_ros.errors import UserError

if TYPE_CHECKING:  # whoever only asks for budgets has no use for torch
    from deer_vla_ros.inference.exit_rule import ExitRule

AVERAGES = ("average_gmac", "average_fraction", "average_ms")
"""Budgets of the mean step: they set the thresholds."""
PEAKS = ("peak_gmac", "memory_gib", "deadline_ms")
"""Budgets of every step: they set the deepest exit."""
UNITS = {
    "average_gmac": "GMAC",
    "average_fraction": "of full depth",
    "average_ms": "ms",
    "peak_gmac": "GMAC",
    "memory_gib": "GiB",
    "deadline_ms": "ms",
}


def amounts_of(texts: Iterable[str], names: Sequence[str], where: str) -> dict[str, float]:
    """Amounts by name of NAME=VALUE arguments; UserError, `where` first, for a name not among `names` or no positive number."""
    amounts: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            amounts[name] = float(value)
        except ValueError:
            amounts[name] = math.nan
        if name not in names or not (math.isfinite(amounts[name]) and amounts[name] > 0):
            raise UserError(
                f"{where} is {text!r}: give NAME=VALUE with a positive number, and as NAME one of {', '.join(names)}"
            )
    return amounts


@dataclass(frozen=True)
class Budget:
    """What the user asks for; 0 is no limit. Several hold together: the tightest wins.

    average_gmac, average_fraction, average_ms: mean of the language part [GMAC], of its share of full depth, of the whole step [ms].
    peak_gmac, deadline_ms: no step goes to an exit that costs more [GMAC], or that is predicted to take longer [ms].
    memory_gib: layers that fit into it stay on the device [GiB]. governor: steer achieved means onto the requested ones.
    """

    average_gmac: float = 0.0
    average_fraction: float = 0.0
    peak_gmac: float = 0.0
    memory_gib: float = 0.0
    average_ms: float = 0.0
    deadline_ms: float = 0.0
    governor: bool = True

    def check(self) -> None:
        """Raises UserError where a value is no amount; what is feasible only a keeper knows."""
        for name, value in self.active((*AVERAGES, *PEAKS)).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"budget.{name} is {value:g}: give a positive number of {UNITS[name]}, or 0 for no limit"
                )

    def active(self, names: tuple[str, ...]) -> dict[str, float]:
        """Those of `names` that limit anything."""
        return {name: value for name in names if (value := getattr(self, name)) != 0}


@dataclass(frozen=True)
class StepCost:
    """GMAC of one step: its language part, the language part at full depth, and everything."""

    language_gmac: float
    language_gmac_full: float
    total_gmac: float

    @property
    def fraction(self) -> float:
        return self.language_gmac / self.language_gmac_full


@dataclass(frozen=True)
class Achieved:
    """Means over the steps since the budget was asked for, and over the newest of them; NaN before the first step."""

    steps: int
    gmac: float
    fraction: float
    ms: float
    recent_gmac: float
    recent_ms: float
    deadline_misses: int
    recent_miss_rate: float


@dataclass(frozen=True)
class BudgetStatus:
    """Requested against achieved, at one instruction length.

    rule: in force, with the governor's correction. feasible: by budget, the price of the first exit and of full depth; a budget
    whose prices are not known here is missing. expected_gmac, expected_ms: mean on the calibration's deltas, NaN where unknown.
    binding: the average that decided the thresholds, empty for none. clamped: budgets below the first exit's price at this length.
    correction: what the governor multiplies the binding budget by. notes: what is odd about the thresholds, for people.
    """

    budget_id: int
    tokens: int
    rule: ExitRule
    requested: Budget
    feasible: dict[str, tuple[float, float]]
    expected_gmac: float
    expected_ms: float
    achieved: Achieved
    binding: str
    clamped: tuple[str, ...]
    correction: float
    notes: tuple[str, ...]
    resident_layers: int
    resident_gib: float
