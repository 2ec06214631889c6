"""How does a checkpoint drive several tables? It renders what each arm sees, and decides in lock step under a chosen exit rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deer_vla_ros.budget.keeper import BudgetKeeper
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import UserError
from deer_vla_ros.evaluation.chain_run import Decision
from deer_vla_ros.evaluation.table_arm import TableArm
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.lockstep import LockstepPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.checkpoint import Checkpoint

RuleOf = Callable[[int], ExitRule]
"""The exit rule for instructions of so many tokens."""


@dataclass(frozen=True)
class ExitChoice:
    """What decides how deep a policy thinks, one of: a budget, a fixed exit (a layer), the last layer, thresholds (one per exit).

    None of them: the thresholds that the checkpoint ships.
    """

    budget: Budget | None = None
    exit_layer: int | None = None
    full_depth: bool = False
    thresholds: tuple[float, ...] | None = None

    def rule_of(self, checkpoint: Checkpoint) -> RuleOf:
        """UserError, with the remedy, where this checkpoint cannot keep to it."""
        info = checkpoint.info
        exits = info.model.exits
        if self.budget is not None:
            return _budget_rules(self.budget, checkpoint)
        if self.exit_layer is not None or self.full_depth:
            layer = exits[-1] if self.full_depth else self.exit_layer
            if layer not in exits:
                raise UserError(
                    f"evaluate: --exit is {layer}, but the exits are at layers {', '.join(map(str, exits))}: give one"
                )
            rule = ExitRule((layer,), (1e8,), info.delta)
        else:
            thresholds = info.thresholds if self.thresholds is None else self.thresholds
            if len(thresholds) != len(exits):
                raise UserError(f"evaluate: {len(thresholds)} --thresholds for the {len(exits)} exits {exits}: give one each")
            rule = ExitRule(exits, thresholds, info.delta)
        return lambda tokens: rule

    def to_json(self) -> dict[str, Any]:
        """What was chosen, by name; "thresholds": "checkpoint" where nothing was."""
        if self.budget is not None:
            amounts = dataclasses.asdict(self.budget)
            return {name: value for name, value in amounts.items() if name != "governor" and value}
        if self.exit_layer is not None:
            return {"exit": self.exit_layer}
        if self.full_depth:
            return {"full_depth": True}
        return {"thresholds": "checkpoint" if self.thresholds is None else list(self.thresholds)}


class NetworkDriver:
    """Drives up to `lanes` arms by a checkpoint (chain_run.Driver)."""

    def __init__(self, checkpoint: Checkpoint, rule_of: RuleOf, lanes: int):
        rule = rule_of(checkpoint.info.model.max_tokens)
        self._policy = LockstepPolicy(checkpoint.model, checkpoint.tokenizer, rule, lanes)
        self._rule_of = rule_of

    def begin(self, lane: int, task: str, instruction: str) -> int:
        tokens = self._policy.reset(lane, instruction)
        self._policy.set_rule(self._rule_of(tokens), lane)
        return tokens

    def decide(self, arms: Mapping[int, TableArm]) -> dict[int, Decision]:
        """UserError where an action is not finite: such a network cannot be scored."""
        steps = self._policy.step({lane: _observation(arm) for lane, arm in arms.items()})
        for step in steps.values():
            if not step.action.is_finite:
                raise UserError("evaluate: the network's action is not finite: its weights are damaged, or training diverged")
        return {lane: Decision(step.action.pose, step.action.gripper > 0, step.exit_layer) for lane, step in steps.items()}


def _observation(arm: TableArm) -> Observation:
    views = arm.table.render()
    return Observation(views.static, views.gripper, arm.measured())


def _budget_rules(budget: Budget, checkpoint: Checkpoint) -> RuleOf:
    """Thresholds as the node solves them for each instruction's length, without the governor: they do not move from step to step."""
    budget = dataclasses.replace(budget, governor=False)
    keeper = BudgetKeeper.of(checkpoint)
    keeper.check(budget)
    keeper.set(budget)

    def rule_of(tokens: int) -> ExitRule:
        keeper.set_tokens(tokens)
        return keeper.rule

    return rule_of
