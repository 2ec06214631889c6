"""Recordings of the table's topics as rosbag2 files: of the running node, or of the scripted expert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geometry_msgs.msg import PoseStamped
from rosbags.interfaces import Qos, QosDurability, QosHistory, QosLiveliness, QosReliability, QosTime
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import to_cdr, type_of
from deer_vla_ros.control.types import Pose
from deer_vla_ros.errors import UserError
from deer_vla_ros.files import whole_folder
from deer_vla_ros.lab.sim.expert import act
from deer_vla_ros.lab.sim.referee import task_called
from deer_vla_ros.lab.sim.table import Table
from deer_vla_ros.lab.sim.table_arm import STEP_S, TableArm
from deer_vla_ros.lab.sim.tasks import Task
from deer_vla_ros.model.action_space import TABLETOP
from deer_vla_ros.ros.messages import image_message, pose_message, stamp

FRAME = "base"
TYPES = {
    "camera/static/image_raw": Image,
    "camera/gripper/image_raw": Image,
    "ee_pose": PoseStamped,
    "joint_states": JointState,
    "instruction": String,
    "target_pose": PoseStamped,
    "gripper_command": Float64MultiArray,
    "/clock": Clock,
}
BEGINS_NS = 1_800_000_000_000_000_000
"""Stamp of the expert's first frame [ns]; its value has no meaning."""
STEP_LIMIT = 80
MS = 1_000_000


_FOREVER = QosTime(9223372036, 854775807)
LATCHED_QOS = Qos(
    QosHistory.KEEP_LAST,
    1,
    QosReliability.RELIABLE,
    QosDurability.TRANSIENT_LOCAL,
    _FOREVER,
    _FOREVER,
    QosLiveliness.AUTOMATIC,
    _FOREVER,
    False,
)
"""LATCHED of ros.messages for the player. Nodes that start later also receive the instruction."""


class TableRecorder:
    """Writes the messages that the table publishes and receives."""

    def __init__(self, folder: Path):
        self._file = BagFile(folder)
        for topic, kind in TYPES.items():
            self._file.declare(
                _absolute(topic), type_of(kind), qos=[LATCHED_QOS] if topic == "instruction" else ()
            )

    def write(self, topic: str, message: Any, time_ns: int) -> None:
        """Writes a message of a topic of TYPES."""
        self._file.write(_absolute(topic), to_cdr(message), time_ns)

    def close(self) -> None:
        self._file.close()


def _absolute(topic: str) -> str:
    return "/" + topic.lstrip("/")


def record_expert(folder: Path, seed: int, instructions: list[str]) -> list[tuple[str, bool, int]]:
    """Records the camera images and the commands while the expert follows the instructions in order.

    Returns for each instruction its text, whether it was done, and the number of steps. The folder is
    complete or it does not exist. Raises UserError if the folder exists, if an instruction names no task, or
    if a task is impossible at its time.
    """
    tasks = [_task(text) for text in instructions]
    if folder.exists():
        raise UserError(f"{folder} exists: give the recording another name")
    with whole_folder(folder) as made:
        return _record(made, seed, list(zip(instructions, tasks)))


def _record(folder: Path, seed: int, wanted: list[tuple[str, Task]]) -> list[tuple[str, bool, int]]:
    recorder = TableRecorder(folder)
    now_ns, results = BEGINS_NS, []
    with Table(seed) as table:
        arm = TableArm(table)
        for text, task in wanted:
            before = table.state()
            if not task.possible(before):
                raise UserError(
                    f"--show {text!r} makes no sense by then: give another one, or another --seed"
                )
            recorder.write("instruction", String(data=text), now_ns)
            is_done, steps = False, 0
            while not is_done and steps < STEP_LIMIT:
                _frame(recorder, table, now_ns)
                intent = act(task.name, table.state())
                target = arm.step(intent.pose, intent.open)
                _command(recorder, target, intent.open, now_ns)
                now_ns, steps = now_ns + round(STEP_S * 1e9), steps + 1
                is_done = task.succeeded(before, table.state())
            results.append((text, is_done, steps))
        _frame(recorder, table, now_ns)
    recorder.close()
    return results


def _task(text: str) -> Task:
    task = task_called(text)
    if task is None:
        raise UserError(
            f"--show {text!r} names no task of the table: "
            "say it as docs/explanation/embedded-model.md lists them"
        )
    return task


def _frame(recorder: TableRecorder, table: Table, stamp_ns: int) -> None:
    """Records images, pose and joints of one time; each is received shortly after its stamp."""
    views = table.render()
    joints = JointState(name=list(table.joint_names), position=table.joint_positions().tolist())
    joints.header.stamp = stamp(stamp_ns)
    recorder.write("ee_pose", pose_message(table.tcp_pose(), FRAME, stamp_ns), stamp_ns + 1 * MS)
    recorder.write("joint_states", joints, stamp_ns + 1 * MS)
    recorder.write(
        "camera/gripper/image_raw",
        image_message(views.gripper, "gripper_camera", stamp_ns),
        stamp_ns + 2 * MS,
    )
    recorder.write(
        "camera/static/image_raw", image_message(views.static, "static_camera", stamp_ns), stamp_ns + 3 * MS
    )


def _command(recorder: TableRecorder, target: Pose, is_open: bool, stamp_ns: int) -> None:
    opening = TABLETOP.gripper_open if is_open else TABLETOP.gripper_closed
    recorder.write("target_pose", pose_message(target, FRAME, stamp_ns), stamp_ns + 10 * MS)
    recorder.write("gripper_command", Float64MultiArray(data=[float(opening)]), stamp_ns + 10 * MS)
