"""What of a controller can be set, all of it live between two ticks but the rate."""

from __future__ import annotations

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
