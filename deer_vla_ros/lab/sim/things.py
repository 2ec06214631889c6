"""The positions of all things on the table that a policy must find in its images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import DRAWER_OPEN_M, in_drawer

NAMES = (*COLOURS, "drawer", "slider", "button", "switch")


@dataclass(frozen=True, eq=False)
class Things:
    """All things in the order of NAMES.

    positions (things, 3) [m, base frame]: centres of blocks and touch points of fixtures; NaN for a thing
    that no camera can see. yaws (things,) [rad]: rotation about z; 0 for things along the axes.
    """

    positions: np.ndarray
    yaws: np.ndarray


def things(state: TableState) -> Things:
    """Returns all positions. A block in a closed drawer, or one that fell off the table, is not visible."""
    blocks = [state.block(colour) for colour in COLOURS]
    hidden = np.full(3, np.nan)
    shown = [
        block.position if _is_visible(state, colour) else hidden for colour, block in zip(COLOURS, blocks)
    ]
    fixtures = (drawer_handle(state), slider_knob(state), led_button(), lamp_switch(state))
    yaws = [*(yaw_of(block.quaternion) for block in blocks), *(0.0 for _ in fixtures)]
    return Things(np.array([*shown, *fixtures]), np.array(yaws))


def drawer_handle(state: TableState) -> np.ndarray:
    """Returns the centre of its bar (3,)."""
    return np.array([0.472 - state.drawer, -0.28, 0.084])


def slider_knob(state: TableState) -> np.ndarray:
    """Returns the point (3,) where fingers push it."""
    return np.array([0.64, -0.10 + state.slider, 0.075])


def led_button() -> np.ndarray:
    """Returns its top (3,)."""
    return np.array([0.38, 0.26, 0.042])


def lamp_switch(state: TableState) -> np.ndarray:
    """Returns the point (3,) where fingers push it."""
    return np.array([0.62, 0.22 + state.switch, 0.045])


def yaw_of(quaternion: np.ndarray) -> float:
    """Returns the yaw [rad] of a cube: of its four equivalent yaws, the one nearest to 0."""
    x, y, z, w = quaternion
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _is_visible(state: TableState, colour: str) -> bool:
    return bool(state.block(colour).position[2] > 0.0) and not (
        in_drawer(state, colour) and state.drawer < DRAWER_OPEN_M
    )
