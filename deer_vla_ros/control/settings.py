"""The settings of a controller, in a module that loads without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from deer_vla_ros.control.guard import GuardLimits
from deer_vla_ros.control.inputs import InputLimits


@dataclass(frozen=True)
class ControllerSettings:
    """All of them but rate_hz may change between two ticks.

    rate_hz: the most steps per second, and how often a hold is repeated. gripper_hysteresis,
    gripper_dwell_ns: see `GripperSwitch`. follow_timeout_ns: for how long the arm may stand still while its
    target is ahead of it; 0: no limit.
    """

    rate_hz: float
    inputs: InputLimits
    guard: GuardLimits
    gripper_hysteresis: float = 0.0
    gripper_dwell_ns: int = 0
    follow_timeout_ns: int = 0

    def loosened_from(self, before: ControllerSettings) -> list[str]:
        """Names of the ROS parameters whose limits allow more than they do in `before`."""
        guard = [f"guard.{name}" for name in self.guard.loosened_from(before.guard)]
        names = ("max_age", "max_pose_age", "max_skew")
        inputs = [
            f"inputs.{name}_s"
            for name in names
            if getattr(self.inputs, f"{name}_ns") > getattr(before.inputs, f"{name}_ns")
        ]
        timeout_ns, before_ns = (each.follow_timeout_ns or math.inf for each in (self, before))
        return [*guard, *inputs, *(["guard.follow_timeout_s"] if timeout_ns > before_ns else [])]
