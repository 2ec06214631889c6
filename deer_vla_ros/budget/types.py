"""Frozen data types of budgets: what is asked for, what a step costs, and what was achieved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deer_vla_ros.errors import UserError

if TYPE_CHECKING:  # a user of `Budget` alone must not load torch
    from deer_vla_ros.inference.exit_rule import ExitRule

AVERAGES = ("average_gmac", "average_fraction", "average_ms")
"""Budgets of the mean step. They decide the thresholds."""
PEAKS = ("peak_gmac", "memory_gib", "deadline_ms")
"""Budgets of every step. They decide the deepest exit."""
UNITS = {
    "average_gmac": "GMAC",
    "average_fraction": "of full depth",
    "average_ms": "ms",
    "peak_gmac": "GMAC",
    "memory_gib": "GiB",
    "deadline_ms": "ms",
}


def amounts_of(texts: Iterable[str], names: Sequence[str], where: str) -> dict[str, float]:
    """Amounts by name from NAME=VALUE arguments.

    Raises UserError, beginning with `where`, for a name not in `names` or a value that is no positive number.
    """
    amounts: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            amounts[name] = float(value)
        except ValueError:
            amounts[name] = math.nan
        if name not in names or not (math.isfinite(amounts[name]) and amounts[name] > 0):
            raise UserError(
                f"{where} is {text!r}: give NAME=VALUE with a positive number, "
                f"and as NAME one of {', '.join(names)}"
            )
    return amounts


@dataclass(frozen=True)
class Budget:
    """What the user asks for. 0 means no limit. All given limits hold together.

    average_gmac, average_fraction, average_ms: mean cost of the language part [GMAC], of the language part as
    a share of full depth, and of the whole step [ms]. peak_gmac, deadline_ms: no step goes to an exit that
    costs more [GMAC], or that is predicted to take longer [ms]. memory_gib: only the layers that fit stay on
    the device [GiB]. governor: whether feedback keeps the achieved means at the requested ones.
    """

    average_gmac: float = 0.0
    average_fraction: float = 0.0
    peak_gmac: float = 0.0
    memory_gib: float = 0.0
    average_ms: float = 0.0
    deadline_ms: float = 0.0
    governor: bool = True

    def check(self) -> None:
        """Raises UserError if a value is no amount. `BudgetKeeper.check` checks whether it is feasible."""
        for name, value in self.active((*AVERAGES, *PEAKS)).items():
            if not (math.isfinite(value) and value > 0):
                raise UserError(
                    f"budget.{name} is {value:g}: give a positive number of {UNITS[name]}, or 0 for no limit"
                )

    def active(self, names: tuple[str, ...]) -> dict[str, float]:
        """Those of `names` that set a limit, with their values."""
        return {name: value for name in names if (value := getattr(self, name)) != 0}


@dataclass(frozen=True)
class StepCost:
    """The cost of one step in GMAC: the language part, the same at full depth, and the whole step."""

    language_gmac: float
    language_gmac_full: float
    total_gmac: float

    @property
    def fraction(self) -> float:
        """The language part as a share of full depth."""
        return self.language_gmac / self.language_gmac_full


@dataclass(frozen=True)
class Achieved:
    """Means over the steps since the budget was asked for, and over the newest of them.

    gmac, fraction: of the language part. ms: of the whole step. All are NaN before the first step.
    recent_miss_rate: share of the newest steps that missed the deadline.
    """

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
    """The requested budget and what was achieved, at one instruction length.

    tokens: of the instruction. rule: of the next step, with the governor's correction. feasible: by budget,
    the cost of the first exit and of full depth; budgets in ms are missing until a latency is measured.
    expected_gmac, expected_ms: mean cost on the calibration's deltas; NaN if unknown. binding: the average
    budget that decides the thresholds; empty for none. clamped: budgets below the cost of the first exit.
    correction: the factor by which the governor changes the binding budget. notes: texts for users about
    unusual thresholds. resident_gib: weights of the layers on the device. device_gib: all memory that this
    process holds on that device; NaN if unknown.
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
    device_gib: float = float("nan")
