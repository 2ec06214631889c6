"""What does an action mean on the robot? Units, frame and gripper convention, declared by the checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.from_json import from_json

MIN_RATE_HZ, MAX_RATE_HZ = 0.1, 1000.0


@dataclass(frozen=True)
class ActionSpace:
    """How a normalised action becomes a motion.

    frame: name of the frame in which motions, measured poses and targets are expressed.
    translation_m: metres that a pose value of 1 stands for, per step.
    rotation_rad: radians that a rotation value of 1 stands for, per step (XYZ Euler, fixed axes of `frame`).
    gripper_open, gripper_closed: value of the gripper command for open and closed.
    rate_hz: steps per second that the policy was trained at.
    """

    frame: str
    translation_m: float
    rotation_rad: float
    gripper_open: float
    gripper_closed: float
    rate_hz: float

    def __post_init__(self) -> None:
        for name in ("translation_m", "rotation_rad", "rate_hz"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"action space: {name} is {value}: give a positive number")
        for name in ("gripper_open", "gripper_closed"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"action space: {name} is {getattr(self, name)}: give a finite number")
        if not MIN_RATE_HZ <= self.rate_hz <= MAX_RATE_HZ:
            raise UserError(
                f"action space: rate_hz is {self.rate_hz}: give {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g} steps per second"
            )
        if not self.frame:
            raise UserError("action space: frame is empty: name the frame that the action is expressed in")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpace:
        """From `config.json`; unknown or missing keys and values of another type raise UserError by name."""
        return from_json(cls, values, "config.json: action_space")


CALVIN = ActionSpace(
    frame="world", translation_m=0.02, rotation_rad=0.05, gripper_open=1.0, gripper_closed=-1.0, rate_hz=30.0
)
"""What the released checkpoints were trained on (CALVIN, relative actions)."""

TABLETOP = ActionSpace(
    frame="base", translation_m=0.03, rotation_rad=0.15, gripper_open=0.08, gripper_closed=0.0, rate_hz=10.0
)
"""The simulated table's: the gripper command is the opening between the fingers in metres."""
