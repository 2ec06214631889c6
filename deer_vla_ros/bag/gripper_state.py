"""Whether a recorded gripper is open, from the positions of its joints: for an arm that was led by hand."""

from __future__ import annotations

import math
from typing import Any

from deer_vla_ros.errors import UserError
from deer_vla_ros.model.action_space import ActionSpace

TRAVEL = 0.1
"""Share of the gripper's range by which it has to close (or open) to count as closed (or open). The position
alone does not tell: fingers that hold a wide object are nearer to open than to closed."""
MARGIN = 0.5
"""Share of the gripper's range by which a position may be outside it. One further away is of other units, or
of another joint."""


class GripperState:
    """Decides from one JointState message after another whether the gripper is open.

    closed, opened: the position when it is closed and when it is open, in the units of the messages. joint:
    the joint's name; empty: messages have one joint, or two fingers, whose positions are added to their gap.
    At its first position, the gripper is what it is nearer to; from then on its motion decides.
    """

    def __init__(self, space: ActionSpace, closed: float, opened: float, joint: str = ""):
        if not (math.isfinite(closed) and math.isfinite(opened) and closed != opened):
            raise UserError(f"--gripper-range is {closed:g} {opened:g}: give two positions that differ")
        self._space, self._closed, self._opened, self._joint = space, closed, opened, joint
        self._is_open: bool | None = None
        self._furthest = 0.0
        self._names: list[str] = []

    @property
    def command(self) -> float | None:
        """The gripper command for the present state; None before the first position."""
        if self._is_open is None:
            return None
        return self._space.gripper_open if self._is_open else self._space.gripper_closed

    def see(self, message: Any) -> None:
        """Takes a sensor_msgs/JointState. Messages without the joint, or without a finite position, change
        nothing. Raises UserError where the joint is not clear, or its position far outside the range."""
        positions = dict(zip(message.name, message.position))
        self._names = list(message.name)
        if not self._joint and len(message.position) > 2:
            raise UserError(f"the gripper's state has {self._joints()}: name one with --gripper-joint")
        found = [positions.get(self._joint, math.nan)] if self._joint else message.position
        position = sum(found) if len(found) else math.nan
        if not math.isfinite(position):
            return
        share = (position - self._closed) / (self._opened - self._closed)
        if not -MARGIN <= share <= 1 + MARGIN:
            raise UserError(
                f"the gripper is at {position:g}, but --gripper-range is {self._closed:g} (closed) to "
                f"{self._opened:g} (open): give the range of this joint, in its units"
            )
        self._move(share)

    def check(self) -> None:
        """Raises UserError if no message had a position."""
        if self._is_open is None:
            raise UserError(
                f"the gripper's state has no position of {self._joint or 'a joint'}, it has "
                f"{self._joints()}: name a joint with --gripper-joint, or a topic with --topic "
                "gripper_state:=TOPIC"
            )

    def _move(self, share: float) -> None:
        """share: of the way from closed (0) to open (1)."""
        if self._is_open is None:
            self._is_open, self._furthest = share >= 0.5, share
        towards = 1 if self._is_open else -1
        self._furthest = towards * max(towards * share, towards * self._furthest)
        if towards * (self._furthest - share) > TRAVEL:
            self._is_open, self._furthest = not self._is_open, share

    def _joints(self) -> str:
        return f"the joints {', '.join(self._names)}" if self._names else "no joint"
