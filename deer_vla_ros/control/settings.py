"""What of a controller can be set, all of it live between two ticks but the rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.inputs import InputLimits


@dataclass(frozen=True)
class ControllerSettings:
    """rate_hz: at most so many steps, and while holding as many repeats, per second.

    gripper_hysteresis: how far from one half the gripper's probability must be to change it;
    gripper_dwell_ns: the least time between two changes. follow_timeout_ns: for how long the arm may stand
    still although its target is ahead of it; 0: for ever.
    """

    rate_hz: float
    inputs: InputLimits
    guard: GuardLimits
    gripper_hysteresis: float = 0.0
    gripper_dwell_ns: int = 0
    follow_timeout_ns: int = 0

    def loosened_from(self, before: ControllerSettings) -> list[str]:
        """Parameters whose limit allows more than it did `before`."""
        guard = [f"guard.{name}" for name in self.guard.loosened_from(before.guard)]
        names = ("max_age", "max_pose_age", "max_skew")
        inputs = [
            f"inputs.{name}_s"
            for name in names
            if getattr(self.inputs, f"{name}_ns") > getattr(before.inputs, f"{name}_ns")
        ]
        timeout_ns, before_ns = (each.follow_timeout_ns or math.inf for each in (self, before))
        return [*guard, *inputs, *(["guard.follow_timeout_s"] if timeout_ns > before_ns else [])]
