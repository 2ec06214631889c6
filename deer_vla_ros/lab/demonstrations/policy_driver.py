"""Who acts before the expert takes over? A checkpoint's network, at full depth, told what to do."""

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
    """Makes the network of a checkpoint folder follow an instruction; one instruction at a time."""
    checkpoint = load(folder)
    rule = ExitRule(
        checkpoint.info.model.exits[-1:], (-1.0,), checkpoint.info.delta
    )  # its one exit is the last one
    policy = DeerPolicy(checkpoint.model, checkpoint.tokenizer, rule)

    def drive(observation: Observation) -> Action:
        action = policy.step(observation).action
        if not action.is_finite:
            raise UserError(
                f"record-demos: an action of {folder} is not finite: its weights are damaged, or training diverged"
            )
        return action

    def told(instruction: str) -> Driver:
        policy.reset(instruction)
        return drive

    return told


def fingerprint(folder: Path) -> str:
    """SHA-256 of all that a network's actions depend on."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise UserError(
                f"record-demos: {folder / name} cannot be read ({error.strerror}): give --policy a checkpoint folder"
            ) from error
    return digest.hexdigest()
