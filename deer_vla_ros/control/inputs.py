"""The input gate: it keeps the newest of every input and says why a step must not act on them."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.control.types import Camera, Frame, HoldReason, MeasuredPose, Pose

UNIT_QUATERNION_TOLERANCE = 1e-2
"""How far a quaternion's length may be from 1: covers float32 publishers, not a forgotten field."""

MAX_ARM_SPEED, MAX_ARM_TURN = 3.0, 10.0
"""m/s and rad/s: faster than any arm of this kind moves. A measured pose that moves faster is wrong, or of
another arm."""
POSE_NOISE_M, POSE_NOISE_RAD = 0.02, 0.1
"""How far two measured poses may be apart at no distance in time."""
MAX_COORDINATE_M = 100.0
"""How far from its frame's origin an arm can be, mobile robots in a hall included."""


@dataclass(frozen=True)
class InputLimits:
    """What still counts as now.

    max_age_ns: a camera frame older than this is stale; max_pose_age_ns: likewise the measured pose.
    max_skew_ns: stamps of the two cameras further apart do not belong together; also how far a stamp may lie
    in the future.
    """

    max_age_ns: int
    max_pose_age_ns: int
    max_skew_ns: int


@dataclass(frozen=True)
class Inputs:
    """The newest of everything at one moment.

    pair: the newest static and gripper frame that belong together. good_pose: the newest pose that made sense
    by itself. pose_jump_ns: stamp of the last pose that was too far from the good one before to be believed.
    demands: holds that are demanded from outside for as long as they stand. holds_requested: how many were
    requested so far, those that were let go at once included. clearances: how often a person deliberately let
    the arm go on, by lifting the requested hold or by another instruction. dropped: static frames of pairs
    that were replaced before a tick saw them.
    """

    static: Frame | None = None
    gripper: Frame | None = None
    pair: tuple[Frame, Frame] | None = None
    pose: MeasuredPose | None = None
    good_pose: MeasuredPose | None = None
    pose_jump_ns: int | None = None
    instruction: str = ""
    demands: tuple[HoldReason, ...] = ()
    holds_requested: int = 0
    clearances: int = 0
    resets: int = 0
    dropped: int = 0


class InputGate:
    """Keeps the newest of every input. Inputs may arrive from any thread; nothing here waits for a step."""

    def __init__(self, limits: InputLimits, frame: str):
        self.limits = limits
        self._action_frame = frame
        self._lock = threading.Lock()
        self._inputs = Inputs()
        self._seen: Frame | None = None

    def snapshot(self) -> Inputs:
        """Everything as it is now; frozen, so that a tick sees one moment."""
        return self._inputs

    def put_frame(self, camera: Camera, frame: Frame) -> bool:
        """A new image; forms a pair with the other camera's newest where their stamps are close enough.

        Returns whether there is a pair that no tick has seen.
        """
        with self._lock:
            inputs = dataclasses.replace(self._inputs, **{camera.value: frame})
            static, gripper = inputs.static, inputs.gripper
            if static and gripper and abs(static.stamp_ns - gripper.stamp_ns) <= self.limits.max_skew_ns:
                # A second gripper frame for the same static frame makes a newer pair, not one more step.
                dropped = (
                    inputs.pair is not None
                    and inputs.pair[0] is not self._seen
                    and inputs.pair[0] is not static
                )
                inputs = dataclasses.replace(
                    inputs, pair=(static, gripper), dropped=inputs.dropped + int(dropped)
                )
            self._inputs = inputs
            return inputs.pair is not None and inputs.pair[0] is not self._seen

    def put_pose(self, pose: MeasuredPose) -> None:
        with self._lock:
            good, jump_ns = self._inputs.good_pose, self._inputs.pose_jump_ns
            if pose.frame == self._action_frame and is_sane(pose.pose):
                jump_ns = pose.stamp_ns if good is not None and _is_jump(good, pose) else jump_ns
                good = pose
            self._inputs = dataclasses.replace(self._inputs, pose=pose, good_pose=good, pose_jump_ns=jump_ns)

    def put_instruction(self, text: str) -> None:
        """Another text than the newest is a clearance; an empty one never is."""
        text = text.strip()
        with self._lock:
            is_other = bool(text) and text != self._inputs.instruction
            self._inputs = dataclasses.replace(self._inputs, instruction=text, **self._clearance(is_other))

    def request_hold(self, hold: bool) -> None:
        """Every requested hold counts, however soon it is lifted; lifting is a clearance, also where none was
        requested."""
        with self._lock:
            demands, requested = (
                self._demands(HoldReason.REQUESTED, hold),
                self._inputs.holds_requested + int(hold),
            )
            self._inputs = dataclasses.replace(
                self._inputs, demands=demands, holds_requested=requested, **self._clearance(not hold)
            )

    def demand_hold(self, reason: HoldReason, stands: bool) -> None:
        """A hold for a reason that only the caller sees, for as long as it stands; its end is no clearance."""
        if (reason in self._inputs.demands) != stands:
            with self._lock:
                self._inputs = dataclasses.replace(self._inputs, demands=self._demands(reason, stands))

    def clear(self) -> None:
        """A clearance, without any other change."""
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, **self._clearance(True))

    def request_reset(self) -> None:
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, resets=self._inputs.resets + 1)

    def mark_seen(self, pair: tuple[Frame, Frame] | None) -> None:
        """A tick stepped on this pair or deliberately held: it is not dropped."""
        with self._lock:
            self._seen = pair[0] if pair else None

    def forget(self) -> None:
        """Drops frames and pose, which belong to another time; the instruction and demands stay."""
        nothing = dict.fromkeys(("static", "gripper", "pair", "pose", "good_pose", "pose_jump_ns"))
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, **nothing)

    def judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """Why no step may act on `inputs` at `now_ns`; empty when it may. Every reason is named, not only the
        first."""
        reasons = list(inputs.demands)
        if not inputs.instruction:
            reasons.append(HoldReason.NO_INSTRUCTION)
        reasons += self._judge_cameras(inputs, now_ns)
        reasons += self.judge_pose(inputs, now_ns)
        return tuple(reasons)

    def judge_pose(self, inputs: Inputs, now_ns: int) -> list[HoldReason]:
        """Why the measured pose cannot be built upon; empty when it can."""
        pose = inputs.pose
        if pose is None:
            return [HoldReason.NO_POSE]
        reasons = []
        if pose.frame != self._action_frame:
            reasons.append(HoldReason.POSE_FRAME)
        if not is_sane(pose.pose):
            reasons.append(HoldReason.POSE_INVALID)
        age = now_ns - pose.stamp_ns
        if age > self.limits.max_pose_age_ns:
            reasons.append(HoldReason.POSE_STALE)
        if age < -self.limits.max_skew_ns:
            reasons.append(HoldReason.POSE_IN_FUTURE)
        if (
            inputs.pose_jump_ns is not None
            and pose.stamp_ns - inputs.pose_jump_ns <= self.limits.max_pose_age_ns
        ):
            reasons.append(HoldReason.POSE_JUMPED)
        return reasons

    def _judge_cameras(self, inputs: Inputs, now_ns: int) -> list[HoldReason]:
        """Cameras are judged by the newest frame of each, and then by the newest pair.

        The pair may lag behind one camera for a moment, until the other's frame is here; it is skewed when it
        lags for longer than a frame may be old.
        """
        reasons = []
        for name, frame in (("STATIC", inputs.static), ("GRIPPER", inputs.gripper)):
            missing, unstamped, stale, future = (
                HoldReason[text.format(name)]
                for text in ("NO_{}_FRAME", "{}_UNSTAMPED", "{}_STALE", "{}_IN_FUTURE")
            )
            if frame is None:
                reasons.append(missing)
            elif frame.stamp_ns == 0:
                reasons.append(unstamped)
            elif now_ns - frame.stamp_ns > self.limits.max_age_ns:
                reasons.append(stale)
            elif now_ns - frame.stamp_ns < -self.limits.max_skew_ns:
                reasons.append(future)
        if not reasons and (inputs.pair is None or self.is_outdated(inputs.pair, now_ns)):
            reasons.append(HoldReason.SKEW)
        return reasons

    def is_outdated(self, pair: tuple[Frame, Frame], now_ns: int) -> bool:
        """Whether one of the pair is older than a frame may be."""
        return now_ns - min(frame.stamp_ns for frame in pair) > self.limits.max_age_ns

    def _clearance(self, given: bool) -> dict[str, object]:
        """What a clearance changes, where it is given: a pose that jumped has been looked at, too."""
        return {"clearances": self._inputs.clearances + 1, "pose_jump_ns": None} if given else {}

    def _demands(self, reason: HoldReason, stands: bool) -> tuple[HoldReason, ...]:
        """What is demanded, with or without `reason`."""
        others = tuple(each for each in self._inputs.demands if each is not reason)
        return (*others, reason) if stands else others


def is_sane(pose: Pose) -> bool:
    """Whether a pose can be an arm's at all: finite, of unit length, within any reach, and not the zeros of a
    driver that has not measured yet."""
    position, length = pose.position, np.linalg.norm(pose.quaternion)
    is_position = (
        np.isfinite(position).all() and np.abs(position).max() <= MAX_COORDINATE_M and position.any()
    )
    return bool(is_position and abs(length - 1) <= UNIT_QUATERNION_TOLERANCE)


def _is_jump(before: MeasuredPose, now: MeasuredPose) -> bool:
    """Whether no arm could have moved from one measured pose to the other in the time between them. Both are
    sane."""
    seconds = abs(now.stamp_ns - before.stamp_ns) / 1e9
    metres, radians = now.pose.apart(before.pose)
    return (
        metres > POSE_NOISE_M + MAX_ARM_SPEED * seconds or radians > POSE_NOISE_RAD + MAX_ARM_TURN * seconds
    )
