"""The budget keeper: it turns a budget into an exit rule with an id, and keeps the account of what steps
cost.

A budget is a set of limits, some for the mean over steps (AVERAGES) and some for every single step (PEAKS).
An exit rule says at which layers a step may stop, and by which thresholds. The cost of an exit is what a step
that stops there is expected to cost. Layers and exits are counted from 0.
"""

from __future__ import annotations

import decimal
import functools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deer_vla_ros.budget.calibration import FEW_SAMPLES, REMEDY, Calibration
from deer_vla_ros.budget.cost import cost_table, cumulated_gib
from deer_vla_ros.budget.governor import Governor
from deer_vla_ros.budget.latency import LatencyModel
from deer_vla_ros.budget.path import NEVER, ThresholdPath, exit_shares
from deer_vla_ros.budget.types import AVERAGES, PEAKS, UNITS, Achieved, Budget, BudgetStatus, StepCost
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint
from deer_vla_ros.model.config import ModelConfig

Result = TypeVar("Result")

SHORTEST = 4
"""Number of tokens of the shortest instruction. Before the first instruction, costs are computed for it."""
REFRESH = 25
"""Number of steps after which budgets in ms are solved again, with the latencies measured meanwhile."""
NOTABLE_MOVE = 0.02
"""The rule gets a new id if new latencies move its position by more than this share of the path's length."""
TIES = 0.02
"""If more than this share of an exit's deltas equal its threshold, the status has a note: a small change of
the budget may then change the cost much."""

RECENT = 200
"""Number of steps that the recent means and the recent rate of misses cover. Before that many steps, the
means cover all steps, and the rate counts the missing ones as not missed."""


class BudgetAccount:
    """Means over all steps, and over the newest RECENT steps. Its size does not grow with the steps."""

    def __init__(self) -> None:
        self._spent, self._steps, self._misses = np.zeros(3), 0, 0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._recent_misses: deque[bool] = deque(maxlen=RECENT)

    @property
    def steps(self) -> int:
        return self._steps

    def enter(self, gmac: float, fraction: float, ms: float, missed: bool) -> None:
        """Enters one step.

        gmac, fraction: its language part, in GMAC and as a share of full depth. ms: time of the whole step.
        missed: whether it missed the deadline.
        """
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


@dataclass(frozen=True)
class _Solution:
    """The exits and thresholds that the budget gives for one instruction length, layers on the device and
    latencies.

    count: number of exits that are allowed, the first ones. costs: for each average budget, the cost of each
    allowed exit (count,) in the unit of the budget. position: the place on the threshold path of `count`
    exits, from 0 to the path's end; None means that the checkpoint's own thresholds apply. clamped: names of
    the budgets that are smaller than the cost of the first exit.
    """

    count: int
    costs: dict[str, np.ndarray]
    position: float | None
    clamped: tuple[str, ...]


def _locked(method: Callable[..., Result]) -> Callable[..., Result]:
    """Runs the method under the keeper's lock: one thread calls `book` while another calls `status`."""

    @functools.wraps(method)
    def locked(self: BudgetKeeper, *arguments, **named) -> Result:
        with self._lock:
            return method(self, *arguments, **named)

    return locked


class BudgetKeeper:
    """Turns the budget into an exit rule for the current instruction, and accounts for what steps cost.

    The cost depends on the number of tokens of the instruction, so each number gets its own rule, with a new
    id, counted from 1. Corrections by the governors and small changes of the latencies keep the id. Any
    thread may call any method; only the thread that runs the steps may read `rule` and `budget_id`, which
    take no lock.
    """

    def __init__(
        self,
        model: ModelConfig,
        delta: str,
        thresholds: tuple[float, ...],
        layer_bytes: Sequence[int],
        calibration: Calibration | None = None,
        no_calibration: str = f"the checkpoint has no calibration: {REMEDY}",
    ):
        """model: the network's sizes. delta: how two exits' actions are compared (`ExitRule.delta`).
        thresholds: one for each exit; they are used if no average budget is set. layer_bytes: of each
        layer on the device. calibration: average budgets need it; one that does not fit the model is left
        out. no_calibration: the error text if an average budget is requested without a calibration."""
        self._lock = threading.RLock()
        self._model, self._delta, self._thresholds = model, delta, thresholds
        self._calibration, self._no_calibration = calibration, no_calibration
        try:
            if calibration is not None:
                calibration.check(model.exits, delta)
        except UserError as error:  # only a request for an average needs the calibration
            self._calibration, self._no_calibration = None, str(error)
        self._paths: dict[int, ThresholdPath] = {}
        self._gib = cumulated_gib(layer_bytes)
        # The latency model needs only the ratios of the layers' costs. They hardly depend on the tokens.
        self.latency = LatencyModel(cost_table(model, model.max_tokens // 2).layers)
        self._resident = model.decoder.layers
        self._budget = Budget()
        self._table = cost_table(model, min(SHORTEST, model.max_tokens))
        self._id = 0
        self.begin()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> BudgetKeeper:
        """Makes the keeper of a checkpoint, with the calibration of its folder.

        If the calibration is missing or unusable, no error is raised here. `check` raises it as UserError
        when an average budget is requested.
        """
        info, folder = checkpoint.info, checkpoint.folder
        arguments = info.model, info.delta, info.thresholds, checkpoint.model.layer_bytes
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

        names: the budgets that the user changes now. A budget that is not among them is not checked: it may
        have become infeasible with a longer instruction, and is then clamped.
        """
        exit_costs, averages = self._exit_costs(), budget.active(AVERAGES)
        for name in names:
            value = getattr(budget, name)
            if name not in UNITS or value == 0:
                continue
            if name in averages and self._calibration is None:
                raise UserError(f"budget.{name} is {value:g}, but {self._no_calibration}")
            if name not in exit_costs:
                raise UserError(
                    f"budget.{name} is {value:g}, but no latency was measured on this device yet: "
                    "use a budget in GMAC"
                )
            low, high = exit_costs[name][0], exit_costs[name][-1]
            if not (math.isfinite(value) and value >= low):
                least = _rounded_up(low)
                at = "" if name == "memory_gib" else f" at {self._table.tokens} tokens"
                raise UserError(
                    f"budget.{name} is {value:g}, which is not at least the {least} {UNITS[name]} "
                    f"of the first exit{at}: ask for {least} to {high:.4g}, or 0 for no limit"
                )

    @_locked
    def set(self, budget: Budget) -> None:
        """Replaces the budget, and begins anew (see `begin`). It checks nothing: call `check` before."""
        self._budget = budget
        self.begin()

    @_locked
    def set_tokens(self, tokens: int) -> None:
        """Sets the number of tokens of a new instruction.

        If a budget is now smaller than the cost of the first exit, that cost is used in its place, and
        `status().clamped` contains the budget's name.
        """
        if tokens != self._table.tokens:
            self._table = cost_table(self._model, tokens)
            self._make_new_rule()

    @_locked
    def set_resident(self, layers: int) -> None:
        """Sets the number of layers that are on the device now, at least those of the first exit. No exit
        beyond them is allowed."""
        if layers != self._resident:
            self._resident = layers
            self._make_new_rule()

    @_locked
    def begin(self) -> None:
        """Call it when control begins. It empties the account and the governors, and makes a rule with a new
        id."""
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
        """Enters a step into the account, the latency model and the governors, and corrects the rule of the
        next step. Returns the step's cost [GMAC] at the current number of tokens. The step's times are in ms.
        """
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
        """Returns what is asked for, what is feasible, and what was achieved since control began or
        the budget was set.

        feasible: the cost of the first and of the last exit, on the device or not. expected_*: without the
        governors' correction; NaN if there is no calibration or latency. correction: 1.0 means none.
        """
        exit_costs, shares = self._exit_costs(), self._expected_shares()
        governor = self._governors.get(self._binding)
        return BudgetStatus(
            budget_id=self._id,
            tokens=self._table.tokens,
            rule=self._rule,
            requested=self._budget,
            feasible={name: (float(costs[0]), float(costs[-1])) for name, costs in exit_costs.items()},
            expected_gmac=_mean(shares, exit_costs["average_gmac"]),
            expected_ms=_mean(shares, exit_costs.get("average_ms")),
            achieved=self._account.achieved(),
            binding=self._binding,
            clamped=self._solution.clamped,
            correction=governor.effective(self._overspent()) / governor.target if governor else 1.0,
            notes=_notes(self._rule, self._calibration.deltas) if self._binding else (),
            resident_layers=self._resident,
            resident_gib=float(self._gib[self._resident - 1]),
        )

    @_locked
    def longest_ms(self) -> float:
        """Returns the expected time [ms] of a step to the deepest exit that the budget allows; NaN if no
        latency was measured."""
        costs = self._exit_costs().get("average_ms")
        return math.nan if costs is None else float(costs[self._solution.count - 1])

    # --- solving

    def _exit_costs(self) -> dict[str, np.ndarray]:
        """Returns for each budget the cost of each exit (exits,) in the budget's unit. Without a measured
        latency there are none in ms, and budgets in ms have no effect."""
        exits, layers = self._model.exits, np.cumsum(self._table.layers)
        gmac = layers[list(exits)]
        exit_costs = {
            "average_gmac": gmac,
            "average_fraction": gmac / layers[-1],
            "peak_gmac": gmac,
            "memory_gib": self._gib[list(exits)],
        }
        if self.latency.is_measured:
            # Number of layers that a step to the exit runs, and of actions that it computes: one after the
            # layer before the first exit, with which the first exit is compared, and one at each exit.
            depths = [(layer + 1, index + 2) for index, layer in enumerate(exits)]
            exit_costs["average_ms"] = np.array([self.latency.expected(*depth) for depth in depths])
            exit_costs["deadline_ms"] = np.array([self.latency.high(*depth) for depth in depths])
        return exit_costs

    def _make_new_rule(self) -> None:
        """Solves the budget, and gives the resulting rule a new id."""
        self._solution = self._solve()
        self._begin_id()
        self._rule, self._binding = self._corrected_rule()

    def _refresh(self) -> None:
        """Solves the budget with the present latencies. The rule gets a new id if, compared with the solution
        of the present id, the number of exits changes, the path begins or ceases to be used, or the position
        moves by more than NOTABLE_MOVE of the path."""
        self._solution = now = self._solve()
        before = self._solution_of_id
        length = self._path(now.count).end if now.position is not None else 1.0
        moved = abs((now.position or 0.0) - (before.position or 0.0))
        has_path = now.position is not None, before.position is not None
        if now.count != before.count or has_path[0] != has_path[1] or moved > NOTABLE_MOVE * length:
            self._begin_id()

    def _begin_id(self) -> None:
        self._id, self._solution_of_id = self._id + 1, self._solution

    def _solve(self) -> _Solution:
        """Solves the budget for this instruction length and these layers. Updates the governors' limits."""
        exit_costs = self._exit_costs()
        averages, peaks = (
            {name: limit for name, limit in self._budget.active(names).items() if name in exit_costs}
            for names in (AVERAGES, PEAKS)
        )
        clamped = tuple(name for name, limit in {**averages, **peaks}.items() if limit < exit_costs[name][0])
        allowed = [index for index, layer in enumerate(self._model.exits) if layer < self._resident]
        for name, limit in peaks.items():
            allowed = [index for index in allowed if exit_costs[name][index] <= limit]
        count = max(len(allowed), 1)
        self._governors = {
            name: self._governor(name, limit, exit_costs[name]) for name, limit in averages.items()
        }
        costs = {name: exit_costs[name][:count] for name in averages}
        positions = [
            self._path(count).position_within(costs[name], governor.target)
            for name, governor in self._governors.items()
        ]
        return _Solution(count, costs, max(positions, default=None), clamped)

    def _governor(self, name: str, limit: float, costs: np.ndarray) -> Governor:
        """Returns the governor of an average budget, a new one if there is none yet, for these costs of the
        exits. `Governor.overspent` is relative to the budget, so it stays valid for another instruction."""
        low, high = float(costs[0]), float(costs[-1])
        governor = self._governors.get(name) or Governor(limit, low, high)
        governor.target, governor.low, governor.high = max(limit, low), low, high
        if limit < low:
            # Every step overspends this budget now. Earlier savings would let steps cost even more.
            governor.overspent = max(governor.overspent, 0.0)
        return governor

    def _corrected_rule(self) -> tuple[ExitRule, str]:
        """Returns the exit rule of the solution, corrected by the governors, and the name of the average
        budget that needs the largest position. The name is empty if no average budget restricts the rule."""
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
        """Returns the largest `Governor.overspent`, by which all governors correct: the strictest correction
        keeps every budget. It is 0 if the governor is switched off."""
        if not self._budget.governor:
            return 0.0
        return max(governor.overspent for governor in self._governors.values())

    def _path(self, count: int) -> ThresholdPath:
        """Returns the threshold path of the first `count` exits. It is made when it is first needed."""
        if count not in self._paths:
            self._paths[count] = self._calibration.path(count)
        return self._paths[count]

    def _expected_shares(self) -> np.ndarray | None:
        """Returns the share (count,) of the calibration's steps that each allowed exit takes, without the
        governors' correction; None without a calibration."""
        if self._calibration is None:
            return None
        solution = self._solution
        if solution.position is not None:
            return self._path(solution.count).shares(solution.position)
        return exit_shares(self._calibration.deltas[:, : solution.count], self._thresholds[: solution.count])


def _notes(rule: ExitRule, deltas: np.ndarray) -> tuple[str, ...]:
    """Returns texts for users about thresholds that were solved on these calibrated deltas (N, exits): that
    there are few samples or many equal deltas, and which exits never stop a step."""
    notes, samples = [], len(deltas)
    if samples < FEW_SAMPLES:
        notes.append(f"the thresholds were computed from only {samples} samples: {REMEDY} with more")
    for index, layer in enumerate(rule.exits[:-1]):
        threshold = rule.thresholds[index]
        ties = np.mean(deltas[:, index] == np.float32(threshold))
        if threshold == NEVER:
            notes.append(f"the exit at layer {layer} never stops a step under this budget")
        elif ties > TIES:
            notes.append(
                f"{ties:.0%} of the calibrated deltas at layer {layer} equal its threshold: "
                "a small change of the budget may change the cost much"
            )
    return tuple(notes)


def _mean(shares: np.ndarray | None, costs: np.ndarray | None) -> float:
    """Returns the mean cost of a step; NaN if shares or costs are unknown."""
    return float("nan") if shares is None or costs is None else float(shares @ costs[: len(shares)])


def _rounded_up(value: float) -> str:
    """Returns `value` with four significant digits, rounded up, so that a budget copied from an error message
    is not refused again."""
    return f"{decimal.Context(prec=4, rounding=decimal.ROUND_CEILING).create_decimal(value):g}"
