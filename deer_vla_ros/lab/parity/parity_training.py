"""The parity check of training: losses, gradients, parameter groups and updates against the reference's
recorded ones.

In float32 only the first two steps are compared, because later ones amplify rounding errors: a maximum may
move to another element, and Adam scales gradients near zero up. A recording of the same training in float64
covers all steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deer_vla_ros.lab.parity.comparison import Difference, compare, compare_relative
from deer_vla_ros.lab.parity.reference_tensors import (
    ModelRecording,
    TrainingRecording,
    read_arrays,
    read_model,
    read_training,
)
from deer_vla_ros.lab.training.augmentation import shift
from deer_vla_ros.lab.training.losses import (
    ActionTargets,
    ExitDraws,
    LossWeights,
    MultiExitLoss,
    exit_features,
    multi_exit_loss,
    segments,
)
from deer_vla_ros.lab.training.optimisation import (
    Optimiser,
    OptimiserSettings,
    ParameterGroup,
    Schedule,
    Stage,
    parameter_groups,
)

STEP_KINDS = ("parameter_groups", "learning_rates")
TRAINING_KINDS = (*STEP_KINDS, "loss_steps_0_1")
TRAINING64_KINDS = (*STEP_KINDS, "loss_relative", "grad_norm_relative", "param_delta_l2_relative")
SHIFT_KINDS = ("random_shift",)
COMPARABLE_STEPS = 2
SHIFT_GRID = 2.0**-8
"""Recorded pixels are rounded to this grid. They are multiples of 1/8, and the reference's resampling adds
errors far below half of the grid."""


def check_training(folder: Path, name: str) -> Iterator[Difference]:
    """Compares the joint stage's first steps in float32, and both stages' parameter groups and rates."""
    recording, training = read_model(folder, name), read_training(folder, name)
    yield from _check_groups(recording, training)
    stage = training.stages[0]
    optimiser = _optimiser(recording, training, stage)
    steps = stage["steps"][:COMPARABLE_STEPS]
    for number, step in enumerate(steps):
        loss = step_loss(recording, step)
        ours = reference_losses(loss)
        for key, value in step["losses"].items():
            yield compare("loss_steps_0_1", f"{stage['stage']} step {number} {key}", value, ours[key])
        if step is not steps[-1]:
            loss.total.backward()
            optimiser.step()


def check_training64(folder: Path, name: str) -> Iterator[Difference]:
    """Compares every step of both stages in float64: losses, gradients, and how far each parameter moved."""
    recording, training = read_model(folder, name), read_training(folder, name, "_fp64")
    recording.model.double()
    yield from _check_groups(recording, training)
    untrained = _weights(recording)
    for stage in training.stages:
        before, optimiser = _weights(recording), _optimiser(recording, training, stage)
        for number, step in enumerate(stage["steps"]):
            yield from _check_step(f"{stage['stage']} step {number}", recording, step, optimiser)
        after = _weights(recording)
        moved = {
            name: float((after[name] - before[name]).norm()) for name in _names(recording, optimiser.groups)
        }
        yield from _compare_each("param_delta_l2_relative", stage["stage"], stage["param_delta_l2"], moved)
        yield from _check_values(stage["stage"], training.values, untrained, after)


def check_random_shift(folder: Path) -> Iterator[Difference]:
    """Applies the shifts that the reference drew to its images, and compares every pixel."""
    arrays = read_arrays(folder / "preproc.npz")
    for pad in sorted(
        int(name.removeprefix("shift").removesuffix("/in")) for name in arrays if name.endswith("/in")
    ):
        windows = torch.from_numpy(arrays[f"shift{pad}/in"])
        for kind, images in (("traj", windows.flatten(0, 1)), ("single", windows[:, 0])):
            offsets = torch.from_numpy(arrays[f"shift{pad}/{kind}_shift_int"]).long()[:, 0, 0]
            recorded = arrays[f"shift{pad}/{kind}_out"]
            ours = shift(images, offsets, pad).view(recorded.shape)
            yield compare(
                "random_shift", f"shift{pad}/{kind}_out", np.round(recorded / SHIFT_GRID) * SHIFT_GRID, ours
            )


def _check_groups(recording: ModelRecording, training: TrainingRecording) -> Iterator[Difference]:
    """Compares which parameters share a learning rate and a weight decay, and the rate of every step."""
    for stage in training.stages:
        settings, schedule = _settings(training, stage), _schedule(training, stage)
        ours = {
            (_digits(group.learning_rate), group.weight_decay, settings.betas, settings.eps): group
            for group in parameter_groups(recording.model, Stage(stage["stage"]), settings)
        }
        for number, recorded in enumerate(training.groups[stage["stage"]]):
            key = (
                _digits(recorded["base_lr"]),
                recorded["weight_decay"],
                tuple(recorded["betas"]),
                recorded["eps"],
            )
            group = ours.pop(key, None)
            names = {name.removeprefix("module.") for name in recorded["params"]}
            others = names ^ set(_names(recording, [group] if group else []))
            where = f"{stage['stage']} group {number}"
            yield Difference("parameter_groups", where, float(len(others)))
            for index, step in enumerate(stage["steps"] if group else ()):
                rate = _digits(group.learning_rate * schedule.scale(index))
                yield compare(
                    "learning_rates",
                    f"{where} step {index}",
                    np.array(_digits(step["lr_used_per_group"][number])),
                    rate,
                )
        for group in ours.values():
            yield Difference(
                "parameter_groups", f"{stage['stage']}: ours of {group.names[0]}", float(len(group.names))
            )


def _check_step(
    where: str, recording: ModelRecording, step: Mapping[str, Any], optimiser: Optimiser
) -> Iterator[Difference]:
    """Takes one training step, and compares its losses and its gradient norms."""
    loss = step_loss(recording, step)
    loss.total.backward()
    yield from _compare_each("loss_relative", where, step["losses"], reference_losses(loss))
    parameters = dict(recording.model.named_parameters())
    norms = {
        reference: float(parameters[name].grad.norm())
        for name, reference in recording.reference_names.items()
        if parameters[name].grad is not None
    }
    yield from _compare_each("grad_norm_relative", where, step["grad_norm_per_param"], norms)
    yield compare_relative(
        "grad_norm_relative", f"{where}, all parameters", step["grad_norm_total"], optimiser.step()
    )


def _check_values(
    stage: str,
    recorded: Mapping[str, np.ndarray],
    untrained: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
) -> Iterator[Difference]:
    """Compares selected parameters after a stage.

    The difference is the distance from the recorded values, divided by the distance of those from the
    untrained values.
    """
    for key, values in recorded.items():
        if key.startswith(f"{stage}/"):
            name = key.removeprefix(f"{stage}/")
            after = torch.from_numpy(values)
            error, moved = (after - ours[name]).norm(), (after - untrained[name]).norm()
            yield Difference("param_delta_l2_relative", f"value of {key}", float(error / moved))


def _compare_each(
    kind: str, where: str, recorded: Mapping[str, float], ours: Mapping[str, float]
) -> Iterator[Difference]:
    """Compares named numbers, relative to the recorded ones.

    A number that only one side has differs infinitely.
    """
    for name in {**recorded, **ours}:
        yield compare_relative(kind, f"{where} {name}", recorded.get(name, np.nan), ours.get(name, np.nan))


def step_loss(recording: ModelRecording, step: Mapping[str, Any]) -> MultiExitLoss:
    """The loss of one recorded step with the exits that the reference drew, in the precision of the model.

    The model stays in evaluation mode. Only dropout differs in training mode, and it was 0 in the recorded
    training.
    """
    model, arrays, batch = recording.model, recording.window, f"batch{step['batch']}"
    images, actions = (
        torch.from_numpy(array).to(model.dtype)
        for array in (
            np.stack((arrays[f"{batch}/rgb_static"], arrays[f"{batch}/rgb_gripper"]), axis=2),
            arrays[f"{batch}/actions"],
        )
    )
    ids, mask = (torch.from_numpy(arrays[f"{batch}/{name}"]) for name in ("input_ids", "attention_mask"))
    features = exit_features(model, images, ids, mask, recording.tokenizer.image_token)
    draws = ExitDraws(
        per_step=torch.tensor(step["strategy1_idx"]),
        per_segment=segments(
            torch.tensor(step["strategy2_idx"]), step["strategy2_prev_len"], images.shape[1]
        ),
    )
    return multi_exit_loss(model, features, ActionTargets.from_actions(actions), draws, LossWeights())


def reference_losses(loss: MultiExitLoss) -> dict[str, float]:
    """The values of a loss under the names in the reference's log: `num` is the pose, `bin` the gripper."""
    passes = [part for _, part in loss.parts()]
    heads = [*loss.auxiliary.values(), loss.last]
    named = {
        "": (
            torch.stack([part.pose for part in passes]).mean(),
            torch.stack([part.gripper for part in passes]).mean(),
        ),
        **{f"_{number}": (part.pose, part.gripper) for number, part in enumerate(heads)},
    }
    values = {"loss_calvin": loss.total, "mse": named[""][0]}
    for suffix, (pose, gripper) in named.items():
        values |= {f"loss_calvin_num{suffix}": pose, f"loss_calvin_bin{suffix}": gripper}
    for prefix, part in zip(("extra_exit_loss", "extra_exit_loss2"), loss.shared):
        values |= {f"{prefix}_num": part.pose, f"{prefix}_bin": part.gripper}
    return {name: float(value.detach()) for name, value in values.items()}


def _optimiser(recording: ModelRecording, training: TrainingRecording, stage: Mapping[str, Any]) -> Optimiser:
    return Optimiser(
        recording.model, Stage(stage["stage"]), _settings(training, stage), _schedule(training, stage)
    )


def _settings(training: TrainingRecording, stage: Mapping[str, Any]) -> OptimiserSettings:
    recorded = training.settings
    return OptimiserSettings(
        learning_rate=recorded[f"{stage['stage']}_learning_rate"],
        head_scale=recorded["exit_lr_scale"],
        weight_decay=recorded["weight_decay"],
    )


def _schedule(training: TrainingRecording, stage: Mapping[str, Any]) -> Schedule:
    return Schedule("constant", warmup_steps=training.warmup[stage["stage"]])


def _names(recording: ModelRecording, groups: Iterable[ParameterGroup]) -> list[str]:
    """The reference's names of the groups' parameters, or ours if the reference has none."""
    return [recording.reference_names.get(name, name) for group in groups for name in group.names]


def _weights(recording: ModelRecording) -> dict[str, Tensor]:
    """A copy of every parameter that the reference has too, by the reference's name."""
    parameters = dict(recording.model.named_parameters())
    return {
        reference: parameters[name].detach().clone() for name, reference in recording.reference_names.items()
    }


def _digits(rate: float) -> float:
    """A learning rate, rounded to the nine digits of the recording."""
    return float(f"{rate:.9g}")
