"""The ROS node of the simulated table.

Like a robot, it publishes images, poses and joints, and takes commands. Unlike a robot, it also listens to
`instruction`. It publishes the instruction on `~/succeeded` when it is carried out.

Callbacks only put messages into an inbox. The main thread takes them from there, advances physics, renders
and publishes. Signal handlers only set a flag. A slow image therefore never delays a command, and OpenGL
stays in one thread.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger

from deer_vla_ros.errors import UserError
from deer_vla_ros.lab.sim.referee import Referee
from deer_vla_ros.lab.sim.scene import MAX_OPENING
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.ros.messages import image_message, nanoseconds, pose_message, stamp
from deer_vla_ros.ros.process import END_WITHIN_S, ros_process
from deer_vla_ros.ros.qos import NEWEST

if TYPE_CHECKING:
    from deer_vla_ros.lab.sim.table_recording import TableRecorder

BASE_FRAME = "base"
POSE_RATE_HZ = 50.0
MODES = ("paced", "lockstep")

_RELIABLE = QoSProfile(depth=1)
_SIGNAL_LATENCY = 0.05  # s: period at which a waiting thread checks whether it must stop
_BACKLOG_LIMIT = 0.5  # s: delay after which the table no longer tries to catch up
_LOG_EVERY = 2.0  # s between repetitions of the same log message


class TableNode(Node):
    """The node `table`. `run()` does the work in the calling thread until `stop` is set."""

    def __init__(self, stop: threading.Event, recorder: TableRecorder | None = None) -> None:
        super().__init__("table")
        self._recorder = recorder
        self._stop = stop
        self._declare_parameters()
        self._seed = self.get_parameter("seed").value
        self._table = Table(self._seed)
        self._publishes_clock = self.get_parameter("clock.publish").value
        self._lockstep = self.get_parameter("clock.mode").value == "lockstep"
        self._elapsed_ns = 0

        self._referee = Referee()
        self._judged = ""  # the instruction that the referee judges

        self._inbox = threading.Condition()  # guards the seven below
        self._target: PoseStamped | None = None
        self._gripper: Float64MultiArray | None = None
        self._instruction: str | None = None
        self._awaited: Time | None = None  # stamp of the camera pair whose answer lock step awaits
        self._resets_asked = self._resets_done = 0
        self._reset_seed = self._seed

        self._static_image = self.create_publisher(Image, "camera/static/image_raw", NEWEST)
        self._gripper_image = self.create_publisher(Image, "camera/gripper/image_raw", NEWEST)
        self._ee_pose = self.create_publisher(PoseStamped, "ee_pose", _RELIABLE)
        self._joint_states = self.create_publisher(JointState, "joint_states", _RELIABLE)
        self._succeeded = self.create_publisher(String, "~/succeeded", _RELIABLE)
        self._clock_topic = (
            self.create_publisher(Clock, "/clock", _RELIABLE) if self._publishes_clock else None
        )
        # The gripper comes first. If both messages have arrived, its callback then runs first. In lock step,
        # the target starts the next step.
        self.create_subscription(Float64MultiArray, "gripper_command", self._on_gripper, _RELIABLE)
        self.create_subscription(PoseStamped, "target_pose", self._on_target, _RELIABLE)
        self.create_subscription(String, "instruction", self._on_instruction, _RELIABLE)
        self.create_service(Trigger, "~/reset", self._on_reset)

    def _declare_parameters(self) -> None:
        def declare(name, default, description, live=False, low=None, high=None, constraint=""):
            descriptor = ParameterDescriptor(
                description=description, read_only=not live, additional_constraints=constraint
            )
            if isinstance(default, float):
                descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
            elif type(default) is int:
                descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
            return self.declare_parameter(name, default, descriptor).value

        declare(
            "seed",
            0,
            "arrangement of the table; a new value counts from the next reset on",
            True,
            0,
            2**31 - 1,
        )
        declare("camera.rate_hz", 10.0, "camera pairs per second of table time", low=1.0, high=50.0)
        declare(
            "clock.publish",
            False,
            "publish /clock and stamp everything with the table's own time from 0 s on",
        )
        mode = declare(
            "clock.mode", "paced",
            "paced: at clock.factor times real time. lockstep: as fast as possible, waiting after each "
            "camera pair for the target_pose with its stamp",
            constraint=" or ".join(MODES),
        )  # fmt: skip
        declare("clock.factor", 1.0, "table seconds per real second, when paced", True, 0.01, 100.0)
        declare(
            "clock.lockstep_timeout_s", 2.0,
            "real seconds that lock step waits for an answer, then goes on without",
            True, 0.001, 3600.0,
        )  # fmt: skip
        if mode not in MODES:
            raise UserError(f"clock.mode is {mode!r}: set it to {' or '.join(MODES)}")

    # -- callbacks: they only put messages into the inbox
    # ----------------------------------------------------------

    def _on_gripper(self, message: Float64MultiArray) -> None:
        with self._inbox:
            self._gripper = message

    def _on_instruction(self, message: String) -> None:
        with self._inbox:
            self._instruction = message.data

    def _on_target(self, message: PoseStamped) -> None:
        with self._inbox:
            self._target = message
            if message.header.stamp == self._awaited:
                self._awaited = None
                self._inbox.notify_all()

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._inbox:
            self._resets_asked += 1
            ticket = self._resets_asked
            self._inbox.notify_all()
            self._inbox.wait_for(lambda: self._resets_done >= ticket or self._stop.is_set(), timeout=5.0)
            response.success = self._resets_done >= ticket
        response.message = (
            f"arrangement {ticket} after the start, seed {self._reset_seed}"
            if response.success
            else "not reset: the table is stopping, or busy for more than 5 s"
        )
        return response

    # -- the main thread
    # -------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Advances, renders and publishes until `stop` is set. Then closes OpenGL."""
        ticks_per_frame = max(1, round(POSE_RATE_HZ / self.get_parameter("camera.rate_hz").value))
        tick_ns = round(1e9 / self.get_parameter("camera.rate_hz").value / ticks_per_frame)
        try:
            self._table.render()  # the first image is slow because shaders are compiled
            self._due = time.monotonic()
            while not self._stop.is_set():
                for _ in range(ticks_per_frame):
                    self._tick(tick_ns)
                self._publish_frame()
        finally:
            self._table.close()
            with self._inbox:
                self._inbox.notify_all()  # a waiting reset is not carried out

    def _tick(self, tick_ns: int) -> None:
        """Advances the table by a short time: takes commands, runs physics and publishes poses."""
        self._take_commands()
        self._table.advance(tick_ns * 1e-9)
        self._elapsed_ns += tick_ns
        if not self._lockstep:
            self._keep_pace(tick_ns * 1e-9 / self.get_parameter("clock.factor").value)
        self._publish_poses()

    def _keep_pace(self, seconds: float) -> None:
        self._due += seconds
        behind = time.monotonic() - self._due
        if behind > _BACKLOG_LIMIT:
            self.get_logger().warning(
                f"{behind:.2f} s behind real time; skipping it. "
                "Lower clock.factor or camera.rate_hz if this repeats",
                throttle_duration_sec=_LOG_EVERY,
            )
            self._due = time.monotonic()
        self._wait(self._due)

    def _wait(self, deadline: float, over: Callable[[], bool] = lambda: False) -> None:
        """Waits until `deadline` (time.monotonic) or until `over()`. Carries out resets meanwhile."""
        with self._inbox:
            while not self._stop.is_set():
                self._reset_if_asked()
                left = deadline - time.monotonic()
                if over() or left <= 0:
                    break
                self._inbox.wait(min(left, _SIGNAL_LATENCY))

    def _reset_if_asked(self) -> None:
        """Resets the table and drops earlier commands. The caller holds the inbox."""
        if self._resets_done == self._resets_asked:
            return
        seed = self.get_parameter("seed").value
        self._table.reset(None if seed == self._reset_seed else seed)
        self._reset_seed = seed
        self._target = self._gripper = self._awaited = None
        self._resets_done = self._resets_asked
        self._inbox.notify_all()

    def _take_commands(self) -> None:
        with self._inbox:
            self._reset_if_asked()
            target, self._target = self._target, None
            gripper, self._gripper = self._gripper, None
            instruction, self._instruction = self._instruction, None
        for topic, text in (("gripper_command", gripper), ("target_pose", target)):
            if text is not None:
                self._record(topic, text)
        if instruction is not None:
            self._record("instruction", String(data=instruction))
            self._judged = instruction
            if not_judged := self._referee.begin(instruction, self._table.state()):
                self.get_logger().info(f"{not_judged}: whether it is done is not judged")
        if gripper is not None:
            self._command_gripper(gripper)
        if target is not None:
            self._command_target(target)

    def _command_target(self, message: PoseStamped) -> None:
        if message.header.frame_id != BASE_FRAME:
            self.get_logger().error(
                f"target_pose is in frame {message.header.frame_id!r}; the table takes {BASE_FRAME!r}: "
                "transform the pose, or set header.frame_id if it is in the base frame already",
                throttle_duration_sec=_LOG_EVERY,
            )
            return
        position, orientation = message.pose.position, message.pose.orientation
        try:
            self._table.set_target(
                np.array([position.x, position.y, position.z]),
                np.array([orientation.x, orientation.y, orientation.z, orientation.w]),
            )
        except ValueError as error:
            self.get_logger().error(f"target_pose refused: {error}", throttle_duration_sec=_LOG_EVERY)

    def _command_gripper(self, message: Float64MultiArray) -> None:
        if len(message.data) != 1:
            self.get_logger().error(
                f"gripper_command has {len(message.data)} numbers; one is expected, the opening in metres",
                throttle_duration_sec=_LOG_EVERY,
            )
            return
        opening = message.data[0]
        try:
            self._table.set_gripper(opening)
        except ValueError as error:
            self.get_logger().error(f"gripper_command refused: {error}", throttle_duration_sec=_LOG_EVERY)
            return
        if not 0.0 <= opening <= MAX_OPENING:
            self.get_logger().warning(
                f"gripper_command {opening:g} m clamped into 0 (closed) .. {MAX_OPENING:g} m (open)",
                throttle_duration_sec=_LOG_EVERY,
            )

    def _now(self) -> Time:
        if self._publishes_clock:
            return stamp(self._elapsed_ns)
        return self.get_clock().now().to_msg()

    def _publish_poses(self) -> None:
        now = self._now()
        if self._clock_topic is not None:
            self._publish(self._clock_topic, "/clock", Clock(clock=now))
        self._publish(
            self._ee_pose, "ee_pose", pose_message(self._table.tcp_pose(), BASE_FRAME, nanoseconds(now))
        )
        joints = JointState(name=list(self._table.joint_names))
        joints.header.stamp = now
        joints.position = self._table.joint_positions().tolist()
        joints.velocity = self._table.joint_velocities().tolist()
        self._publish(self._joint_states, "joint_states", joints)

    def _publish(self, publisher: Publisher, topic: str, message: Any) -> None:
        publisher.publish(message)
        self._record(topic, message)

    def _record(self, topic: str, message: Any) -> None:
        """Writes a message into the recording, if there is one, as received now."""
        if self._recorder is not None:
            self._recorder.write(topic, message, nanoseconds(self._now()))

    def _publish_frame(self) -> None:
        """Publishes both images with one stamp. In lock step it then waits for the answer."""
        now = self._now()
        views = self._table.render()
        if self._referee.succeeded(self._table.state()):
            self._succeeded.publish(String(data=self._judged))
        if self._lockstep:
            with self._inbox:
                self._awaited = now
        self._publish(
            self._static_image,
            "camera/static/image_raw",
            image_message(views.static, "static_camera", nanoseconds(now)),
        )
        self._publish(
            self._gripper_image,
            "camera/gripper/image_raw",
            image_message(views.gripper, "gripper_camera", nanoseconds(now)),
        )
        if self._lockstep:
            timeout = self.get_parameter("clock.lockstep_timeout_s").value
            self._wait(time.monotonic() + timeout, over=lambda: self._awaited is None)


def main(args: list[str] | None = None, record: Path | None = None) -> int:
    """Runs the node until SIGINT or SIGTERM, and returns 0.

    args: as for rclpy.init. record: folder of a recording to make. Raises UserError for a wrong parameter.
    """
    with contextlib.ExitStack() as stack:
        stop, recorder = stack.enter_context(ros_process(args, END_WITHIN_S)), None
        if record is not None:
            # It is imported only here because it also imports the policy's action space.
            from deer_vla_ros.lab.sim.table_recording import TableRecorder

            recorder = TableRecorder(record)
            stack.callback(recorder.close)
        node = TableNode(stop, recorder)
        executor = SingleThreadedExecutor()
        executor.add_node(node)
        failures: list[BaseException] = []
        callbacks = threading.Thread(target=_spin, args=(executor, stop, failures), name="callbacks")
        callbacks.start()
        try:
            node.run()
        finally:
            stop.set()
            callbacks.join()
            node.destroy_node()
        for failure in failures:
            raise failure
    return 0


def _spin(executor: SingleThreadedExecutor, stop: threading.Event, failures: list[BaseException]) -> None:
    """Runs callbacks until `stop`. An exception in a callback ends the node; main() raises it again."""
    try:
        while not stop.is_set():
            executor.spin_once(timeout_sec=_SIGNAL_LATENCY)
    except BaseException as error:
        failures.append(error)
        stop.set()
