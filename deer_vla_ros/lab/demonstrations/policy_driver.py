"""The policy that acts before the expert takes over: a checkpoint's network at full depth."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.exit_rule import ExitRule
from deer_vla_ros.inference.policy import DeerPolicy
from deer_vla_ros.inference.types import Action, Observation
from deer_vla_ros.lab.demonstrations.demonstrations import Driver
from deer_vla_ros.model.checkpoint import CONFIG, TOKENIZER, WEIGHTS, load


def new_driver(folder: Path) -> Callable[[str], Driver]:
    """Returns a function that makes the network of a folder follow an instruction, one at a time."""
    checkpoint = load(folder)
    only_last = checkpoint.info.model.exits[-1:]
    rule = ExitRule(only_last, (-1.0,), checkpoint.info.delta)
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule)

    def drive(observation: Observation) -> Action:
        action = policy.step(observation).action
        if not action.is_finite:
            raise UserError(
                f"record-demos: an action of {folder} is not finite: its weights are damaged, "
                "or training diverged"
            )
        return action

    def driver_of(instruction: str) -> Driver:
        policy.reset(instruction)
        return drive

    return driver_of


def network_files(folder: Path) -> tuple[Path, ...]:
    """Returns the paths of all files that a network's actions depend on."""
    return tuple(folder / name for name in (CONFIG, WEIGHTS, TOKENIZER))


def fingerprint(folder: Path) -> str:
    """Returns the SHA-256 of all files that a network's actions depend on."""
    digest = hashlib.sha256()
    for path in network_files(folder):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"record-demos: {path} cannot be read ({error.strerror}): give --policy a checkpoint folder"
            ) from error
    return digest.hexdigest()
