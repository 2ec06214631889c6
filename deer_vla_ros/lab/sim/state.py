"""The state of the table as frozen data: poses, joint positions, lights and images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.control.types import Pose

COLOURS = ("red", "blue", "pink")


@dataclass(frozen=True, eq=False)
class TableState:
    """Everything that a task can ask about. The base frame's y points to the arm's left.

    red, blue, pink: poses of the centres of the blocks (cubes of 46 mm). drawer: metres from closed, 0 to
    0.13 (open).
    slider: metres from its right end, 0 to 0.20 (left). led, lamp: whether they are on. switch: metres from
    its right end, 0 (off) to 0.06 (on). tcp: the measured pose. opening: metres between the finger pads, 0 to
    0.08 (open).
    """

    red: Pose
    blue: Pose
    pink: Pose
    drawer: float
    slider: float
    led: bool
    lamp: bool
    switch: float
    tcp: Pose
    opening: float

    def block(self, colour: str) -> Pose:
        """Returns the pose of the block of this colour. Raises ValueError if it is not one of COLOURS."""
        if colour not in COLOURS:
            raise ValueError(f"no {colour!r} block; the table has {', '.join(COLOURS)}")
        return getattr(self, colour)


@dataclass(frozen=True, eq=False)
class Views:
    """The images of both cameras at one time, RGB uint8: static (200, 200, 3) and gripper (84, 84, 3)."""

    static: np.ndarray
    gripper: np.ndarray
