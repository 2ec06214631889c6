"""Is the budget kept? The exit rule that a budget allows, under an id, and what steps under it really cost."""

from __future__ import annotations

import decimal
import functools
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deer_vla_ros.budget.account import Account
from deer_vla_ros.budget.calibration import FEW_SAMPLES, REMEDY, Calibration
from deer_vla_ros.budget.cost import cost_table, cumulated_gib
from deer_vla_ros.budget.families import NEVER, exit_shares
from deer_vla_ros.budget.governor import Governor
from deer_vla_ros.budget.latency import LatencyModel
from deer_vla_ros.budget.path import ThresholdPath
from deer_vla_ros.budget.types import AVERAGES, PEAKS, UNITS, Budget, BudgetStatus, StepCost
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint
from deer_vla_ros.model.config import ModelConfig

Result = TypeVar("Result")

SHORTEST = 4
"""Tokens of the shortest instruction: until there is one, a budget is feasible that could be."""
REFRESH = 25
"""Steps after which budgets in ms are solved anew from the latencies measured meanwhile."""
WORTH_TELLING = 0.02
"""Share of the path that thresholds must have moved by to be a new rule, when only latencies changed."""
TIES = 0.02
"""Share of equal deltas at a threshold above which cost comes in steps."""


@dataclass(frozen=True)
class _Solution:
    """What the budget means at one instruction length.

    count: exits allowed. position: on the path of so many exits; None: the checkpoint's own thresholds.
    """

    count: int
    position: float | None
    clamped: tuple[str, ...]


def _locked(method: Callable[..., Result]) -> Callable[..., Result]:
    """Of a keeper: one thread at a time. Steps are booked in one thread while another asks for the status."""

    @functools.wraps(method)
    def locked(self: BudgetKeeper, *arguments, **named) -> Result:
        with self._lock:
            return method(self, *arguments, **named)

    return locked


class BudgetKeeper:
    """Turns the budget into an exit rule for the current instruction, and keeps the account of it.

    Cost depends on the instruction's token count, so the rule is made anew for each instruction. A new rule gets a new id; the
    governor's corrections between two steps do not. May be asked from any thread.
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
        """thresholds: those that hold while no average is asked for. calibration: needed for averages; no_calibration: why it lacks."""
        self._lock = threading.RLock()
        self._model, self._delta, self._thresholds = model, delta, thresholds
        self._calibration, self._no_calibration = calibration, no_calibration
        try:
            if calibration is not None:
                calibration.check(model.exits, delta)
        except UserError as error:  # only who asks for an average needs to hear it
            self._calibration, self._no_calibration = None, str(error)
        self._paths: dict[int, ThresholdPath] = {}
        self._gib = cumulated_gib(model, bytes_per_weight)
        self.latency = LatencyModel(cost_table(model, model.max_tokens // 2).layers)
        self._resident = model.decoder.layers
        self._budget = Budget()
        self._table = cost_table(model, min(SHORTEST, model.max_tokens))
        self._id = 0
        self._begin_account()
        self._solve()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BudgetKeeper:
        """Of a checkpoint with the calibration of its folder; why there is none is told only to who asks for an average."""
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

    # --- asking

    @_locked
    def check(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError where one of `names` in `budget` cannot be kept at the current instruction length; changes nothing.

        names: what is asked for now. What was asked for before may have become infeasible; it is clamped, and refuses nothing else.
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
                named, at = (
                    _rounded_up(low),
                    "" if name == "memory_gib" else f" at {self._table.tokens} tokens",
                )
                raise UserError(
                    f"budget.{name} is {value:g}, which is not at least the {named} {UNITS[name]} of the first exit{at}: "
                    f"ask for {named} to {high:.4g}, or 0 for no limit"
                )

    @_locked
    def set(self, budget: Budget) -> None:
        """Asks for another budget. One that the first exit exceeds allows just that exit; `check` refuses it beforehand."""
        self._budget = budget
        self._begin_account()
        self._solve()

    @_locked
    def set_tokens(self, tokens: int) -> None:
        """A new instruction of `tokens` tokens; a budget that its first exit exceeds is clamped to it, and the status shows it."""
        if tokens != self._table.tokens:
            self._table = cost_table(self._model, tokens)
            self._solve()

    @_locked
    def set_resident(self, layers: int) -> None:
        """How many layers are on the device now: no exit beyond them is taken."""
        if layers != self._resident:
            self._resident = layers
            self._solve()

    @_locked
    def begin(self) -> None:
        """Control begins anew: the account and the governor forget."""
        self._begin_account()
        self._solve()

    # --- what holds

    @property
    def rule(self) -> ExitRule:
        """The exit rule of the next step."""
        return self._current

    @property
    def budget_id(self) -> int:
        return self._id

    @_locked
    def book(self, step: PolicyStep) -> StepCost:
        """Enters one step into the account; the next step's rule may be another."""
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
        self._current = self._rule()
        return cost

    @_locked
    def status(self) -> BudgetStatus:
        prices, shares = self._prices(), self._expected_shares()
        governor = self._governors.get(self._binding)
        return BudgetStatus(
            budget_id=self._id,
            tokens=self._table.tokens,
            rule=self._current,
            requested=self._budget,
            feasible={name: (float(price[0]), float(price[-1])) for name, price in prices.items()},
            expected_gmac=_mean(shares, prices["average_gmac"]),
            expected_ms=_mean(shares, prices.get("average_ms")),
            achieved=self._account.achieved(),
            binding=self._binding,
            clamped=self._solution.clamped,
            correction=governor.effective(self._overspent()) / governor.target if governor else 1.0,
            notes=self._notes(),
            resident_layers=self._resident,
            resident_gib=float(self._gib[self._resident - 1]),
        )

    # --- solving

    def _prices(self) -> dict[str, np.ndarray]:
        """By budget, what each exit costs in that budget's unit (exits,)."""
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

    def _solve(self, silently: bool = False) -> None:
        """The rule for what is asked for, at this instruction length and with the layers that are here; under a new id."""
        prices, averages, peaks = self._prices(), self._budget.active(AVERAGES), self._budget.active(PEAKS)
        averages = {name: limit for name, limit in averages.items() if name in prices}
        clamped = tuple(
            name
            for name, limit in {**averages, **peaks}.items()
            if name in prices and limit < prices[name][0]
        )
        allowed = [index for index, layer in enumerate(self._model.exits) if layer < self._resident]
        for name, limit in peaks.items():
            if name in prices:
                allowed = [index for index in allowed if prices[name][index] <= limit]
        count = max(len(allowed), 1)
        self._priced = {name: prices[name][:count] for name in averages}
        self._governors = {
            name: self._governor(name, limit, prices[name]) for name, limit in averages.items()
        }
        positions = {
            name: self._path(count).position_within(self._priced[name], governor.target)
            for name, governor in self._governors.items()
        }
        position = max(positions.values(), default=None)
        self._solution = _Solution(count, position, clamped)
        if not silently:
            self._begin_id()
        self._current = self._rule()

    def _begin_id(self) -> None:
        self._id, self._told = self._id + 1, self._solution

    def _governor(self, name: str, limit: float, prices: np.ndarray) -> Governor:
        """The budget's governor, with what it remembers: a sum relative to the budget, so it outlasts another instruction's prices."""
        low, high = float(prices[0]), float(prices[-1])
        governor = self._governors.get(name) or Governor(limit, low, high)
        governor.target, governor.low, governor.high = max(limit, low), low, high
        if limit < low:  # clamped: what was saved at other prices must not be spent beyond the budget
            governor.overspent = max(governor.overspent, 0.0)
        return governor

    def _refresh(self) -> None:
        """Solves again with the latencies of now; a rule that is much the same keeps its id."""
        self._solve(silently=True)
        told, now = self._told, self._solution
        span = self._path(now.count).end if now.position is not None else 1.0
        if (
            now.count != told.count
            or abs((now.position or 0.0) - (told.position or 0.0)) > WORTH_TELLING * span
        ):
            self._begin_id()

    def _rule(self) -> ExitRule:
        """The solution as thresholds, moved by what the governors have summed up."""
        solution = self._solution
        exits = self._model.exits[: solution.count]
        if solution.position is None:
            self._binding = ""
            return ExitRule(exits, self._thresholds[: solution.count], self._delta)
        path, overspent = self._path(solution.count), self._overspent()
        positions = {
            name: path.position_within(self._priced[name], governor.effective(overspent))
            for name, governor in self._governors.items()
        }
        self._binding = max(positions, key=lambda name: positions[name])
        position = positions[self._binding]
        if position == 0:
            self._binding = ""
        return ExitRule(exits, path.thresholds(position), self._delta)

    def _overspent(self) -> float:
        """What the governors act on: the sum of the budget that is overspent most."""
        return (
            max(governor.overspent for governor in self._governors.values()) if self._budget.governor else 0.0
        )

    def _path(self, count: int) -> ThresholdPath:
        """The path of the first `count` exits, made when it is first needed."""
        if count not in self._paths:
            self._paths[count] = self._calibration.path(count)
        return self._paths[count]

    # --- the account

    def _begin_account(self) -> None:
        self._account = Account()
        self._governors: dict[str, Governor] = {}

    def _expected_shares(self) -> np.ndarray | None:
        """(exits,) shares on the calibration's deltas, without the governor's correction."""
        if self._calibration is None:
            return None
        solution = self._solution
        if solution.position is not None:
            return self._path(solution.count).shares(solution.position)
        return exit_shares(self._calibration.deltas[:, : solution.count], self._thresholds[: solution.count])

    def _notes(self) -> tuple[str, ...]:
        """What a person should know about the thresholds: too few samples, ties, exits that never stop a step."""
        if not self._binding:
            return ()
        notes, samples = [], len(self._calibration.deltas)
        if samples < FEW_SAMPLES:
            notes.append(f"thresholds rest on {samples} samples only: {REMEDY} with more")
        for index, layer in enumerate(self._current.exits[:-1]):
            threshold = self._current.thresholds[index]
            ties = np.mean(self._calibration.deltas[:, index] == np.float32(threshold))
            if threshold == NEVER:
                notes.append(f"the exit at layer {layer} never stops a step under this budget")
            elif ties > TIES:
                notes.append(
                    f"{ties:.0%} of the calibrated deltas at layer {layer} equal its threshold: cost comes in steps"
                )
        return tuple(notes)


def _mean(shares: np.ndarray | None, prices: np.ndarray | None) -> float:
    return float("nan") if shares is None or prices is None else float(shares @ prices[: len(shares)])


def _rounded_up(value: float) -> str:
    """Four digits that are enough: a budget of just what a message names must not be refused again."""
    return f"{decimal.Context(prec=4, rounding=decimal.ROUND_CEILING).create_decimal(value):g}"
