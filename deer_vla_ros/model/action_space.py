"""The action space of a checkpoint: units, frame and gripper convention of its actions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.from_json import from_json

MIN_RATE_HZ, MAX_RATE_HZ = 0.1, 1000.0


@dataclass(frozen=True)
class ActionSpace:
    """How a normalised action is converted to a motion.

    frame: the name of the frame of motions, measured poses and targets.
    translation_m: the metres per step that a pose value of 1 means.
    rotation_rad: the radians per step that a rotation value of 1 means (XYZ Euler, fixed axes of `frame`).
    gripper_open, gripper_closed: the values of the gripper command for open and closed.
    rate_hz: the steps per second that the policy was trained for.
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
                f"action space: rate_hz is {self.rate_hz}: "
                f"give {MIN_RATE_HZ:g} to {MAX_RATE_HZ:g} steps per second"
            )
        if not self.frame:
            raise UserError("action space: frame is empty: name the frame that the action is expressed in")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> ActionSpace:
        """Reads JSON values. Raises a UserError that names an unknown or missing key or a wrong type, and
        `where` it stands."""
        return from_json(cls, values, f"{where}: action_space")


CALVIN = ActionSpace(
    frame="world", translation_m=0.02, rotation_rad=0.05, gripper_open=1.0, gripper_closed=-1.0, rate_hz=30.0
)
"""The action space of the released checkpoints (CALVIN, relative actions)."""

TABLETOP = ActionSpace(
    frame="base", translation_m=0.03, rotation_rad=0.15, gripper_open=0.08, gripper_closed=0.0, rate_hz=10.0
)
"""The action space of the simulated table. The gripper command is the gap between the fingers [m]."""
