"""The tasks of the table: their phrasings, when they are possible, and when they are done.

As in CALVIN's task oracle, a task compares the simulator's state before the instruction with the current
state. Left and right are seen from the arm (+y and -y of the base frame).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import mujoco
import numpy as np

from deer_vla_ros.lab.sim.scene import BLOCK_HALF, DRAWER_CENTRE, DRAWER_HALF, DRAWER_PLACE, TABLE_AREA
from deer_vla_ros.lab.sim.state import COLOURS, TableState

RELATIONS = ("nearest", "farthest")
LIFTED_M = 0.05  # least height that a lifted block gains
PUSHED_M = 0.05  # least distance that a pushed block moves sideways
PUSH_ROOM = (-0.10, 0.12)  # m, y: blocks beyond this range are not pushed
HANDS = np.array([0.022, 0.022, 0.028])  # m: largest offset of a held block's centre from the TCP
DRAWER_OPEN_M, DRAWER_CLOSED_M = 0.10, 0.02
SLIDER_LEFT_M, SLIDER_RIGHT_M = 0.16, 0.04
GRIPPER_ROOM = 0.075  # m, y: distance between blocks at which an open finger fits between them
RELEASED_M = 0.068  # least opening after any release of a block: its diagonal is 65 mm
RELATION_MARGIN = 0.03  # m: least difference of two distances for "nearest" and "farthest"
GRIP_MARGIN = 0.002  # m: largest gap between closed fingers and a held block


@dataclass(frozen=True, eq=False)
class Task:
    """One task.

    phrasings: for training. held_out: phrasings for evaluation only. possible: whether the task can be given
    in a state.
    succeeded: whether it is done, from the states before and now. block: the colour of the task's block, from
    the state before; None if the task is not about a block. goes_on: whether the task can continue in a state
    in which it would not be given because the gripper holds a block.
    """

    name: str
    phrasings: tuple[str, ...]
    held_out: tuple[str, ...]
    possible: Callable[[TableState], bool]
    succeeded: Callable[[TableState, TableState], bool]
    block: Callable[[TableState], str] | None = None
    goes_on: Callable[[TableState], bool] = lambda state: False


def in_drawer(state: TableState, colour: str) -> bool:
    """Returns whether the block's centre is inside the drawer, at any position of the drawer."""
    position = state.block(colour).position
    centre = DRAWER_CENTRE - [state.drawer, 0.0]
    return bool((np.abs(position[:2] - centre) < DRAWER_HALF).all() and position[2] < 0.06)


def below(state: TableState, colour: str) -> str | None:
    """Returns the block directly under this one, or None."""
    position = state.block(colour).position
    for other in COLOURS:
        offset = position - state.block(other).position
        if other != colour and np.hypot(*offset[:2]) < 0.035 and abs(offset[2] - 2 * BLOCK_HALF) < 0.012:
            return other
    return None


def is_covered(state: TableState, colour: str) -> bool:
    """Returns whether another block rests on this one; a held block does not count."""
    return any(below(state, other) == colour for other in COLOURS if other not in (colour, held(state)))


def on_table(state: TableState, colour: str) -> bool:
    """Returns whether the block is on the table top within TABLE_AREA."""
    position = state.block(colour).position
    inside = (TABLE_AREA[:, 0] < position[:2]).all() and (position[:2] < TABLE_AREA[:, 1]).all()
    return bool(inside and abs(position[2] - BLOCK_HALF) < 0.012 and not in_drawer(state, colour))


def held(state: TableState) -> str | None:
    """Returns the block that the closed fingers hold, by its sides or its diagonal, or None."""
    colour = between_fingers(state)
    if colour is None or not 0.03 < state.opening < _grip_width(state, colour) + GRIP_MARGIN:
        return None
    return colour


def _grip_width(state: TableState, colour: str) -> float:
    """Returns the width of the block along the direction in which the fingers close [m]."""
    fingers = _rotation(state.tcp.quaternion)[:, 1]
    return float(2 * BLOCK_HALF * np.abs(fingers @ _rotation(state.block(colour).quaternion)).sum())


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Returns the rotation matrix of a quaternion, (4,) xyzw -> (3, 3)."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, np.roll(quaternion, 1))
    return matrix.reshape(3, 3)


def between_fingers(state: TableState) -> str | None:
    """Returns the block between the fingers, held or not, or None."""
    for colour in COLOURS:
        if (np.abs(state.block(colour).position - state.tcp.position) < HANDS).all():
            return colour
    return None


def has_room(state: TableState, colour: str) -> bool:
    """Returns whether no other block prevents an open gripper around this block."""
    position = state.block(colour).position
    for other in COLOURS:
        offset = np.abs(state.block(other).position - position)
        if other != colour and offset[0] < 0.045 and offset[1] < GRIPPER_ROOM and offset[2] < 0.03:
            return False
    return True


def graspable(state: TableState, colour: str) -> bool:
    """Returns whether the block is free on the table, without a held block over it."""
    hanging = held(state)
    if hanging and np.hypot(*(state.block(hanging).position - state.block(colour).position)[:2]) < 0.07:
        return hanging == colour
    return on_table(state, colour) and not is_covered(state, colour) and has_room(state, colour)


def stacked(state: TableState) -> tuple[str, str] | None:
    """Returns (upper, lower) of two stacked blocks, of which the upper one is not held, or None."""
    for upper in COLOURS:
        lower = below(state, upper)
        if lower and held(state) != upper:
            return upper, lower
    return None


def drawer_block(state: TableState) -> str | None:
    """Returns a block in the drawer that the gripper can reach if the drawer is open, or None."""
    for colour in COLOURS:
        offset = np.abs(state.block(colour).position[:2] - DRAWER_PLACE + [state.drawer, 0.0])
        if in_drawer(state, colour) and offset[0] < 0.03 and offset[1] < 0.012:
            return colour
    return None


def free_blocks(state: TableState) -> list[str]:
    """Returns the blocks on which another one can be put: on the table, not covered, not held."""
    return [c for c in COLOURS if on_table(state, c) and not is_covered(state, c) and held(state) != c]


def _is_lifted(before: TableState, now: TableState, colour: str) -> bool:
    return held(now) == colour and now.block(colour).position[2] > before.block(colour).position[2] + LIFTED_M


def _lift(colour: str) -> Task:
    verbs = ("lift", "pick up", "grasp", "grab", "take")
    return Task(
        name=f"lift_{colour}_block",
        phrasings=(*(f"{verb} the {colour} block" for verb in verbs), f"lift up the {colour} cube"),
        held_out=(
            f"grab the {colour} cube",
            f"lift the {colour} block up",
            f"go and pick the {colour} block up",
        ),
        possible=lambda state: graspable(state, colour) and held(state) != colour,
        succeeded=lambda before, now: _is_lifted(before, now, colour),
        block=lambda before: colour,
        goes_on=lambda state: held(state) == colour,
    )


def others(colour: str) -> tuple[str, str]:
    """Returns the two other colours, in the order of COLOURS."""
    first, second = (other for other in COLOURS if other != colour)
    return first, second


def related(state: TableState, relation: str, colour: str) -> str:
    """Returns the other block that is "nearest" to the block `colour`, or "farthest" from it, from above."""
    choose = min if relation == "nearest" else max
    return choose(others(colour), key=lambda other: _apart(state, other, colour))


def _apart(state: TableState, one: str, other: str) -> float:
    """Returns the horizontal distance of two blocks [m]."""
    return float(np.hypot(*(state.block(one).position - state.block(other).position)[:2]))


def _lift_related(relation: str, colour: str) -> Task:
    """Makes a task whose block is not named; it follows from the positions of all three blocks."""

    def is_clear(state: TableState, standing: Iterable[str]) -> bool:
        first, second = (_apart(state, other, colour) for other in others(colour))
        return abs(first - second) > RELATION_MARGIN and all(on_table(state, c) for c in standing)

    def possible(state: TableState) -> bool:
        return is_clear(state, COLOURS) and graspable(state, related(state, relation, colour))

    def goes_on(state: TableState) -> bool:
        """The gripper holds the right block, or a wrong one that it must put back."""
        hand, meant = held(state), related(state, relation, colour)
        return (
            hand is not None
            and is_clear(state, set(COLOURS) - {hand})
            and (hand == meant or graspable(state, meant))
        )

    place = f"nearest to the {colour}" if relation == "nearest" else f"farthest from the {colour}"
    other = f"closest to the {colour}" if relation == "nearest" else f"farthest away from the {colour}"
    loose = f"near the {colour}" if relation == "nearest" else f"far from the {colour}"
    return Task(
        name=f"lift_{relation}_{'to' if relation == 'nearest' else 'from'}_{colour}",
        phrasings=(
            f"lift the block {place} block",
            f"pick up the block {other} block",
            f"grasp the block {loose} block",
            f"take the block that is {place} block",
            f"grab the block that is {other} block",
        ),
        held_out=(
            f"grab the block {place} one",
            f"pick up the block that is {loose} block",
            f"lift the cube {other} block",
        ),
        possible=possible,
        succeeded=lambda before, now: _is_lifted(before, now, related(before, relation, colour)),
        block=lambda before: related(before, relation, colour),
        goes_on=goes_on,
    )


def _push(colour: str, side: str) -> Task:
    sign = 1.0 if side == "left" else -1.0

    def possible(state: TableState) -> bool:
        room = PUSH_ROOM[0] < state.block(colour).position[1] < PUSH_ROOM[1]
        return (
            bool(room)
            and on_table(state, colour)
            and not is_covered(state, colour)
            and _pushable(state, colour, sign)
        )

    def succeeded(before: TableState, now: TableState) -> bool:
        start, end = before.block(colour).position, now.block(colour).position
        return sign * (end[1] - start[1]) > PUSHED_M and end[2] < 2 * BLOCK_HALF and held(now) != colour

    return Task(
        name=f"push_{colour}_block_{side}",
        phrasings=(
            f"push the {colour} block to the {side}",
            f"push the {colour} block {side}",
            f"slide the {colour} block to the {side}",
            f"move the {colour} block to the {side}",
            f"go shove the {colour} cube to the {side}",
        ),
        held_out=(
            f"slide the {colour} cube {side}",
            f"push the {colour} cube to the {side}",
            f"go and shove the {colour} block {side}",
        ),
        possible=possible,
        succeeded=succeeded,
        block=lambda before: colour,
    )


def _pushable(state: TableState, colour: str, sign: float) -> bool:
    """Returns whether the fingers have room behind the block, and no other block is in its way."""
    position = state.block(colour).position
    for other in COLOURS:
        offset = state.block(other).position - position
        ahead = sign * offset[1]
        if other != colour and abs(offset[0]) < 0.05 and -0.10 < ahead < 0.12:
            return False
    return True


def _take_out(before: TableState, now: TableState) -> bool:
    colour = held(now)
    return bool(colour) and in_drawer(before, colour) and now.block(colour).position[2] > 0.10


def _unstacked(before: TableState, now: TableState) -> bool:
    """The upper block left the lower one in any way, as in CALVIN."""
    pair = stacked(before)
    if pair is None:
        return False
    moved = np.linalg.norm(now.block(pair[0]).position - before.block(pair[0]).position)
    return bool(moved > 0.03) and below(now, pair[0]) is None


def _placed(before: TableState, now: TableState) -> bool:
    colour = held(before)
    return bool(colour) and now.opening > RELEASED_M and in_drawer(now, colour)


def _put_on_block(before: TableState, now: TableState) -> bool:
    colour = held(before)
    return bool(colour) and now.opening > RELEASED_M and below(now, colour) is not None


def _switched(task: str, phrasings: tuple[str, ...], held_out: tuple[str, ...], light: str, on: bool) -> Task:
    return Task(
        task,
        phrasings,
        held_out,
        possible=lambda state: getattr(state, light) != on,
        succeeded=lambda before, now: getattr(now, light) == on,
    )


def _all_tasks() -> tuple[Task, ...]:
    return (
        *(_lift(colour) for colour in COLOURS),
        *(_lift_related(relation, colour) for relation in RELATIONS for colour in COLOURS),
        *(_push(colour, side) for colour in COLOURS for side in ("left", "right")),
        Task(
            "open_drawer",
            (
                "open the drawer",
                "pull the drawer",
                "pull the handle of the drawer",
                "pull open the drawer",
                "pull out the drawer",
            ),
            ("go open the drawer", "grasp the drawer handle and open it", "slide the drawer open"),
            possible=lambda state: state.drawer < DRAWER_CLOSED_M,
            succeeded=lambda before, now: now.drawer > DRAWER_OPEN_M,
        ),
        Task(
            "close_drawer",
            (
                "close the drawer",
                "push the drawer",
                "push the handle of the drawer",
                "push the drawer shut",
                "shut the drawer",
            ),
            ("go close the drawer", "push the drawer closed", "shut the open drawer"),
            possible=lambda state: state.drawer > DRAWER_OPEN_M,
            succeeded=lambda before, now: now.drawer < DRAWER_CLOSED_M,
        ),
        *(
            Task(
                f"move_slider_{side}",
                (
                    f"move the slider to the {side}",
                    f"push the slider to the {side}",
                    f"slide the purple handle to the {side}",
                    f"move the slider {side}",
                    f"push the purple slider {side}",
                ),
                (
                    f"slide the slider {side}",
                    f"push the purple handle to the {side}",
                    f"go and move the slider to the {side}",
                ),
                possible=lambda state, side=side: (
                    state.slider < SLIDER_RIGHT_M if side == "left" else state.slider > SLIDER_LEFT_M
                ),
                succeeded=lambda before, now, side=side: (
                    now.slider > SLIDER_LEFT_M if side == "left" else now.slider < SLIDER_RIGHT_M
                ),
            )
            for side in ("left", "right")
        ),
        *(
            _switched(
                f"turn_{word}_led",
                (
                    f"turn {word} the led",
                    f"switch {word} the led",
                    f"press the button to turn {word} the led",
                    f"turn {word} the green light",
                    f"push the button to switch {word} the green led",
                ),
                (
                    f"turn the led {word}",
                    f"switch the green light {word}",
                    f"press the button to switch {word} the led",
                ),
                "led",
                word == "on",
            )
            for word in ("on", "off")
        ),
        *(
            _switched(
                f"turn_{word}_lamp",
                (
                    f"turn {word} the lamp",
                    f"switch {word} the lamp",
                    f"use the switch to turn {word} the lamp",
                    f"turn {word} the yellow light",
                    f"move the switch to turn {word} the yellow lamp",
                ),
                (
                    f"turn the lamp {word}",
                    f"switch the yellow light {word}",
                    f"use the switch to switch {word} the lamp",
                ),
                "lamp",
                word == "on",
            )
            for word in ("on", "off")
        ),
        Task(
            "place_in_drawer",
            (
                "place the block in the drawer",
                "put the block in the drawer",
                "store the grasped block in the drawer",
                "place the grasped block in the drawer",
                "drop the block into the drawer",
            ),
            (
                "store the block in the drawer",
                "put the grasped block into the drawer",
                "go and drop the block in the drawer",
            ),
            possible=lambda state: (
                held(state) is not None and state.drawer > DRAWER_OPEN_M and not _drawer_is_used(state)
            ),
            succeeded=_placed,
        ),
        Task(
            "take_out_of_drawer",
            (
                "take the block out of the drawer",
                "lift the block out of the drawer",
                "get the block from the drawer",
                "pick up the block in the drawer",
                "grasp the block from the drawer",
            ),
            (
                "take the block from the drawer",
                "grasp the block in the drawer",
                "go and get the block out of the drawer",
            ),
            possible=lambda state: (
                state.drawer > DRAWER_OPEN_M and drawer_block(state) is not None and held(state) is None
            ),
            succeeded=_take_out,
        ),
        Task(
            "stack_block",
            (
                "stack the grasped block",
                "place the grasped block on top of another block",
                "put the block on top of another block",
                "stack the blocks on top of each other",
                "stack the block on another block",
            ),
            (
                "stack the block",
                "place the block on top of another block",
                "put the grasped block on another block",
            ),
            possible=lambda state: (
                held(state) is not None and bool(free_blocks(state)) and stacked(state) is None
            ),
            succeeded=_put_on_block,
        ),
        Task(
            "unstack_block",
            (
                "unstack the blocks",
                "take off the stacked block",
                "remove the top block",
                "take the top block off the stack",
                "lift the top block of the stack",
            ),
            (
                "remove the stacked block",
                "go to the stack and take off the top block",
                "take off the top block",
            ),
            possible=lambda state: stacked(state) is not None and held(state) is None,
            succeeded=_unstacked,
        ),
    )


def _drawer_is_used(state: TableState) -> bool:
    return any(in_drawer(state, colour) and held(state) != colour for colour in COLOURS)


TASKS: tuple[Task, ...] = _all_tasks()
BY_NAME: dict[str, Task] = {task.name: task for task in TASKS}
NEEDS_HELD_BLOCK = ("place_in_drawer", "stack_block")
"""Tasks that need a held block; their instructions do not name its colour."""
