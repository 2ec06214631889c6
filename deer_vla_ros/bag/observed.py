"""The observations in a recording at the control rate: pairs of frames, pose and instruction, as the
controller sees them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
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
from deer_vla_ros.bag.recording import Recording
from deer_vla_ros.bag.replay import arrivals
from deer_vla_ros.control.inputs import InputGate, InputLimits
from deer_vla_ros.control.pace import Pace
from deer_vla_ros.control.types import HoldReason, MeasuredPose, Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.inference.types import Observation
from deer_vla_ros.ros.messages import measured_pose


@dataclass(frozen=True, eq=False)
class ObservedStep:
    """A moment at which the controller would have stepped.

    stamp_ns: of the static frame. pose: the measured pose whose stamp is nearest to it; that of `observation`
    is the newest one that the controller would have had. gripper, target: the newest recorded commands of
    gripper and arm; None before the first one. If the gripper's state is read, `gripper` is the command for
    it.
    """

    instruction: str
    observation: Observation
    stamp_ns: int
    pose: MeasuredPose
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
    """Yields the moments of a recording at which a controller with these settings would step.

    account: its counts go on. frame: the action frame. topics: recorded topics by the node's names, if they
    differ. gripper_state: read in place of gripper commands. Moments before its first position are left out
    and counted. node: as in `find_topics`. Raises UserError for a recording that cannot be read or lacks an
    input.
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
        gate, pace, stamps = InputGate(limits, frame), Pace(rate_hz), Stamps(clock, path)
        if instruction is not None:
            found.pop(INSTRUCTION, None)
            gate.put_instruction(instruction)
        newest, last_ns = _Newest(path, gripper_state), 0
        step: ObservedStep | None = None
        heard = newest.watch(messages(recording, found, account.tally))
        for arrival in arrivals(heard, stamps, account.tally, lambda event: False):
            if arrival.time_ns < last_ns - limits.max_skew_ns:  # as Controller.tick
                account.holds[HoldReason.CLOCK_JUMPED] += 1
                gate.forget()
                pace.forget()
            last_ns = arrival.time_ns
            has_news = arrival.put(gate)
            step = _with_nearest_pose(step, gate.snapshot().good_pose)
            if not has_news:
                continue
            inputs = gate.snapshot()
            reasons = gate.judge(inputs, arrival.time_ns)
            gate.mark_seen(inputs.pair)
            account.holds.update(reasons)
            if reasons or not pace.admits(inputs.pair[0].stamp_ns):
                continue
            pace.take(inputs.pair[0].stamp_ns)
            if gripper_state and newest.gripper is None:
                account.tally.skip(found[GRIPPER_STATE], "steps before the gripper's first position")
                continue
            account.seen += 1
            if step is not None:  # it waited for a pose that is nearer to its frame
                yield step
            static, gripper = inputs.pair
            step = ObservedStep(
                inputs.instruction,
                Observation(static.image, gripper.image, inputs.pose.pose.as_array()),
                static.stamp_ns,
                inputs.pose,
                newest.gripper,
                newest.target,
            )
        if step is not None:
            yield step
        account.dropped += gate.snapshot().dropped
        if gripper_state:
            with _named(path):
                gripper_state.check()


def _with_nearest_pose(step: ObservedStep | None, pose: MeasuredPose | None) -> ObservedStep | None:
    """The step with `pose`, if that is nearer to its frame than the pose that it has."""
    if step is None or pose is None:
        return step
    now, other = (abs(each.stamp_ns - step.stamp_ns) for each in (step.pose, pose))
    return replace(step, pose=pose) if other < now else step


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Puts the recording's name before a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


class _Newest:
    """The newest recorded commands of gripper and arm."""

    def __init__(self, path: Path, gripper_state: GripperState | None) -> None:
        self._path, self._state = path, gripper_state
        self.gripper: float | None = None
        self.target: Pose | None = None

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
                self.target = measured_pose(message).pose
            yield name, record, message
