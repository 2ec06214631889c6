"""Whether the gripper is to be open: a probability near one half must not make the fingers flutter."""

from __future__ import annotations

from deer_vla_ros.inference.types import Action


class GripperSwitch:
    """Opens from 0.5 + hysteresis on, closes from 0.5 - hysteresis on, and otherwise stays as it is; and it
    stays for dwell_ns after a change.

    With a hysteresis of 0, or before anything was decided, it is the reference's rule: open above one half.
    """

    def __init__(self, hysteresis: float, dwell_ns: int = 0):
        self.hysteresis, self.dwell_ns = hysteresis, dwell_ns
        self._is_open: bool | None = None
        self._changed_ns: int | None = None

    def decide(self, action: Action, now_ns: int = 0) -> bool:
        """Whether the gripper is to be open at `now_ns`."""
        wanted = self._is_open
        if self._is_open is None or abs(action.gripper_probability - 0.5) >= self.hysteresis:
            wanted = action.gripper > 0
        if wanted != self._is_open and not self._dwells(now_ns):
            self._is_open, self._changed_ns = wanted, now_ns
        return self._is_open

    @property
    def state(self) -> tuple[bool | None, int | None]:
        """What it decided and when; to be given back where a decision was not acted upon."""
        return self._is_open, self._changed_ns

    @state.setter
    def state(self, state: tuple[bool | None, int | None]) -> None:
        self._is_open, self._changed_ns = state

    def _dwells(self, now_ns: int) -> bool:
        """Whether the last change was less than dwell_ns ago; a clock that went back ends it."""
        return self._changed_ns is not None and 0 <= now_ns - self._changed_ns < self.dwell_ns
