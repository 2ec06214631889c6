"""Continuity of the commands on one topic: stamps never go back, quaternions never change sign needlessly."""

from __future__ import annotations

import dataclasses

import numpy as np

from deer_vla_ros.control.types import Command, HoldReason, Pose


class Continuity:
    """Adapts each command of one publisher to the command that was sent before it."""

    def __init__(self, stamp_ns: int = 0, quaternion: np.ndarray | None = None) -> None:
        """stamp_ns, quaternion (4,): of the last command that was sent, if another process sent it."""
        self.stamp_ns, self.quaternion = stamp_ns, quaternion

    def passed(self, command: Command) -> Command:
        """The command as it may be sent. Call this once per command, in the order of sending.

        A motion has the stamp of its camera frames, a hold the time at which it is made. The first motion
        after a hold would therefore be older than the hold; it gets the hold's stamp. Stamps go back only
        when the clock jumped back. A quaternion and its negative are the same orientation; the one nearer to
        the last quaternion is sent, because an arm controller may interpolate the numbers.
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
