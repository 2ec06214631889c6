"""The driver that moves several simulated scenes by a checkpoint's network, under a chosen exit rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from deer_vla_ros.budget.keeper import BudgetKeeper
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.lab.scoring.chain_run import ChainScene, LaneDecision
from deer_vla_ros.model.checkpoint import Checkpoint, CheckpointInfo

RuleOf = Callable[[int, int], ExitRule]
"""Gives the exit rule for an instruction's number of tokens and for the number of steps since it was
given."""


@dataclass(frozen=True)
class ExitChoice:
    """What decides how many layers a policy runs. Set at most one field; without any, the checkpoint's own
    thresholds apply.

    budget: thresholds as the node solves them from a budget. exit_layer: the same exit in every step, by its
    layer.
    full_depth: the last layer in every step. thresholds: one per exit.
    by_time: pairs of a layer and a step of the instruction. The layer is the exit before that step; after the
    last pair, the last layer is.
    """

    budget: Budget | None = None
    exit_layer: int | None = None
    full_depth: bool = False
    thresholds: tuple[float, ...] | None = None
    by_time: tuple[tuple[int, int], ...] | None = None

    def rule_of(self, checkpoint: Checkpoint) -> RuleOf:
        """The exit rules that this choice means for a checkpoint.

        Raises UserError if the checkpoint cannot follow the choice.
        """
        info = checkpoint.info
        exits = info.model.exits
        if self.budget is not None:
            return _budget_rules(self.budget, checkpoint)
        if self.by_time is not None:
            rules = [(_always(layer, info), until) for layer, until in self.by_time]
            last = _always(exits[-1], info)
            return lambda tokens, step: next((rule for rule, until in rules if step < until), last)
        if self.exit_layer is not None or self.full_depth:
            rule = _always(exits[-1] if self.full_depth else self.exit_layer, info)
        else:
            thresholds = info.thresholds if self.thresholds is None else self.thresholds
            if len(thresholds) != len(exits):
                raise UserError(
                    f"evaluate: {len(thresholds)} --thresholds for the {len(exits)} exits {exits}: "
                    "give one each"
                )
            rule = ExitRule(exits, thresholds, info.delta)
        return lambda tokens, step: rule

    def to_json(self) -> dict[str, Any]:
        """The choice by its name, or {"thresholds": "checkpoint"} if no field is set."""
        if self.budget is not None:
            amounts = dataclasses.asdict(self.budget)
            return {name: value for name, value in amounts.items() if name != "governor" and value}
        if self.exit_layer is not None:
            return {"exit": self.exit_layer}
        if self.full_depth:
            return {"full_depth": True}
        if self.by_time is not None:
            return {"by_time": [list(pair) for pair in self.by_time]}
        return {"thresholds": "checkpoint" if self.thresholds is None else list(self.thresholds)}


def _always(layer: int, info: CheckpointInfo) -> ExitRule:
    """The exit rule that always exits at `layer`."""
    exits = info.model.exits
    if layer not in exits:
        raise UserError(
            f"evaluate: --exit is {layer}, but the exits are at layers {', '.join(map(str, exits))}: give one"
        )
    return ExitRule((layer,), (1e8,), info.delta)


class NetworkDriver:
    """Moves up to `lanes` arms by a checkpoint's network (a chain_run.Driver)."""

    def __init__(self, checkpoint: Checkpoint, rule_of: RuleOf, lanes: int):
        rule = rule_of(checkpoint.info.model.max_tokens, 0)
        self._policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule, lanes)
        self._rule_of = rule_of
        self._tokens, self._steps = [0] * lanes, [0] * lanes

    def begin(self, lane: int, task: str, instruction: str) -> int:
        """See chain_run.Driver. The network gets the instruction alone, not the task's name."""
        self._tokens[lane], self._steps[lane] = self._policy.reset(instruction, lane), 0
        return self._tokens[lane]

    def decide(self, scenes: Mapping[int, ChainScene]) -> dict[int, LaneDecision]:
        """See chain_run.Driver.

        Raises UserError if an action is not finite: such a network cannot be scored.
        """
        for lane in scenes:
            self._policy.set_rule(self._rule_of(self._tokens[lane], self._steps[lane]), lane)
            self._steps[lane] += 1
        steps = self._policy.step_lanes({lane: scene.observe() for lane, scene in scenes.items()})
        for step in steps.values():
            if not step.action.is_finite:
                raise UserError(
                    "evaluate: the network's action is not finite: "
                    "its weights are damaged, or training diverged"
                )
        return {
            lane: LaneDecision(step.action.pose, step.action.gripper > 0, step.exit_layer)
            for lane, step in steps.items()
        }


def _budget_rules(budget: Budget, checkpoint: Checkpoint) -> RuleOf:
    """The thresholds that the node solves for each instruction's length.

    The governor is off: they are the same in every step.
    """
    budget = dataclasses.replace(budget, governor=False)
    keeper = BudgetKeeper.of(checkpoint)
    keeper.check(budget)
    keeper.set(budget)

    @cache
    def of_tokens(tokens: int) -> ExitRule:
        keeper.set_tokens(tokens)
        return keeper.rule

    return lambda tokens, step: of_tokens(tokens)
