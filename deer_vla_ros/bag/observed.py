"""The observations in a recording: pairs of frames, pose and instruction, as the controller sees them."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from deer_vla_ros.bag.gripper_state import GripperState
from deer_vla_ros.bag.input_topics import (
    GRIPPER_COMMAND,
    GRIPPER_STATE,
    INSTRUCTION,
    TARGET,
    Stamps,
    Tally,
    find_topics,
    messages,
)
from deer_vla_ros.bag.recording import Record, Recording
from deer_vla_ros.bag.replay import REMEMBERED_NS, arrivals
from deer_vla_ros.control.inputs import InputGate, InputLimits, is_sane
from deer_vla_ros.control.motion import between
from deer_vla_ros.control.pace import JITTER, Pace
from deer_vla_ros.control.types import HoldReason, MeasuredPose, Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.ros.messages import measured_pose

SHORTEST_SPAN, LONGEST_SPAN = 1 - 2 * JITTER, 1 + 2 * JITTER
"""In control periods: the least and the most time between two measurements for a motion of one period. Both
may jitter as much as the pace allows a frame to be early."""


@dataclass(frozen=True, eq=False)
class ObservedStep:
    """A moment at which the controller could have stepped.

    stamp_ns: of the static frame. pose: the measured pose at this time, between those before and after it;
    None if these are too far apart. The pose in `observation` is the newest one that the controller would
    have had. gripper, target: the newest recorded commands of gripper and arm; None before the first one, and
    if the target is older than inputs.max_pose_age_s. If the gripper's state is read, `gripper` is the
    command for it.
    """

    instruction: str
    observation: Observation
    stamp_ns: int
    pose: Pose | None
    gripper: float | None
    target: Pose | None


@dataclass
class Account:
    """What was used, and what was not. holds: moments at which the controller would have held, by reason.

    seen: moments that were used. dropped: camera pairs that a newer one replaced before they were used.
    """

    tally: Tally = field(default_factory=Tally)
    holds: Counter[HoldReason] = field(default_factory=Counter)
    seen: int = 0
    dropped: int = 0

    def lines(self) -> list[str]:
        """What was left out, one line for each reason."""
        held = [
            f"held {count} times: {reason.name}: {reason.value}" for reason, count in self.holds.most_common()
        ]
        dropped = [f"{self.dropped} camera pairs replaced by newer ones"] if self.dropped else []
        return [*self.tally.lines(), *held, *dropped]


def observed(
    path: Path,
    account: Account,
    rate_hz: float,
    limits: InputLimits,
    frame: str,
    topics: dict[str, str],
    clock: str = "receive",
    instruction: str | None = None,
    gripper_state: GripperState | None = None,
    node: str = "",
) -> Iterator[ObservedStep]:
    """Yields every moment of a recording at which a controller could step, at whatever rate cameras have:
    `paced` and `conversion.spaced` choose among them.

    account: its counts go on. rate_hz: the control rate; a pose is known where those around it are at most
    LONGEST_SPAN control periods apart. frame: the action frame. topics: recorded topics by the node's names,
    if they differ. gripper_state: read in place of gripper commands. Moments before its first position are
    left out and counted. node: as in `find_topics`. Raises UserError for a recording that cannot be read or
    lacks an input.
    """
    with Recording(path) as recording:
        said = (INSTRUCTION,) if instruction is None else ()
        state = (GRIPPER_STATE,) if gripper_state else ()
        found = find_topics(recording, topics, (*said, *state), account.tally, node)
        if said and INSTRUCTION not in found:
            raise UserError(
                f"{path} has no topic {INSTRUCTION}: name one with --topic {INSTRUCTION}:=TOPIC, "
                "or say with --instruction what is done"
            )
        if gripper_state and GRIPPER_STATE not in found:
            raise UserError(
                f"{path} has no topic {GRIPPER_STATE}: name the gripper's joint states with "
                f"--topic {GRIPPER_STATE}:=TOPIC"
            )
        found.pop(GRIPPER_COMMAND if gripper_state else GRIPPER_STATE, None)
        gate, stamps = InputGate(limits, frame), Stamps(clock, path)
        if instruction is not None:
            found.pop(INSTRUCTION, None)
            gate.put_instruction(instruction)
        newest = _Newest(path, gripper_state, frame, limits.max_pose_age_ns, account.tally)
        poses, last_ns, used = _Poses(LONGEST_SPAN * 1e9 / rate_hz), 0, None
        heard = newest.watch(messages(recording, found, account.tally))
        for arrival in arrivals(heard, stamps, account.tally, lambda event: False):
            if arrival.time_ns < last_ns - limits.max_skew_ns:  # as Controller.tick
                account.holds[HoldReason.CLOCK_JUMPED] += 1
                gate.forget()
                yield from poses.rest()
            last_ns = arrival.time_ns
            has_news = arrival.put(gate)
            inputs = gate.snapshot()
            yield from poses.see(inputs.good_pose)
            if not has_news:
                continue
            reasons = gate.judge(inputs, arrival.time_ns)
            gate.mark_seen(inputs.pair)
            account.holds.update(reasons)
            if reasons or inputs.pair[0] is used:  # the news is another instruction or gripper frame
                continue
            used = inputs.pair[0]
            if gripper_state and newest.gripper is None:
                account.tally.skip(found[GRIPPER_STATE], "steps before the gripper's first position")
                continue
            account.seen += 1
            static, gripper = inputs.pair
            step = ObservedStep(
                inputs.instruction,
                Observation(static.image, gripper.image, inputs.pose.pose.as_array()),
                static.stamp_ns,
                None,
                newest.gripper,
                newest.target_at(arrival.received_ns),
            )
            yield from poses.wait(step)
        yield from poses.rest()
        account.dropped += gate.snapshot().dropped
        if gripper_state:
            with _named(path):
                gripper_state.check()


def paced(steps: Iterable[ObservedStep], rate_hz: float) -> Iterator[ObservedStep]:
    """The moments at which a controller with this control rate would step."""
    pace, last_ns = Pace(rate_hz), 0
    for step in steps:
        if step.stamp_ns < last_ns:  # the clock was set back
            pace.forget()
        last_ns = step.stamp_ns
        if pace.admits(step.stamp_ns):
            pace.take(step.stamp_ns)
            yield step


class _Poses:
    """The recent measured poses, and the moments that wait for one after their frame."""

    def __init__(self, longest_ns: float):
        """longest_ns: how far apart two poses may be for one between them to be known."""
        self._longest_ns = longest_ns
        self._poses: deque[MeasuredPose] = deque()
        self._waiting: deque[ObservedStep] = deque()

    def see(self, pose: MeasuredPose | None) -> Iterator[ObservedStep]:
        """Takes the newest pose. Yields the moments whose pose it makes known."""
        if pose is None or (self._poses and pose.stamp_ns <= self._poses[-1].stamp_ns):
            return
        self._poses.append(pose)
        while self._poses[0].stamp_ns < pose.stamp_ns - REMEMBERED_NS:
            self._poses.popleft()
        while self._waiting and self._waiting[0].stamp_ns <= pose.stamp_ns:
            step = self._waiting.popleft()
            yield replace(step, pose=self._at(step.stamp_ns))

    def wait(self, step: ObservedStep) -> Iterator[ObservedStep]:
        """Takes a moment, later than those before. Yields it at once if its pose is known already."""
        if self._poses and step.stamp_ns <= self._poses[-1].stamp_ns and not self._waiting:
            yield replace(step, pose=self._at(step.stamp_ns))
        else:
            self._waiting.append(step)

    def rest(self) -> Iterator[ObservedStep]:
        """Yields the moments that still wait, without a pose, and forgets all poses."""
        yield from self._waiting
        self._waiting.clear()
        self._poses.clear()

    def _at(self, stamp_ns: int) -> Pose | None:
        place = bisect_left(self._poses, stamp_ns, key=lambda pose: pose.stamp_ns)
        after = self._poses[place]
        if after.stamp_ns == stamp_ns:
            return after.pose
        before = self._poses[place - 1] if place else None
        if before is None or after.stamp_ns - before.stamp_ns > self._longest_ns:
            return None
        share = (stamp_ns - before.stamp_ns) / (after.stamp_ns - before.stamp_ns)
        return between(before.pose, after.pose, share)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the recording's name before a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Newest:
    """The newest recorded commands of gripper and arm."""

    def __init__(
        self, path: Path, gripper_state: GripperState | None, frame: str, max_age_ns: int, tally: Tally
    ) -> None:
        self._path, self._state, self._frame, self._max_age_ns = path, gripper_state, frame, max_age_ns
        self._tally = tally
        self.gripper: float | None = None
        self._target: Pose | None = None
        self._target_ns = 0

    def target_at(self, received_ns: int) -> Pose | None:
        """The newest target at this time of receipt, if it is not too old."""
        return self._target if received_ns - self._target_ns <= self._max_age_ns else None

    def watch(self, heard):
        """Yields the messages unchanged, and remembers the commands among them."""
        for name, record, message in heard:
            if name == GRIPPER_COMMAND and len(message.data) == 1:
                self.gripper = float(message.data[0])
            elif name == GRIPPER_STATE:
                with _named(self._path):
                    self._state.see(message)
                self.gripper = self._state.command
            elif name == TARGET:
                self._take(record, measured_pose(message))
            yield name, record, message

    def _take(self, record: Record, target: MeasuredPose) -> None:
        if target.frame != self._frame:
            self._tally.skip(record.topic, f"in the frame {target.frame[:40]!r}, not {self._frame!r}")
        elif is_sane(target.pose):
            self._target, self._target_ns = target.pose, record.time_ns
