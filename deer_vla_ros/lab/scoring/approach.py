"""Which block the arm goes to first after an instruction, decided from states of the table alone."""

from __future__ import annotations

import numpy as np

from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import held

NEAR_M = 0.08
"""The TCP is near a block if their horizontal distance is less than this."""
DOWN_M = 0.07
"""The TCP is down if its height is less than this."""
UP_M = 0.12
"""The TCP leaves a block if it rises above this height: it touches nothing on the table there."""
MOVED_M = 0.01
"""A block that has moved further than this was touched."""


class Approach:
    """Finds the approached block from all states of an attempt.

    The arm arrives at the first moment when the TCP is down and near a block. If it is near several blocks
    then, the block that moves most afterwards counts: fingers that push a block come down behind it, perhaps
    nearer to another one. If none moves, the nearest block counts. The block where the arm is at the start
    (the last task ended there, or the fingers hold it) counts only if the arm never arrives at another block.
    """

    def __init__(self, start: TableState):
        self._now = start
        self._at = self._origin = held(start) or next(iter(_near(start, UP_M)), None)
        self._arrival: TableState | None = None

    @property
    def block(self) -> str | None:
        """The colour of the approached block so far; None if there is none."""
        if self._arrival is None:
            return self._origin
        came_to = _near(self._arrival, DOWN_M)
        moved = {colour: _distance(self._arrival, self._now, colour) for colour in came_to}
        most = max(came_to, key=lambda colour: moved[colour])
        return most if moved[most] > MOVED_M else came_to[0]

    def see(self, state: TableState) -> None:
        """Takes the state after one more step."""
        self._now = state
        if self._arrival is not None or (self._at and self._at in _near(state, UP_M)[:1]):
            return
        self._at = None
        if _near(state, DOWN_M):
            self._arrival = state


def _near(state: TableState, height: float) -> list[str]:
    """The blocks that the TCP is near, the nearest first; none if the TCP is not below `height` [m]."""
    tcp = state.tcp.position
    distances = {colour: float(np.hypot(*(state.block(colour).position - tcp)[:2])) for colour in COLOURS}
    near = [colour for colour in COLOURS if tcp[2] < height and distances[colour] < NEAR_M]
    return sorted(near, key=lambda colour: distances[colour])


def _distance(one: TableState, other: TableState, colour: str) -> float:
    return float(np.linalg.norm(one.block(colour).position - other.block(colour).position))
