"""What does training minimise? The action errors of every head over windows of steps, exits drawn at random.

Yue et al., "DeeR-VLA", NeurIPS 2024, arXiv 2411.02359, and the reference implementation, which `parity` compares with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.head import ActionHead, HeadOutput, pool
from deer_vla_ros.model.network import MultiExitVLA


@dataclass(frozen=True)
class ActionTargets:
    """What the demonstrator did in B windows of T steps.

    pose (B, T, 6) in -1..1; gripper (B, T), 1 = open, 0 = closed; valid (B, T) bool, False for a step that only pads its
    window, None where every step counts.
    """

    pose: Tensor
    gripper: Tensor
    valid: Tensor | None = None

    @classmethod
    def from_actions(cls, actions: Tensor, valid: Tensor | None = None) -> ActionTargets:
        """(B, T, 7) actions as datasets store them, the gripper last: above 0 is open."""
        return cls(actions[..., :6], (actions[..., 6] > 0).to(actions.dtype), valid)


@dataclass(frozen=True)
class LossWeights:
    """Huber error of the pose, quadratic below `huber_delta`, times `pose`, plus cross-entropy of the gripper times `gripper`."""

    huber_delta: float = 1.0
    pose: float = 1.0
    gripper: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.huber_delta) and self.huber_delta > 0):
            raise UserError(f"loss: huber_delta is {self.huber_delta}: give a positive number")
        for name in ("pose", "gripper"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise UserError(f"loss: weight {name} is {getattr(self, name)}: give 0 or more")


@dataclass(frozen=True)
class ActionLoss:
    """One head's mean errors, before their weights, and their weighted sum; scalars."""

    pose: Tensor
    gripper: Tensor
    total: Tensor


@dataclass(frozen=True)
class ExitDraws:
    """Which exit feeds the shared head: indices into the model's exits, (B, T) for each of its two passes."""

    per_step: Tensor
    per_segment: Tensor


@dataclass(frozen=True)
class MultiExitLoss:
    """The unweighted sum over the passes of all heads, and each pass.

    auxiliary: by exit layer, without the last; last: the last layer's own head, None where no auxiliary heads train;
    shared: the two passes of the shared head.
    """

    shared: tuple[ActionLoss, ActionLoss]
    last: ActionLoss | None = None
    auxiliary: dict[int, ActionLoss] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        return torch.stack([loss.total for _, loss in self.parts()]).sum()

    def parts(self) -> Iterator[tuple[str, ActionLoss]]:
        """Every pass by the name that logs give it: `auxiliary_1`, ..., `last`, `shared_1`, `shared_2`."""
        yield from ((f"auxiliary_{exit_layer}", loss) for exit_layer, loss in self.auxiliary.items())
        if self.last is not None:
            yield "last", self.last
        yield from ((f"shared_{number}", loss) for number, loss in enumerate(self.shared, start=1))


def action_loss(output: HeadOutput, targets: ActionTargets, weights: LossWeights) -> ActionLoss:
    """Mean over the steps that count: Huber error of the pose, binary cross-entropy of the gripper."""
    pose = F.huber_loss(output.pose, targets.pose, reduction="none", delta=weights.huber_delta).mean(dim=-1)
    gripper = F.binary_cross_entropy_with_logits(output.gripper_logit[..., 0], targets.gripper, reduction="none")
    pose, gripper = (_mean(errors, targets.valid) for errors in (pose, gripper))
    return ActionLoss(pose, gripper, weights.pose * pose + weights.gripper * gripper)


def _mean(errors: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, T) errors over the steps that count; 0 where none does."""
    if valid is None:
        return errors.mean()
    return torch.where(valid, errors, 0).sum() / valid.sum().clamp(min=1)


def draw_per_step(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> Tensor:
    """(batch, window) indices of `exits`: one drawn for every step."""
    return torch.randint(exits, (batch, window), generator=generator)


def draw_per_segment(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> Tensor:
    """(batch, window) indices of `exits`: the window splits after 1..`window` steps, where it does is the same for the batch;
    each sample draws one exit for either segment."""
    drawn = torch.randint(exits, (batch, 2), generator=generator)
    split = int(torch.randint(1, window + 1, (), generator=generator))
    return segments(drawn, split, window)


def segments(drawn: Tensor, split: int, window: int) -> Tensor:
    """(B, 2) exits of the first `split` steps and of the others -> (B, window)."""
    return torch.where(torch.arange(window, device=drawn.device) < split, drawn[:, :1], drawn[:, 1:])


def draw_exits(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> ExitDraws:
    """Draws for one batch, on the CPU."""
    return ExitDraws(
        per_step=draw_per_step(exits, batch, window, generator),
        per_segment=draw_per_segment(exits, batch, window, generator),
    )


def exit_features(model: MultiExitVLA, images: Tensor, input_ids: Tensor, attention_mask: Tensor, image_token: int) -> Tensor:
    """Pooled features of every exit, (exits, B, T, width); a model with a final norm adds one row: the last exit's, normed.

    images (B, T, cameras, 3, size, size), normalised; input_ids and attention_mask (B, S): the T steps of a window share them.
    Gradients reach the parameters that require them; where none below the heads does, the features carry no graph.
    """
    batch, window = images.shape[:2]
    ids, mask = (text.repeat_interleave(window, dim=0) for text in (input_ids, attention_mask))
    text = model.encode_text(ids, mask, image_token)
    features = []
    for layer, hidden in enumerate(model.hidden_states(model.encode_images(images.flatten(0, 1)), text)):
        if layer in model.config.exits:
            features.append(pool(hidden))
    if model.final_norm is not None:
        features.append(pool(model.final_norm(hidden)))
    return torch.stack(features).unflatten(1, (batch, window))


def multi_exit_loss(
    model: MultiExitVLA,
    features: Tensor,
    targets: ActionTargets,
    draws: ExitDraws,
    weights: LossWeights,
    auxiliary_heads: bool = True,
    random_exits: bool = True,
) -> MultiExitLoss:
    """The loss of both training stages on `exit_features`; LSTM states start from zero in every window.

    auxiliary_heads=False: the shared head alone trains; neither the auxiliary heads nor the last layer's own.
    random_exits=False: both passes of the shared head read the last exit, `draws` or not.
    """
    exits = model.config.exits
    last = len(exits) - 1
    passes = (draws.per_step, draws.per_segment)
    if not random_exits:
        passes = tuple(torch.full_like(drawn, last) for drawn in passes)
    shared = tuple(_loss_of(model.shared_head, _selected(features, drawn), targets, weights) for drawn in passes)
    if not auxiliary_heads:
        return MultiExitLoss(shared)
    return MultiExitLoss(
        shared=shared,
        last=_loss_of(model.last_head, features[-1], targets, weights),
        auxiliary={
            exit_layer: _loss_of(model.auxiliary_heads[str(exit_layer)], feature, targets, weights)
            for exit_layer, feature in zip(exits[:last], features)
        },
    )


def _loss_of(head: ActionHead, feature: Tensor, targets: ActionTargets, weights: LossWeights) -> ActionLoss:
    return action_loss(head(feature, head.initial_state(feature.shape[0])), targets, weights)


def _selected(features: Tensor, drawn: Tensor) -> Tensor:
    """(B, T, width): of each step, the feature of the exit drawn for it."""
    batch, window = drawn.shape
    steps = torch.arange(window, device=features.device)
    samples = torch.arange(batch, device=features.device)[:, None]
    return features[drawn.to(features.device), samples, steps]
