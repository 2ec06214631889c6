"""When has a step thought enough? Two neighbouring exits agree, or the budget ends."""

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
"""Difference of what two exits say, by name: of the poses (..., 6), the gripper takes no part; `feature`: of what the head reads there
(..., width). `l2` is the paper's, `feature` the paper's ablation."""


def compared(delta: str, poses: Tensor, features: Tensor) -> Tensor:
    """What a delta of that name takes the difference of, in float32."""
    return (features if delta == "feature" else poses).float()


@dataclass(frozen=True)
class ExitRule:
    """The exits a step may take and the agreement each asks for.

    exits: layers (from 0), ascending; the last is the deepest allowed and always taken when reached.
    thresholds: one per exit; a delta not above it stops the step. The last one is not read.
    delta: name of the difference, one of DELTAS.
    steps_per_stage: k > 1 probes on every k-th step only; those between keep the depth.
    ensemble: emit the mean of the chosen and the previous exit's action; exits, deltas and state stay.
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
                f"exit rule: {len(self.thresholds)} thresholds for {len(self.exits)} exits {self.exits}: give one each"
            )
        if any(math.isnan(threshold) for threshold in self.thresholds):
            raise UserError(
                f"exit rule: thresholds {self.thresholds} contain NaN: use -1 for never, a large value for always"
            )
        if self.delta not in DELTAS:
            raise UserError(f"exit rule: unknown delta '{self.delta}': use one of {', '.join(DELTAS)}")
        if self.steps_per_stage < 1:
            raise UserError(f"exit rule: steps_per_stage is {self.steps_per_stage}: use 1 or more")

    @property
    def deepest(self) -> int:
        """The deepest layer that a step may run."""
        return self.exits[-1]

    def measure(self, read: Tensor, previous: Tensor) -> float:
        """Delta of two exits' vectors, as `compared` gives them; reading it synchronises the device."""
        return DELTAS[self.delta](read.float(), previous.float()).item()

    def agrees(self, index: int, delta: float) -> bool:
        """Whether `delta` at exit number `index` stops the step. NaN never agrees."""
        return delta <= self.thresholds[index]

    def probes(self, episode_step: int) -> bool:
        """Whether this step of the episode looks for its exit, rather than keeping the last one's depth."""
        return episode_step % self.steps_per_stage == 0

    def index_not_shallower(self, layer: int) -> int:
        """The first exit at `layer` or deeper; the deepest allowed where there is none."""
        return next(
            (i for i, exit_layer in enumerate(self.exits) if exit_layer >= layer), len(self.exits) - 1
        )
