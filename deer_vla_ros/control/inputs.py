"""The input gate: it keeps the newest value of every input, and says why a step must not use them."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.control.types import Camera, Frame, HoldReason, MeasuredPose, Pose

UNIT_QUATERNION_TOLERANCE = 1e-2
"""The largest difference of a quaternion's length from 1: float32 passes, a field left at 0 does not."""

MAX_ARM_SPEED, MAX_ARM_TURN = 3.0, 10.0
"""[m/s], [rad/s]: no arm of this kind moves faster. A measured pose that does is wrong, or another arm's."""
POSE_NOISE_M, POSE_NOISE_RAD = 0.02, 0.1
"""[m] and [rad]: the largest distance of two poses that are measured at the same time."""
MAX_COORDINATE_M = 100.0
"""[m]: the largest distance of an arm from the origin of its frame, mobile robots in a hall included."""


@dataclass(frozen=True)
class InputLimits:
    """The limits of age and skew.

    max_age_ns: the largest age of a camera frame. max_pose_age_ns: the largest age of the measured pose.
    max_skew_ns: the largest distance of the two camera stamps of a pair, and of a stamp in the future.
    """

    max_age_ns: int
    max_pose_age_ns: int
    max_skew_ns: int


@dataclass(frozen=True)
class Inputs:
    """The newest value of every input at one moment.

    pair: the newest static and gripper frame whose stamps belong together. good_pose: the newest pose that is
    sane by itself (see `is_sane`). pose_jump_ns: stamp of the last good pose that was further from the good
    pose before it than an arm moves. demands: reasons to hold that hold as long as they are demanded.
    holds_requested: number of requested holds so far, including those that were lifted at once. clearances:
    how often a person let the arm go on, by lifting the requested hold or by another instruction. dropped:
    number of pairs that newer ones replaced before a tick saw their static frame.
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
    """Keeps the newest value of every input.

    Any thread may call any method; none of them waits for a step. `limits` is set by the control thread.
    """

    def __init__(self, limits: InputLimits, frame: str):
        self.limits = limits
        self._action_frame = frame
        self._lock = threading.Lock()
        self._inputs = Inputs()
        self._seen: Frame | None = None

    def snapshot(self) -> Inputs:
        """All inputs as they are now, frozen, so that a tick works with one moment."""
        return self._inputs

    def put_frame(self, camera: Camera, frame: Frame) -> bool:
        """Takes a new frame. It forms a pair with the other camera's newest frame if their stamps are close.

        Returns whether there is a pair that no tick has seen, so that a tick may have something to do.
        """
        with self._lock:
            inputs = dataclasses.replace(self._inputs, **{camera.value: frame})
            static, gripper = inputs.static, inputs.gripper
            if static and gripper and abs(static.stamp_ns - gripper.stamp_ns) <= self.limits.max_skew_ns:
                # A second gripper frame for the same static frame makes a newer pair, but not another step.
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
        """Takes a measured pose, and compares it with the last good one."""
        with self._lock:
            good, jump_ns = self._inputs.good_pose, self._inputs.pose_jump_ns
            if pose.frame == self._action_frame and is_sane(pose.pose):
                jump_ns = pose.stamp_ns if good is not None and _is_jump(good, pose) else jump_ns
                good = pose
            self._inputs = dataclasses.replace(self._inputs, pose=pose, good_pose=good, pose_jump_ns=jump_ns)

    def put_instruction(self, text: str) -> None:
        """Takes an instruction; an empty one means hold.

        A new text is a clearance and starts a new episode at the next step. The same text does neither.
        """
        text = text.strip()
        with self._lock:
            is_other = bool(text) and text != self._inputs.instruction
            self._inputs = dataclasses.replace(self._inputs, instruction=text, **self._clearance(is_other))

    def request_hold(self, hold: bool) -> None:
        """Requests a hold, or lifts it. Lifting is a clearance, even if no hold was requested.

        Each requested hold counts, even if it is lifted before a tick sees it.
        """
        with self._lock:
            demands, requested = (
                self._demands(HoldReason.REQUESTED, hold),
                self._inputs.holds_requested + int(hold),
            )
            self._inputs = dataclasses.replace(
                self._inputs, demands=demands, holds_requested=requested, **self._clearance(not hold)
            )

    def demand_hold(self, reason: HoldReason, stands: bool) -> None:
        """Demands a hold as long as `stands`, for a reason that the caller sees. Its end is no clearance."""
        if (reason in self._inputs.demands) != stands:
            with self._lock:
                self._inputs = dataclasses.replace(self._inputs, demands=self._demands(reason, stands))

    def clear(self) -> None:
        """A clearance: a person has looked at the arm, and serious reasons do not hold any longer."""
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, **self._clearance(True))

    def request_reset(self) -> None:
        """Requests a new episode at the next step, with a cleared temporal state."""
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, resets=self._inputs.resets + 1)

    def mark_seen(self, pair: tuple[Frame, Frame] | None) -> None:
        """A tick has used this pair, or has held: the pair does not count as dropped."""
        with self._lock:
            self._seen = pair[0] if pair else None

    def forget(self) -> None:
        """Forgets frames and poses, because the clock has jumped. The instruction and the demands stay."""
        nothing = dict.fromkeys(("static", "gripper", "pair", "pose", "good_pose", "pose_jump_ns"))
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, **nothing)

    def judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """All reasons why no step may use `inputs` at `now_ns`; empty if a step may."""
        reasons = list(inputs.demands)
        if not inputs.instruction:
            reasons.append(HoldReason.NO_INSTRUCTION)
        reasons += self._judge_cameras(inputs, now_ns)
        reasons += self.judge_pose(inputs, now_ns)
        return tuple(reasons)

    def judge_pose(self, inputs: Inputs, now_ns: int) -> list[HoldReason]:
        """All reasons why the measured pose must not be used; empty if it may be."""
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
        """Judges the newest frame of each camera, and then the newest pair.

        A pair may be older than one camera's newest frame, until the other camera's frame arrives. If the
        pair is older than a frame may be, the cameras are skewed.
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
        """Whether a frame of the pair is older than a frame may be."""
        return now_ns - min(frame.stamp_ns for frame in pair) > self.limits.max_age_ns

    def _clearance(self, given: bool) -> dict[str, object]:
        """The fields of `Inputs` that a clearance changes, if it is given. It also clears a pose jump."""
        return {"clearances": self._inputs.clearances + 1, "pose_jump_ns": None} if given else {}

    def _demands(self, reason: HoldReason, stands: bool) -> tuple[HoldReason, ...]:
        """The demands with `reason` if it stands, else without it."""
        others = tuple(each for each in self._inputs.demands if each is not reason)
        return (*others, reason) if stands else others


def is_sane(pose: Pose) -> bool:
    """Whether an arm can have this pose: finite, a unit quaternion, within MAX_COORDINATE_M, and not at the
    origin (a driver that has not measured yet sends zeros)."""
    position, length = pose.position, np.linalg.norm(pose.quaternion)
    is_position = (
        np.isfinite(position).all() and np.abs(position).max() <= MAX_COORDINATE_M and position.any()
    )
    return bool(is_position and abs(length - 1) <= UNIT_QUATERNION_TOLERANCE)


def _is_jump(before: MeasuredPose, now: MeasuredPose) -> bool:
    """Whether no arm can move from one measured pose to the other in the time between them. Both are sane."""
    seconds = abs(now.stamp_ns - before.stamp_ns) / 1e9
    metres, radians = now.pose.apart(before.pose)
    return (
        metres > POSE_NOISE_M + MAX_ARM_SPEED * seconds or radians > POSE_NOISE_RAD + MAX_ARM_TURN * seconds
    )
