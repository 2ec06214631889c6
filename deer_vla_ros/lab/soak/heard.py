"""The plain data that the judge takes and gives: poses, commands, limits and violations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SECOND = 1_000_000_000
"""One second in nanoseconds."""


@dataclass(frozen=True)
class Limits:
    """The limits of every command. They are a separate copy of the node's defaults, to notice a node that
    weakens its own.

    max_translation_m, max_rotation_rad: per step. leash_m, leash_rad: the most distance of a target from the
    arm. max_age_s: the most age of an input that moves the arm. late_s: how much later than max_age_s a
    command may leave the node.
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
    """A pose of the arm, published at `said_ns` (wall clock): position (3,) [m], quaternion (4,) xyzw."""

    said_ns: int
    position: np.ndarray
    quaternion: np.ndarray


@dataclass(frozen=True)
class HeardCommand:
    """One command as the observer received it.

    said_ns: when it left its publisher, wall clock. heard_ns: when the observer's middleware received it,
    wall clock. clock_ns: the time of the node's own clock at `said_ns`; it is equal to `said_ns` except in
    simulated time. clock_just_set: that clock was set so shortly before that the node may not know the new
    time yet. stamp_ns: the stamp of the header.

    position: (3,) [m] and quaternion: (4,) xyzw of the target; None if no target had this stamp. linear: (3,)
    [m/s] and angular: (3,) [rad/s] of the twist; None if no twist had this stamp. after_loss: messages before
    it were lost, so that it cannot be compared with the command before. publisher: the number that the
    observer gave its publisher; a node and its watchdog are two publishers.
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
        """Whether the command moves the arm: its twist is not zero. NaN counts as a motion."""
        return self.linear is not None and not (np.all(self.linear == 0) and np.all(self.angular == 0))


@dataclass(frozen=True)
class Violation:
    """One broken promise.

    at_ns: the time, wall clock. what: its kind, one word. value, limit: in the unit that `message` names.
    """

    at_ns: int
    what: str
    value: float
    limit: float
    message: str
