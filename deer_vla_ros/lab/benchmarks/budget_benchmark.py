"""The budget benchmark: requested against achieved mean costs, on held-out observations and on changed
images.

The layers run once per observation. Every budget is then tested on the same features, with the policy's own
code (`step_on_features`), a memory of its own, and thresholds that are solved as the node solves them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from deer_vla_ros.budget.calibration import Calibration, episode_features
from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.keeper import RECENT, BudgetKeeper
from deer_vla_ros.budget.types import Budget
from deer_vla_ros.files import write_json
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.lab.scoring.table_episodes import table_episodes
from deer_vla_ros.model.checkpoint import Checkpoint, load

MARGIN = 0.03
"""Distance of the outermost budgets from the ends of the feasible range, as a share of that range: at the
ends every step takes the same exit."""
SETTLING = 200
"""Steps at the start that do not count for the worst window."""
SHIFT_BRIGHTNESS, SHIFT_NOISE = 0.55, 25.0
SHIFT = f"images at {SHIFT_BRIGHTNESS:g} of their brightness, Gaussian noise of {SHIFT_NOISE:g} levels"


@dataclass(frozen=True)
class BudgetRow:
    """The result of one budget. requested, expected, achieved: mean costs as shares of full depth, 0..1.

    expected: the mean on the calibration. relative_error: achieved / requested - 1. exit_shares: each exit's
    share of the steps. shifted_governed, shifted_ungoverned: the relative error of the worst window of RECENT
    steps on changed images, with and without the governor.
    """

    requested: float
    expected: float
    achieved: float
    relative_error: float
    exit_shares: list[float]
    shifted_governed: float
    shifted_ungoverned: float


@dataclass(frozen=True)
class _Job:
    """The input of a worker: folders of the checkpoint, and of features (N, layers, width) and episodes."""

    folder: Path
    features: Path


def shifted(observation: Observation) -> Observation:
    """The same scene in darker light and with a noisier camera. The noise is seeded from the image itself."""

    def alter(image: np.ndarray) -> np.ndarray:
        random = np.random.default_rng(int(image[::7, ::7].astype(np.int64).sum()))
        noisy = image * SHIFT_BRIGHTNESS + random.normal(0.0, SHIFT_NOISE, image.shape)
        return np.clip(noisy, 0, 255).astype(np.uint8)

    return Observation(alter(observation.static), alter(observation.gripper), observation.tcp)


def measure(
    folder: Path,
    seeds: range,
    steps: int,
    shifted_seeds: range,
    budgets: int,
    scratch: Path,
    processes: int,
    on_progress: Callable[[str], None],
) -> tuple[list[BudgetRow], int]:
    """Returns one row per budget, and the number of steps that cost more than a requested peak.

    seeds, shifted_seeds: demonstrations of `steps` steps per seed, with usual and with changed images.
    budgets: the number of budgets. scratch: a folder for the features. on_progress: gets lines of text.
    """
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        on_progress(f"{len(seeds)} episodes of {steps} steps, every layer of each")
        usual = _features(pool, folder, seeds, steps, False, scratch / "usual", processes)
        other = _features(pool, folder, shifted_seeds, steps, True, scratch / "shifted", processes)
        checkpoint = load(folder)
        rows = []
        for row in pool.map(
            _row, [(usual, other, fraction) for fraction in budget_fractions(checkpoint, budgets)]
        ):
            on_progress(
                f"asked for {row.requested:.3f} of full depth, "
                f"got {row.achieved:.3f} ({row.relative_error:+.1%})"
            )
            rows.append(row)
        violations = sum(
            pool.map(_peak_violations, [(usual, index) for index in range(len(checkpoint.info.model.exits))])
        )
    return rows, violations


def budget_fractions(checkpoint: Checkpoint, count: int) -> np.ndarray:
    """(count,) Budgets across the feasible range, as shares of full depth."""
    low, high = _keeper(checkpoint).status().feasible["average_fraction"]
    return low + np.linspace(MARGIN, 1 - MARGIN, count) * (high - low)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _keeper(checkpoint: Checkpoint) -> BudgetKeeper:
    info = checkpoint.info
    return BudgetKeeper(
        info.model,
        info.delta,
        info.thresholds,
        checkpoint.model.layer_bytes,
        Calibration.load(checkpoint.folder),
    )


def _features(
    pool: ProcessPoolExecutor,
    folder: Path,
    seeds: range,
    steps: int,
    is_shifted: bool,
    out: Path,
    processes: int,
) -> _Job:
    """Computes the features of all episodes and writes them to files, which the workers map into memory."""
    chunks = [seeds[index :: processes * 4] for index in range(processes * 4)]
    parts = list(
        pool.map(_chunk_features, [(folder, chunk, steps, is_shifted) for chunk in chunks if len(chunk)])
    )
    out.mkdir(parents=True)
    np.save(out / "features.npy", np.concatenate([features for features, _ in parts]))
    write_json(out / "episodes.json", [episode for _, episodes in parts for episode in episodes])
    return _Job(folder, out)


def _chunk_features(job: tuple[Path, range, int, bool]) -> tuple[np.ndarray, list[tuple[str, int]]]:
    folder, seeds, steps, is_shifted = job
    alter = {"alter": shifted} if is_shifted else {}
    episodes = list(table_episodes(seeds, steps, **alter))
    features = [found.numpy() for found, _ in episode_features(load(folder), episodes)]
    return np.concatenate(features), [
        (episode.instruction, len(episode.observations)) for episode in episodes
    ]


def _walk(checkpoint: Checkpoint, job: _Job, budget: Budget) -> Iterator[tuple[float, float, int]]:
    """Yields the cost [GMAC], the share of full depth and the exit's index of every step of all episodes."""
    keeper = _keeper(checkpoint)
    keeper.set(budget)
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, keeper.rule)
    features, begin = np.load(job.features / "features.npy", mmap_mode="r"), 0
    for instruction, length in json.loads((job.features / "episodes.json").read_text()):
        keeper.set_tokens(policy.reset(instruction))
        for step_features in torch.from_numpy(np.array(features[begin : begin + length])):
            policy.rule = keeper.rule
            step = policy.step_on_features(step_features)
            cost = keeper.book(step)
            yield cost.language_gmac, cost.fraction, step.exit_index
        begin += length


def report(rows: list[BudgetRow], violations: int, seeds: dict[str, str]) -> dict[str, object]:
    """The report that `--json` writes."""
    return {
        "worst_relative_error": max(abs(row.relative_error) for row in rows),
        "worst_relative_error_shifted_governed": max(row.shifted_governed for row in rows),
        "worst_relative_error_shifted_ungoverned": max(row.shifted_ungoverned for row in rows),
        "peak_violations": violations,
        "shift": SHIFT,
        "seeds": seeds,
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def _row(job: tuple[_Job, _Job, float]) -> BudgetRow:
    usual, other, fraction = job
    checkpoint = load(usual.folder)
    keeper = _keeper(checkpoint)
    budget = Budget(average_fraction=float(fraction), governor=False)
    keeper.set(budget)
    _, high = keeper.status().feasible["average_gmac"]
    steps = list(_walk(checkpoint, usual, budget))
    achieved = float(np.mean([share for _, share, _ in steps]))
    taken = np.bincount([index for _, _, index in steps], minlength=len(checkpoint.info.model.exits))
    worst = {
        governed: _worst_window(
            _walk(checkpoint, other, dataclasses.replace(budget, governor=governed)), fraction
        )
        for governed in (True, False)
    }
    return BudgetRow(
        requested=float(fraction),
        expected=keeper.status().expected_gmac / high,
        achieved=achieved,
        relative_error=achieved / fraction - 1,
        exit_shares=(taken / len(steps)).tolist(),
        shifted_governed=worst[True],
        shifted_ungoverned=worst[False],
    )


def _worst_window(steps: Iterator[tuple[float, float, int]], fraction: float) -> float:
    """The largest relative error of the mean over RECENT steps, after the first SETTLING steps."""
    shares = np.array([share for _, share, _ in steps])[SETTLING:]
    means = np.convolve(shares, np.ones(RECENT) / RECENT, mode="valid")
    return float(np.abs(means / fraction - 1).max())


def _peak_violations(job: tuple[_Job, int]) -> int:
    """The number of steps that cost more than a requested peak, which is the cost of exit number `index`.

    The requested average is full depth. The first exit is always allowed, even if a long instruction makes it
    dearer than the peak.
    """
    features, index = job
    checkpoint = load(features.folder)
    model = checkpoint.info.model
    peak = cost_table(model, model.max_tokens // 2).language(model.exits[index] + 1)
    budget = Budget(peak_gmac=peak, average_fraction=1.0)
    return sum(gmac > peak and exit_index > 0 for gmac, _, exit_index in _walk(checkpoint, features, budget))
