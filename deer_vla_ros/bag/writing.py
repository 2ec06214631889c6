"""What does a replay leave as a recording? The input's topics as they were, and what the policy would have said beside them."""

from __future__ import annotations

from pathlib import Path

from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from std_msgs.msg import Float64MultiArray

from deer_vla_ros.bag.inputs import STEPS, Tally
from deer_vla_ros.bag.recording import Record, Recording, definition, types
from deer_vla_ros.bag.rows import STEP_TYPE
from deer_vla_ros.control.types import Command
from deer_vla_ros.ros.cdr import to_cdr
from deer_vla_ros.ros.stamped import pose_message

TARGET, GRIPPER_COMMAND = "target_pose", "gripper_command"
OUTPUTS = {
    f"/{STEPS}": STEP_TYPE,
    f"/{TARGET}": "geometry_msgs/msg/PoseStamped",
    f"/{GRIPPER_COMMAND}": "std_msgs/msg/Float64MultiArray",
}
RECORDED = "/recorded"
"""Before the names of recorded topics that the replay's own would be mixed with."""


class ReplayBag:
    """An MCAP recording in the making; `close` finishes it. Without inputs it holds the replay's topics alone."""

    def __init__(self, folder: Path, recording: Recording, tally: Tally, with_inputs: bool):
        self._writer = Writer(folder, version=9, storage_plugin=StoragePlugin.MCAP)
        self._writer.set_compression(CompressionMode.STORAGE, CompressionFormat.ZSTD)
        self._writer.open()
        self._inputs = {}
        for each in recording.connections if with_inputs else []:
            found = definition(each)
            if found is None:
                tally.skip(each.topic, f"not copied: {each.msgtype} is not defined in the recording, nor installed here")
            elif each.topic not in self._inputs:
                topic = RECORDED + each.topic if each.topic in OUTPUTS else each.topic
                self._inputs[each.topic] = self._writer.add_connection(
                    topic,
                    each.msgtype,
                    msgdef=found[0],
                    rihs01=found[1],
                    offered_qos_profiles=each.ext.offered_qos_profiles,
                )
        self._outputs = {topic: self._writer.add_connection(topic, kind, typestore=types()) for topic, kind in OUTPUTS.items()}

    def copy(self, record: Record) -> None:
        """One of the input's messages, as it is."""
        if connection := self._inputs.get(record.topic):
            self._writer.write(connection, record.time_ns, record.data)

    def add(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        """What the policy said at `time_ns`; step: its `~/step` message."""
        if step is not None:
            self._writer.write(self._outputs[f"/{STEPS}"], time_ns, step)
        if command.gripper is not None:
            message = Float64MultiArray(data=[float(command.gripper)])
            self._writer.write(self._outputs[f"/{GRIPPER_COMMAND}"], time_ns, to_cdr(message))
        if command.target is not None:
            message = pose_message(command.target, frame_id, command.stamp_ns)
            self._writer.write(self._outputs[f"/{TARGET}"], time_ns, to_cdr(message))

    def close(self) -> None:
        self._writer.close()

    def abort(self) -> None:
        """Ends without an index."""
        self._writer.abort()
