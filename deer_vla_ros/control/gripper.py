"""The gripper switch: hysteresis and dwell time on the network's probability that the gripper is open."""

from __future__ import annotations

from deer_vla_ros.inference.types import Action


class GripperSwitch:
    """Opens at a probability of 0.5 + hysteresis or more, closes at 0.5 - hysteresis or less.

    After a change it does not change again for dwell_ns.

    With a hysteresis of 0, and for the first decision, this is the rule of the reference implementation: open
    above 0.5.
    """

    def __init__(self, hysteresis: float, dwell_ns: int = 0):
        self.hysteresis, self.dwell_ns = hysteresis, dwell_ns
        self._is_open: bool | None = None
        self._changed_ns: int | None = None

    def decide(self, action: Action, now_ns: int = 0) -> bool:
        """Whether the gripper must be open at `now_ns`."""
        wanted = self._is_open
        if self._is_open is None or abs(action.gripper_probability - 0.5) >= self.hysteresis:
            wanted = action.gripper > 0
        if wanted != self._is_open and not self._dwells(now_ns):
            self._is_open, self._changed_ns = wanted, now_ns
        return self._is_open

    @property
    def state(self) -> tuple[bool | None, int | None]:
        """The last decision and when it changed. Set it back if a decision was not carried out."""
        return self._is_open, self._changed_ns

    @state.setter
    def state(self, state: tuple[bool | None, int | None]) -> None:
        self._is_open, self._changed_ns = state

    def _dwells(self, now_ns: int) -> bool:
        """Whether the last change was less than dwell_ns ago; a clock that went back ends the dwell time."""
        return self._changed_ns is not None and 0 <= now_ns - self._changed_ns < self.dwell_ns
