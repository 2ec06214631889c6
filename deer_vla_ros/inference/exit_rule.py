"""The exit rule: a step stops where two neighbouring exits agree, or at the deepest exit allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deer_vla_ros.errors import UserError

DELTAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": lambda a, b: (a - b).square().mean(-1).sqrt(),
    "mean": lambda a, b: (a - b).abs().mean(-1),
    "max": lambda a, b: (a - b).abs().amax(-1),
    "cosine": lambda a, b: 1 - torch.cosine_similarity(a, b, dim=-1),
    "feature": lambda a, b: 1 - torch.cosine_similarity(a, b, dim=-1),
}
"""The kinds of difference (delta) between two exits, by name. `feature` compares the features (..., width)
that the head reads, the others compare the poses (..., 6) without the gripper. The paper uses `l2`, and
`feature` in an ablation."""


def compared(delta: str, poses: Tensor, features: Tensor) -> Tensor:
    """The values that a delta of this name compares, in float32."""
    return (features if delta == "feature" else poses).float()


@dataclass(frozen=True)
class ExitRule:
    """The exits that a step may take, and how well two exits must agree.

    exits: layers (from 0), ascending. The last one is the deepest exit allowed; a step that reaches it stops.
    thresholds: one per exit. A delta at or below its threshold stops the step. The last one is not used.
    delta: the name of the difference, one of DELTAS.
    steps_per_stage: if k > 1, only every k-th step probes the exits; the steps between keep its depth.
    ensemble: the action is the mean of the chosen and the previous exit's action. This changes neither the
        exits nor the deltas nor the memory.
    """

    exits: tuple[int, ...]
    thresholds: tuple[float, ...]
    delta: str = "l2"
    steps_per_stage: int = 1
    ensemble: bool = False

    def __post_init__(self) -> None:
        if not self.exits or list(self.exits) != sorted(set(self.exits)):
            raise UserError(f"exit rule: exits are {self.exits}: give at least one, ascending, none twice")
        if len(self.thresholds) != len(self.exits):
            raise UserError(
                f"exit rule: {len(self.thresholds)} thresholds for {len(self.exits)} exits {self.exits}: "
                "give one each"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise UserError(
                f"exit rule: thresholds {self.thresholds} contain NaN: "
                "use -1 for never, a large value for always"
            )
        if self.delta not in DELTAS:
            raise UserError(f"exit rule: unknown delta '{self.delta}': use one of {', '.join(DELTAS)}")
        if self.steps_per_stage < 1:
            raise UserError(f"exit rule: steps_per_stage is {self.steps_per_stage}: use 1 or more")

    @property
    def deepest(self) -> int:
        """The deepest layer that a step may run."""
        return self.exits[-1]

    def agrees(self, index: int, delta: float) -> bool:
        """Whether `delta` at exit number `index` stops the step. NaN does not."""
        return delta <= self.thresholds[index]

    def probes(self, episode_step: int) -> bool:
        """Whether this step of the episode probes the exits; if not, it keeps the depth of the last step."""
        return episode_step % self.steps_per_stage == 0

    def index_not_shallower(self, layer: int) -> int:
        """The index of the first exit at `layer` or deeper; of the deepest exit if there is none."""
        return next(
            (i for i, exit_layer in enumerate(self.exits) if exit_layer >= layer), len(self.exits) - 1
        )
