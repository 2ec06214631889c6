"""The scripted expert: it chooses the next action of a task from the current state only.

It has no memory and no phases. It can therefore label any state, and it recovers from any disturbance. The
same state always has the same label; a demonstrator with hidden phases would teach a policy something that it
cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np

from deer_vla_ros.lab.sim.kinematics import rotation_vector
from deer_vla_ros.lab.sim.scene import BLOCK_HALF, DRAWER_PLACE
from deer_vla_ros.lab.sim.state import COLOURS, TableState
from deer_vla_ros.lab.sim.tasks import (
    RELATIONS,
    RELEASED_M,
    below,
    between_fingers,
    drawer_block,
    free_blocks,
    held,
    in_drawer,
    is_covered,
    on_table,
    others,
    related,
    stacked,
)
from deer_vla_ros.lab.sim.things import drawer_handle, lamp_switch, led_button, slider_knob, yaw_of

STEP_M = 0.03  # translation of a pose value of 1
STEP_RAD = 0.15  # rotation of a pose value of 1

TRANSIT = 0.145  # m: height at which the TCP touches nothing on the table
HIGHEST = 0.24  # m: height to which a block is lifted
_DOWN = np.array([0.0, 1.0, 0.0, 0.0])  # wxyz: gripper straight down, fingers along y
_CLEAR = np.array([0.030, 0.030, 0.040])  # m around the TCP without blocks after the gripper has released one
_BESIDE = 0.060  # m from the centre of a thing: where closed fingers go down to push it
_GAIN = 0.9  # share of the remaining distance in one step; the arm's lag covers the rest


@dataclass(frozen=True, eq=False)
class Intent:
    """The expert's action in one state.

    pose: (6,) action in -1..1, units STEP_M and STEP_RAD, base frame. open: whether the gripper should be
    open.
    """

    pose: np.ndarray
    open: bool


def act(task: str, state: TableState) -> Intent:
    """Returns the next action for a task of tasks.TASKS. Raises KeyError for another name."""
    if task.startswith(("lift_", "push_")):
        verb, colour, *side = task.split("_")
        if colour in RELATIONS:
            return _pick(state, related(state, colour, side[1]))
        if verb == "lift":
            return _pick(state, colour)
        return _push(
            state, state.block(colour).position, np.array([0.0, 1.0 if side[1] == "left" else -1.0]), 0.024
        )
    return _SCRIPTS[task](state)


def _pick(state: TableState, colour: str) -> Intent:
    """Grasps the block and lifts it."""
    block, tcp = state.block(colour), state.tcp.position
    if held(state) == colour:
        return _intent(state, [*tcp[:2], min(tcp[2] + 0.05, HIGHEST)], open_=False, turn=None)
    if (blocked := _let_go(state, but=colour)) is not None:
        return blocked
    goal = np.array([*block.position[:2], max(block.position[2] - 0.002, 0.018)])
    yaw = yaw_of(block.quaternion) if np.hypot(*(goal - tcp)[:2]) < 0.10 else 0.0
    if _is_near(tcp, goal, 0.013, 0.014):
        return _intent(state, goal, open_=False, turn=None)
    return _approach(state, goal, open_=True, yaw=yaw)


def _put(state: TableState, goal: np.ndarray, release_z: float, xy: float) -> Intent:
    """Moves a held block over the goal, moves it down and releases it."""
    tcp = state.tcp.position
    if _is_near(tcp, goal, xy, release_z):
        return _intent(state, goal, open_=True, turn=None)
    return _approach(state, goal, open_=False, yaw=None, transit=TRANSIT + 0.02, funnel=0.012)


def _place_in_drawer(state: TableState) -> Intent:
    place = np.array([*(DRAWER_PLACE - [state.drawer, 0.0]), 0.050])
    if held(state) is None:
        around = between_fingers(state)
        return _release(state) if around and in_drawer(state, around) else _pick_nearest(state)
    return _put(state, place, 0.012, 0.012)


def _stack(state: TableState) -> Intent:
    colour = held(state)
    if colour is None:
        around = between_fingers(state)
        return _release(state) if around and below(state, around) else _pick_nearest(state)
    block, tcp = state.block(colour), state.tcp.position
    free = free_blocks(state) or others(colour)
    base = min((state.block(c).position for c in free), key=lambda p: np.hypot(*(p - tcp)[:2]))
    # The held block can be off the middle of the fingers. The goal places the block, not the TCP.
    goal = base + [0.0, 0.0, 2 * BLOCK_HALF + 0.004] - (block.position - tcp)
    return _put(state, goal, 0.007, 0.009)


def _release(state: TableState) -> Intent:
    """Opens the fingers around a block that is at its goal."""
    return _intent(state, state.tcp.position, open_=True, turn=None)


def _pick_nearest(state: TableState) -> Intent:
    """Grasps the nearest free block, for example one that was dropped on the way."""
    tcp = state.tcp.position
    free = [c for c in COLOURS if on_table(state, c) and not is_covered(state, c)] or list(COLOURS)
    return _pick(state, min(free, key=lambda c: float(np.linalg.norm(state.block(c).position - tcp))))


def _take_out(state: TableState) -> Intent:
    """Takes a block out of the drawer, if necessary one at a place that is hard to reach."""
    inside = [colour for colour in COLOURS if in_drawer(state, colour)]
    return _pick(state, held(state) or drawer_block(state) or (inside or COLOURS)[0])


def _unstack(state: TableState) -> Intent:
    pair = stacked(state)
    return _pick(state, held(state) or (pair[0] if pair else COLOURS[0]))


def _push(state: TableState, thing: np.ndarray, direction: np.ndarray, z: float) -> Intent:
    """Moves closed fingers down behind the thing and pushes it along `direction` (2,).

    `direction` is a unit vector along x or y.
    """
    if (blocked := _let_go(state)) is not None:
        return blocked
    tcp = state.tcp.position
    offset = tcp[:2] - thing[:2]
    along = float(offset @ direction)
    aside = offset - along * direction
    if -_BESIDE - 0.03 < along < -0.020 and np.hypot(*aside) < 0.016 and abs(tcp[2] - z) < 0.020:
        ahead = np.array([*(thing[:2] + 0.06 * direction), z])
        return _intent(state, ahead, open_=False, turn=0.0)
    goal = np.array([*(thing[:2] - _BESIDE * direction), z])
    return _approach(state, goal, open_=False, yaw=0.0)


def _open_drawer(state: TableState) -> Intent:
    """Closes the fingers on the handle and pulls."""
    handle, tcp = drawer_handle(state), state.tcp.position
    if _is_near(tcp, handle, 0.014, 0.012):
        if state.opening < 0.032:
            return _intent(state, handle - [0.06, 0.0, 0.0], open_=False, turn=0.0)
        return _intent(state, handle, open_=False, turn=0.0)
    if (blocked := _let_go(state)) is not None:
        return blocked
    return _approach(state, handle, open_=True, yaw=0.0)


def _close_drawer(state: TableState) -> Intent:
    return _push(state, drawer_handle(state) + [0.005, 0.0, -0.012], np.array([1.0, 0.0]), 0.070)


def _move_slider(sign: float):
    def script(state: TableState) -> Intent:
        return _push(state, slider_knob(state), np.array([0.0, sign]), 0.060)

    return script


def _turn_lamp(sign: float):
    def script(state: TableState) -> Intent:
        return _push(state, lamp_switch(state), np.array([0.0, sign]), 0.042)

    return script


def _turn_led(on: bool):
    def script(state: TableState) -> Intent:
        """Presses the button. If a press did not change the light, it first lets the button go up."""
        if (blocked := _let_go(state)) is not None:
            return blocked
        button, tcp = led_button(), state.tcp.position
        over = np.hypot(*(tcp - button)[:2]) < 0.016
        if state.led == on or (over and tcp[2] < 0.040):
            return _intent(state, [*button[:2], 0.10], open_=False, turn=0.0)
        if over and tcp[2] < 0.075:
            return _intent(state, [*button[:2], 0.020], open_=False, turn=0.0)
        return _approach(state, [*button[:2], 0.055], open_=False, yaw=0.0)

    return script


_SCRIPTS = {
    "open_drawer": _open_drawer,
    "close_drawer": _close_drawer,
    "move_slider_left": _move_slider(1.0),
    "move_slider_right": _move_slider(-1.0),
    "turn_on_led": _turn_led(True),
    "turn_off_led": _turn_led(False),
    "turn_on_lamp": _turn_lamp(1.0),
    "turn_off_lamp": _turn_lamp(-1.0),
    "place_in_drawer": _place_in_drawer,
    "take_out_of_drawer": _take_out,
    "stack_block": _stack,
    "unstack_block": _unstack,
}


def _let_go(state: TableState, but: str = "") -> Intent | None:
    """Releases a held block that is not `but` and moves the fingers up; None if the gripper is free."""
    colour = held(state)
    tcp = state.tcp.position
    if colour is None:
        # After a release, the fingers stay open until they are above the block.
        near = [c for c in COLOURS if c != but and (np.abs(state.block(c).position - tcp) < _CLEAR).all()]
        if not near or state.opening < 0.03:
            return None
        return _intent(state, [*tcp[:2], tcp[2] + 0.05], open_=True, turn=None)
    return _intent(state, tcp, open_=True, turn=None)


def _approach(
    state: TableState, goal, open_: bool, yaw: float | None, transit: float = TRANSIT, funnel: float = 0.015
) -> Intent:
    """Moves over the goal at transit height, then down to it inside a funnel.

    If the arm is below the funnel, it moves up first.
    """
    goal, tcp = np.asarray(goal, float), state.tcp.position
    distance = float(np.hypot(*(goal - tcp)[:2]))
    height = goal[2] + (max(transit, goal[2] + 0.04) - goal[2]) * np.clip(
        (distance - funnel) / 0.05, 0.0, 1.0
    )
    fingers_ready = state.opening >= RELEASED_M if open_ else state.opening < 0.056 or held(state) is not None
    if not fingers_ready:
        height = max(height, goal[2] + 0.07)
    below = height - tcp[2]
    share = float(np.clip(1.0 - (below - 0.02) / 0.03, 0.0, 1.0))  # share of the sideways motion
    return _intent(state, [*(tcp[:2] + share * (goal - tcp)[:2]), height], open_, yaw)


def _intent(state: TableState, goal, open_: bool, turn: float | None) -> Intent:
    """Returns one step towards a TCP position. turn: the goal yaw [rad]; None keeps the orientation."""
    motion = _GAIN * (np.asarray(goal, float) - state.tcp.position) / STEP_M
    motion /= max(1.0, float(np.abs(motion).max()))
    rotation = np.zeros(3)
    if turn is not None:
        current = np.roll(state.tcp.quaternion, 1)
        rotation = _GAIN * rotation_vector(_turned(turn), current) / STEP_RAD
        rotation /= max(1.0, float(np.abs(rotation).max()))
    return Intent(np.concatenate([motion, rotation]).astype(np.float32), open_)


def _turned(yaw: float) -> np.ndarray:
    """Returns the orientation wxyz of a gripper that points straight down, turned by `yaw` about z."""
    result = np.empty(4)
    mujoco.mju_mulQuat(result, np.array([np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]), _DOWN)
    return result


def _is_near(tcp: np.ndarray, goal: np.ndarray, xy: float, z: float) -> bool:
    return bool(np.hypot(*(tcp - goal)[:2]) < xy and abs(tcp[2] - goal[2]) < z)
