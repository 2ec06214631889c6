"""Whether the arm goes where it is told: targets against measured poses, over time."""

from __future__ import annotations

from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.types import Pose

AHEAD, AHEAD_M, AHEAD_RAD = 0.5, 0.01, 0.05
"""A target is ahead of the arm from this share of a step's limit on, and at least from this distance on: a
soft arm in contact stays behind by some millimetres."""
STILL_M, STILL_RAD = 0.003, 0.02
"""An arm that moves less than this does not move: above the noise of encoders, below any motion on command.
"""


class Following:
    """Looks at every target and the pose that was measured then.

    An arm at rest near its target follows. One that stands still for long while its target is ahead of it
    does not: it is stopped, or its measured pose is frozen. Holds in between do not make it move, so they
    change nothing.
    """

    def __init__(self) -> None:
        self._rest: Pose | None = None
        self._stamp_ns = self._still_ns = 0

    def begin(self) -> None:
        """Forgets what was before."""
        self._rest = None
        self._still_ns = 0

    def still_ns(
        self, stamp_ns: int, target: Pose, measured: Pose, limits: GuardLimits, period_ns: int
    ) -> int:
        """For how long the arm has stood still altogether while its target was ahead of it [ns].

        stamp_ns: of the step; period_ns: the most that one step counts for.
        """
        since_ns, self._stamp_ns = stamp_ns - self._stamp_ns, stamp_ns
        if self._rest is None or _has_moved(self._rest, measured):
            self._rest, self._still_ns = measured, 0
        metres, radians = measured.apart(target)
        if metres >= _ahead(limits.max_translation_m, AHEAD_M, limits.leash_m) or radians >= _ahead(
            limits.max_rotation_rad, AHEAD_RAD, limits.leash_rad
        ):
            self._still_ns += min(max(since_ns, 0), period_ns)
        return self._still_ns


def _ahead(step: float, least: float, leash: float) -> float:
    """From which distance on a target is ahead; no target gets further ahead than the leash."""
    return min(max(AHEAD * step, least), AHEAD * leash)


def _has_moved(before: Pose, now: Pose) -> bool:
    metres, radians = before.apart(now)
    return metres > STILL_M or radians > STILL_RAD
