"""This file holds what a fault is, what must be seen while it lasts, and how the node gets over it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deer_vla_ros.lab.soak.arena import Arena

HOLD_WITHIN_S = 0.6
"""How long after a fault's begin the last motion may leave: inputs.max_age_s, 0.2 s, and 0.1 s for a busy
machine."""
NOT_FOLLOWING_WITHIN_S = 3.6
"""The same where only an arm that does not follow gives the fault away: guard.follow_timeout_s and 0.6 s."""


class Door(enum.Enum):
    """Where a fault comes in. Two at once come in by different doors."""

    CAMERAS = "cameras"
    POSE = "measured pose"
    INFERENCE = "inference"
    CALLS = "instruction and services"
    PROCESSES = "processes"
    CLOCK = "clock"


class Clearing(enum.Enum):
    """How the node moves again when the fault is over."""

    ITSELF = "by itself"
    ASKED = "when ~/hold is called with false, and not before"
    EITHER = "by itself or when ~/hold is called with false"


@dataclass(frozen=True)
class Fault:
    """One way to make life hard.

    about: what happens, for people. seconds: how long it lasts, beyond what `begin` takes.
    begin, end: do it; each returns the time [ns, wall clock] from which on it was so.
    holds_after_s: the arm must hold so long after the begin at the latest, until the end; None: it need not.
    holds_for_s: where the fault ends by itself, how long after its begin; None: with `end`.
    by_decisions: nobody hears commands meanwhile, and ~/step has to do.
    is_silent: no command is expected meanwhile. restarts: the node's process ends. is_robots: the fake robot
    only. alone: its promise means nothing while another fault lasts.
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
        """Whether it may come together with another one."""
        return self.door not in (Door.PROCESSES, Door.CLOCK) and not (
            self.is_silent or self.by_decisions or self.alone
        )
