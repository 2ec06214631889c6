"""How far does a policy come along chains of instructions? Several tables in lock step, one driver for all of them.

As CALVIN's long-horizon protocol: at most so many steps per instruction, success decided on states before and now, the driver's
memory cleared at every instruction, the arm and the table left as they are; the first failure ends a chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deer_vla_ros.lab.scoring.approach import Approach
from deer_vla_ros.lab.scoring.chains import Chain, set_up
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import BY_NAME


@dataclass(frozen=True, eq=False)
class LaneDecision:
    """pose: (6,) action in -1..1. open: whether the gripper is to be open. exit_layer: where it was read; -1: at no layer."""

    pose: np.ndarray
    open: bool
    exit_layer: int = -1


class Driver(Protocol):
    """Who moves the arms, each in a lane of its own."""

    def begin(self, lane: int, task: str, instruction: str) -> int:
        """A new instruction in a lane; returns its tokens, specials included, 0 where there is no text."""

    def decide(self, arms: Mapping[int, TableArm]) -> Mapping[int, LaneDecision]:
        """The next step of every lane named, from where its arm and table are."""


@dataclass(frozen=True)
class Attempt:
    """One instruction, followed or not.

    position: in its chain, from 0. feasible: whether the task was possible when it was asked for; if not, it failed at once.
    approached: whether the block that the instruction is about is the first that the arm came to; None where it is about none, or where
    nothing was tried. exits: steps by the layer at which they exited. tokens: of the instruction.
    """

    task: str
    instruction: str
    held_out: bool
    position: int
    feasible: bool
    succeeded: bool
    steps: int
    approached: bool | None
    tokens: int
    exits: dict[int, int]

    @classmethod
    def from_json(cls, values: dict) -> Attempt:
        """Inverse of `dataclasses.asdict`, from the JSON of it."""
        return cls(**{**values, "exits": {int(layer): count for layer, count in values["exits"].items()}})


def run_chains(
    chains: Sequence[Chain],
    tables: Sequence[Table],
    driver: Driver,
    step_limit: int,
    tell: Callable[[], None] = lambda: None,
) -> list[tuple[Attempt, ...]]:
    """The attempts of each chain, one lane and table per chain. tell: called whenever a chain has ended.

    A chain's steps depend on which others run beside it by float noise only, and contacts amplify that: repeat the same chains
    together, and every number is the same.
    """
    runs = {
        lane: _ChainRun(chain, set_up(chain, table))
        for lane, (chain, table) in enumerate(zip(chains, tables, strict=True))
    }
    going = {lane: run for lane, run in runs.items() if run.begin(driver, lane)}
    while going:
        for lane, decision in driver.decide({lane: run.arm for lane, run in going.items()}).items():
            if not going[lane].step(decision, step_limit) and not going[lane].begin(driver, lane):
                del going[lane]
                tell()
    return [tuple(run.attempts) for run in runs.values()]


@dataclass
class _ChainRun:
    """A chain on its way."""

    chain: Chain
    arm: TableArm
    attempts: list[Attempt] = field(default_factory=list)

    def begin(self, driver: Driver, lane: int) -> bool:
        """Goes on to the next instruction; False where the chain is over."""
        position = len(self.attempts)
        if position == len(self.chain.tasks) or (self.attempts and not self.attempts[-1].succeeded):
            return False
        self.task, self.before = BY_NAME[self.chain.tasks[position]], self.arm.table.state()
        self.steps, self.exits, self.approach = 0, Counter(), Approach(self.before)
        self.tokens = driver.begin(lane, self.task.name, self.chain.instructions[position])
        if not self.task.possible(self.before):
            self._end(succeeded=False, feasible=False)
            return False
        return True

    def step(self, decision: LaneDecision, step_limit: int) -> bool:
        """One control step; whether the instruction is still being followed."""
        self.arm.step(decision.pose, decision.open)
        self.steps += 1
        self.exits[decision.exit_layer] += 1
        now = self.arm.table.state()
        self.approach.see(now)
        succeeded = self.task.succeeded(self.before, now)
        if succeeded or self.steps == step_limit:
            self._end(succeeded, feasible=True)
            return False
        return True

    def _end(self, succeeded: bool, feasible: bool) -> None:
        position = len(self.attempts)
        judged = feasible and self.task.block is not None
        self.attempts.append(
            Attempt(
                task=self.task.name,
                instruction=self.chain.instructions[position],
                held_out=self.chain.held_out[position],
                position=position,
                feasible=feasible,
                succeeded=bool(succeeded),
                steps=self.steps,
                approached=self.approach.block == self.task.block(self.before) if judged else None,
                tokens=self.tokens,
                exits=dict(sorted(self.exits.items())),
            )
        )
