"""The policy under a budget: the network, the layers on its device, and the exit rule from the budget."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.budget.cost import GIB, layers_within
from deer_vla_ros.budget.keeper import BudgetKeeper
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.budget.types import AVERAGES, PEAKS, Budget, BudgetStatus, StepCost
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.backend_check import EAGER, choose
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.residency import ResidentLayers, bytes_held, present_layers
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint

WARM_UP_RUNS = 3
"""Number of runs of each exit."""

AT_ORIGIN = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
"""Pose (7,) of the warm-up: position and quaternion xyzw."""


@dataclass(frozen=True)
class BudgetedStep:
    """One step, its cost, and the id of the exit rule that it ran with."""

    policy: PolicyStep
    cost: StepCost
    budget_id: int


@dataclass(frozen=True)
class WarmUp:
    """What a warm-up did. steps: how many. deepest_ms: the newest step to the deepest exit [ms]. skipped: the
    exits (layers, from 0) that never ran, because the time was over."""

    steps: int
    deepest_ms: float
    skipped: tuple[int, ...]


class BudgetedPolicy:
    """A policy whose exit rule always comes from the budget.

    Any thread may call `check` and read `status`, `budget_id` and `problem`. All else belongs to one thread.
    chosen: what the steps run with. problem: why the network is less deep than the budget allows; empty if it
    is not. given_rule: exits and thresholds of the next steps in place of the budget's, for a replay that
    repeats recorded steps; None: the budget's.
    """

    def __init__(self, checkpoint: Checkpoint, latencies: LatencyTable | None = None, backend: str = EAGER):
        """latencies: replace the measured latencies of every step. backend: what steps run with, as in
        `backend_check.choose`; it is compared with eager steps here."""
        info = checkpoint.info
        self._model, self._layer_bytes = info.model, checkpoint.model.layer_bytes
        self._device = checkpoint.model.device
        self._keeper = BudgetKeeper.of(checkpoint)
        self._keeper.set_resident(present_layers(checkpoint.model))
        self.chosen = choose(backend, checkpoint.model, checkpoint.tokenizer, self._keeper.rule)
        self._policy = self.chosen.policy
        self._layers = ResidentLayers(checkpoint.model, checkpoint.folder, self._policy)
        self._can_reload = checkpoint.folder is not None
        if latencies is not None:
            self._keeper.latency.use(latencies)
        self.problem = ""
        self.given_rule: tuple[tuple[int, ...], tuple[float, ...]] | None = None

    @property
    def status(self) -> BudgetStatus:
        return dataclasses.replace(self._keeper.status(), device_gib=bytes_held(self._device) / GIB)

    @property
    def longest_ms(self) -> float:
        """The expected time [ms] of a step to the deepest exit that the budget allows; NaN if no latency was
        measured."""
        return self._keeper.longest_ms()

    @property
    def budget_id(self) -> int:
        """The id of the next step's rule."""
        return self._keeper.budget_id

    def check(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError if one of `names` in `budget` cannot be kept. Changes nothing."""
        self._keeper.check(budget, names)
        if budget.memory_gib and not self._can_reload:
            raise UserError(
                f"budget.memory_gib is {budget.memory_gib:g}, "
                "but this network has no folder to load layers back from: use 0"
            )

    def set(self, budget: Budget) -> None:
        """Asks for a budget that `check` accepted. The next step obeys it; the policy's memory stays.

        Layers that exceed the memory budget leave the device now. Layers that fit again are loaded in the
        background; until then, steps go only as deep as before.
        """
        self._layers.keep(layers_within(self._model, self._layer_bytes, budget.memory_gib))
        self.problem = ""
        self._keeper.set(budget)
        self._use_layers()

    def begin(self) -> None:
        """Control begins: the budget's account and governors start anew."""
        self._keeper.begin()
        self._policy.rule = self._keeper.rule

    def absorb(self) -> None:
        """Starts to use the layers that were loaded in the background.

        If loading failed, the depth stays, and `problem` says why.
        """
        try:
            if self._layers.absorb():
                self._use_layers()
        except UserError as error:
            self.problem = str(error)

    def wait_for_layers(self) -> None:
        """Waits until the layers that fit again are loaded: a replay must not depend on the disk's speed."""
        self._layers.wait()
        self.absorb()

    def close(self) -> None:
        """Ends the loading in the background. No step may follow."""
        self._layers.close()

    def reset(self, instruction: str) -> None:
        """Clears the policy's memory, and makes the exit rule for the length of the instruction."""
        self._keeper.set_tokens(self._policy.reset(instruction))
        self._policy.rule = self._keeper.rule

    def step(self, observation: Observation) -> BudgetedStep:
        """Runs one step and enters it into the account. Raises what the inference raises."""
        if self.given_rule is not None:
            exits, thresholds = self.given_rule
            self._policy.rule = dataclasses.replace(self._keeper.rule, exits=exits, thresholds=thresholds)
        step, budget_id = self._policy.step(observation), self._keeper.budget_id
        if self._keeper.latency.is_frozen:
            step = dataclasses.replace(step, times=self._keeper.latency.times(step))
        cost = self._keeper.book(step)
        self._policy.rule = self._keeper.rule
        return BudgetedStep(step, cost, budget_id)

    def warm_up(
        self,
        image_shape: tuple[int, int],
        seconds: float = math.inf,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> WarmUp:
        """Runs every exit on a grey image: the first real step is then not slow, and latencies are known.

        The deepest exit comes first, because a step there runs and times every part of the network. The
        first step of all, which is slow, is not timed unless it is the only one.
        seconds: no step starts after this time, but one always runs. on_progress: called before each step and
        after the last one, with the number of steps so far and in all. What it raises ends the warm-up.
        """
        grey = np.full((*image_shape, 3), 128, dtype=np.uint8)
        rule, begin = self._policy.rule, time.monotonic()
        runs = WARM_UP_RUNS * [rule.exits[:count] for count in range(len(rule.exits), 0, -1)]
        steps = []
        self._policy.reset("warm up")
        for exits in runs:
            on_progress(len(steps), len(runs))
            if steps and time.monotonic() - begin >= seconds:
                break
            self._policy.rule = ExitRule(exits, (-1.0,) * len(exits), rule.delta)
            steps.append(self._policy.step(Observation(grey, grey, AT_ORIGIN)))
        on_progress(len(steps), len(runs))
        for step in steps[1:] or steps:
            self._keeper.latency.observe(step)
        self._policy.rule = rule
        deepest_ms = [step.times.total for step in steps if step.exit_layer == rule.deepest][-1]
        reached = {step.exit_layer for step in steps}
        return WarmUp(len(steps), deepest_ms, tuple(exit for exit in rule.exits if exit not in reached))

    def _use_layers(self) -> None:
        """Makes the exit rule for the layers that are on the device."""
        self._keeper.set_resident(self._layers.count)
        self._policy.rule = self._keeper.rule
