"""How deep may the policy think now? The policy, the layers that are on its device, and the budget that
bounds both."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.budget.cost import layers_within
from deer_vla_ros.budget.keeper import BudgetKeeper
from deer_vla_ros.budget.latency import LatencyTable
from deer_vla_ros.budget.types import AVERAGES, PEAKS, Budget, BudgetStatus, StepCost
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.residency import ResidentLayers
from deer_vla_ros.inference.types import Observation, PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint

WARM_UP_RUNS = 3
"""Of each exit; the first is not timed."""

AT_ORIGIN = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])


@dataclass(frozen=True)
class BudgetedStep:
    """One decision, what it cost, and the id of the budget that it ran under."""

    policy: PolicyStep
    cost: StepCost
    budget_id: int


class BudgetedPolicy:
    """A policy whose exit rule is always the budget's. One thread at a time, but for `check` and `status`."""

    def __init__(self, checkpoint: Checkpoint, latencies: LatencyTable | None = None):
        """latencies: taken for those of every step, in place of what it really takes."""
        info = checkpoint.info
        self._model, self._bytes_per_weight = info.model, checkpoint.model.dtype.itemsize
        self._keeper = BudgetKeeper.of(checkpoint)
        self._layers = ResidentLayers(checkpoint.model, checkpoint.folder)
        self._keeper.set_resident(self._layers.count)
        self._policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, self._keeper.rule)
        self._can_reload = checkpoint.folder is not None
        if latencies is not None:
            self._keeper.latency.use(latencies)
        self.problem = ""

    @property
    def status(self) -> BudgetStatus:
        return self._keeper.status()

    @property
    def budget_id(self) -> int:
        """Of the next step."""
        return self._keeper.budget_id

    def check(self, budget: Budget, names: Iterable[str] = (*AVERAGES, *PEAKS)) -> None:
        """Raises UserError where one of `names` in `budget` cannot be kept; changes nothing."""
        self._keeper.check(budget, names)
        if budget.memory_gib and not self._can_reload:
            raise UserError(
                f"budget.memory_gib is {budget.memory_gib:g}, but this network has no folder to load layers back from: use 0"
            )

    def set(self, budget: Budget) -> None:
        """Asks for a budget that `check` accepted: the next step obeys it, the memory stays.

        Layers that its memory has no room for leave the device now; those that it has room for again are
        loaded meanwhile, and the steps until then go as deep as before.
        """
        self._layers.keep(layers_within(self._model, self._bytes_per_weight, budget.memory_gib))
        self.problem = ""
        self._keeper.set(budget)
        self._use_layers()

    def begin(self) -> None:
        """Control begins anew: the budget's account and governor forget."""
        self._keeper.begin()
        self._policy.rule = self._keeper.rule

    def absorb(self) -> None:
        """Takes up layers that have been loaded in the background; where that failed, the depth stays and
        `problem` says why."""
        try:
            if self._layers.absorb():
                self._use_layers()
        except UserError as error:
            self.problem = str(error)

    def wait_for_layers(self) -> None:
        """Until layers that a budget has room for again are here; a replay does not depend on how fast a disk
        is."""
        self._layers.wait()
        self.absorb()

    def close(self) -> None:
        """Ends what goes on in the background; no step comes after it."""
        self._layers.close()

    def reset(self, instruction: str) -> None:
        """Clears the memory and makes the exit rule for the instruction's length."""
        self._keeper.set_tokens(self._policy.reset(instruction))
        self._policy.rule = self._keeper.rule

    def step(self, observation: Observation) -> BudgetedStep:
        """One decision, entered into the account; the next one's rule may be another. Raises what the
        inference raises."""
        step, budget_id = self._policy.step(observation), self._keeper.budget_id
        if self._keeper.latency.is_frozen:
            step = dataclasses.replace(step, times=self._keeper.latency.times(step))
        cost = self._keeper.book(step)
        self._policy.rule = self._keeper.rule
        return BudgetedStep(step, cost, budget_id)

    def warm_up(self, image_shape: tuple[int, int]) -> None:
        """Runs every exit on a grey image, so that the first real step is not the slow one and latencies are
        known; no other trace."""
        grey = np.full((*image_shape, 3), 128, dtype=np.uint8)
        rule = self._policy.rule
        for depth in range(len(rule.exits)):
            exits = rule.exits[: depth + 1]
            self._policy.rule = ExitRule(exits, (-1.0,) * len(exits), rule.delta)
            self._policy.reset("warm up")
            for run in range(WARM_UP_RUNS):
                step = self._policy.step(Observation(grey, grey, AT_ORIGIN))
                if run > 0:
                    self._keeper.latency.observe(step)
        self._policy.rule = rule

    def _use_layers(self) -> None:
        """The rule for the layers that are here."""
        self._keeper.set_resident(self._layers.count)
        self._policy.rule = self._keeper.rule
