"""The fake robot's arm: a point that follows its target with a lag."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

HOME = (0.4, 0.0, 0.3)
LAG_S = 0.12
"""Time constant of the first-order lag."""


@dataclass
class Arm:
    """The state of the arm. position: (3,) [m]. quaternion: (4,) xyzw.

    target: the commanded position and quaternion; None if the arm has to stay where it is.
    """

    position: np.ndarray = field(default_factory=lambda: np.array(HOME))
    quaternion: np.ndarray = field(default_factory=lambda: np.array([1.0, 0.0, 0.0, 0.0]))
    target: tuple[np.ndarray, np.ndarray] | None = None
    _push: tuple[np.ndarray, float] = field(default_factory=lambda: (np.zeros(3), 0.0))

    def push(self, way: np.ndarray, seconds: float) -> None:
        """Moves the arm by `way` (3,) [m] within `seconds`, in addition to its commands: a person's push."""
        self._push = (way / seconds, seconds)

    def displace(self, way: np.ndarray) -> None:
        """Moves the arm by `way` (3,) [m] at once."""
        self.position = self.position + way

    def advance(self, seconds: float) -> None:
        """Advances the simulated time."""
        speed, left = self._push
        if left > 0:
            self.position = self.position + speed * min(left, seconds)
            self._push = (speed, left - seconds)
        if self.target is None or not all(np.isfinite(part).all() for part in self.target):
            return
        share = 1 - math.exp(-seconds / LAG_S)
        position, quaternion = self.target
        self.position = self.position + share * (position - self.position)
        near = quaternion if quaternion @ self.quaternion >= 0 else -quaternion
        turned = self.quaternion + share * (near - self.quaternion)
        self.quaternion = turned / np.linalg.norm(turned)
