"""Which inputs may a step act on? The newest of everything, and only if it is fresh and belongs together."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass

import numpy as np

from deer_vla_ros.control.types import Camera, Frame, HoldReason, MeasuredPose

UNIT_QUATERNION_TOLERANCE = 1e-2
"""How far a quaternion's length may be from 1: covers float32 publishers, not a forgotten field."""

MAX_ARM_SPEED = 3.0
"""m/s: faster than any arm of this kind moves; a measured pose that moves faster is wrong, or of another arm."""
POSE_NOISE_M = 0.02
"""How far two measured poses may be apart at no distance in time."""


@dataclass(frozen=True)
class InputLimits:
    """What still counts as now.

    max_age_ns: a camera frame older than this is stale; max_pose_age_ns: likewise the measured pose.
    max_skew_ns: stamps of the two cameras further apart do not belong together; also how far a stamp may lie in the future.
    """

    max_age_ns: int
    max_pose_age_ns: int
    max_skew_ns: int


@dataclass(frozen=True)
class Inputs:
    """The newest of everything at one moment.

    pose_jump_ns: stamp of the last pose that was too far from the one before to be believed.
    pair: the newest static and gripper frame that belong together. dropped: static frames of pairs that were
    replaced before a tick saw them.
    """

    static: Frame | None = None
    gripper: Frame | None = None
    pair: tuple[Frame, Frame] | None = None
    pose: MeasuredPose | None = None
    instruction: str = ""
    hold_requested: bool = False
    pose_jump_ns: int | None = None
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
                dropped = inputs.pair is not None and inputs.pair[0] is not self._seen and inputs.pair[0] is not static
                inputs = dataclasses.replace(inputs, pair=(static, gripper), dropped=inputs.dropped + int(dropped))
            self._inputs = inputs
            return inputs.pair is not None and inputs.pair[0] is not self._seen

    def put_pose(self, pose: MeasuredPose) -> None:
        with self._lock:
            jumped = _is_jump(self._inputs.pose, pose)
            jump_ns = pose.stamp_ns if jumped else self._inputs.pose_jump_ns
            self._inputs = dataclasses.replace(self._inputs, pose=pose, pose_jump_ns=jump_ns)

    def put_instruction(self, text: str) -> None:
        self._replace(instruction=text.strip())

    def request_hold(self, hold: bool) -> None:
        self._replace(hold_requested=hold)

    def request_reset(self) -> None:
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, resets=self._inputs.resets + 1)

    def mark_seen(self, pair: tuple[Frame, Frame] | None) -> None:
        """A tick stepped on this pair or deliberately held: it is not dropped."""
        with self._lock:
            self._seen = pair[0] if pair else None

    def forget(self) -> None:
        """Drops frames and pose, which belong to another time; instruction and requests stay."""
        self._replace(static=None, gripper=None, pair=None, pose=None, pose_jump_ns=None)

    def judge(self, inputs: Inputs, now_ns: int) -> tuple[HoldReason, ...]:
        """Why no step may act on `inputs` at `now_ns`; empty when it may. Every reason is named, not only the first."""
        reasons = []
        if inputs.hold_requested:
            reasons.append(HoldReason.REQUESTED)
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
        length = np.linalg.norm(pose.pose.quaternion)
        if not (np.isfinite(pose.pose.position).all() and abs(length - 1) <= UNIT_QUATERNION_TOLERANCE):
            reasons.append(HoldReason.POSE_INVALID)
        age = now_ns - pose.stamp_ns
        if age > self.limits.max_pose_age_ns:
            reasons.append(HoldReason.POSE_STALE)
        if age < -self.limits.max_skew_ns:
            reasons.append(HoldReason.POSE_IN_FUTURE)
        if inputs.pose_jump_ns is not None and pose.stamp_ns - inputs.pose_jump_ns <= self.limits.max_pose_age_ns:
            reasons.append(HoldReason.POSE_JUMPED)
        return reasons

    def _judge_cameras(self, inputs: Inputs, now_ns: int) -> list[HoldReason]:
        """Cameras are judged by the newest frame of each, and then by the newest pair.

        The pair may lag behind one camera for a moment, until the other's frame is here; it is skewed when it lags for longer
        than a frame may be old.
        """
        reasons = []
        for name, frame in (("STATIC", inputs.static), ("GRIPPER", inputs.gripper)):
            missing, unstamped, stale, future = (
                HoldReason[text.format(name)] for text in ("NO_{}_FRAME", "{}_UNSTAMPED", "{}_STALE", "{}_IN_FUTURE")
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

    def _replace(self, **changes: object) -> None:
        with self._lock:
            self._inputs = dataclasses.replace(self._inputs, **changes)


def _is_jump(before: MeasuredPose | None, now: MeasuredPose) -> bool:
    """Whether no arm could have moved from one measured pose to the other in the time between them."""
    if before is None or before.frame != now.frame:
        return False
    distance = float(np.linalg.norm(now.pose.position - before.pose.position))
    return distance > POSE_NOISE_M + MAX_ARM_SPEED * abs(now.stamp_ns - before.stamp_ns) / 1e9
