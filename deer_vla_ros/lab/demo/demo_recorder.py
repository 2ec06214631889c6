"""The recorder of a demo: a ROS node that gives instructions, and keeps every step and some images.

Its process does not load torch, so that this module must not import modules that use the policy.
"""

from __future__ import annotations

import time
from collections import OrderedDict

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.node import Node
from rclpy.qos import HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image
from std_msgs.msg import String

from deer_vla_ros.lab.demo.demo_report import (
    InstructionResult,
    PictureMoment,
    image_array,
    row_of,
    seconds_of,
)
from deer_vla_ros.msg import PolicyStep
from deer_vla_ros.ros.messages import SECOND, nanoseconds
from deer_vla_ros.ros.qos import LATCHED

POLICY_NODE, TABLE_NODE = "deer_vla", "table"
CAMERAS = ("static", "gripper")
IMAGES_WAITING = 30
"""Images kept per camera until the message of the step that used them arrives: 3 s at 10 Hz."""
EVERY_STEP = QoSProfile(depth=1000, history=HistoryPolicy.KEEP_LAST, reliability=ReliabilityPolicy.RELIABLE)
IMAGES = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)


class DemoRecorder(Node):
    """Receives both cameras' images, `~/step`, `/diagnostics` and the table's successes, and publishes
    `instruction`.

    All its work happens in the thread that spins it. moment_interval_s: the least time between two moments
    whose images are kept [s].
    """

    def __init__(self, moment_interval_s: float):
        super().__init__("demo")
        self.rows: list[dict] = []
        self.moments: list[PictureMoment] = []
        self.first_step_at: float | None = None  # Its time.monotonic().
        self.recording = True
        self.figures: dict[str, str] = {}  # The newest values of the policy node in /diagnostics.
        self.figures_stamp_s = 0.0
        self.status = ""  # The newest message of the policy node in /diagnostics.
        self.told: list[InstructionResult] = []
        self._waits_for_instruction = False
        self._moment_interval_s = moment_interval_s
        self._images: dict[str, OrderedDict[int, Image]] = {camera: OrderedDict() for camera in CAMERAS}

        self._instruction = self.create_publisher(String, "instruction", LATCHED)
        self.create_subscription(String, f"{TABLE_NODE}/succeeded", self._on_success, EVERY_STEP)
        self.create_subscription(PolicyStep, f"{POLICY_NODE}/step", self._on_step, EVERY_STEP)
        self.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        for camera in CAMERAS:
            topic = f"camera/{camera}/image_raw"
            self.create_subscription(
                Image, topic, lambda image, camera=camera: self._on_image(camera, image), IMAGES
            )

    def say(self, instruction: str) -> None:
        """Publishes an instruction."""
        self.told.append(InstructionResult(instruction))
        self._instruction.publish(String(data=instruction))

    def ready(self) -> bool:
        """Whether both cameras publish, and the policy node has a publisher of steps and reports a warning.

        The warning means that the node holds because it has no instruction. From then on no step gets lost,
        and `figures` has all holds of the start-up.
        """
        return self._waits_for_instruction and all(self._images.values()) and self.policies() > 0

    def missing(self) -> str:
        """The names of everything that `ready` still waits for."""
        waits = [f"the {camera} camera" for camera in CAMERAS if not self._images[camera]]
        return ", ".join(
            waits if self._waits_for_instruction and self.policies() else [*waits, "the policy node"]
        )

    def policies(self) -> int:
        """The number of policy nodes that publish steps in this ROS domain. A second one is foreign."""
        return self.count_publishers(f"{POLICY_NODE}/step")

    def _on_image(self, camera: str, image: Image) -> None:
        waiting = self._images[camera]
        waiting[nanoseconds(image.header.stamp)] = image
        if len(waiting) > IMAGES_WAITING:
            waiting.popitem(last=False)

    def _on_step(self, message: PolicyStep) -> None:
        if not self.recording:
            return
        if self.first_step_at is None:
            self.first_step_at = time.monotonic()
        row = row_of(message)
        told = self._pending(row["instruction"])
        if told:
            told.steps += 1
        self.rows.append(row)
        newest = self.moments[-1].row if self.moments else None
        if newest is None or _stamp_s(row) - _stamp_s(newest) >= self._moment_interval_s:
            static = self._images["static"].get(nanoseconds(message.static_stamp))
            gripper = self._images["gripper"].get(nanoseconds(message.gripper_stamp))
            if static and gripper:  # If an image was lost, the next step becomes the moment.
                self.moments.append(PictureMoment(row, image_array(static), image_array(gripper)))

    def _on_success(self, message: String) -> None:
        told = self._pending(message.data)
        if self.recording and told:
            told.done = True

    def _pending(self, instruction: str) -> InstructionResult | None:
        """The result of the newest instruction if it has this text and is not done yet; else None."""
        last = self.told[-1] if self.told else None
        return last if last and last.instruction == instruction and not last.done else None

    def _on_diagnostics(self, array: DiagnosticArray) -> None:
        for status in array.status:
            if status.hardware_id != POLICY_NODE:
                continue
            self.status = status.message
            self.figures = {pair.key: pair.value for pair in status.values}
            self.figures_stamp_s = nanoseconds(array.header.stamp) / SECOND
            self._waits_for_instruction = status.level == DiagnosticStatus.WARN


def _stamp_s(row: dict) -> float:
    return seconds_of(row["header"]["stamp"])
