"""The bench: it gives the judge all messages in the order of time, and keeps a record of violations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deer_vla_ros.lab.soak.heard import SECOND, HeardCommand, HeardPose, Limits, Violation
from deer_vla_ros.lab.soak.judge import CLOCK_STEP_NS, Judge
from deer_vla_ros.lab.soak.pairing import PATIENCE_NS, Half, Pairing
from deer_vla_ros.lab.soak.silence import Silence

SILENCE_LIMIT_S = 0.5
"""The longest time without a command that is not a violation."""
STALL_AROUND_NS = SECOND // 5
"""A stall of the observer excuses silence during the stall, and for this time before and after it."""


CLOCK_DELIVERY_NS = SECOND // 10
"""The most time that a /clock message takes to the node."""


@dataclass(frozen=True)
class Summary:
    """The observer's result. violations: each one's fields, and "faults", those in progress at that time."""

    commands: int
    motions: int
    commands_outside_limits: int
    stale_commands: int
    longest_silence_s: float
    stalls: int
    longest_stall_s: float
    violations: list[dict[str, Any]]


@dataclass
class _Trouble:
    """A fault from its begin to the node's recovery. end_ns is None until the recovery."""

    name: str
    begin_ns: int
    end_ns: int | None = None


@dataclass
class _Window:
    """A time in which the arm had to hold. It is checked when all commands up to its end are judged."""

    name: str
    begin_ns: int
    end_ns: int
    by_decisions: bool


@dataclass
class Bench:
    """Takes messages in the order of their arrival; `judge_until` passes them on to the judge.

    tell: called with keywords for every event that the soak command has to know. All times are in ns of the
    wall clock.
    """

    tell: Callable[..., None]
    _judge: Judge = field(default_factory=lambda: Judge(Limits()))
    _pairing: Pairing = field(default_factory=Pairing)
    _silence: Silence = field(default_factory=Silence)
    _poses: list[HeardPose] = field(default_factory=list)
    _offsets: list[tuple[int, int]] = field(default_factory=list)
    _troubles: list[_Trouble] = field(default_factory=list)
    _windows: list[_Window] = field(default_factory=list)
    _violations: list[dict[str, Any]] = field(default_factory=list)
    _outside: int = 0
    _stale: int = 0
    _stalls: list[float] = field(default_factory=list)
    _now_ns: int = 0

    def set_limits(self, limits: Limits) -> None:
        """Sets the limits of all commands. Call it before the first command is judged."""
        self._judge.limits = limits

    # --- Messages that were received.

    def pose(self, pose: HeardPose) -> None:
        """Takes a measured or a true pose of the arm."""
        self._poses.append(pose)

    def clock(self, said_ns: int, offset_ns: int) -> None:
        """Takes a reading of the node's clock: at `said_ns` it was `offset_ns` ahead of the wall clock.

        Without any call the two clocks are taken to be equal.
        """
        self._offsets.append((said_ns, offset_ns))

    def half(self, half: Half) -> None:
        """Takes a twist or a target. A twist is also reported at once, as a motion or a hold."""
        self._pairing.put(half)
        if half.is_twist:
            moves = bool(half.first.any() or half.second.any())
            self.tell(**{"motion" if moves else "hold": half.said_ns})

    def step(self, said_ns: int, held: bool, reasons: list[str]) -> None:
        """Takes a step message of the node. held: whether the arm held. reasons: why."""
        self._judge.decision(said_ns, held)
        self.tell(step=said_ns, held=held, reasons=reasons)

    def status(self, said_ns: int, level: int, message: str) -> None:
        """Takes the node's status in /diagnostics."""
        self.tell(status=said_ns, level=level, message=message)

    # --- Requests of the soak command.

    def fault(self, name: str, at_ns: int) -> None:
        """Notes that a fault begins."""
        self._troubles.append(_Trouble(name, at_ns))

    def over(self, name: str, at_ns: int) -> None:
        """Notes that the node has recovered from a fault, or that the soak command stopped waiting for it."""
        for trouble in self._troubles:
            if trouble.name == name and trouble.end_ns is None:
                trouble.end_ns = at_ns

    def must_have_held(self, name: str, begin_ns: int, end_ns: int, by_decisions: bool) -> None:
        """Demands that the arm held in this time. by_decisions: judge by steps, not by commands."""
        self._windows.append(_Window(name, begin_ns, end_ns, by_decisions))

    def mute(self, begin_ns: int, end_ns: int) -> None:
        """Excuses silence in this time: no node ran, or nobody could receive its commands."""
        self._silence.excuse(begin_ns, end_ns)

    def stalled(self, begin_ns: int, end_ns: int) -> None:
        """Notes a time in which the observer could not receive messages, and excuses silence around it."""
        self._stalls.append((end_ns - begin_ns) / SECOND)
        self._silence.excuse(begin_ns - STALL_AROUND_NS, end_ns + STALL_AROUND_NS)

    def lose_arm(self) -> None:
        """Forgets the arm's poses, because the robot was killed. Messages so far are judged first."""
        self.judge_until(self._now_ns + PATIENCE_NS)
        self._judge.lose_arm()

    def forget(self) -> None:
        """Treats the next command as the first one. Messages so far are judged first."""
        self.judge_until(self._now_ns + PATIENCE_NS)
        self._judge.forget()

    # --- The judgement.

    def judge_until(self, now_ns: int) -> None:
        """Judges all messages that are at least PATIENCE_NS old, in the order of time."""
        self._now_ns = max(now_ns, self._now_ns)
        commands = self._pairing.take(self._now_ns)
        until = self._now_ns - PATIENCE_NS
        self._poses.sort(key=lambda pose: pose.said_ns)
        for command in commands:
            self._poses_until(command.said_ns)
            self._command(command)
        self._poses_until(until)
        for window in [window for window in self._windows if window.end_ns < until]:
            self._windows.remove(window)
            for violation in self._judge.check_held(window.begin_ns, window.end_ns, window.by_decisions):
                self._outside += 1
                self._record(violation, [window.name])

    def _poses_until(self, until_ns: int) -> None:
        count = sum(pose.said_ns <= until_ns for pose in self._poses)
        for pose in self._poses[:count]:
            self._judge.pose(pose)
        del self._poses[:count]

    def _command(self, command: HeardCommand) -> None:
        self._silence.heard(command.said_ns)
        found = self._judge.command(self._by_the_nodes_clock(command))
        self._stale += any(violation.what == "stale" for violation in found)
        self._outside += any(violation.what != "stale" for violation in found)
        for violation in found:
            self._record(violation, self._in_progress(violation.at_ns))

    def _by_the_nodes_clock(self, command: HeardCommand) -> HeardCommand:
        """The command with the time of the node's clock.

        Just after a jump the clock may have shown two times: the older one counts.
        """
        if not self._offsets:
            return command
        self._offsets.sort()
        before = [entry for entry in self._offsets if entry[0] <= command.said_ns]
        recent = [entry for entry in before if entry[0] > command.said_ns - CLOCK_DELIVERY_NS] or before[-1:]
        self._offsets = [*before[-10:], *self._offsets[len(before) :]]
        offsets = [offset for _, offset in recent] or [0]
        just_set = max(offsets) - min(offsets) > CLOCK_STEP_NS
        return dataclasses.replace(command, clock_ns=command.said_ns + min(offsets), clock_just_set=just_set)

    def _in_progress(self, at_ns: int, until_ns: int | None = None) -> list[str]:
        """The names of the faults in progress at `at_ns`, or at any time from `at_ns` to `until_ns`."""
        return [
            trouble.name
            for trouble in self._troubles
            if trouble.begin_ns <= (until_ns or at_ns) and (trouble.end_ns is None or at_ns <= trouble.end_ns)
        ]

    def _record(self, violation: Violation, faults: list[str]) -> None:
        told = dataclasses.asdict(violation) | {"faults": faults}
        self._violations.append(told)
        self.tell(violation=told)

    def summary(self) -> Summary:
        """The result up to now."""
        stretches = self._silence.stretches(self._now_ns - PATIENCE_NS)
        silences = [
            dataclasses.asdict(
                Violation(quiet.begin_ns, "silence", quiet.seconds, SILENCE_LIMIT_S, "no command [s]")
            )
            | {"faults": self._in_progress(quiet.begin_ns, quiet.end_ns)}
            for quiet in stretches
            if quiet.seconds > SILENCE_LIMIT_S
        ]
        return Summary(
            commands=self._judge.commands,
            motions=self._judge.motions,
            commands_outside_limits=self._outside,
            stale_commands=self._stale,
            longest_silence_s=max((quiet.seconds for quiet in stretches), default=0.0),
            stalls=len(self._stalls),
            longest_stall_s=max(self._stalls, default=0.0),
            violations=[*self._violations, *silences],
        )
