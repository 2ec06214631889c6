"""The faults of the robot: cameras, measured pose, arm and clock."""

from __future__ import annotations

from typing import Any

from deer_vla_ros.lab.soak.arena import Arena
from deer_vla_ros.lab.soak.fault import (
    HOLD_WITHIN_S,
    NOT_FOLLOWING_WITHIN_S,
    Act,
    Clearing,
    Door,
    Fault,
    nothing,
)

PUSH_M, PUSH_S = [-0.2, 0.15, 0.1], 0.5
"""The push of a hand on a moving arm, and its duration."""
CARRY_M, CARRY_S = [0.2, -0.15, 0.1], 1.2
"""The push of a hand on an arm that holds, and its duration."""
DISPLACED_M = [0.2, 0.3, 0.15]
"""The displacement. Its direction alternates, so that the arm stays inside its workspace."""


def _quirk(name: str, on: bool) -> Act:
    return lambda arena: arena.robot.ask(quirk=name, on=on)["at"]


def _odd(name: str, about: str, door: Door, seconds: float, **options: Any) -> Fault:
    """A fault that switches a quirk of the robot on and off."""
    return Fault(
        name, about, door, seconds, _quirk(name, True), _quirk(name, False), is_robots=True, **options
    )


def _camera(name: str, about: str, seconds: float = 1.6, holds: bool = True) -> Fault:
    return _odd(name, about, Door.CAMERAS, seconds, holds_after_s=HOLD_WITHIN_S if holds else None)


def _pose(name: str, about: str, seconds: float = 1.6, **options: Any) -> Fault:
    return _odd(name, about, Door.POSE, seconds, **({"holds_after_s": HOLD_WITHIN_S} | options))


def _displace(arena: Arena) -> int:
    arena.count += 1
    sign = 1 if arena.count % 2 else -1
    return arena.robot.ask(displace=[sign * part for part in DISPLACED_M])["at"]


def _push(arena: Arena) -> int:
    return arena.robot.ask(push=PUSH_M, seconds=PUSH_S)["at"]


def _hold_and_carry(arena: Arena) -> int:
    answer = arena.caller.ask(do="hold", **{"with": {"value": True}})
    arena.promise(answer["ok"], "~/hold with true was not answered")
    arena.robot.ask(push=CARRY_M, seconds=CARRY_S)
    return answer["at"]


def _deafen(arena: Arena) -> int:
    arena.observer.say(do="deaf", on=True)
    return arena.robot.ask(quirk="commands_unheard", on=True)["at"]


def _undeafen(arena: Arena) -> int:
    arena.observer.say(do="deaf", on=False)
    return arena.robot.ask(quirk="commands_unheard", on=False)["at"]


FAULTS = (
    _camera("static_camera_killed", "the static camera publishes nothing"),
    _camera("gripper_camera_killed", "the gripper camera publishes nothing"),
    _camera("camera_frozen", "both cameras repeat one image, stamp and all"),
    _camera("camera_slow", "both cameras publish at 1 Hz", 3.2, holds=False),
    _camera("stamps_out_of_order", "camera stamps jump back and forth within 0.25 s", holds=False),
    _camera("stamps_of_another_clock", "camera stamps count from 1970"),
    _camera("stamps_zero", "camera stamps are zero"),
    _camera("stamps_in_future", "camera stamps are 10 s ahead"),
    _camera("cameras_skewed", "the gripper camera's stamps are 0.25 s behind"),
    _camera("resolution_changes", "images change their size", 2.0, holds=False),
    _camera("encoding_bgr8", "images become bgr8", holds=False),
    _camera("encoding_mono8", "images become mono8", holds=False),
    _camera("encoding_unknown", "images have an encoding that the node does not know"),
    _camera("images_truncated", "images have half their data"),
    _camera("image_header_absurd", "image headers promise 2^32 - 1 pixels a side"),
    _pose("pose_absent", "no measured pose"),
    _pose("pose_nan", "the measured pose is NaN"),
    _pose("pose_huge", "the measured pose is 1e300 m away"),
    _pose("pose_zero_quaternion", "the measured pose's quaternion is zero"),
    _pose("pose_wrong_frame", "the measured pose is in another frame"),
    _pose(
        "pose_first_zero",
        "the pose's publisher starts anew and first says (0, 0, 0)",
        holds_after_s=None,
        clearing=Clearing.EITHER,
    ),
    _pose(
        "pose_frozen",
        "the measured pose stands still with fresh stamps",
        5.5,
        holds_after_s=NOT_FOLLOWING_WITHIN_S,
        clearing=Clearing.ASKED,
        alone=True,
    ),
    _odd(
        "arm_stuck",
        "the arm does not follow its targets",
        Door.POSE,
        5.5,
        holds_after_s=NOT_FOLLOWING_WITHIN_S,
        clearing=Clearing.ASKED,
        alone=True,
    ),
    Fault(
        "arm_displaced",
        "the arm is 0.4 m away at once, and stays there",
        Door.POSE,
        1.0,
        _displace,
        nothing,
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.ASKED,
        is_robots=True,
    ),
    Fault(
        "arm_pushed",
        "somebody pushes the moving arm by 0.27 m within 0.5 s",
        Door.POSE,
        1.0,
        _push,
        nothing,
        clearing=Clearing.EITHER,
        is_robots=True,
    ),
    Fault(
        "arm_carried_while_held",
        "~/hold is called, and somebody carries the arm by 0.27 m",
        Door.POSE,
        1.8,
        _hold_and_carry,
        nothing,
        holds_after_s=0.1,
        clearing=Clearing.ASKED,
        is_robots=True,
    ),
    Fault(
        "commands_unheard",
        "nobody subscribes to the arm's commands",
        Door.PROCESSES,
        4.0,
        _deafen,
        _undeafen,
        holds_after_s=2.5,
        clearing=Clearing.EITHER,
        by_decisions=True,
        is_silent=True,
        is_robots=True,
    ),
    _odd(
        "clock_jumps_back",
        "the simulated clock jumps back by 20 s",
        Door.CLOCK,
        1.6,
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.ASKED,
    ),
    _odd(
        "clock_jumps_forward",
        "the simulated clock jumps ahead by 20 s",
        Door.CLOCK,
        1.6,
        clearing=Clearing.EITHER,
    ),
    _odd(
        "clock_stops",
        "the simulated clock stands still",
        Door.CLOCK,
        2.5,
        holds_after_s=HOLD_WITHIN_S,
        clearing=Clearing.EITHER,
    ),
)
