"""What the host reads of an exit: eight numbers, which leave the device together in one copy."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deer_vla_ros.inference.exit_rule import DELTAS, compared
from deer_vla_ros.model.head import HeadOutput

NUMBERS = 8
"""How many numbers a reading has: the delta, the pose (6) and the gripper's probability."""


class Reading(NamedTuple):
    """The head's output after a layer, as numbers on the host.

    delta: the difference to the output before; NaN if there is none. pose: (6,) float32 in -1..1.
    gripper_probability: 0..1.
    """

    delta: float
    pose: np.ndarray
    gripper_probability: float

    @classmethod
    def of(cls, numbers: np.ndarray) -> Reading:
        """From one row of `packed`. Copies the numbers."""
        return cls(float(numbers[0]), numbers[1:7].copy(), float(numbers[7]))


def packed(delta: str, output: HeadOutput, now: Tensor, before: Tensor) -> Tensor:
    """(B, NUMBERS) float32: the readings of a head's output (B, 1, ...), on its device.

    delta: one of DELTAS. now, before: (B, ...) what this and the earlier output are `compared` by.
    """
    return torch.cat(
        (
            DELTAS[delta](now, before)[:, None],
            output.pose[:, 0].float(),
            output.gripper_logit[:, 0].float().sigmoid(),
        ),
        1,
    )


def values_compared(delta: str, output: HeadOutput) -> Tensor:
    """(B, ...) float32: the values of a head's output (B, 1, ...) that this delta compares."""
    return compared(delta, output.pose, output.feature)[:, 0]
