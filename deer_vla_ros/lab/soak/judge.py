"""This file holds the judge: it hears poses and commands and tells what was not as promised."""

from __future__ import annotations

from collections import deque

import numpy as np

from deer_vla_ros.lab.soak import checks
from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand, HeardPose, Limits, Violation

REMEMBERED_NS = 2 * SECOND
"""How long poses are kept."""
CLOCK_STEP_NS = SECOND // 20
"""A clock that moves more than this against the wall clock between two commands has jumped."""
MOTIONS = 100_000
"""Motions that are remembered for `check_held`: hours of a fault that never ends are not needed."""


class Judge:
    """Knows nothing of ROS and has no clock: time comes with what it hears, and has to come in order.

    Poses and commands may come from any number of publishers. After `forget` the next command is the first
    one.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.commands = 0
        self.motions = 0
        self._poses: deque[HeardPose] = deque()
        self._motion_times: deque[int] = deque(maxlen=MOTIONS)
        self._decision_times: deque[int] = deque(maxlen=MOTIONS)
        self._travelled: deque[tuple[int, float, float]] = deque()
        self.forget()

    def forget(self) -> None:
        """What comes next does not follow what came before: another node, or some of it was not heard."""
        self._last: dict[int, HeardCommand] = {}  # by publisher
        self._last_target: np.ndarray | None = None  # its quaternion
        self._last_motion: HeardCommand | None = None
        self._travelled.clear()

    def pose(self, pose: HeardPose) -> None:
        """Where the arm is measured to be, or is; both count as places that a target may be near to."""
        self._poses.append(pose)
        while self._poses and pose.said_ns - self._poses[0].said_ns > REMEMBERED_NS and len(self._poses) > 1:
            self._poses.popleft()

    def lose_arm(self) -> None:
        """The robot is gone; the next pose is where another one stands."""
        self._poses.clear()

    def decision(self, said_ns: int, held: bool) -> None:
        """The node told of a step; where nobody can hear commands this is all there is to judge by."""
        if not held:
            self._decision_times.append(said_ns)

    def command(self, command: HeardCommand) -> list[Violation]:
        """Everything that is wrong with one command."""
        self.commands += 1
        if command.after_loss:
            self.forget()
        found = checks.finite(command)
        if not found:
            near = self._near(command.said_ns)
            found = self._order(command) + checks.target(self.limits, command, near, self._last_motion)
            found += self._sign(command)
            found += self._motion(command, near) if command.moves else []
        self._note(command, lost=bool(found) and found[0].what == "not_finite")
        return found

    def check_held(self, begin_ns: int, end_ns: int, by_decisions: bool = False) -> list[Violation]:
        """One violation for each motion that was told between two times, when the arm had to hold."""
        times = self._decision_times if by_decisions else self._motion_times
        return [
            Violation(
                at,
                "motion_in_fault",
                (at - begin_ns) / SECOND,
                0.0,
                "the arm was moved when it had to hold [s too late]",
            )
            for at in times
            if begin_ns < at < end_ns
        ]

    def _near(self, now_ns: int) -> list[HeardPose]:
        """The poses that a command may build upon; the newest one where the arm has not been heard for
        long."""
        oldest = now_ns - round((self.limits.max_age_s + self.limits.late_s) * SECOND)
        near = [pose for pose in self._poses if pose.said_ns >= oldest]
        return near or list(self._poses)[-1:]

    def _order(self, command: HeardCommand) -> list[Violation]:
        last = self._last.get(command.publisher)
        if last is None or command.stamp_ns >= last.stamp_ns:
            return []
        if abs((command.clock_ns - command.said_ns) - (last.clock_ns - last.said_ns)) > CLOCK_STEP_NS:
            return []  # the node's own clock was set
        if last.clock_just_set:
            return []  # the last command may still have been stamped by the clock from before
        value = (last.stamp_ns - command.stamp_ns) / SECOND
        return [
            Violation(
                command.said_ns,
                "stamp_back",
                value,
                0.0,
                "a publisher's stamp is older than its last one [s]",
            )
        ]

    def _sign(self, command: HeardCommand) -> list[Violation]:
        if command.quaternion is None or self._last_target is None:
            return []
        product = float(command.quaternion @ self._last_target)
        # An arm that was turned by more than 120 degrees between two holds has no sign to keep.
        if product >= -0.5:
            return []
        message = "the quaternion has the other sign than the last target's"
        return [Violation(command.said_ns, "quaternion_sign", product, 0.0, message)]

    def _motion(self, command: HeardCommand, near: list[HeardPose]) -> list[Violation]:
        found = checks.fresh(self.limits, command) + checks.speed(self.limits, command)
        if command.position is None:
            return found
        if self._last_motion is None:
            return found + checks.start(self.limits, command, near)
        found += checks.step(self.limits, command, self._last_motion)
        return found + self._travel(command)

    def _travel(self, command: HeardCommand) -> list[Violation]:
        """The way of one second, so that steps that are each small do not come too often."""
        self._travelled.append((command.said_ns, *checks.moved_by(command, self._last_motion)))
        while command.said_ns - self._travelled[0][0] > SECOND:
            self._travelled.popleft()
        metres, radians = (sum(part) for part in list(zip(*self._travelled))[1:])
        return checks.travel(self.limits, command, metres, radians)

    def _note(self, command: HeardCommand, lost: bool) -> None:
        self._last[command.publisher] = command
        if command.moves:
            self.motions += 1
            self._motion_times.append(command.said_ns)
        if lost:
            self._last_motion = None
            return
        if command.quaternion is not None:
            self._last_target = command.quaternion
        if not command.moves:
            self._last_motion = None
            self._travelled.clear()
        elif command.position is not None:
            self._last_motion = command
