"""Open or closed? A probability near one half must not make the fingers flutter."""

from __future__ import annotations

from deer_vla_ros.inference.types import Action


class GripperSwitch:
    """Opens from 0.5 + hysteresis on, closes from 0.5 - hysteresis on, and otherwise stays as it is.

    With a hysteresis of 0, or before anything was decided, it is the reference's rule: open above one half.
    """

    def __init__(self, hysteresis: float):
        self.hysteresis = hysteresis
        self._is_open: bool | None = None

    def decide(self, action: Action) -> bool:
        """Whether the gripper is to be open."""
        if self._is_open is None or abs(action.gripper_probability - 0.5) >= self.hysteresis:
            self._is_open = action.gripper > 0
        return self._is_open
