"""The run of chains of instructions: several simulated tables in lock step, all moved by one driver.

The rules are those of CALVIN's long-horizon protocol (LH-MTLC, Mees et al. 2022, arXiv 2112.03227). Every
instruction has a limited number of steps. Success is decided from the table's state before the instruction
and its state now. At every instruction the driver's memory is cleared, while the arm and the table stay as
they are. The first failure ends the chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deer_vla_ros.lab.scoring.approach import Approach
from deer_vla_ros.lab.scoring.chains import Chain, set_up
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import TableArm
from deer_vla_ros.lab.sim.tasks import BY_NAME
from deer_vla_ros.model.from_json import from_json


@dataclass(frozen=True, eq=False)
class LaneDecision:
    """The action of one lane in one step.

    pose: (6,) action, each value in -1..1. open: whether the gripper has to be open.
    exit_layer: the layer whose exit gave the action, from 0; -1 if the driver has no layers.
    """

    pose: np.ndarray
    open: bool
    exit_layer: int = -1


class Driver(Protocol):
    """What moves the arms; each arm has a lane of its own."""

    def begin(self, lane: int, task: str, instruction: str) -> int:
        """Starts a new instruction in a lane.

        Returns its number of tokens, special tokens included; 0 if the driver reads no text.
        """

    def decide(self, arms: Mapping[int, TableArm]) -> Mapping[int, LaneDecision]:
        """Returns the next decision of every lane in `arms`, from the present state of its arm and table."""


@dataclass(frozen=True)
class Attempt:
    """One instruction that was given, and its result.

    held_out: whether the training never used this phrasing. position: the instruction's place in its chain,
    from 0. feasible: whether the task was possible when it was asked for; if not, the attempt failed without
    a step. approached: whether the arm first came to the block that the instruction names; None if it names
    no block or was not feasible. exits: the number of steps by exit layer. tokens: the instruction's number
    of tokens.
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
    def read(cls, values: Any) -> Attempt:
        """The attempt whose `dataclasses.asdict` was written as JSON and read again. UserError for others."""
        return from_json(cls, values, "attempt")


def run_chains(
    chains: Sequence[Chain],
    tables: Sequence[Table],
    driver: Driver,
    step_limit: int,
    on_chain_end: Callable[[], None] = lambda: None,
) -> list[tuple[Attempt, ...]]:
    """Runs every chain in a lane and on a table of its own. Returns the attempts of each chain, in order.

    step_limit: the most steps per instruction. on_chain_end: called whenever a chain has ended.

    The other chains of a batch change a chain's actions by rounding errors, and contacts amplify these.
    The results are the same in every run only if the same chains run together.
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
                on_chain_end()
    return [tuple(run.attempts) for run in runs.values()]


@dataclass
class _ChainRun:
    """A chain that is being run."""

    chain: Chain
    arm: TableArm
    attempts: list[Attempt] = field(default_factory=list)

    def begin(self, driver: Driver, lane: int) -> bool:
        """Starts the next instruction. Returns False if the chain is over."""
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
        """Runs one control step. Returns False if it was the instruction's last one."""
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
