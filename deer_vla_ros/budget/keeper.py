"""The budget keeper: it turns a budget into an exit rule with an id, and keeps the account of real costs."""

from __future__ import annotations

import decimal
import functools
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deer_vla_ros.budget.account import BudgetAccount
from deer_vla_ros.budget.calibration import FEW_SAMPLES, REMEDY, Calibration
from deer_vla_ros.budget.cost import cost_table, cumulated_gib
from deer_vla_ros.budget.governor import Governor
from deer_vla_ros.budget.latency import LatencyModel
from deer_vla_ros.budget.path import NEVER, ThresholdPath, exit_shares
from deer_vla_ros.budget.types import AVERAGES, PEAKS, UNITS, Budget, BudgetStatus, StepCost
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint
from deer_vla_ros.model.config import ModelConfig

Result = TypeVar("Result")

SHORTEST = 4
"""Tokens of the shortest instruction. Budgets are checked against it before the first instruction."""
REFRESH = 25
"""Number of steps after which budgets in ms are solved again, with the latencies measured meanwhile."""
NOTABLE_MOVE = 0.02
"""Share of the path by which new latencies must move the position before the rule gets a new id."""
TIES = 0.02
"""Share of equal deltas at a threshold above which the cost changes in visible jumps."""


@dataclass(frozen=True)
class _Solution:
    """The meaning of the budget for one instruction length, with the present layers and latencies.

    count: number of exits that are allowed. costs: by average budget, the cost of each allowed exit (count,)
    in the unit of the budget. position: on the path of `count` exits; None: the checkpoint's own thresholds
    apply. clamped: budgets below the cost of the first exit.
    """

    count: int
    costs: dict[str, np.ndarray]
    position: float | None
    clamped: tuple[str, ...]


def _locked(method: Callable[..., Result]) -> Callable[..., Result]:
    """The method runs under the keeper's lock: one thread books steps while another asks for the status."""

    @functools.wraps(method)
    def locked(self: BudgetKeeper, *arguments, **named) -> Result:
        with self._lock:
            return method(self, *arguments, **named)

    return locked


class BudgetKeeper:
    """Turns the budget into an exit rule for the current instruction, and accounts for what steps cost.

    The cost depends on the number of tokens of the instruction, so each instruction gets its own rule. A new
    rule gets a new id; the governor's corrections between two steps do not. Any thread may call any method.
    """

    def __init__(
        self,
        model: ModelConfig,
        delta: str,
        thresholds: tuple[float, ...],
        bytes_per_weight: int,
        calibration: Calibration | None = None,
        no_calibration: str = f"the checkpoint has no calibration: {REMEDY}",
    ):
        """thresholds: apply if no average is asked for. calibration: needed for averages. no_calibration: the
        text for users if there is none."""
        self._lock = threading.RLock()
        self._model, self._delta, self._thresholds = model, delta, thresholds
        self._calibration, self._no_calibration = calibration, no_calibration
        try:
            if calibration is not None:
                calibration.check(model.exits, delta)
        except UserError as error:  # only a request for an average needs the calibration
            self._calibration, self._no_calibration = None, str(error)
        self._paths: dict[int, ThresholdPath] = {}
        self._gib = cumulated_gib(model, bytes_per_weight)
        self.latency = LatencyModel(cost_table(model, model.max_tokens // 2).layers)
        self._resident = model.decoder.layers
        self._budget = Budget()
        self._table = cost_table(model, min(SHORTEST, model.max_tokens))
        self._id = 0
        self.begin()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BudgetKeeper:
        """The keeper of a checkpoint, with the calibration of its folder.

        If the calibration is missing or unusable, only a request for an average raises the error.
        """
        info, folder, bytes_per_weight = checkpoint.info, checkpoint.folder, checkpoint.model.dtype.itemsize
        arguments = info.model, info.delta, info.thresholds, bytes_per_weight
        try:
            found = Calibration.load(folder) if folder else None
            if found is None:
                return cls(*arguments)
            found.check_weights(folder)
        except UserError as error:
            return cls(*arguments, no_calibration=str(error))
        return cls(*arguments, found)

    # --- requests

    @_locked
    def check(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError if one of `names` in `budget` cannot be kept at the current instruction length.

        names: the budgets that are asked for now. One that was asked for earlier may have become infeasible;
        it is clamped, and does not make this check fail.
        """
        prices, averages = self._prices(), budget.active(AVERAGES)
        for name in names:
            value = getattr(budget, name)
            if name not in UNITS or value == 0:
                continue
            if name in averages and self._calibration is None:
                raise UserError(f"budget.{name} is {value:g}, but {self._no_calibration}")
            if name not in prices:
                raise UserError(
                    f"budget.{name} is {value:g}, but no latency was measured here: use a budget in GMAC"
                )
            low, high = prices[name][0], prices[name][-1]
            if not (math.isfinite(value) and value >= low):
                least = _rounded_up(low)
                at = "" if name == "memory_gib" else f" at {self._table.tokens} tokens"
                raise UserError(
                    f"budget.{name} is {value:g}, which is not at least the {least} {UNITS[name]} "
                    f"of the first exit{at}: ask for {least} to {high:.4g}, or 0 for no limit"
                )

    @_locked
    def set(self, budget: Budget) -> None:
        """Asks for another budget. If the first exit exceeds it, only that exit is allowed (see `check`)."""
        self._budget = budget
        self.begin()

    @_locked
    def set_tokens(self, tokens: int) -> None:
        """Takes the number of tokens of a new instruction.

        A budget that the first exit exceeds is clamped to that exit; the status names it.
        """
        if tokens != self._table.tokens:
            self._table = cost_table(self._model, tokens)
            self._make_new_rule()

    @_locked
    def set_resident(self, layers: int) -> None:
        """Takes the number of layers that are on the device now. No exit beyond them is allowed."""
        if layers != self._resident:
            self._resident = layers
            self._make_new_rule()

    @_locked
    def begin(self) -> None:
        """Control begins: the account and the governors start anew."""
        self._account = BudgetAccount()
        self._governors: dict[str, Governor] = {}
        self._make_new_rule()

    # --- the rule and the account

    @property
    def rule(self) -> ExitRule:
        """The exit rule of the next step."""
        return self._rule

    @property
    def budget_id(self) -> int:
        """The id of the next step's rule."""
        return self._id

    @_locked
    def book(self, step: PolicyStep) -> StepCost:
        """Enters one step into the account. The rule of the next step may be another one."""
        cost = StepCost(
            language_gmac=self._table.language(step.layers_run),
            language_gmac_full=self._table.language(self._model.decoder.layers),
            total_gmac=self._table.total(step.layers_run, step.head_probes),
        )
        self.latency.observe(step)
        measured = {
            "average_gmac": cost.language_gmac,
            "average_fraction": cost.fraction,
            "average_ms": step.times.total,
        }
        missed = 0 < self._budget.deadline_ms < step.times.total
        self._account.enter(cost.language_gmac, cost.fraction, step.times.total, missed)
        for name, governor in self._governors.items():
            governor.note(measured[name])
        if self._account.steps % REFRESH == 0 and (self._budget.average_ms or self._budget.deadline_ms):
            self._refresh()
        self._rule, self._binding = self._corrected_rule()
        return cost

    @_locked
    def status(self) -> BudgetStatus:
        prices, shares = self._prices(), self._expected_shares()
        governor = self._governors.get(self._binding)
        return BudgetStatus(
            budget_id=self._id,
            tokens=self._table.tokens,
            rule=self._rule,
            requested=self._budget,
            feasible={name: (float(price[0]), float(price[-1])) for name, price in prices.items()},
            expected_gmac=_mean(shares, prices["average_gmac"]),
            expected_ms=_mean(shares, prices.get("average_ms")),
            achieved=self._account.achieved(),
            binding=self._binding,
            clamped=self._solution.clamped,
            correction=governor.effective(self._overspent()) / governor.target if governor else 1.0,
            notes=_notes(self._rule, self._calibration.deltas) if self._binding else (),
            resident_layers=self._resident,
            resident_gib=float(self._gib[self._resident - 1]),
        )

    # --- solving

    def _prices(self) -> dict[str, np.ndarray]:
        """By budget, the cost of each exit (exits,) in its unit. Budgets in ms need a measured latency."""
        exits, layers = self._model.exits, np.cumsum(self._table.layers)
        gmac = layers[list(exits)]
        prices = {
            "average_gmac": gmac,
            "average_fraction": gmac / layers[-1],
            "peak_gmac": gmac,
            "memory_gib": self._gib[list(exits)],
        }
        if self.latency.is_measured:
            depths = [(layer + 1, index + 2) for index, layer in enumerate(exits)]
            prices["average_ms"] = np.array([self.latency.expected(*depth) for depth in depths])
            prices["deadline_ms"] = np.array([self.latency.high(*depth) for depth in depths])
        return prices

    def _make_new_rule(self) -> None:
        """Solves the budget, and gives the resulting rule a new id."""
        self._solution = self._solve()
        self._begin_id()
        self._rule, self._binding = self._corrected_rule()

    def _refresh(self) -> None:
        """Solves the budget with the present latencies. A rule that is nearly the same keeps its id."""
        self._solution = now = self._solve()
        before = self._solution_of_id
        length = self._path(now.count).end if now.position is not None else 1.0
        moved = abs((now.position or 0.0) - (before.position or 0.0))
        if now.count != before.count or moved > NOTABLE_MOVE * length:
            self._begin_id()

    def _begin_id(self) -> None:
        self._id, self._solution_of_id = self._id + 1, self._solution

    def _solve(self) -> _Solution:
        """Solves the budget for this instruction length and these layers. Updates the governors' limits."""
        prices = self._prices()
        averages, peaks = (
            {name: limit for name, limit in self._budget.active(names).items() if name in prices}
            for names in (AVERAGES, PEAKS)
        )
        clamped = tuple(name for name, limit in {**averages, **peaks}.items() if limit < prices[name][0])
        allowed = [index for index, layer in enumerate(self._model.exits) if layer < self._resident]
        for name, limit in peaks.items():
            allowed = [index for index in allowed if prices[name][index] <= limit]
        count = max(len(allowed), 1)
        self._governors = {
            name: self._governor(name, limit, prices[name]) for name, limit in averages.items()
        }
        costs = {name: prices[name][:count] for name in averages}
        positions = [
            self._path(count).position_within(costs[name], governor.target)
            for name, governor in self._governors.items()
        ]
        return _Solution(count, costs, max(positions, default=None), clamped)

    def _governor(self, name: str, limit: float, prices: np.ndarray) -> Governor:
        """The governor of a budget, with these limits. Its sum is relative to the budget, so it stays valid
        for another instruction's prices."""
        low, high = float(prices[0]), float(prices[-1])
        governor = self._governors.get(name) or Governor(limit, low, high)
        governor.target, governor.low, governor.high = max(limit, low), low, high
        if limit < low:  # clamped: savings at other prices must not be spent beyond the budget
            governor.overspent = max(governor.overspent, 0.0)
        return governor

    def _corrected_rule(self) -> tuple[ExitRule, str]:
        """The exit rule of the solution, corrected by the governors, and the average budget that decides it.

        The second is empty if no average limits the rule.
        """
        solution = self._solution
        exits = self._model.exits[: solution.count]
        if solution.position is None:
            return ExitRule(exits, self._thresholds[: solution.count], self._delta), ""
        path, overspent = self._path(solution.count), self._overspent()
        positions = {
            name: path.position_within(solution.costs[name], governor.effective(overspent))
            for name, governor in self._governors.items()
        }
        binding = max(positions, key=lambda name: positions[name])
        position = positions[binding]
        return ExitRule(exits, path.thresholds(position), self._delta), "" if position == 0 else binding

    def _overspent(self) -> float:
        """The sum that the governors correct: that of the budget which is overspent most."""
        if not self._budget.governor:
            return 0.0
        return max(governor.overspent for governor in self._governors.values())

    def _path(self, count: int) -> ThresholdPath:
        """The path of the first `count` exits, made when it is first needed."""
        if count not in self._paths:
            self._paths[count] = self._calibration.path(count)
        return self._paths[count]

    def _expected_shares(self) -> np.ndarray | None:
        """(exits,) The share of the calibration's steps that each exit takes, without the correction."""
        if self._calibration is None:
            return None
        solution = self._solution
        if solution.position is not None:
            return self._path(solution.count).shares(solution.position)
        return exit_shares(self._calibration.deltas[:, : solution.count], self._thresholds[: solution.count])


def _notes(rule: ExitRule, deltas: np.ndarray) -> tuple[str, ...]:
    """Texts for users about thresholds that were solved on these calibrated deltas (N, exits): few samples,
    ties, and exits that never stop a step."""
    notes, samples = [], len(deltas)
    if samples < FEW_SAMPLES:
        notes.append(f"thresholds rest on {samples} samples only: {REMEDY} with more")
    for index, layer in enumerate(rule.exits[:-1]):
        threshold = rule.thresholds[index]
        ties = np.mean(deltas[:, index] == np.float32(threshold))
        if threshold == NEVER:
            notes.append(f"the exit at layer {layer} never stops a step under this budget")
        elif ties > TIES:
            notes.append(
                f"{ties:.0%} of the calibrated deltas at layer {layer} equal its threshold: "
                "cost comes in steps"
            )
    return tuple(notes)


def _mean(shares: np.ndarray | None, prices: np.ndarray | None) -> float:
    """Mean cost of a step; NaN if shares or prices are unknown."""
    return float("nan") if shares is None or prices is None else float(shares @ prices[: len(shares)])


def _rounded_up(value: float) -> str:
    """Four digits, rounded up, so that a budget copied from an error message is not refused again."""
    return f"{decimal.Context(prec=4, rounding=decimal.ROUND_CEILING).create_decimal(value):g}"
