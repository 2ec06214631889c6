"""Is the budget kept? The exit rule that a budget allows, under an id, and what steps under it really cost."""

from __future__ import annotations

import decimal
import math
from dataclasses import dataclass

from deer_vla_ros.budget.cost import CostTable, cost_table, layer_gib
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.config import ModelConfig


@dataclass(frozen=True)
class Budget:
    """What the user asks for.

    peak_gmac: GMAC per step of the language part that no step passes; 0 is no limit.
    """

    peak_gmac: float = 0.0


@dataclass(frozen=True)
class BudgetStatus:
    """Requested against achieved, at one instruction length. GMAC are of the language part, per step."""

    budget_id: int
    tokens: int
    rule: ExitRule
    requested_peak_gmac: float
    feasible_min_gmac: float
    feasible_max_gmac: float
    achieved_mean_gmac: float
    achieved_steps: int
    resident_layers: int
    resident_gib: float

    @property
    def is_clamped(self) -> bool:
        """Whether this instruction's first exit alone costs more than the peak asked for."""
        return 0 < self.requested_peak_gmac < self.feasible_min_gmac


@dataclass(frozen=True)
class StepCost:
    """GMAC of one step: its language part, the language part at full depth, and everything."""

    language_gmac: float
    language_gmac_full: float
    total_gmac: float


class BudgetKeeper:
    """Turns the budget into an exit rule for the current instruction, and keeps the account of it.

    Cost depends on the instruction's token count, so the rule is made anew for each instruction. A new rule gets a new id.
    """

    def __init__(self, model: ModelConfig, delta: str, thresholds: tuple[float, ...], bytes_per_weight: int):
        self._model = model
        self._delta = delta
        self._thresholds = thresholds
        self._resident_gib = sum(layer_gib(model, i, bytes_per_weight) for i in range(model.decoder.layers))
        self._budget = Budget()
        self._table = cost_table(model, model.max_tokens)
        self._id = 0
        self._begin(self._rule(self._budget, self._table))

    @property
    def rule(self) -> ExitRule:
        """The exit rule in force."""
        return self._current

    @property
    def budget_id(self) -> int:
        return self._id

    def check(self, budget: Budget) -> None:
        """Raises UserError where `budget` cannot be kept at the current instruction length; changes nothing."""
        low, high = self._feasible()
        if not (budget.peak_gmac == 0 or (math.isfinite(budget.peak_gmac) and budget.peak_gmac >= low)):
            named = _rounded_up(low)
            raise UserError(
                f"budget.peak_gmac is {budget.peak_gmac:g}, which is not at least the {named} GMAC of the first exit at {self._table.tokens} tokens: "
                f"ask for {named} to {high:.4g}, or 0 for no limit"
            )

    def set(self, budget: Budget) -> None:
        """Asks for another budget. A peak that the first exit exceeds allows just that exit; `check` refuses it beforehand."""
        self._budget = budget
        self._begin(self._rule(budget, self._table))

    def set_tokens(self, tokens: int) -> None:
        """A new instruction of `tokens` tokens; a peak that its first exit exceeds allows just that exit, and the status shows it."""
        if tokens != self._table.tokens:
            self._table = cost_table(self._model, tokens)
            self._begin(self._rule(self._budget, self._table))

    def book(self, step: PolicyStep) -> StepCost:
        """Enters one step into the account."""
        cost = StepCost(
            language_gmac=self._table.language(step.layers_run),
            language_gmac_full=self._table.language(self._model.decoder.layers),
            total_gmac=self._table.total(step.layers_run, step.head_probes),
        )
        self._spent += cost.language_gmac
        self._steps += 1
        return cost

    def status(self) -> BudgetStatus:
        low, high = self._feasible()
        return BudgetStatus(
            budget_id=self._id,
            tokens=self._table.tokens,
            rule=self._current,
            requested_peak_gmac=self._budget.peak_gmac,
            feasible_min_gmac=low,
            feasible_max_gmac=high,
            achieved_mean_gmac=self._spent / self._steps if self._steps else float("nan"),
            achieved_steps=self._steps,
            resident_layers=self._model.decoder.layers,
            resident_gib=self._resident_gib,
        )

    def _feasible(self) -> tuple[float, float]:
        """GMAC of the cheapest and of the dearest step."""
        return self._table.language(self._model.exits[0] + 1), self._table.language(self._model.decoder.layers)

    def _rule(self, budget: Budget, table: CostTable) -> ExitRule:
        """Thresholds of the exits that the peak allows, at least the first."""
        exits = self._model.exits
        if budget.peak_gmac > 0:
            exits = tuple(layer for layer in exits if table.language(layer + 1) <= budget.peak_gmac) or exits[:1]
        return ExitRule(exits, self._thresholds[: len(exits)], self._delta)

    def _begin(self, rule: ExitRule) -> None:
        self._current = rule
        self._id += 1
        self._spent, self._steps = 0.0, 0


def _rounded_up(gmac: float) -> str:
    """Four digits that are enough: a budget of just what a message names must not be refused again."""
    return f"{decimal.Context(prec=4, rounding=decimal.ROUND_CEILING).create_decimal(gmac):g}"
