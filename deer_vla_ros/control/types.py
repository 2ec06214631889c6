"""Frozen data types for the inputs and outputs of a control tick. Times are integers [ns] of one clock."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the watchdog process uses these types, and must not load torch
    from deer_vla_ros.budget.types import StepCost
    from deer_vla_ros.inference.types import PolicyStep


class Camera(enum.Enum):
    STATIC = "static"
    GRIPPER = "gripper"


class HoldReason(enum.Enum):
    """Why the arm holds. The value is the text for users."""

    STOPPING = "control is ending"
    REQUESTED = "hold was requested through the service"
    NOT_ENABLED = "the topic `enable` does not say true, or was not refreshed within control.enable_timeout_s"
    CLOCK_JUMPED = "the clock jumped backwards: everything received before it is forgotten"
    CLOCK_STOPPED = "the clock stands still: /clock is paused, has ended or has not begun"
    STALLED = "control stood still for longer than inputs.max_age_s: the watchdog held the arm meanwhile"
    WATCHDOG_LOST = "the watchdog process does not answer: it starts, has ended or is stopped"
    CONTROL_FAILED = "control has failed: the process ends and has to be started again"
    CALLBACK_FAILED = "a callback of the node raised an error: see its log"
    COMMANDS_UNHEARD = (
        "nobody listens to the arm's commands: start the arm's controller (or see control.rehearsal)"
    )
    OTHER_PUBLISHER = "another node may command the arm: it is looked for and listened to for a moment"
    OTHER_COMMANDER = (
        "another node commands the arm too: stop one of the two (control.allow_other_commanders)"
    )
    NO_INSTRUCTION = "no instruction, or an empty one"
    NO_STATIC_FRAME = "no frame of the static camera yet"
    NO_GRIPPER_FRAME = "no frame of the gripper camera yet"
    STATIC_UNSTAMPED = "the static frame's stamp is zero: have the camera driver stamp its images"
    GRIPPER_UNSTAMPED = "the gripper frame's stamp is zero: have the camera driver stamp its images"
    STATIC_STALE = "the newest static frame is older than inputs.max_age_s"
    GRIPPER_STALE = "the newest gripper frame is older than inputs.max_age_s"
    STATIC_IN_FUTURE = "the static frame's stamp lies in the future: the camera uses another clock"
    GRIPPER_IN_FUTURE = "the gripper frame's stamp lies in the future: the camera uses another clock"
    SKEW = "the cameras' stamps are further apart than inputs.max_skew_s"
    NO_POSE = "no measured TCP pose yet"
    POSE_STALE = "the measured TCP pose is older than inputs.max_pose_age_s"
    POSE_IN_FUTURE = "the measured TCP pose's stamp lies in the future: its publisher uses another clock"
    POSE_FRAME = "the measured TCP pose is in another frame than the action"
    POSE_INVALID = (
        "the measured TCP pose is not finite, not of unit length, exactly zero, or beyond any reach"
    )
    POSE_JUMPED = "the measured TCP pose jumped further than an arm moves"
    ARM_MOVED = "the arm was moved away from its target"
    ARM_NOT_FOLLOWING = (
        "the arm does not follow its targets (protective stop? controller?), or its pose is frozen"
    )
    BEYOND_WORKSPACE = (
        "the arm is further outside the guard's workspace than the leash reaches: move it back in"
    )
    NOT_FINITE = "the network's action is not finite"
    TOO_SLOW = "the inference took so long that its frames are older than inputs.max_age_s"
    INFERENCE_FAILED = "inference raised an error"


SERIOUS = frozenset(
    {
        HoldReason.CLOCK_JUMPED,
        HoldReason.CALLBACK_FAILED,
        HoldReason.COMMANDS_UNHEARD,
        HoldReason.OTHER_COMMANDER,
        HoldReason.POSE_JUMPED,
        HoldReason.ARM_MOVED,
        HoldReason.ARM_NOT_FOLLOWING,
        HoldReason.NOT_FINITE,
        HoldReason.INFERENCE_FAILED,
    }
)
"""Reasons that do not end by themselves: a person must look at the arm, and then call `~/hold` with false or
give another instruction.

COMMANDS_UNHEARD is serious only if it interrupted a motion. Otherwise the arm's controller may not have
started yet.
"""

COMMANDED_BY_OTHERS = frozenset({HoldReason.OTHER_PUBLISHER, HoldReason.OTHER_COMMANDER})
"""Reasons for which the arm gets no hold command either, because it would disturb another node's motion."""


class Limit(enum.Enum):
    """A limit of the guard that can change a motion. The value names its ROS parameters."""

    TRANSLATION = "guard.max_translation_m"
    ROTATION = "guard.max_rotation_rad"
    SPEED = "guard.max_linear_speed_m_s / max_angular_speed_rad_s"
    ACCELERATION = "guard.max_linear_acceleration_m_s2 / max_angular_acceleration_rad_s2"
    RAMP_IN = "guard.ramp_in_steps"
    WORKSPACE = "guard.workspace_min / workspace_max"
    LEASH = "guard.leash_m / leash_rad"


@dataclass(frozen=True)
class Frame:
    """One camera image, (H, W, 3) uint8 RGB. stamp_ns: when it was taken. is_grey: it had no colours."""

    image: np.ndarray
    stamp_ns: int
    is_grey: bool = False


@dataclass(frozen=True)
class Pose:
    """position (3,) [m]; quaternion (4,) x y z w, unit length."""

    position: np.ndarray
    quaternion: np.ndarray

    def as_array(self) -> np.ndarray:
        """(7,) position and quaternion."""
        return np.concatenate([self.position, self.quaternion])

    def apart(self, other: Pose) -> tuple[float, float]:
        """The distance to `other`, [m] and [rad]. A quaternion and its negative are the same orientation."""
        cosine = min(1.0, abs(float(self.quaternion @ other.quaternion)))
        return float(np.linalg.norm(self.position - other.position)), 2 * math.acos(cosine)


@dataclass(frozen=True)
class MeasuredPose:
    """The pose of the TCP in `frame`, measured at `stamp_ns`."""

    pose: Pose
    frame: str
    stamp_ns: int


@dataclass(frozen=True)
class Twist:
    """A velocity: linear (3,) [m/s] and angular (3,) [rad/s], both along the axes of the action frame."""

    linear: np.ndarray
    angular: np.ndarray

    @classmethod
    def zero(cls) -> Twist:
        return cls(np.zeros(3), np.zeros(3))


@dataclass(frozen=True)
class Decision:
    """The record of one inference: its inputs, its result and its cost.

    step, episode, episode_step: counted from 0. tick_ns: ROS time at the begin of the step. steady_ns: the
    same on a clock that never stops. limits: the limits that changed the motion. held: why the motion was
    refused; empty if it was not.
    """

    step: int
    episode: int
    episode_step: int
    instruction: str
    policy: PolicyStep
    cost: StepCost
    budget_id: int
    static_stamp_ns: int
    gripper_stamp_ns: int
    pose_stamp_ns: int
    tick_ns: int
    steady_ns: int
    limits: tuple[Limit, ...]
    held: tuple[HoldReason, ...]

    @property
    def stamp_ns(self) -> int:
        """The newer of the two camera stamps."""
        return max(self.static_stamp_ns, self.gripper_stamp_ns)

    @property
    def skew_ns(self) -> int:
        """The distance of the two camera stamps."""
        return abs(self.static_stamp_ns - self.gripper_stamp_ns)

    def age_ns(self, stamp_ns: int) -> int:
        """The age of an input when the step began."""
        return self.tick_ns - stamp_ns


@dataclass(frozen=True)
class Command:
    """The command of one tick, a motion or a hold.

    stamp_ns: of the decision, or of the tick for a hold. target: absolute TCP pose in the action frame; None:
    no pose is published. gripper: command value; None: no gripper command. holds: why the arm holds; empty
    for a motion. decision: given if this tick ran an inference. error: the cause of INFERENCE_FAILED in
    `holds`. is_silent: the command is not sent to the arm, because another node commands the arm.
    """

    stamp_ns: int
    target: Pose | None
    twist: Twist
    gripper: float | None
    holds: tuple[HoldReason, ...] = ()
    decision: Decision | None = None
    error: str = ""
    is_silent: bool = False
