"""What is true on the table? Plain frozen data: poses, joint positions, lights, images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COLOURS = ("red", "blue", "pink")


@dataclass(frozen=True, eq=False)
class Pose:
    """position (3,) metres and quaternion (4,) xyzw of unit length, in the base frame."""

    position: np.ndarray
    quaternion: np.ndarray


@dataclass(frozen=True, eq=False)
class TableState:
    """Everything a task can ask about; the base frame's y points to the arm's left.

    red, blue, pink: poses of the blocks' centres (cubes of 46 mm). drawer: metres it is out, 0 closed to 0.13 open.
    slider: metres from its right end, 0 right to 0.20 left. led, lamp: lit or not. switch: metres from its right end,
    0 off to 0.06 on. tcp: measured. opening: metres between the finger pads, 0 closed to 0.08 open.
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
        """The pose of the block called `colour`, one of COLOURS; ValueError for another word."""
        if colour not in COLOURS:
            raise ValueError(f"no {colour!r} block; the table has {', '.join(COLOURS)}")
        return getattr(self, colour)


@dataclass(frozen=True, eq=False)
class Views:
    """One moment seen by both cameras, RGB uint8: static (200, 200, 3) and gripper (84, 84, 3)."""

    static: np.ndarray
    gripper: np.ndarray
