"""The judge: it takes poses and commands and returns the violations of the limits."""

from __future__ import annotations

from collections import deque

import numpy as np

from deer_vla_ros.lab.soak import checks
from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand, HeardPose, Limits, Violation

REMEMBERED_NS = 2 * SECOND
"""How long poses are kept."""
CLOCK_STEP_NS = SECOND // 20
"""The node's clock has jumped if it moves by more than this against the wall clock between two commands."""
MOTIONS = 100_000
"""The number of newest motions that are kept for `check_held`, more than any fault lasts."""


class Judge:
    """Checks commands against limits. It uses neither ROS nor a clock: poses and commands bring their times,
    in order.

    Poses and commands may come from any number of publishers. After `forget` the next command counts as the
    first one.
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
        """Forgets the commands so far: the next one comes from another node, or some were lost."""
        self._last: dict[int, HeardCommand] = {}  # The last command, by publisher.
        self._last_target: np.ndarray | None = None  # The quaternion of the last target.
        self._last_motion: HeardCommand | None = None
        self._travelled.clear()

    def pose(self, pose: HeardPose) -> None:
        """Takes a measured or a true pose of the arm. A target may be near either of them."""
        self._poses.append(pose)
        while self._poses and pose.said_ns - self._poses[0].said_ns > REMEMBERED_NS and len(self._poses) > 1:
            self._poses.popleft()

    def lose_arm(self) -> None:
        """Forgets the poses: the robot was killed, and the next pose is that of another robot."""
        self._poses.clear()

    def decision(self, said_ns: int, held: bool) -> None:
        """Takes a step of the node. It serves to judge the node while nobody receives its commands."""
        if not held:
            self._decision_times.append(said_ns)

    def command(self, command: HeardCommand) -> list[Violation]:
        """Takes a command and returns its violations."""
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
        """One violation for each motion that was commanded between two times, in which the arm had to hold.

        by_decisions: use the node's steps instead of its commands.
        """
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
        """The poses on which a command may be based; only the newest pose if all are too old."""
        oldest = now_ns - round((self.limits.max_age_s + self.limits.late_s) * SECOND)
        near = [pose for pose in self._poses if pose.said_ns >= oldest]
        return near or list(self._poses)[-1:]

    def _order(self, command: HeardCommand) -> list[Violation]:
        last = self._last.get(command.publisher)
        if last is None or command.stamp_ns >= last.stamp_ns:
            return []
        if abs((command.clock_ns - command.said_ns) - (last.clock_ns - last.said_ns)) > CLOCK_STEP_NS:
            return []  # The node's own clock was set.
        if last.clock_just_set:
            return []  # The last command may have a stamp from before the clock was set.
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
        # If the arm was turned by more than 120 degrees between two holds, either sign is right.
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
        """Checks the way of one second, so that small steps do not come too often."""
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
