"""The watchdog: a small process that holds the arm when the policy node hangs, is stopped or has died.

It is a process of its own because nothing inside the node can be relied upon then: an inference may keep the
interpreter's lock, the kernel may have stopped or killed the node. It imports neither torch nor the policy.
The node starts it (`watchdog_client.py`) and beats through a socket; nobody else needs to know of it.

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
from deer_vla_ros.ros.messages import NEWEST, measured_pose, pose_message, twist_message

MARGIN_S = 0.05
"""How much longer than inputs.max_age_s a beat may be missing: as long as the node may wait between a beat
and the beginning of a step, which it throws away by itself when it took longer than inputs.max_age_s."""
LOOK_S = 0.02
"""How often the watchdog looks whether a beat is missing."""
ANSWER_S = 0.1
"""How often it tells the node that it is alive."""
HOLD_AFTER_DEATH_S = 2.0
"""For how long a dead node's arm is told to hold: until every controller has heard it."""


@dataclass(frozen=True)
class WatchdogSettings:
    """Names are absolute, after remapping; a topic that is empty is not published on."""

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
    """What the node says: it was alive at beat_ns, by the clock that never stops.

    commands: whether it tells the arm anything, so that a missing beat leaves an arm without a commander. stamp_ns,
    quaternion: of the newest command, quaternion empty before the first target. step_m, step_rad: limits of one step. The
    others are parameters of the node as they are now; frame: of the action.
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
    """Listens to beats until the node ends it, or is gone."""

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
        """Returns when the node has said that it ends, or HOLD_AFTER_DEATH_S after it died."""
        due = answered = 0.0
        while True:
            now = time.monotonic()
            if now - answered >= ANSWER_S:
                self._answer()
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
        """Waits LOOK_S for news: whether the node lives, and whether it has ended in order."""
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

    def _answer(self) -> None:
        with contextlib.suppress(
            BlockingIOError, TimeoutError, ConnectionError
        ):  # a stopped node does not read; a dead one is seen
            self._link.send(b"alive")

    def _bury(self) -> None:
        """The node has died: its arm is held at the control rate for a while."""
        if self._beat is None or not self._beat.commands:
            return
        end = time.monotonic() + HOLD_AFTER_DEATH_S
        while time.monotonic() < end:
            self._hold(HoldReason.STALLED)
            time.sleep(1 / self._beat.rate_hz)

    def _hold(self, reason: HoldReason) -> None:
        """Zero twist at once; the measured pose as target, where a fresh one is known."""
        for _ in range(
            8
        ):  # the newest pose and clock wait in their queues; nothing is taken from them until it is needed
            self._executor.spin_once(timeout_sec=0.0)
        now_ns = self._node.get_clock().now().nanoseconds
        pose = self._pose_to_hold(now_ns)
        command = self._continuity.passed(Command(now_ns, pose, Twist.zero(), None, holds=(reason,)))
        if self._twist:
            self._twist.publish(twist_message(command.twist, self._beat.frame, command.stamp_ns))
        if self._target and command.target is not None:
            self._target.publish(pose_message(command.target, self._beat.frame, command.stamp_ns))

    def _pose_to_hold(self, now_ns: int) -> Pose | None:
        """As the controller chooses it: the pose that was held before while the arm is within a step of it."""
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
    """arguments: the socket's descriptor, WatchdogSettings as JSON, and arguments for rclpy."""
    descriptor, settings, *ros_args = arguments
    settings = WatchdogSettings(**json.loads(settings))
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # a Ctrl-C is the node's to answer; it ends this process afterwards
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
