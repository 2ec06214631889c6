"""What leaves on one topic goes on from what left before: stamps never go back, quaternions never change
their sign without need."""

from __future__ import annotations

import dataclasses

import numpy as np

from deer_vla_ros.control.types import Command, HoldReason, Pose


class Continuity:
    """Passes every command of one publisher in the order in which they leave."""

    def __init__(self, stamp_ns: int = 0, quaternion: np.ndarray | None = None) -> None:
        """stamp_ns, quaternion (4,): those that left last, where another process goes on."""
        self.stamp_ns, self.quaternion = stamp_ns, quaternion

    def passed(self, command: Command) -> Command:
        """The command as it may leave.

        A motion is stamped like its camera frames, a hold with the time at which it is told: the first motion
        after a hold would go back, and takes the hold's stamp instead. Only a clock that jumped back takes
        stamps back with it. A quaternion and its negative are one orientation: the one nearest to the last is
        sent, for a controller that interpolates between numbers.
        """
        if HoldReason.CLOCK_JUMPED in command.holds:
            self.stamp_ns = 0
        self.stamp_ns = max(self.stamp_ns, command.stamp_ns)
        target = command.target
        if target is not None:
            if self.quaternion is not None and float(self.quaternion @ target.quaternion) < 0:
                target = Pose(target.position, -target.quaternion)
            self.quaternion = target.quaternion
        return dataclasses.replace(command, stamp_ns=self.stamp_ns, target=target)
