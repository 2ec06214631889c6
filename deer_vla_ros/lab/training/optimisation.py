"""The optimiser of each stage: its trained parameters, AdamW groups, learning rate schedule and clipping."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn
from torch.optim import AdamW

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.network import MultiExitVLA

HEADS = ("shared_head.", "last_head.", "auxiliary_heads.")
VISION = "vision."
DECODER = re.compile(r"layers\.\d+\.block\.|final_norm\.")
CROSS_ATTENTION = re.compile(r"layers\.\d+\.cross_attention\.")
SCHEDULES = ("constant", "cosine")


class Stage(str, Enum):
    """JOINT trains everything that is not frozen. EXIT trains only the heads, on constant features."""

    JOINT = "joint"
    EXIT = "exit"


@dataclass(frozen=True)
class OptimiserSettings:
    """The settings of AdamW, and which parameters it trains.

    learning_rate: per step, after warm-up. In the joint stage, the heads' rate is `head_scale` times this
    rate.
    weight_decay: applies only to the matrices of cross-attention and its feed-forward, and of trained towers.
    clip_norm: largest Euclidean norm of all gradients together. train_vision, train_decoder: also train the
    vision tower and the decoder blocks. The reference takes them from a release and keeps them frozen; a
    small network has no release.
    """

    learning_rate: float = 1e-4
    head_scale: float = 0.25
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: float = 1.0
    train_vision: bool = False
    train_decoder: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "head_scale", "eps", "clip_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UserError(f"optimiser: {name} is {getattr(self, name)}: give a positive number")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise UserError(f"optimiser: weight_decay is {self.weight_decay}: give 0 or more")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimiser: betas are {self.betas}: give two numbers from 0 to below 1")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over steps.

    It rises linearly from 0 at step 0 to the full rate at `warmup_steps`. Then it is constant, or it follows
    half a cosine to 0 at `total_steps` (not needed for `constant`).
    """

    kind: str = "constant"
    warmup_steps: int = 2500
    total_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise UserError(f"schedule: kind is '{self.kind}': give one of {', '.join(SCHEDULES)}")
        if self.warmup_steps < 0:
            raise UserError(f"schedule: warmup_steps is {self.warmup_steps}: give 0 or more")
        if self.kind == "cosine" and self.total_steps <= self.warmup_steps:
            raise UserError(
                f"schedule: total_steps is {self.total_steps}, the warm-up takes {self.warmup_steps}: "
                "give more steps in total"
            )

    def scale(self, step: int) -> float:
        """Returns the share of the learning rate for `step`, which counts from 0."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        progress = (step - self.warmup_steps) / (self.total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class ParameterGroup:
    """Names of parameters in the network that have the same learning rate and weight decay."""

    names: tuple[str, ...]
    learning_rate: float
    weight_decay: float


def trains(name: str, stage: Stage, settings: OptimiserSettings) -> bool:
    """Returns whether `stage` trains the parameter `name` of the network."""
    if name.startswith(HEADS):
        return True
    if stage is Stage.EXIT:
        return False
    if name.startswith(VISION):
        return settings.train_vision
    if DECODER.match(name):
        return settings.train_decoder
    return True


def decays(name: str, parameter: Tensor) -> bool:
    """Returns whether weight decay applies to a parameter.

    In cross-attention it applies to all but gates, biases and the attention's norm, as in the reference. The
    rule of the reference uses names. It does not recognise the norm of the feed-forward, so that weight
    decays too.
    """
    if CROSS_ATTENTION.match(name):
        return not name.endswith(("_gate", ".bias", ".attention.norm.weight"))
    in_blocks = bool(DECODER.match(name)) or (name.startswith(VISION) and ".layers." in name)
    return in_blocks and parameter.ndim > 1


def parameter_groups(model: MultiExitVLA, stage: Stage, settings: OptimiserSettings) -> list[ParameterGroup]:
    """Returns all parameters that `stage` trains, each in one group, without empty groups."""
    head_scale = settings.head_scale if stage is Stage.JOINT else 1.0
    names: dict[tuple[float, float], list[str]] = {}
    for name, parameter in model.named_parameters():
        if trains(name, stage, settings):
            rate = settings.learning_rate * (head_scale if name.startswith(HEADS) else 1.0)
            decay = settings.weight_decay if decays(name, parameter) else 0.0
            names.setdefault((rate, decay), []).append(name)
    return [ParameterGroup(tuple(members), rate, decay) for (rate, decay), members in names.items()]


def freeze_all_but(model: MultiExitVLA, groups: Iterable[ParameterGroup]) -> None:
    """Enables gradients only for the parameters of `groups`, and drops all old gradients."""
    moving = {name for group in groups for name in group.names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)
        parameter.grad = None


class Optimiser:
    """AdamW with schedule and clipping for the parameters of one stage; it freezes all other parameters.

    After `loss.backward()`, `step` applies the gradients and drops them.
    """

    def __init__(self, model: MultiExitVLA, stage: Stage, settings: OptimiserSettings, schedule: Schedule):
        self.groups = parameter_groups(model, stage, settings)
        freeze_all_but(model, self.groups)
        parameters = dict(model.named_parameters())
        self._adamw = AdamW(
            [
                {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay}
                for group in self.groups
            ],
            betas=settings.betas,
            eps=settings.eps,
        )
        self._schedule = schedule
        self._clip_norm = settings.clip_norm
        self.steps = 0

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of each of `groups` in the next step."""
        scale = self._schedule.scale(self.steps)
        return tuple(group.learning_rate * scale for group in self.groups)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields all trained parameters."""
        for group in self._adamw.param_groups:
            yield from group["params"]

    def step(self) -> float:
        """Updates the parameters with their gradients. Returns the norm of the gradients before clipping."""
        norm = nn.utils.clip_grad_norm_(list(self.parameters()), self._clip_norm)
        for group, rate in zip(self._adamw.param_groups, self.rates):
            group["lr"] = rate
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self.steps += 1
        return float(norm)

    def state_dict(self) -> dict:
        """Returns the state from which a resumed run continues."""
        return {"adamw": self._adamw.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned, for the same network, stage and settings."""
        self._adamw.load_state_dict(state["adamw"])
        self.steps = state["steps"]
