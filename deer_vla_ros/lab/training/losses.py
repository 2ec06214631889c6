"""The training loss: the action errors of every head over windows of steps, with randomly drawn exits.

Sources: Yue et al., "DeeR-VLA", NeurIPS 2024, arXiv 2411.02359, and the reference implementation. `parity`
compares with the latter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.grounding import POINT_UNIT, Found, turn_from_down
from deer_vla_ros.model.head import ActionHead, HeadOutput, pool
from deer_vla_ros.model.network import MultiExitVLA


@dataclass(frozen=True)
class ActionTargets:
    """The demonstrator's actions in B windows of T steps.

    pose (B, T, 6): in -1..1. gripper (B, T): 1 = open, 0 = closed. valid (B, T) bool: False for a step that
    only pads its window; None if every step counts. count: the divisor of sums if it is not the number of
    valid steps. If a batch is spread over processes, each divides by its share of all valid steps.
    """

    pose: Tensor
    gripper: Tensor
    valid: Tensor | None = None
    count: float | None = None

    @classmethod
    def from_actions(
        cls, actions: Tensor, valid: Tensor | None = None, count: float | None = None
    ) -> ActionTargets:
        """Makes targets from (B, T, 7) actions of a data set. The gripper is last; above 0 is open."""
        return cls(actions[..., :6], (actions[..., 6] > 0).to(actions.dtype), valid, count)


@dataclass(frozen=True)
class LossWeights:
    """Weights of the Huber error of the pose and of the cross-entropy of the gripper.

    huber_delta: the Huber error is quadratic below it.
    """

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
    """Scalars of one head: its mean errors without weights, and their weighted sum."""

    pose: Tensor
    gripper: Tensor
    total: Tensor


@dataclass(frozen=True)
class ExitDraws:
    """The exits that feed the shared head, as indices of exits: (B, T) for each of its two passes."""

    per_step: Tensor
    per_segment: Tensor


@dataclass(frozen=True)
class MultiExitLoss:
    """The losses of the passes of all heads, and their unweighted sum.

    auxiliary: by exit layer, without the last layer. last: the own head of the last layer; None if no
    auxiliary heads are trained. shared: the two passes of the shared head.
    """

    shared: tuple[ActionLoss, ActionLoss]
    last: ActionLoss | None = None
    auxiliary: dict[int, ActionLoss] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        return torch.stack([loss.total for _, loss in self.parts()]).sum()

    def parts(self) -> Iterator[tuple[str, ActionLoss]]:
        """Yields every pass with its name in logs: `auxiliary_1`, ..., `last`, `shared_1`, `shared_2`."""
        yield from ((f"auxiliary_{exit_layer}", loss) for exit_layer, loss in self.auxiliary.items())
        if self.last is not None:
            yield "last", self.last
        yield from ((f"shared_{number}", loss) for number, loss in enumerate(self.shared, start=1))


def action_loss(output: HeadOutput, targets: ActionTargets, weights: LossWeights) -> ActionLoss:
    """Returns the means over valid steps of the pose's Huber error and the gripper's binary cross-entropy."""
    pose = F.huber_loss(output.pose, targets.pose, reduction="none", delta=weights.huber_delta).mean(dim=-1)
    gripper = F.binary_cross_entropy_with_logits(
        output.gripper_logit[..., 0], targets.gripper, reduction="none"
    )
    pose, gripper = (_mean(errors, targets.valid, targets.count) for errors in (pose, gripper))
    return ActionLoss(pose, gripper, weights.pose * pose + weights.gripper * gripper)


def _mean(errors: Tensor, valid: Tensor | None, count: float | None) -> Tensor:
    """Returns the mean of (B, T) errors over valid steps, or 0 without valid steps."""
    if valid is None:
        return errors.mean() if count is None else errors.sum() / count
    return torch.where(valid, errors, 0).sum() / (valid.sum().clamp(min=1) if count is None else count)


def draw_per_step(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws one exit for every step: (batch, window) indices below `exits`."""
    return torch.randint(exits, (batch, window), generator=generator)


def draw_per_segment(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws one exit for each of two segments of every window: (batch, window) indices below `exits`.

    The first segment has 1..`window` steps, the same number in the whole batch.
    """
    drawn = torch.randint(exits, (batch, 2), generator=generator)
    split = int(torch.randint(1, window + 1, (), generator=generator))
    return segments(drawn, split, window)


def segments(drawn: Tensor, split: int, window: int) -> Tensor:
    """Repeats (B, 2) exits over the first `split` steps and over the others -> (B, window)."""
    return torch.where(torch.arange(window, device=drawn.device) < split, drawn[:, :1], drawn[:, 1:])


def draw_exits(exits: int, batch: int, window: int, generator: torch.Generator | None = None) -> ExitDraws:
    """Draws the exits of one batch, on the CPU."""
    return ExitDraws(
        per_step=draw_per_step(exits, batch, window, generator),
        per_segment=draw_per_segment(exits, batch, window, generator),
    )


def exit_features(
    model: MultiExitVLA, images: Tensor, input_ids: Tensor, attention_mask: Tensor, image_token: int
) -> Tensor:
    """Returns `features_of` windows, (exits, B, T, width).

    images (B, T, cameras, 3, size, size); input_ids and attention_mask (B, S): one instruction per window.
    """
    batch, window = images.shape[:2]
    ids, mask = (text.repeat_interleave(window, dim=0) for text in (input_ids, attention_mask))
    features, _ = features_of(model, images.flatten(0, 1), ids, mask, image_token)
    return features.unflatten(1, (batch, window))


def features_of(
    model: MultiExitVLA,
    images: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    image_token: int,
    tcp: Tensor | None = None,
    pool_padding: bool = True,
) -> tuple[Tensor, Found | None]:
    """Returns the pooled features of every exit, (exits, N, width), and what the grounding found (or None).

    images (F, cameras, 3, size, size), normalised, and tcp (F, 7); input_ids and attention_mask (N, S): N / F
    instructions for each moment, ordered by moment. pool_padding: whether padding counts in the pooled
    maximum, as in the reference. A model with a final norm adds one row: the normalised features of the last
    exit. Gradients reach the parameters that require them. If no parameter below the heads does, the features
    have no graph.
    """
    text = model.encode_text(input_ids, attention_mask, image_token)
    sight = model.see(images, tcp)
    visual = sight.visual.repeat_interleave(input_ids.shape[0] // images.shape[0], 0)
    features = []
    padding = None if pool_padding else (attention_mask == 0)[..., None]
    for layer, hidden in enumerate(model.hidden_states(visual, text)):
        if layer in model.config.exits:
            features.append(_pooled(hidden, padding))
    if model.final_norm is not None:
        features.append(_pooled(model.final_norm(hidden), padding))
    return torch.stack(features), sight.found


def point_loss(found: Found, points: Tensor, tcp: Tensor, beta: float = 0.1) -> Tensor:
    """Returns the smooth L1 error of the things' positions relative to the TCP, in units of POINT_UNIT.

    points (F, things, 3) [m] and tcp (F, 7): in the action frame. A thing that is not visible (NaN) counts 0.
    """
    wanted = (points - tcp[:, None, :3]) / POINT_UNIT
    return F.smooth_l1_loss(found.point, torch.where(wanted.isnan(), found.point.detach(), wanted), beta=beta)


def turn_loss(found: Found, yaws: Tensor, points: Tensor, tcp: Tensor, beta: float = 0.1) -> Tensor:
    """Returns the smooth L1 error of the things' rotation relative to the fingers.

    yaws (F, things) [rad]; points and tcp: as in `point_loss`.
    """
    angles = 4 * (yaws - turn_from_down(tcp[:, 3:])[:, None, 2])
    wanted = torch.stack([angles.cos(), angles.sin()], -1)
    return F.smooth_l1_loss(
        found.turn, torch.where(points[..., :1].isnan(), found.turn.detach(), wanted), beta=beta
    )


def _pooled(hidden: Tensor, padding: Tensor | None) -> Tensor:
    return pool(hidden if padding is None else hidden.masked_fill(padding, torch.finfo(hidden.dtype).min))


def heatmap_loss(found: Found, pixels: Tensor, spread: float = 0.7) -> Tensor:
    """Returns the cross-entropy of the first query's attention for each thing and camera.

    The target is a Gaussian of `spread` cells around the thing. The result is the mean over all views; a view
    without the thing counts 0.
    pixels (F, things, cameras, 2): x and y, 0..1 inside the image, NaN if not visible. Only the simulator
    knows them, so this loss needs data of the simulated table.
    """
    logits = found.logits[:, :, :: found.logits.shape[2] // found.point.shape[1]]
    pixels = pixels.transpose(1, 2)
    side = round(logits.shape[-1] ** 0.5)
    centres = torch.arange(side, device=logits.device) + 0.5
    inside = ((pixels > 0) & (pixels < 1)).all(-1)
    x, y = (torch.nan_to_num(pixels) * side).unsqueeze(-1).unbind(-2)
    columns, rows = (torch.exp(-((centres - at) ** 2) / (2 * spread**2)) for at in (x, y))
    wanted = (rows[..., :, None] * columns[..., None, :]).flatten(-2)
    wanted = wanted / wanted.sum(-1, keepdim=True).clamp(min=1e-9)
    errors = -(wanted * logits.log_softmax(-1)).sum(-1)
    return torch.where(inside, errors, 0).mean()


def multi_exit_loss(
    model: MultiExitVLA,
    features: Tensor,
    targets: ActionTargets,
    draws: ExitDraws,
    weights: LossWeights,
    auxiliary_heads: bool = True,
    random_exits: bool = True,
) -> MultiExitLoss:
    """Returns the loss of both training stages on `exit_features`.

    LSTM states are zero at the start of a window.

    auxiliary_heads: False trains only the shared head, not the auxiliary heads and not the last layer's own
    head.
    random_exits: False makes both passes of the shared head read the last exit and ignores `draws`.
    """
    exits = model.config.exits
    last = len(exits) - 1
    passes = (draws.per_step, draws.per_segment)
    if not random_exits:
        passes = tuple(torch.full_like(drawn, last) for drawn in passes)
    shared = tuple(
        _loss_of(model.shared_head, _selected(features, drawn), targets, weights) for drawn in passes
    )
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
    """Returns for each step the features of its drawn exit, (B, T, width)."""
    batch, window = drawn.shape
    steps = torch.arange(window, device=features.device)
    samples = torch.arange(batch, device=features.device)[:, None]
    return features[drawn.to(features.device), samples, steps]
