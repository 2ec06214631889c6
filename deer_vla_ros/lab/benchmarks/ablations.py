"""The ablations: what each part of the method contributes, on the same chains and at the same mean cost.

Each network trains by the same recipe with one part switched off, and is then calibrated. The exit criteria
and the threshold families are compared on the network that has all parts. Networks that are trained,
calibrated or scored already are not trained, calibrated or scored again.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from deer_vla_ros.budget.calibration import REMEDY, Calibration
from deer_vla_ros.budget.cost import exit_fractions
from deer_vla_ros.budget.families import FAMILIES, thresholds_within
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import write_text
from deer_vla_ros.lab.benchmarks.depth_curve import Point
from deer_vla_ros.lab.scoring.network_driver import ExitChoice
from deer_vla_ros.lab.training.recipe import Recipe, read_values
from deer_vla_ros.model.checkpoint import CONFIG, load_info
from deer_vla_ros.processes import run_python

ALL_PARTS = "all parts"
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    ALL_PARTS: ({}, {}),
    "no auxiliary heads": ({}, {"auxiliary_heads": False}),
    "no random exits": ({}, {"random_exits": False}),
    "no LSTM": ({"memory": False}, {}),
}
"""For each network, the changes to the recipe's network and to each of its training steps."""
SHARED_PASSES = 2
FEATURES, TIME = "criterion: feature similarity", "criterion: time step"


@dataclass(frozen=True)
class Setting:
    """The settings that all rows share.

    recipe: the training recipe, a YAML file. data: the folder of its data. out: the folder for networks and
    recipes. processes: the number of training processes at most, where there is no GPU. fraction: the average
    budget of every row, as a share of full depth, 0..1.
    """

    recipe: Path
    data: Path
    out: Path
    processes: int
    fraction: float


def networks(setting: Setting, on_progress: Callable[[str], None]) -> dict[str, Path]:
    """Trains and calibrates every network of TRAINED. Returns their checkpoint folders by name.

    on_progress: gets a line of text before each long step.
    """
    found = {}
    for name, (network, train) in TRAINED.items():
        on_progress(f"training: {name}")
        found[name] = _trained(setting, name, network, train)
        _calibrate(found[name], on_progress)
    return found


def points(
    setting: Setting,
    folders: dict[str, Path],
    score: Callable[[list[Point]], list[dict]],
    on_progress: Callable[[str], None],
) -> list[Point]:
    """Every row of the ablations as one evaluation.

    folders: the checkpoint folders by name, ALL_PARTS among them. score: returns the figures of points
    (depth_curve.measure); the time criterion needs those of the first row. on_progress: gets a line of text
    before each long step. Raises UserError if the network with all parts has no calibration.
    """
    whole = folders[ALL_PARTS]
    calibration, budget = _calibration(whole), ExitChoice(budget=Budget(average_fraction=setting.fraction))
    rows = [Point("ablation", name, folder, budget) for name, folder in folders.items()]
    rows.append(Point("ablation", FEATURES, _by_features(whole, setting.out, on_progress), budget))
    shares = shares_within(calibration, whole, setting.fraction)
    schedule = by_time(shares, score(rows[:1])[0]["steps_by_time"])
    rows.append(Point("ablation", TIME, whole, ExitChoice(by_time=schedule)))
    for family in FAMILIES:
        thresholds = family_thresholds(calibration, whole, family, setting.fraction)
        rows.append(
            Point("ablation", f"thresholds: {family}", whole, ExitChoice(thresholds=tuple(thresholds)))
        )
    return [*rows, Point("ablation", "every step to the last layer", whole, ExitChoice(full_depth=True))]


def by_time(shares: dict[int, float], steps_by_time: list[int]) -> tuple[tuple[int, int], ...]:
    """The exits by time: pairs of a layer and the step of an instruction before which it is the exit, shallow
    exits first.

    Each exit gets about its share of all steps. The deepest exit has no entry, since it has no end. shares:
    by layer. steps_by_time: how many instructions took more than 0, 1, ... steps.
    """
    done = np.cumsum([0, *steps_by_time]) / sum(steps_by_time)
    until = np.abs(done[:, None] - np.cumsum(list(shares.values()))).argmin(0)
    return tuple(zip(shares, until.tolist()))[:-1]


def shares_within(calibration: Calibration, folder: Path, fraction: float) -> dict[int, float]:
    """Each exit's share of the steps, by layer, under the calibrated thresholds of an average budget.

    fraction: the average budget, as a share of full depth, 0..1.
    """
    path, costs = calibration.path(len(calibration.exits)), _costs(folder)
    return dict(zip(calibration.exits, path.shares(path.position_within(costs, fraction)).tolist()))


def family_thresholds(
    calibration: Calibration, folder: Path, family: str, fraction: float
) -> tuple[float, ...]:
    """The paper's thresholds of an average budget, one per exit: quantiles of the deltas in windows of
    demonstrations.

    family: one of FAMILIES. fraction: the average budget, as a share of full depth, 0..1.
    """
    return thresholds_within(family, calibration.window_deltas, _costs(folder), fraction)


def _costs(folder: Path) -> np.ndarray:
    """(exits,) The cost of each exit's language part, as a share of full depth."""
    config = load_info(folder).model
    return exit_fractions(config, config.max_tokens // 2)


def _trained(setting: Setting, name: str, network: dict[str, Any], train: dict[str, Any]) -> Path:
    values = read_values(setting.recipe)
    slug = name.replace(" ", "_")
    values["name"], values["network"] = slug, {**values["network"], **network}
    exits = len(Recipe.read(setting.recipe).network.config().exits)
    values["steps"] = [
        {"train": _switched(step["train"], train, exits)} if "train" in step else step
        for step in values["steps"]
    ]
    recipe = setting.out / "recipes" / f"{slug}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    write_text(recipe, yaml.safe_dump(values, sort_keys=False))
    most = torch.cuda.device_count() or setting.processes
    _call(
        "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", Recipe.read(recipe).processes_within(most),
        "-m", "deer_vla_ros", "train",
        "--config", recipe, "--out", setting.out, "--data", setting.data, "--threads", 1,
    )  # fmt: skip
    return setting.out / slug / "checkpoint"


def _switched(step: dict[str, Any], train: dict[str, Any], exits: int) -> dict[str, Any]:
    """A training step of the recipe with the changes `train`.

    The loss is a sum over heads. Without the auxiliary heads the weights of the guides (heatmap, point, turn)
    shrink with the number of heads, so that they keep their weight relative to each head.
    """
    kept = 1.0 if train.get("auxiliary_heads", True) else SHARED_PASSES / (SHARED_PASSES + exits)
    return {
        **step,
        **train,
        **{name: kept * step[name] for name in ("heatmap", "point", "turn") if name in step},
    }


def _calibrate(folder: Path, on_progress: Callable[[str], None]) -> None:
    try:
        found = Calibration.load(folder)
        if found is not None:
            found.check_weights(folder)
            return
    except UserError:
        pass  # The calibration belongs to other weights.
    on_progress(f"calibrating {folder}")
    _call("-m", "deer_vla_ros", "calibrate", "table", "--checkpoint", folder)


def _calibration(folder: Path) -> Calibration:
    found = Calibration.load(folder)
    if found is None:
        raise UserError(f"{folder} has no calibration, which thresholds are solved from: {REMEDY}")
    return found


def _by_features(folder: Path, out: Path, on_progress: Callable[[str], None]) -> Path:
    """A copy of the network whose exit criterion compares features instead of actions, calibrated for it."""
    other = out / f"{folder.name}_by_features"
    shutil.copytree(folder, other, dirs_exist_ok=True, ignore=shutil.ignore_patterns("calibration*"))
    info = dataclasses.replace(load_info(folder), delta="feature")
    write_text(other / CONFIG, json.dumps(info.to_dict(), indent=2) + "\n")
    _calibrate(other, on_progress)
    return other


def _call(*arguments: object) -> None:
    run_python(arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, "the ablations'")
