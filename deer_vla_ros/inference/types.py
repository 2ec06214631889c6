"""The input and the output of one control step, as frozen dataclasses without ROS and without torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Observation:
    """The policy's input: (H, W, 3) uint8 RGB images of the static and of the gripper camera.

    tcp: (7,) measured pose of the TCP in the frame of the action space, position [m] and unit quaternion
        xyzw. Networks without proprioception do not use it.
    """

    static: np.ndarray
    gripper: np.ndarray
    tcp: np.ndarray | None = None


@dataclass(frozen=True)
class Action:
    """The network's output: a relative motion of the TCP.

    pose: (6,) float32 in -1..1, x y z and XYZ Euler angles, in units of the checkpoint's action space.
    gripper_probability: the probability, 0..1, that the gripper should be open.
    """

    pose: np.ndarray
    gripper_probability: float

    @property
    def gripper(self) -> int:
        """+1 is open, -1 is closed. A probability of exactly one half is closed, as in the reference."""
        return 1 if self.gripper_probability > 0.5 else -1

    @property
    def is_finite(self) -> bool:
        """Whether no value is infinite or NaN."""
        return bool(np.isfinite(self.pose).all() and np.isfinite(self.gripper_probability))


class StopReason(enum.Enum):
    """The reason why a step stopped at its exit."""

    AGREED = "the delta at this exit is not above its threshold"
    DEEPEST = "the deepest exit allowed"
    STAGE = "between two probing steps: the depth of the last probing step"


@dataclass(frozen=True)
class StageTimes:
    """The milliseconds of each stage of one step. Each stage ends when the device has finished it."""

    preprocess: float
    vision: float
    language: float
    head: float

    @property
    def total(self) -> float:
        return self.preprocess + self.vision + self.language + self.head

    def shared(self, among: int) -> StageTimes:
        """One of `among` equal shares of these times."""
        return StageTimes(
            self.preprocess / among, self.vision / among, self.language / among, self.head / among
        )


@dataclass(frozen=True)
class PolicyStep:
    """One decision: the action, the exit, and the time that it took.

    exits: the exits allowed (layers, from 0). exit_index: the index of the exit taken.
    deltas, thresholds: one per exit. A delta is NaN if its exit was not probed.
    head_probes: how often the head was read. tokens: the tokens of the instruction.
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
