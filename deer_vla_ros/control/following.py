"""A check that the arm follows its targets: it compares targets with measured poses over time."""

from __future__ import annotations

from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.types import Pose

AHEAD, AHEAD_M, AHEAD_RAD = 0.5, 0.01, 0.05
"""A target is ahead of the arm if its distance is at least this share of a step's limit and at least this
distance ([m], [rad]). A compliant arm in contact stays behind its target by some millimetres."""
STILL_M, STILL_RAD = 0.003, 0.02
"""An arm that moves by less than this [m], [rad] stands still: more than encoder noise, less than any
commanded motion."""


class Following:
    """Measures for how long the arm has stood still while its target was ahead of it.

    An arm at rest near its target follows. An arm that stands still for long while its target is ahead is
    stopped, or its measured pose is frozen. Holds between two targets do not reset the time.
    """

    def __init__(self) -> None:
        self._rest: Pose | None = None
        self._stamp_ns = self._still_ns = 0

    def reset(self) -> None:
        """Forgets all earlier poses."""
        self._rest = None
        self._still_ns = 0

    def update(self, stamp_ns: int, target: Pose, measured: Pose, limits: GuardLimits, period_ns: int) -> int:
        """Adds one step. Returns for how long the arm has stood still while its target was ahead [ns].

        stamp_ns: of the step. period_ns: the longest time that one step adds.
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
    """The distance from which on a target is ahead. The leash bounds how far ahead a target can be."""
    return min(max(AHEAD * step, least), AHEAD * leash)


def _has_moved(before: Pose, now: Pose) -> bool:
    metres, radians = before.apart(now)
    return metres > STILL_M or radians > STILL_RAD
