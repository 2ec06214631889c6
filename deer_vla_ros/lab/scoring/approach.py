"""Which block does the arm go to? The first one it comes down to after an instruction, told from states alone."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import held

NEAR_M = 0.08
"""Horizontal distance of the TCP from a block's centre within which it is at that block."""
DOWN_M = 0.07
"""Height of the TCP below which it has come down."""
UP_M = 0.12
"""Height above which it has left the block it was at: nothing on the table is touched there."""
MOVED_M = 0.01
"""How far a block has moved that has been touched."""


class Approach:
    """Sees every state of an attempt; `block` is the colour that was approached, None while there is none.

    The arm comes to blocks at the first moment when the TCP is down and near one. Near several (fingers that push one come down behind
    it, perhaps nearer to another), it is the one that is then moved most; the nearest, where none moves. A block that the arm is at
    when the instruction comes (the last task ended there, or the fingers hold it) counts only if the arm never comes to another.
    """

    def __init__(self, start: TableState):
        self._now = start
        self._at = self._origin = held(start) or next(iter(_near(start, UP_M)), None)
        self._arrival: TableState | None = None

    @property
    def block(self) -> str | None:
        if self._arrival is None:
            return self._origin
        came_to = _near(self._arrival, DOWN_M)
        moved = {colour: _distance(self._arrival, self._now, colour) for colour in came_to}
        most = max(came_to, key=lambda colour: moved[colour])
        return most if moved[most] > MOVED_M else came_to[0]

    def see(self, state: TableState) -> None:
        """The state after one more step."""
        self._now = state
        if self._arrival is not None or (self._at and self._at in _near(state, UP_M)[:1]):
            return
        self._at = None
        if _near(state, DOWN_M):
            self._arrival = state


def _near(state: TableState, height: float) -> list[str]:
    """The blocks that a TCP below `height` is near, the nearest first."""
    tcp = state.tcp.position
    distances = {colour: float(np.hypot(*(state.block(colour).position - tcp)[:2])) for colour in COLOURS}
    near = [colour for colour in COLOURS if tcp[2] < height and distances[colour] < NEAR_M]
    return sorted(near, key=lambda colour: distances[colour])


def _distance(one: TableState, other: TableState, colour: str) -> float:
    return float(np.linalg.norm(one.block(colour).position - other.block(colour).position))
