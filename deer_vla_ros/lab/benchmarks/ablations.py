"""What does each part of the method contribute? Networks trained without it, or run without it, on the same chains at the same cost.

Every network trains by one recipe with one switch thrown, then is calibrated as any checkpoint is. The criterion and the thresholds are
compared on the network that has all parts. What has been trained, calibrated or scored already is not done again.
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
from deer_vla_ros.files import read_yaml, write_text
from deer_vla_ros.lab.benchmarks.depth_curve import Point
from deer_vla_ros.lab.scoring.network_driver import ExitChoice
from deer_vla_ros.lab.training.recipe import Recipe
from deer_vla_ros.model.checkpoint import CONFIG, load_info
from deer_vla_ros.processes import run_python

ALL_PARTS = "all parts"
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    ALL_PARTS: ({}, {}),
    "no auxiliary heads": ({}, {"auxiliary_heads": False}),
    "no random exits": ({}, {"random_exits": False}),
    "no LSTM": ({"memory": False}, {}),
}
"""What is changed in the recipe's network, and in each of its training steps."""
SHARED_PASSES = 2
FEATURES, TIME = "criterion: feature similarity", "criterion: time step"


@dataclass(frozen=True)
class Setting:
    """recipe: the YAML file that all networks share; data: its data folder; processes: of an evaluation, and the most of a training;
    fraction: the average budget of every row, share of full depth."""

    recipe: Path
    data: Path
    out: Path
    processes: int
    fraction: float


def networks(setting: Setting, tell: Callable[[str], None]) -> dict[str, Path]:
    """The checkpoint folder of every network of TRAINED, trained and calibrated."""
    found = {}
    for name, (network, train) in TRAINED.items():
        tell(f"training: {name}")
        found[name] = _trained(setting, name, network, train)
        _calibrate(found[name], tell)
    return found


def points(
    setting: Setting,
    folders: dict[str, Path],
    score: Callable[[list[Point]], list[dict]],
    tell: Callable[[str], None],
) -> list[Point]:
    """Every row as one evaluation. score: the figures of some of them (depth_curve.measure), of which the time criterion needs one."""
    whole = folders[ALL_PARTS]
    calibration, budget = _calibration(whole), ExitChoice(budget=Budget(average_fraction=setting.fraction))
    rows = [Point("ablation", name, folder, budget) for name, folder in folders.items()]
    rows.append(Point("ablation", FEATURES, _by_features(whole, setting.out, tell), budget))
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
    """Which exit (a layer) holds until which step of an instruction, shallow ones first, so that each takes its share of all steps;
    steps_by_time: how many instructions were followed for longer than 0, 1, ... steps."""
    done = np.cumsum([0, *steps_by_time]) / sum(steps_by_time)
    until = np.abs(done[:, None] - np.cumsum(list(shares.values()))).argmin(0)
    return tuple(zip(shares, until.tolist()))[:-1]


def shares_within(calibration: Calibration, folder: Path, fraction: float) -> dict[int, float]:
    """By exit, the share of the steps that it takes under the calibrated thresholds of an average budget."""
    path, costs = calibration.path(len(calibration.exits)), _costs(folder)
    return dict(zip(calibration.exits, path.shares(path.position_within(costs, fraction)).tolist()))


def family_thresholds(
    calibration: Calibration, folder: Path, family: str, fraction: float
) -> tuple[float, ...]:
    """The paper's: quantiles of the deltas in windows of demonstrations."""
    return thresholds_within(family, calibration.window_deltas, _costs(folder), fraction)


def _costs(folder: Path) -> np.ndarray:
    """(exits,) language part of each exit, share of full depth."""
    config = load_info(folder).model
    return exit_fractions(config, config.max_tokens // 2)


def _trained(setting: Setting, name: str, network: dict[str, Any], train: dict[str, Any]) -> Path:
    values = read_yaml(setting.recipe, "config/training/ablation.yaml")
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
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", Recipe.read(recipe).processes_within(most), "-m", "deer_vla_ros", "train",
        "--config", recipe, "--out", setting.out, "--data", setting.data, "--threads", 1,
    )  # fmt: skip
    return setting.out / slug / "checkpoint"


def _switched(step: dict[str, Any], train: dict[str, Any], exits: int) -> dict[str, Any]:
    """A training step with its switch thrown. The loss sums over heads: with fewer of them its guides weigh as much less, as before beside each."""
    kept = 1.0 if train.get("auxiliary_heads", True) else SHARED_PASSES / (SHARED_PASSES + exits)
    return {
        **step,
        **train,
        **{name: kept * step[name] for name in ("heatmap", "point", "turn") if name in step},
    }


def _calibrate(folder: Path, tell: Callable[[str], None]) -> None:
    try:
        found = Calibration.load(folder)
        if found is not None:
            found.check_weights(folder)
            return
    except UserError:
        pass  # of another training
    tell(f"calibrating {folder}")
    _call("-m", "deer_vla_ros", "calibrate", "table", "--checkpoint", folder)


def _calibration(folder: Path) -> Calibration:
    found = Calibration.load(folder)
    if found is None:
        raise UserError(f"{folder} has no calibration, which thresholds are solved from: {REMEDY}")
    return found


def _by_features(folder: Path, out: Path, tell: Callable[[str], None]) -> Path:
    """The same network with exits that compare what their heads read, calibrated for that."""
    other = out / f"{folder.name}_by_features"
    shutil.copytree(folder, other, dirs_exist_ok=True, ignore=shutil.ignore_patterns("calibration*"))
    info = dataclasses.replace(load_info(folder), delta="feature")
    write_text(other / CONFIG, json.dumps(info.to_dict(), indent=2) + "\n")
    _calibrate(other, tell)
    return other


def _call(*arguments: object) -> None:
    run_python(arguments, {**os.environ, "OMP_NUM_THREADS": "1"}, "the ablations'")
