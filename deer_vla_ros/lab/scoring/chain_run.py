"""The run of chains of instructions: several simulated scenes in lock step, all moved by one driver.

The rules are those of CALVIN's long-horizon protocol (LH-MTLC, Mees et al. 2022, arXiv 2112.03227). Every
instruction has a limited number of steps. Success is decided from the scene's state before the instruction
and its state now. At every instruction the driver's memory is cleared, while the arm and the scene stay as
they are. The first failure ends the chain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.from_json import from_json

CHAIN_LENGTH = 5
"""The instructions of a chain."""


@dataclass(frozen=True)
class Chain:
    """Instructions to follow one after the other, and the state in which they begin.

    start: the first state, as the benchmark's scenes understand it. tasks, instructions, wordings: one entry
    per instruction. A wording is the name of the group that the sentence comes from, such as "training".
    """

    start: Any
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    wordings: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LaneDecision:
    """The action of one lane in one step.

    pose: (6,) action, each value in -1..1. open: whether the gripper has to be open.
    exit_layer: the layer whose exit gave the action, from 0; -1 if the driver has no layers.
    """

    pose: np.ndarray
    open: bool
    exit_layer: int = -1


class ChainScene(Protocol):
    """One simulated scene with its arm. It runs one chain at a time, in a lane of its own."""

    def begin(self, start: Any) -> None:
        """Brings the scene into the state in which a chain begins."""

    def ask(self, task: str) -> bool:
        """Starts an instruction: success is judged against the present state. False if it is not possible."""

    def observe(self) -> Observation:
        """What the cameras show now, and the measured pose of the arm."""

    def act(self, pose: np.ndarray, gripper_open: bool) -> None:
        """Starts one control step with action (6,). `finish` has to follow."""

    def finish(self) -> bool:
        """Waits until the step has ended. Returns whether the task asked for is done."""

    def approached(self) -> bool | None:
        """Whether the arm first came to the block that the task names; None if there is no such judgement."""


class Driver(Protocol):
    """What moves the arms; each arm has a lane of its own."""

    def begin(self, lane: int, task: str, instruction: str) -> int:
        """Starts a new instruction in a lane.

        Returns its number of tokens, special tokens included; 0 if the driver reads no text.
        """

    def decide(self, scenes: Mapping[int, ChainScene]) -> Mapping[int, LaneDecision]:
        """Returns the next decision of every lane in `scenes`, from the present state of its scene."""


@dataclass(frozen=True)
class Attempt:
    """One instruction that was given, and its result.

    wording: the group that the sentence comes from, such as "training". position: the instruction's place in
    its chain, from 0. feasible: whether the task was possible when it was asked for; if not, the attempt
    failed without a step. approached: see ChainScene.approached; None if the attempt was not feasible.
    exits: the number of steps by exit layer. tokens: the instruction's number of tokens.
    """

    task: str
    instruction: str
    wording: str
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
    scenes: Sequence[ChainScene],
    driver: Driver,
    step_limit: int,
    on_chain_end: Callable[[], None] = lambda: None,
) -> list[tuple[Attempt, ...]]:
    """Runs every chain in a lane and on a scene of its own. Returns the attempts of each chain, in order.

    step_limit: the most steps per instruction. on_chain_end: called whenever a chain has ended.

    The other chains of a batch change a chain's actions by rounding errors, and contacts amplify these.
    The results are the same in every run only if the same chains run together.
    """
    runs = {
        lane: _ChainRun(chain, scene) for lane, (chain, scene) in enumerate(zip(chains, scenes, strict=True))
    }
    for run in runs.values():
        run.scene.begin(run.chain.start)
    going = {lane: run for lane, run in runs.items() if run.begin(driver, lane)}
    while going:
        decisions = driver.decide({lane: run.scene for lane, run in going.items()})
        for lane, decision in decisions.items():
            # All scenes act before the first one is waited for: some are processes of their own.
            going[lane].scene.act(decision.pose, decision.open)
        for lane, decision in decisions.items():
            if not going[lane].finish(decision, step_limit) and not going[lane].begin(driver, lane):
                del going[lane]
                on_chain_end()
    return [tuple(run.attempts) for run in runs.values()]


@dataclass
class _ChainRun:
    """A chain that is being run."""

    chain: Chain
    scene: ChainScene
    attempts: list[Attempt] = field(default_factory=list)

    def begin(self, driver: Driver, lane: int) -> bool:
        """Starts the next instruction. Returns False if the chain is over."""
        position = len(self.attempts)
        if position == len(self.chain.tasks) or (self.attempts and not self.attempts[-1].succeeded):
            return False
        task = self.chain.tasks[position]
        self.steps, self.exits = 0, Counter()
        self.tokens = driver.begin(lane, task, self.chain.instructions[position])
        if not self.scene.ask(task):
            self._end(succeeded=False, feasible=False)
            return False
        return True

    def finish(self, decision: LaneDecision, step_limit: int) -> bool:
        """Ends one control step. Returns False if it was the instruction's last one."""
        succeeded = self.scene.finish()
        self.steps += 1
        self.exits[decision.exit_layer] += 1
        if succeeded or self.steps == step_limit:
            self._end(succeeded, feasible=True)
            return False
        return True

    def _end(self, succeeded: bool, feasible: bool) -> None:
        position = len(self.attempts)
        self.attempts.append(
            Attempt(
                task=self.chain.tasks[position],
                instruction=self.chain.instructions[position],
                wording=self.chain.wordings[position],
                position=position,
                feasible=feasible,
                succeeded=bool(succeeded),
                steps=self.steps,
                approached=self.scene.approached() if feasible else None,
                tokens=self.tokens,
                exits=dict(sorted(self.exits.items())),
            )
        )
