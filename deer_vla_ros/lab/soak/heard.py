"""This file holds the plain data that the judge hears and tells: poses, commands, limits and violations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SECOND = 1_000_000_000
"""Nanoseconds."""


@dataclass(frozen=True)
class Limits:
    """What every command has to keep. The judge has its own copy of the node's defaults, so that a node that
    loosens its own limits is found out.

    max_translation_m and max_rotation_rad are per step; max_age_s is the oldest input that may move the arm;
    late_s: how much later than that a command may leave the node.
    """

    max_translation_m: float = 0.06
    max_rotation_rad: float = 0.3
    leash_m: float = 0.15
    leash_rad: float = 0.6
    workspace_min: tuple[float, float, float] = (-0.8, -0.8, 0.0)
    workspace_max: tuple[float, float, float] = (0.8, 0.8, 1.2)
    max_age_s: float = 0.3
    late_s: float = 0.2
    rate_hz: float = 10.0


@dataclass(frozen=True)
class HeardPose:
    """Where the arm is, as it was told at `said_ns` (wall clock): position (3,) [m], quaternion (4,) xyzw."""

    said_ns: int
    position: np.ndarray
    quaternion: np.ndarray


@dataclass(frozen=True)
class HeardCommand:
    """One command as it came over DDS.

    said_ns: when it left its publisher, wall clock. heard_ns: when the middleware of the observer had it,
    wall clock. clock_ns: the time of the node's own clock at `said_ns`; equal to it unless the node lives in
    simulated time. clock_just_set: that clock was set so shortly before that the node may not have heard of
    it. stamp_ns: its header's stamp. position (3,) [m] and quaternion (4,) of the target; None
    where none was published. linear (3,) [m/s] and angular (3,) [rad/s] of the twist; None where no twist of
    that stamp came. after_loss: the observer missed something before it, so that it cannot be compared with
    the command before. publisher: which one it came from, numbered by the observer; a node and its watchdog
    are two.
    """

    said_ns: int
    heard_ns: int
    clock_ns: int
    stamp_ns: int
    position: np.ndarray | None
    quaternion: np.ndarray | None
    linear: np.ndarray | None
    angular: np.ndarray | None
    after_loss: bool = False
    publisher: int = 0
    clock_just_set: bool = False

    @property
    def moves(self) -> bool:
        """Whether the arm is told to move: a twist that is not zero, NaN included."""
        return self.linear is not None and not (np.all(self.linear == 0) and np.all(self.angular == 0))


@dataclass(frozen=True)
class Violation:
    """One thing that was not as promised.

    at_ns: wall clock. what: its kind, one word. value and limit: in the unit that `message` names.
    """

    at_ns: int
    what: str
    value: float
    limit: float
    message: str
