"""How much do neighbouring exits disagree, and how far is each from full depth? Measured on recorded observations.

Two measurements, both of them deltas of every exit: as inference meets them (the head's memory lives through the whole episode,
each step's left by an exit drawn at random), and on windows of demonstrations, as the paper defines them (deer.md, "From a budget
to thresholds"). Thresholds are solved from the first, because it is what a step will see.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.model.checkpoint import WEIGHTS, Checkpoint
from deer_vla_ros.model.head import ActionHead, HeadState

CALIBRATION = "calibration.safetensors"
WINDOW = 12
"""Steps of a window, as in training."""
REMEDY = "run `python -m deer_vla_ros calibrate` on the checkpoint folder"
FEW_SAMPLES = 200


@dataclass(frozen=True)
class Episode:
    """One instruction, and what the cameras saw while it stood."""

    instruction: str
    observations: list[Observation]


@dataclass(frozen=True)
class Calibration:
    """N steps of inference and M window positions, along the exits of the network.

    exits: layers, ascending. delta: name of the difference (`exit_rule.DELTAS`).
    deltas (N, exits): from the exit before it (the first: from the layer before it). poses (N, exits, 6) and gripper (N, exits):
    action at each exit, gripper as the probability of open. episodes, steps, tokens (N,): where each sample comes from.
    window_deltas (M, exits): as the paper defines them. provenance: what was measured on which weights, for people.
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
    provenance: dict[str, str]

    @property
    def deviations(self) -> np.ndarray:
        """(N, exits): root mean square distance of each exit's pose from that of the deepest."""
        return np.sqrt(((self.poses - self.poses[:, -1:]) ** 2).mean(-1))

    def check(self, exits: tuple[int, ...], delta: str) -> None:
        """Raises UserError, with the remedy, unless there are rows for `exits` and deltas of that name."""
        missing = sorted(set(exits) - set(self.exits))
        if missing:
            raise UserError(f"{CALIBRATION} has no rows for the exits at layers {missing}, only for {self.exits}: {REMEDY}")
        if delta != self.delta:
            raise UserError(f"{CALIBRATION} holds '{self.delta}' deltas, the checkpoint's rule uses '{delta}': {REMEDY}")

    def save(self, folder: Path) -> None:
        """Writes `calibration.safetensors` in one piece: interrupted, an older one stays as it was."""
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ARRAYS}
        about = {"exits": list(self.exits), "delta": self.delta, "provenance": self.provenance}
        scratch = folder / f".{CALIBRATION}.new"
        save_file(arrays, scratch, {"about": json.dumps(about)})
        scratch.chmod(0o644)
        scratch.replace(folder / CALIBRATION)

    @classmethod
    def load(cls, folder: Path) -> Calibration | None:
        """The calibration of a checkpoint folder; None where it has none. A malformed file raises UserError."""
        path = folder / CALIBRATION
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {})["about"])
                arrays = {name: file.get_tensor(name).astype(kind) for name, kind in ARRAYS.items()}
            calibration = cls(exits=tuple(about["exits"]), delta=about["delta"], provenance=about["provenance"], **arrays)
            samples, exits = len(calibration.deltas), len(calibration.exits)
            if calibration.poses.shape != (samples, exits, 6) or calibration.deltas.shape != (samples, exits):
                raise ValueError("arrays of shapes that do not belong together")
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: not a calibration ({error}): {REMEDY}") from error
        return calibration


ARRAYS = {
    "deltas": np.float32,
    "poses": np.float32,
    "gripper": np.float32,
    "episodes": np.int32,
    "steps": np.int32,
    "tokens": np.int32,
    "window_deltas": np.float32,
}
"""Arrays of the file and the type they are used in."""


def measure(checkpoint: Checkpoint, episodes: Iterable[Episode], provenance: dict[str, str], seed: int = 0) -> Calibration:
    """Every exit on every observation, one pass up the layers each. `episodes` is read once, so it may be longer than memory."""
    rows: dict[str, list] = {name: [] for name in ARRAYS}
    random = np.random.default_rng(seed)
    for number, (features, tokens) in enumerate(episode_features(checkpoint, episodes)):
        for step, (deltas, poses, gripper) in enumerate(_closed_loop(checkpoint, features, random)):
            for name, value in (("deltas", deltas), ("poses", poses), ("gripper", gripper)):
                rows[name].append(value)
            for name, value in (("episodes", number), ("steps", step), ("tokens", tokens)):
                rows[name].append(value)
        rows["window_deltas"] += _windows(checkpoint, features, random)
    if not rows["deltas"]:
        raise UserError("calibration: no observation was given: name recordings with camera images and an instruction")
    exits = checkpoint.info.model.exits
    rows["window_deltas"] = rows["window_deltas"] or [np.empty((0, len(exits)))]
    arrays = {name: np.concatenate(values) if name == "window_deltas" else np.array(values) for name, values in rows.items()}
    arrays = {name: arrays[name].astype(kind) for name, kind in ARRAYS.items()}
    about = {"samples": str(len(arrays["deltas"])), "seed": str(seed), **provenance, "weights_sha256": weights_sha256(checkpoint)}
    return Calibration(exits, checkpoint.info.delta, provenance=about, **arrays)


def weights_sha256(checkpoint: Checkpoint) -> str:
    """Of the weights' file; empty for a network that was never saved."""
    if checkpoint.folder is None:
        return ""
    digest = hashlib.sha256()
    with (checkpoint.folder / WEIGHTS).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def episode_features(checkpoint: Checkpoint, episodes: Iterable[Episode]) -> Iterator[tuple[Tensor, int]]:
    """(T, layers, width) features of each episode in turn, and its instruction's token count."""
    exits = checkpoint.info.model.exits
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, ExitRule(exits, (0.0,) * len(exits), checkpoint.info.delta))
    for episode in episodes:
        policy.reset(episode.instruction)
        yield torch.stack([policy.features(observation) for observation in episode.observations]), policy.tokens


def columns(features: Tensor, exits: tuple[int, ...]) -> Tensor:
    """(..., layers, width) -> (..., 1 + exits, width): the layer before the first exit, then the exits."""
    return features[..., [exits[0] - 1, *exits], :]


@torch.inference_mode()
def _closed_loop(
    checkpoint: Checkpoint, features: Tensor, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Step by step deltas (exits,), poses (exits, 6) and gripper probabilities (exits,) of one episode."""
    exits, head = checkpoint.info.model.exits, checkpoint.model.shared_head
    rule = ExitRule(exits, (0.0,) * len(exits), checkpoint.info.delta)
    state = head.initial_state()
    for step in columns(features, exits):
        output = head(step[:, None], HeadState(*(part.expand(-1, len(step), -1).contiguous() for part in state)))
        poses = output.pose[:, 0]
        deltas = [rule.measure(pose, before) for pose, before in zip(poses[1:], poses[:-1], strict=True)]
        yield np.array(deltas), poses[1:].float().cpu().numpy(), output.gripper_logit[1:, 0, 0].float().sigmoid().cpu().numpy()
        drawn = 1 + int(random.integers(len(exits)))
        state = HeadState(*(part[:, drawn : drawn + 1].contiguous() for part in output.state))


def _windows(checkpoint: Checkpoint, features: Tensor, random: np.random.Generator) -> list[np.ndarray]:
    """Deltas (M, exits) of the windows of one episode, one beginning every half window."""
    exits, rule = checkpoint.info.model.exits, checkpoint.info.delta
    found = []
    for begin in range(0, len(features) - WINDOW + 1, WINDOW // 2):
        window = features[None, begin : begin + WINDOW]
        drawn = torch.from_numpy(random.integers(len(exits), size=(1, WINDOW))).to(features.device)
        found.append(window_deltas(checkpoint.model.shared_head, window, drawn, exits, rule))
    return found


@torch.inference_mode()
def window_deltas(head: ActionHead, features: Tensor, drawn: Tensor, exits: tuple[int, ...], delta: str = "l2") -> np.ndarray:
    """The paper's calibration values, (B * positions, exits), of windows of features (B, W, layers, width).

    For each position q from W/2 - 1 to W - 2 the head reads the features of the exits `drawn` (B, W; indices) at positions before
    q, and then, from that same memory, the layer before the first exit and every exit at q; the values are the deltas of
    consecutive ones.
    """
    rule = ExitRule(exits, (0.0,) * len(exits), delta)
    batch, window = features.shape[:2]
    at_exits = features[:, :, list(exits)]
    past = at_exits.gather(2, drawn[..., None, None].expand(-1, -1, 1, features.shape[-1]))[:, :, 0]
    found = []
    for position in range(window // 2 - 1, window - 1):
        state = head.initial_state(batch)
        if position:
            state = head(past[:, :position], state).state
        poses = [head(feature[:, None], state).pose[:, 0] for feature in columns(features[:, position], exits).unbind(1)]
        found.append(
            [[rule.measure(pose[i], before[i]) for before, pose in zip(poses, poses[1:], strict=False)] for i in range(batch)]
        )
    return np.array(found).transpose(1, 0, 2).reshape(-1, len(exits))
