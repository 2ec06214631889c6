"""What is there on the table to act upon, and where is it? What a policy has to find in its images, whatever it is told to do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import DRAWER_OPEN_M, in_drawer

NAMES = (*COLOURS, "drawer", "slider", "button", "switch")


@dataclass(frozen=True, eq=False)
class Things:
    """In the order of NAMES. positions (things, 3): middles of blocks, places to touch of fixtures [m, base frame], NaN for what no camera can
    see; yaws (things,): how they are turned about the base frame's z [rad], 0 for what stands along the axes."""

    positions: np.ndarray
    yaws: np.ndarray


def things(state: TableState) -> Things:
    """Where everything is; a block in a shut drawer, or one that fell off the table, cannot be seen."""
    blocks = [state.block(colour) for colour in COLOURS]
    hidden = np.full(3, np.nan)
    shown = [
        block.position if _is_visible(state, colour) else hidden for colour, block in zip(COLOURS, blocks)
    ]
    fixtures = (drawer_handle(state), slider_knob(state), led_button(), lamp_switch(state))
    yaws = [*(yaw_of(block.quaternion) for block in blocks), *(0.0 for _ in fixtures)]
    return Things(np.array([*shown, *fixtures]), np.array(yaws))


def drawer_handle(state: TableState) -> np.ndarray:
    """(3,) the middle of its bar."""
    return np.array([0.472 - state.drawer, -0.28, 0.084])


def slider_knob(state: TableState) -> np.ndarray:
    """(3,) where fingers push it."""
    return np.array([0.64, -0.10 + state.slider, 0.075])


def led_button() -> np.ndarray:
    """(3,) its top."""
    return np.array([0.38, 0.26, 0.042])


def lamp_switch(state: TableState) -> np.ndarray:
    """(3,) where fingers push it."""
    return np.array([0.62, 0.22 + state.switch, 0.045])


def yaw_of(quaternion: np.ndarray) -> float:
    """Yaw [rad] of a cube, of four equal ones the one nearest to 0."""
    x, y, z, w = quaternion
    yaw = np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))
    return float((yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)


def _is_visible(state: TableState, colour: str) -> bool:
    return bool(state.block(colour).position[2] > 0.0) and not (
        in_drawer(state, colour) and state.drawer < DRAWER_OPEN_M
    )
