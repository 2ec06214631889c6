"""Whether the arm goes where it is told: targets against measured poses, over time."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from deer_vla_ros.control.types import Pose

AHEAD, AHEAD_M, AHEAD_RAD = 0.5, 0.01, 0.05
"""Share of a step's limit, and at least so much, by which a target must be ahead of the arm before standing
still means anything: a soft arm in contact stays behind by some millimetres."""
STILL_M, STILL_RAD = 0.003, 0.02
"""An arm that moves less than this does not move: above the noise of encoders, below any motion on command.
"""


class Following:
    """Looks at every target and the pose that was measured then. An arm at rest near its target follows; one
    that stands still for long while its target is ahead of it does not: it is stopped, or its measured pose
    is frozen."""

    def __init__(self) -> None:
        self._since: tuple[int, Pose] | None = None

    def begin(self) -> None:
        """Forgets what was before."""
        self._since = None

    def stands_still_ns(
        self, stamp_ns: int, target: Pose, measured: Pose, step_m: float, step_rad: float
    ) -> int:
        """For how long the arm has stood still although its target was ahead of it [ns].

        step_m, step_rad: limits of one step, which say what "ahead" means.
        """
        metres, radians = _distance(target, measured)
        if metres < max(AHEAD * step_m, AHEAD_M) and radians < max(AHEAD * step_rad, AHEAD_RAD):
            self._since = None
            return 0
        if self._since is None or _has_moved(self._since[1], measured):
            self._since = stamp_ns, measured
        return stamp_ns - self._since[0]


def _has_moved(before: Pose, now: Pose) -> bool:
    metres, radians = _distance(before, now)
    return metres > STILL_M or radians > STILL_RAD


def _distance(a: Pose, b: Pose) -> tuple[float, float]:
    """Metres and radians between two poses."""
    turn = Rotation.from_quat(a.quaternion) * Rotation.from_quat(b.quaternion).inv()
    return float(np.linalg.norm(a.position - b.position)), float(turn.magnitude())
