"""Calibration on recorded observations: how far neighbouring exits differ, and each exit from full depth.

The deltas of every exit are measured twice: on whole episodes as inference meets them (the head's memory
lasts through the episode, and each step leaves the memory of an exit drawn at random), and on windows of
demonstrations as the paper defines them. Thresholds come from the first. Their cost is then measured in
closed loop: the exit that a step takes changes the memory, and with it the deltas of the next steps. Shares
counted on single samples were up to 18% off.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deer_vla_ros.budget.cost import cost_table
from deer_vla_ros.budget.path import ThresholdPath
from deer_vla_ros.errors import UserError, cause, shown
from deer_vla_ros.files import whole_file
from deer_vla_ros.inference.exit_rule import DELTAS, ExitRule, compared
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.checkpoint import WEIGHTS, Checkpoint
from deer_vla_ros.model.head import ActionHead, HeadState
from deer_vla_ros.untrusted import check_fetched, parse_json

CALIBRATION = "calibration.safetensors"
WINDOW = 12
"""Number of steps in a window, as in training."""
REMEDY = "run `python -m deer_vla_ros calibrate` on the checkpoint folder"
FEW_SAMPLES = 200
"""With fewer samples, the status warns about the thresholds. A measurement that a time limit ended has at
least so many."""


@dataclass(frozen=True)
class Episode:
    """One instruction and the observations under it. They are read once, so they may be a stream."""

    instruction: str
    observations: Iterable[Observation]


@dataclass(frozen=True)
class Calibration:
    """The measurements of N inference steps and M window positions at each exit of the network.

    exits: layers, ascending. delta: name of the difference (`exit_rule.DELTAS`). deltas (N, exits): from the
    exit before (the first: from the layer before). poses (N, exits, 6) and gripper (N, exits): the action at
    each exit; gripper is the probability of open. episodes, steps, tokens (N,): the origin of each sample.
    window_deltas (M, exits): the paper's deltas. paths: by number of allowed exits, the levels
    (corners, exits - 1) of a path of thresholds, and the shares (corners, exits) measured on it in closed
    loop. provenance: texts for users on what was measured; "weights" is the fingerprint of the weights.
    """

    exits: tuple[int, ...]
    delta: str
    deltas: np.ndarray
    poses: np.ndarray
    gripper: np.ndarray
    episodes: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    window_deltas: np.ndarray
    paths: dict[int, tuple[np.ndarray, np.ndarray]]
    provenance: dict[str, str]

    def path(self, count: int) -> ThresholdPath:
        """The path of thresholds of the first `count` exits."""
        return ThresholdPath(np.sort(self.deltas[:, : count - 1].T, axis=1), *self.paths[count])

    @property
    def deviations(self) -> np.ndarray:
        """(N, exits) Root mean square distance of each exit's pose from that of the deepest exit."""
        return np.sqrt(((self.poses - self.poses[:, -1:]) ** 2).mean(-1))

    def check(self, exits: tuple[int, ...], delta: str) -> None:
        """Raises UserError, with the remedy, if exits or the name of the delta differ."""
        if exits != self.exits:
            raise UserError(
                f"{CALIBRATION} has rows for the exits at layers {self.exits}, "
                f"the network has {exits}: {REMEDY}"
            )
        if delta != self.delta:
            raise UserError(
                f"{CALIBRATION} holds '{self.delta}' deltas, the checkpoint's rule uses '{delta}': {REMEDY}"
            )

    def save(self, folder: Path) -> None:
        """Writes `calibration.safetensors` atomically: an interruption leaves an older file unchanged."""
        arrays = {
            name: np.ascontiguousarray(getattr(self, name).astype(STORED.get(name, kind)))
            for name, kind in ARRAYS.items()
        }
        for count, (levels, shares) in self.paths.items():
            arrays |= {f"path.{count}.levels": levels, f"path.{count}.shares": shares}
        about = {"exits": list(self.exits), "delta": self.delta, "provenance": self.provenance}
        with whole_file(folder / CALIBRATION, sum(array.nbytes for array in arrays.values())) as scratch:
            save_file(arrays, scratch, {"about": json.dumps(about)})

    def check_weights(self, folder: Path) -> None:
        """Raises UserError, with the remedy, if it was measured on other weights than those in the folder."""
        if self.provenance.get("weights") != fingerprint(folder):
            raise UserError(f"{CALIBRATION} was measured on other weights than {folder / WEIGHTS}: {REMEDY}")

    def _check_arrays(self) -> None:
        """Raises ValueError if the shapes of the arrays do not match, or values cannot be."""
        samples, exits = len(self.deltas), len(self.exits)
        if any(len(getattr(self, name)) != samples for name in ("gripper", "episodes", "steps", "tokens")):
            raise ValueError("arrays of different lengths")
        if self.gripper.shape != (samples, exits) or self.window_deltas.shape[1:] != (exits,):
            raise ValueError("arrays of shapes that do not belong together")
        if samples == 0 or self.poses.shape != (samples, exits, 6) or self.deltas.shape != (samples, exits):
            raise ValueError("arrays of shapes that do not belong together")
        for count, (levels, shares) in self.paths.items():
            if (
                levels.shape != (len(shares), count - 1)
                or shares.shape != (len(shares), count)
                or len(shares) == 0
            ):
                raise ValueError(
                    f"the path of {count} exits has arrays of shapes that do not belong together"
                )
            if not _are_shares(levels) or not _are_shares(shares) or (np.diff(levels, axis=0) < 0).any():
                raise ValueError(f"the path of {count} exits is not of rising levels and shares from 0 to 1")
            if (np.abs(shares.sum(1) - 1) > 1e-3).any():
                raise ValueError(f"the path of {count} exits has shares whose sum is not 1")
        if not all(np.isfinite(array).all() for array in (self.deltas, self.poses, self.window_deltas)):
            raise ValueError("values that are not finite")
        if not _are_shares(self.gripper):
            raise ValueError("probabilities of an open gripper that are not from 0 to 1")

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """The calibration in a checkpoint folder, None if it has none. A malformed one raises UserError."""
        path = folder / CALIBRATION
        if not path.is_file():
            return None
        check_fetched(path)
        try:
            with safe_open(path, framework="np") as file:
                about = parse_json((file.metadata() or {})["about"])
                _check_about(about)
                arrays = {name: _array(file, name, kind) for name, kind in ARRAYS.items()}
                counts = range(1, len(about["exits"]) + 1)
                paths = {
                    n: tuple(_array(file, f"path.{n}.{part}", np.float64) for part in ("levels", "shares"))
                    for n in counts
                }
            calibration = cls(
                exits=tuple(about["exits"]),
                delta=about["delta"],
                provenance=about["provenance"],
                paths=paths,
                **arrays,
            )
            calibration._check_arrays()
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a calibration ({cause(error)}): {REMEDY}") from error
        return calibration


def _array(file: safe_open, name: str, kind: type) -> np.ndarray:
    """An array of the file as this type. Raises ValueError for whole numbers in place of others and so on."""
    array = file.get_tensor(name)
    if array.dtype.kind != np.dtype(kind).kind:
        raise ValueError(f"{name} has the type {array.dtype}")
    return array.astype(kind)


def _are_shares(array: np.ndarray) -> bool:
    return bool(((array >= 0) & (array <= 1)).all())  # NaN is neither


def _check_about(about: Any) -> None:
    """Raises ValueError unless these are the facts that `Calibration.save` writes beside the arrays."""
    if not isinstance(about, dict) or about.keys() != {"exits", "delta", "provenance"}:
        raise ValueError("it does not say its exits, delta and provenance")
    exits, facts = about["exits"], about["provenance"]
    if not isinstance(exits, list) or not exits or not all(type(layer) is int for layer in exits):
        raise ValueError("exits are no list of layers")
    if about["delta"] not in DELTAS:  # a TypeError for a list
        raise ValueError(f"its delta is {shown(about['delta'])}")
    if not isinstance(facts, dict) or not all(isinstance(fact, str) for fact in facts.values()):
        raise ValueError("its provenance is not text by name")


ARRAYS = {
    "deltas": np.float32,
    "poses": np.float32,
    "gripper": np.float32,
    "episodes": np.int32,
    "steps": np.int32,
    "tokens": np.int32,
    "window_deltas": np.float32,
}
"""The arrays of the file, with the types that the program uses."""
STORED = {"poses": np.float16, "gripper": np.float16}
"""The arrays whose type in the file is smaller: actions are only compared."""


def measure(
    checkpoint: Checkpoint,
    episodes: Iterable[Episode],
    provenance: dict[str, str],
    seed: int = 0,
    seconds: float = math.inf,
    on_closed_loop: Callable[[int, int], None] = lambda done, total: None,
) -> Calibration:
    """Runs every exit on every observation, with one pass through the layers for each observation.

    Images are read once and not kept. The head's inputs are kept: (1 + exits) * width numbers per step.
    seconds: the most time. Half of it is for the observations, the rest for the closed loop. What was
        measured then is the result, and the provenance says of how many steps.
    on_closed_loop: called after each step of the closed loop with the number of steps so far and in all.

    Raises UserError if there are no observations, if there are fewer than FEW_SAMPLES when the time is over,
    or if an action is not finite.
    """
    info, begin = checkpoint.info, time.monotonic()
    rows: dict[str, list] = {name: [] for name in ARRAYS}
    random, kept = np.random.default_rng(seed), []
    limit = _Limit(begin + seconds / 2)
    episodes = _within(limit, episodes)
    for number, (features, tokens) in enumerate(episode_features(checkpoint, episodes)):
        kept.append(columns(features, info.model.exits))
        for step, (deltas, poses, gripper) in enumerate(_random_walk(checkpoint, kept[-1], random)):
            row = {
                "deltas": deltas,
                "poses": poses,
                "gripper": gripper,
                "episodes": number,
                "steps": step,
                "tokens": tokens,
            }
            for name, value in row.items():
                rows[name].append(value)
        rows["window_deltas"] += _windows(checkpoint, kept[-1], random)
    if not rows["deltas"]:
        raise UserError(
            "calibration: no observation was given: name recordings with camera images and an instruction"
        )
    samples = len(rows["deltas"])
    if limit.was_met and samples < FEW_SAMPLES:
        raise UserError(
            f"calibration: {samples} steps were measured in half of {seconds / 60:g} minutes, and "
            f"{FEW_SAMPLES} are needed: allow {math.ceil(seconds / 60 * FEW_SAMPLES / samples)} minutes, or "
            "use a faster device; nothing was written"
        )
    rows["window_deltas"] = rows["window_deltas"] or [np.empty((0, len(info.model.exits)))]
    arrays = {
        name: np.concatenate(values) if name == "window_deltas" else np.array(values)
        for name, values in rows.items()
    }
    arrays = {name: arrays[name].astype(kind) for name, kind in ARRAYS.items()}
    about = {"samples": str(samples), "seed": str(seed), **provenance}
    if limit.was_met:
        about["time limit"] = f"{seconds / 60:g} minutes, over after {samples} steps"
    if checkpoint.folder is not None:
        about["weights"] = fingerprint(checkpoint.folder)
    calibration = Calibration(info.model.exits, info.delta, paths={}, provenance=about, **arrays)
    if not (np.isfinite(calibration.deltas).all() and np.isfinite(calibration.poses).all()):
        raise UserError(
            "calibration: the network's actions are not all finite on these recordings: check the weights"
        )
    paths, fewest = _measured_paths(checkpoint, calibration, kept, begin + seconds, on_closed_loop)
    if fewest < samples:
        about["closed loop"] = f"{fewest} steps"
    return dataclasses.replace(calibration, paths=paths, provenance=about)


class _Limit:
    """Counts the steps of a measurement, and ends it at the moment `end` [s, time.monotonic].

    was_met: whether it has ended the measurement. on_step: called after each step with the number of steps.
    """

    def __init__(self, end: float, on_step: Callable[[int], None] = lambda steps: None):
        self._end, self._on_step = end, on_step
        self.steps, self.was_met = 0, False

    def goes_on(self) -> bool:
        """Counts a step. Returns whether another one may follow."""
        self.steps += 1
        self._on_step(self.steps)
        self.was_met = time.monotonic() >= self._end
        return not self.was_met


def _within(limit: _Limit, episodes: Iterable[Episode]) -> Iterator[Episode]:
    """The episodes until the limit is met. The last one may have lost observations, but not its first."""

    def observed(observations: Iterable[Observation]) -> Iterator[Observation]:
        for observation in observations:
            yield observation
            if not limit.goes_on():
                return

    for episode in episodes:
        if limit.was_met:
            return
        yield Episode(episode.instruction, observed(episode.observations))


def _measured_paths(
    checkpoint: Checkpoint,
    calibration: Calibration,
    episodes: list[Tensor],
    end: float,
    on_progress: Callable[[int, int], None],
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], int]:
    """For each number of exits: a path's levels, and the shares of its corners in closed loop. And how many
    steps the shares cover at least.

    end: of the time that they share [s, time.monotonic]. Each number of exits gets an equal part of what is
    left.
    """
    model = checkpoint.info.model
    layers = np.cumsum(cost_table(model, model.max_tokens // 2).layers)
    paths, fewest, samples, numbers = {}, len(calibration.deltas), len(calibration.deltas), len(model.exits)
    for count in range(1, numbers + 1):
        now, before = time.monotonic(), (count - 1) * samples
        limit = _Limit(
            now + (end - now) / (numbers + 1 - count),
            lambda steps, before=before: on_progress(before + steps, numbers * samples),
        )
        deltas, deviations = calibration.deltas[:, :count], calibration.deviations[:, :count]
        path = ThresholdPath.ordered(deltas, deviations, layers[list(model.exits[:count])])
        thresholds = np.array([path.thresholds(corner) for corner in range(len(path.levels))])
        shares = closed_loop_shares(
            checkpoint.model.shared_head, episodes, thresholds, calibration.delta, limit.goes_on
        )
        paths[count], fewest = (path.levels, shares), min(fewest, limit.steps)
    return paths, fewest


@torch.inference_mode()
def closed_loop_shares(
    head: ActionHead,
    episodes: list[Tensor],
    thresholds: np.ndarray,
    delta: str,
    goes_on: Callable[[], bool] = lambda: True,
) -> np.ndarray:
    """(P, exits) The share of the steps that each exit takes under each of P rules.

    episodes: features (T, 1 + exits or more, width) of each episode. thresholds (P, exits): one rule per row.
    Each rule has its own memory; all rules run together as one batch per step. goes_on: called after each
    step; False ends the measurement.
    """
    rules, exits = thresholds.shape
    limits = torch.from_numpy(thresholds).to(episodes[0].device)
    limits[:, -1] = float("inf")
    counts = torch.zeros(rules, exits, dtype=torch.int64, device=limits.device)
    every = torch.arange(rules, device=limits.device)
    going = True
    for features in episodes:
        if not going:
            break
        state = head.initial_state(rules)
        for step in features[:, : exits + 1]:
            batch = step[:, None].expand(-1, rules, -1).reshape(-1, 1, step.shape[-1])  # (1 + exits) * rules
            output = head(batch, HeadState(*(part.repeat(1, exits + 1, 1) for part in state)))
            read = compared(delta, output.pose, output.feature)[:, 0].unflatten(0, (exits + 1, rules))
            stops = DELTAS[delta](read[1:], read[:-1]).T.double() <= limits
            taken = stops.int().argmax(1)
            counts[every, taken] += 1
            chosen = (taken + 1) * rules + every
            state = HeadState(*(part[:, chosen] for part in output.state))
            going = goes_on()
            if not going:
                break
    return (counts / counts.sum(1, keepdim=True)).cpu().numpy()


def fingerprint(folder: Path) -> str:
    """A hash of the weights' names and shapes and of the shared head's values.

    It distinguishes training runs without reading all weights.
    """
    digest = hashlib.sha256()
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(f"{name} {file.get_slice(name).get_shape()}\n".encode())
            if name.startswith("shared_head."):
                digest.update(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def episode_features(checkpoint: Checkpoint, episodes: Iterable[Episode]) -> Iterator[tuple[Tensor, int]]:
    """For each episode: features (T, layers, width), and the number of tokens of its instruction."""
    exits = checkpoint.info.model.exits
    policy = DeerPolicy(
        checkpoint.model, checkpoint.tokenizer, ExitRule(exits, (0.0,) * len(exits), checkpoint.info.delta)
    )
    for episode in episodes:
        tokens = policy.reset(episode.instruction)
        yield torch.stack([policy.features(observation) for observation in episode.observations]), tokens


def columns(features: Tensor, exits: tuple[int, ...]) -> Tensor:
    """(..., layers, width) to (..., 1 + exits, width): the layer before the first exit, then the exits."""
    return features[..., [exits[0] - 1, *exits], :]


@torch.inference_mode()
def _random_walk(
    checkpoint: Checkpoint, features: Tensor, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each step: deltas (exits,), poses (exits, 6) and gripper probabilities (exits,).

    features: the `columns` of one episode. The memory that a step leaves is that of a random exit.
    """
    exits, head = checkpoint.info.model.exits, checkpoint.model.shared_head
    state = head.initial_state()
    for step in features:
        output = head(
            step[:, None], HeadState(*(part.expand(-1, len(step), -1).contiguous() for part in state))
        )
        poses, read = output.pose[:, 0], compared(checkpoint.info.delta, output.pose, output.feature)[:, 0]
        deltas = DELTAS[checkpoint.info.delta](read[1:], read[:-1])
        yield (
            deltas.cpu().numpy(),
            poses[1:].float().cpu().numpy(),
            output.gripper_logit[1:, 0, 0].float().sigmoid().cpu().numpy(),
        )
        drawn = 1 + int(random.integers(len(exits)))
        state = HeadState(*(part[:, drawn : drawn + 1].contiguous() for part in output.state))


def _windows(checkpoint: Checkpoint, features: Tensor, random: np.random.Generator) -> list[np.ndarray]:
    """Deltas (M, exits) of one episode's `columns`, in windows that begin every half window."""
    exits, found = checkpoint.info.model.exits, []
    for begin in range(0, len(features) - WINDOW + 1, WINDOW // 2):
        window = features[None, begin : begin + WINDOW]
        drawn = torch.from_numpy(random.integers(len(exits), size=(1, WINDOW))).to(features.device)
        found.append(window_deltas(checkpoint.model.shared_head, window, drawn, checkpoint.info.delta))
    return found


@torch.inference_mode()
def window_deltas(head: ActionHead, features: Tensor, drawn: Tensor, delta: str = "l2") -> np.ndarray:
    """The paper's deltas, (B * positions, exits), in windows of features (B, W, 1 + exits, width).

    features: `columns`. drawn (B, W): indices of exits. For each position q from W/2 - 1 to W - 2, the head
    reads the features of the drawn exits at the positions before q. Then, with this memory, it reads the
    layer before the first exit and each exit at q. The deltas are those of consecutive outputs at q.
    """
    batch, window, count = features.shape[:3]
    past = features.gather(2, (drawn + 1)[..., None, None].expand(-1, -1, 1, features.shape[-1]))[:, :, 0]
    found = []
    for position in range(window // 2 - 1, window - 1):
        state = head.initial_state(batch)
        if position:
            state = head(past[:, :position], state).state
        outputs = [head(features[:, position, column][:, None], state) for column in range(count)]
        read = torch.stack([compared(delta, output.pose, output.feature)[:, 0] for output in outputs])
        found.append(DELTAS[delta](read[1:], read[:-1]).T.cpu().numpy())
    return np.stack(found, axis=1).reshape(-1, count - 1)
