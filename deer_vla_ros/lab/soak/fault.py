"""The description of a fault: what it does, what the node must do meanwhile, and how the node recovers."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deer_vla_ros.lab.soak.arena import Arena

Act = Callable[["Arena"], int]
"""Begins or ends a fault. Returns the time of day at which it took effect [ns]."""
HOLD_WITHIN_S = 0.6
"""The most time from a fault's begin to the last motion: inputs.max_age_s, 0.2 s, and 0.1 s for a busy
machine."""
NOT_FOLLOWING_WITHIN_S = 3.6
"""The same for faults that the node only notices because the arm does not follow: guard.follow_timeout_s and
0.6 s."""


class Door(enum.Enum):
    """The part of the system where a fault acts. Two faults at the same time act at different doors."""

    CAMERAS = "cameras"
    POSE = "measured pose"
    INFERENCE = "inference"
    CALLS = "instruction and services"
    PROCESSES = "processes"
    CLOCK = "clock"


class Clearing(enum.Enum):
    """How the node moves the arm again after the end of a fault."""

    ITSELF = "by itself"
    ASKED = "when ~/hold is called with false, and not before"
    EITHER = "by itself or when ~/hold is called with false"


@dataclass(frozen=True)
class Fault:
    """One fault.

    about: a description. seconds: how long it lasts, in addition to the time of `begin`.
    begin, end: start and end the fault; each returns the time from which the change holds [ns, wall clock].
    holds_after_s: the arm must hold from this time after the begin until the end; None: it need not hold.
    holds_for_s: how long after its begin the fault ends by itself; None: only `end` ends it.
    by_decisions: nobody receives commands meanwhile, so that the judge uses ~/step.
    is_silent: no command is expected meanwhile. restarts: the node's process ends.
    is_robots: only the fake robot can have it. alone: its promise cannot be judged beside another fault.
    """

    name: str
    about: str
    door: Door
    seconds: float
    begin: Callable[[Arena], int]
    end: Callable[[Arena], int]
    holds_after_s: float | None = None
    holds_for_s: float | None = None
    clearing: Clearing = Clearing.ITSELF
    by_decisions: bool = False
    is_silent: bool = False
    restarts: bool = False
    is_robots: bool = False
    alone: bool = False

    @property
    def pairs(self) -> bool:
        """Whether the fault may come together with another one."""
        return self.door not in (Door.PROCESSES, Door.CLOCK) and not (
            self.is_silent or self.by_decisions or self.alone
        )


def nothing(arena: Arena) -> int:
    """The end of a fault that ends by itself: there is nothing to do."""
    return time.time_ns()
