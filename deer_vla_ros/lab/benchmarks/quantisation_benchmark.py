"""Compares the number types of the weights: their bytes, the time of a step, and how far decisions move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deer_vla_ros.budget.calibration import Episode
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import PolicyStep
from deer_vla_ros.model.checkpoint import Checkpoint, load_as

NEVER = -1.0
"""A threshold that no delta is below."""


def measure(
    folder: Path,
    device: str,
    episodes: Iterable[Episode],
    number_types: tuple[str, ...],
    on_step: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Does each step of the episodes with every number type, and compares it with the first of them.

    All number types see the same observations, and each has its own memory. on_step: called after each
    observation. Returns one row of figures for each number type.
    """
    loaded = [load_as(number_type, folder, device) for number_type in number_types]
    subjects = [_Subject(checkpoint) for checkpoint in loaded]
    for episode in episodes:
        for subject in subjects:
            subject.reset(episode.instruction)
        for observation in episode.observations:
            for subject in subjects:
                subject.step(observation)
            on_step()
    first = subjects[0].figures()
    return [
        {"dtype": number_type, **_row(checkpoint, subject.figures(), first)}
        for number_type, checkpoint, subject in zip(number_types, loaded, subjects)
    ]


class _Subject:
    """A network that runs beside others, with one policy for each fixed exit, one that reads all of them, and
    one with the thresholds of the checkpoint."""

    def __init__(self, checkpoint: Checkpoint):
        exits, info = checkpoint.info.model.exits, checkpoint.info
        every_exit = ExitRule(exits, (NEVER,) * len(exits), info.delta)
        dynamic = ExitRule(exits, info.thresholds, info.delta)
        fixed = (ExitRule((layer,), (NEVER,), info.delta) for layer in exits)
        self._policies = [
            DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule) for rule in (every_exit, dynamic, *fixed)
        ]
        self._steps: list[list[PolicyStep]] = []

    def reset(self, instruction: str) -> None:
        for policy in self._policies:
            policy.reset(instruction)

    def step(self, observation) -> None:
        """Does a whole step through all layers, which is timed; the others take the features of one pass."""
        deep, *others = self._policies
        timed = deep.step(observation)
        features = deep.features(observation)
        self._steps.append([timed, *(policy.step_on_features(features) for policy in others)])

    def figures(self) -> dict[str, np.ndarray]:
        """The figures of all steps (n, ...)."""
        deep, dynamic, *fixed = zip(*self._steps)
        return {
            "step_ms": np.array([step.times.total for step in deep]),
            "language_ms": np.array([step.times.language for step in deep]),
            "deltas": np.array([step.deltas for step in deep]),
            "exits": np.array([step.exit_layer for step in dynamic]),
            "poses": np.array([[step.action.pose for step in steps] for steps in fixed]),
            "open": np.array([[step.action.gripper > 0 for step in steps] for steps in fixed]),
        }


def _row(checkpoint: Checkpoint, own: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, Any]:
    """The figures of one number type; `first` are those of the one that it is compared with."""
    model = checkpoint.model
    poses, deltas = np.abs(own["poses"] - first["poses"]), np.abs(own["deltas"] - first["deltas"])
    return {
        "layers_bytes": sum(model.layer_bytes),
        "weights_bytes": sum(tensor.nbytes for tensor in model.state_dict().values()),
        "step_ms": float(np.median(own["step_ms"])),
        "language_ms": float(np.median(own["language_ms"])),
        "pose_deviation_mean": float(poses.mean()),
        "pose_deviation_max": float(poses.max()),
        "gripper_agreement": float((own["open"] == first["open"]).mean()),
        "delta_deviation_median": float(np.median(deltas)),
        "delta_deviation_p95": float(np.quantile(deltas, 0.95)),
        "exit_agreement": float((own["exits"] == first["exits"]).mean()),
        "mean_layers": float(own["exits"].mean() + 1),
        "steps": len(own["exits"]),
        "threads": torch.get_num_threads(),
    }


def text(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as lines for a terminal."""
    titles = (
        "layers MB",
        "language ms",
        "step ms",
        "pose mean",
        "max",
        "gripper",
        "delta p50",
        "p95",
        "exits",
    )
    lines = [f"{'':9}" + "".join(f"{title:>12}" for title in (*titles, "layers"))]
    for row in rows:
        figures = (
            f"{row['layers_bytes'] / 1e6:.3f}",
            f"{row['language_ms']:.3f}",
            f"{row['step_ms']:.3f}",
            f"{row['pose_deviation_mean']:.5f}",
            f"{row['pose_deviation_max']:.4f}",
            f"{row['gripper_agreement']:.2%}",
            f"{row['delta_deviation_median']:.5f}",
            f"{row['delta_deviation_p95']:.5f}",
            f"{row['exit_agreement']:.1%}",
            f"{row['mean_layers']:.2f}",
        )
        lines.append(f"{row['dtype']:9}" + "".join(f"{figure:>12}" for figure in figures))
    return lines
