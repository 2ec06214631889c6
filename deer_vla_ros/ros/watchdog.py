"""The watchdog: a small process that holds the arm when the policy node hangs, is stopped or has died.

It is a separate process because nothing inside the node is reliable in these cases: an inference may keep the
interpreter's lock, or the kernel may have stopped or killed the node. The node starts it
(`watchdog_client.py`) and sends beats through a socket. It imports neither torch nor the policy.

python -m deer_vla_ros.ros.watchdog DESCRIPTOR SETTINGS [ROS ARGUMENTS]
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import socket
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped, TwistStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.signals import SignalHandlerOptions

from deer_vla_ros.control.continuity import Continuity
from deer_vla_ros.control.inputs import InputGate, InputLimits
from deer_vla_ros.control.types import Command, HoldReason, Pose, Twist
from deer_vla_ros.ros.messages import measured_pose, pose_message, twist_message
from deer_vla_ros.ros.qos import NEWEST

MARGIN_S = 0.05
"""The arm is held when the newest beat is older than inputs.max_age_s plus this margin [s]. The margin is the
longest time between a beat and the start of a step. A step itself may take up to inputs.max_age_s: the node
discards a longer one."""
LOOK_S = 0.02
"""Period of the check for a missing beat [s]."""
ANSWER_S = 0.1
"""Period of the messages which tell the node that the watchdog is alive [s]."""
HELD = b"held "
"""Begins the message that tells the node the stamp of a hold [ns], before the hold is published. With it, the
node does not take the hold for another node's command."""
HOLD_AFTER_DEATH_S = 2.0
"""How long the watchdog holds a dead node's arm [s]. Every controller receives the hold in this time."""


@dataclass(frozen=True)
class WatchdogSettings:
    """What the node tells the watchdog at its start. Names are absolute, after remapping.

    If target_topic or twist_topic is empty, nothing is published there.
    """

    target_topic: str
    twist_topic: str
    pose_topic: str
    namespace: str
    name: str
    use_sim_time: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Beat:
    """A message from the node: its control thread was alive at beat_ns (time.monotonic_ns).

    commands: whether the node commands the arm. Only then does a missing beat leave the arm without a
    commander. stamp_ns, quaternion: of the newest command; quaternion (x y z w) is empty before the first
    target. step_m, step_rad: limits of one step. frame: the action frame. The other fields are present values
    of the node's parameters.
    """

    beat_ns: int
    commands: bool
    stamp_ns: int
    quaternion: tuple[float, ...]
    max_age_s: float
    max_pose_age_s: float
    max_skew_s: float
    step_m: float
    step_rad: float
    rate_hz: float
    frame: str

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    def is_missing(self, now_ns: int) -> bool:
        """Whether the next beat is late enough for the arm to be held."""
        return self.commands and now_ns - self.beat_ns > (self.max_age_s + MARGIN_S) * 1e9


class Watchdog:
    """Receives beats, and holds the arm when they are missing or the node has died."""

    def __init__(self, node: Node, link: socket.socket, settings: WatchdogSettings):
        self._node, self._link = node, link
        self._executor = SingleThreadedExecutor(context=node.context)
        self._executor.add_node(node)
        self._beat: Beat | None = None
        self._gate: InputGate | None = None
        self._continuity = Continuity()
        self._held: Pose | None = None
        self._target = (
            node.create_publisher(PoseStamped, settings.target_topic, 10) if settings.target_topic else None
        )
        self._twist = (
            node.create_publisher(TwistStamped, settings.twist_topic, 10) if settings.twist_topic else None
        )
        node.create_subscription(PoseStamped, settings.pose_topic, self._on_pose, NEWEST)

    def run(self) -> None:
        """Returns after the node has announced its end, or HOLD_AFTER_DEATH_S after the node has died."""
        due = answered = 0.0
        while True:
            now = time.monotonic()
            if now - answered >= ANSWER_S:
                self._tell(b"alive")
                answered = now
            alive, ended = self._listen()
            if ended:
                return
            if not alive:
                break
            if self._beat is not None and self._beat.is_missing(time.monotonic_ns()) and now >= due:
                self._hold(HoldReason.STALLED)
                due = now + 1 / self._beat.rate_hz
        self._bury()

    def _listen(self) -> tuple[bool, bool]:
        """Waits up to LOOK_S for a beat. Returns (the node lives, it has announced its end)."""
        try:
            while data := self._link.recv(4096):
                if data == b"end":
                    return True, True
                self._take(Beat(**json.loads(data)))
                self._link.settimeout(0.0)  # only the newest beat counts
        except (TimeoutError, BlockingIOError):
            return True, False
        except ConnectionError:
            return False, False
        finally:
            self._link.settimeout(LOOK_S)
        return False, False

    def _take(self, beat: Beat) -> None:
        self._beat, self._held = beat, None
        self._continuity = Continuity(beat.stamp_ns, np.array(beat.quaternion) if beat.quaternion else None)
        limits = InputLimits(
            *(int(each * 1e9) for each in (beat.max_age_s, beat.max_pose_age_s, beat.max_skew_s))
        )
        if self._gate is None:
            self._gate = InputGate(limits, beat.frame)
        self._gate.limits = limits

    def _tell(self, message: bytes) -> None:
        # A stopped node does not read, and `_listen` notices a dead one.
        with contextlib.suppress(BlockingIOError, TimeoutError, ConnectionError):
            self._link.send(message)

    def _bury(self) -> None:
        """Holds the arm of a dead node for HOLD_AFTER_DEATH_S, at the control rate."""
        if self._beat is None or not self._beat.commands:
            return
        end = time.monotonic() + HOLD_AFTER_DEATH_S
        while time.monotonic() < end:
            self._hold(HoldReason.STALLED)
            time.sleep(1 / self._beat.rate_hz)

    def _hold(self, reason: HoldReason) -> None:
        """Publishes a zero twist, and the measured pose as target if a fresh one is known."""
        # The newest pose and clock wait in their queues and are taken only now.
        for _ in range(8):
            self._executor.spin_once(timeout_sec=0.0)
        now_ns = self._node.get_clock().now().nanoseconds
        pose = self._pose_to_hold(now_ns)
        command = self._continuity.passed(Command(now_ns, pose, Twist.zero(), None, holds=(reason,)))
        self._tell(HELD + str(command.stamp_ns).encode())
        if self._twist:
            self._twist.publish(twist_message(command.twist, self._beat.frame, command.stamp_ns))
        if self._target and command.target is not None:
            self._target.publish(pose_message(command.target, self._beat.frame, command.stamp_ns))

    def _pose_to_hold(self, now_ns: int) -> Pose | None:
        """The pose to hold. As in the controller, it stays while the arm is within a step of it."""
        inputs = self._gate.snapshot()
        if self._gate.judge_pose(inputs, now_ns):
            return None
        measured = inputs.pose.pose
        metres, radians = measured.apart(self._held) if self._held else (math.inf, math.inf)
        if metres > self._beat.step_m or radians > self._beat.step_rad:
            self._held = measured
        return self._held

    def _on_pose(self, message: PoseStamped) -> None:
        if self._gate is not None:
            self._gate.put_pose(measured_pose(message))


def main(arguments: list[str]) -> None:
    """Runs the watchdog. arguments: the socket's descriptor, WatchdogSettings as JSON, and those of rclpy."""
    descriptor, settings, *ros_args = arguments
    settings = WatchdogSettings(**json.loads(settings))
    # The node handles Ctrl-C, and ends this process afterwards.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = socket.socket(fileno=int(descriptor))
    link.settimeout(LOOK_S)
    rclpy.init(args=ros_args, signal_handler_options=SignalHandlerOptions.NO)
    node = Node(
        settings.name,
        namespace=settings.namespace,
        enable_rosout=False,
        start_parameter_services=False,
        parameter_overrides=[
            Parameter("use_sim_time", value=settings.use_sim_time),
            Parameter("start_type_description_service", value=False),
        ],
    )
    try:
        Watchdog(node, link, settings).run()
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
