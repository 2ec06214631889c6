"""What goes into a control step and what comes out? Plain frozen data, no ROS and no network in it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """What the policy sees at one moment: (H, W, 3) uint8 RGB images of the static and of the gripper camera.

    tcp: (7,) measured pose of the TCP in the action space's frame, position [m] and unit quaternion xyzw; networks without
    proprioception do not look at it.
    """

    static: np.ndarray
    gripper: np.ndarray
    tcp: np.ndarray | None = None


@dataclass(frozen=True)
class Action:
    """Relative motion of the TCP as the network gives it.

    pose: (6,) float32 in -1..1, x y z and XYZ Euler angles, in units of the checkpoint's action space.
    gripper_probability: probability that the gripper is to be open, 0..1.
    """

    pose: np.ndarray
    gripper_probability: float

    @property
    def gripper(self) -> int:
        """+1 open, -1 closed; exactly one half means closed, as in the reference."""
        return 1 if self.gripper_probability > 0.5 else -1

    @property
    def is_finite(self) -> bool:
        """Whether every value is a number that can be acted upon."""
        return bool(np.isfinite(self.pose).all() and np.isfinite(self.gripper_probability))


class StopReason(enum.Enum):
    """Why a step stopped where it did."""

    AGREED = "the delta at this exit is not above its threshold"
    DEEPEST = "the deepest exit allowed"
    STAGE = "between two probing steps: the depth of the last probing step"


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of each stage of one step, the device synchronised at every boundary."""

    preprocess: float
    vision: float
    language: float
    head: float

    @property
    def total(self) -> float:
        return self.preprocess + self.vision + self.language + self.head

    def shared(self, among: int) -> StageTimes:
        """One of `among` equal shares."""
        return StageTimes(
            self.preprocess / among, self.vision / among, self.language / among, self.head / among
        )


@dataclass(frozen=True)
class PolicyStep:
    """One decision: the action, how deep it thought, and what that took.

    deltas and thresholds run along `exits` (layers, from 0); a delta is NaN where the exit was not probed.
    """

    action: Action
    exits: tuple[int, ...]
    exit_index: int
    stop: StopReason
    deltas: tuple[float, ...]
    thresholds: tuple[float, ...]
    head_probes: int
    tokens: int
    times: StageTimes

    @property
    def exit_layer(self) -> int:
        return self.exits[self.exit_index]

    @property
    def layers_run(self) -> int:
        return self.exit_layer + 1
