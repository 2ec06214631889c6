"""What does a replay leave as a recording? The input's topics as they were, and what the policy would have said beside them."""

from __future__ import annotations

from pathlib import Path

from std_msgs.msg import Float64MultiArray

from deer_vla_ros.bag.bag_file import BagFile
from deer_vla_ros.bag.cdr import to_cdr
from deer_vla_ros.bag.inputs import GRIPPER_COMMAND, STEPS, TARGET, TYPES, Tally
from deer_vla_ros.bag.recording import Record, Recording, definition
from deer_vla_ros.control.types import Command
from deer_vla_ros.ros.stamped import pose_message

OUTPUTS = {f"/{name}": TYPES[name][0] for name in (STEPS, TARGET, GRIPPER_COMMAND)}
RECORDED = "/recorded"
"""Before the names of recorded topics that the replay's own would be mixed with."""


class ReplayBag:
    """An MCAP recording in the making; `close` finishes it. Without inputs it holds the replay's topics alone."""

    def __init__(self, folder: Path, recording: Recording, tally: Tally, with_inputs: bool):
        self._file = BagFile(folder)
        self._names: dict[str, str] = {}
        for each in recording.connections if with_inputs else []:
            found = definition(each)
            if found is None:
                tally.skip(each.topic, f"not copied: {each.msgtype} is not defined in the recording, nor installed here")
            elif each.topic not in self._names:
                self._names[each.topic] = RECORDED + each.topic if each.topic in OUTPUTS else each.topic
                self._file.declare(self._names[each.topic], each.msgtype, found, each.ext.offered_qos_profiles)
        for topic, kind in OUTPUTS.items():
            self._file.declare(topic, kind)

    def copy(self, record: Record) -> None:
        """One of the input's messages, as it is."""
        if topic := self._names.get(record.topic):
            self._file.write(topic, record.data, record.time_ns)

    def add(self, command: Command, step: bytes | None, frame_id: str, time_ns: int) -> None:
        """What the policy said at `time_ns`; step: its `~/step` message."""
        if step is not None:
            self._file.write(f"/{STEPS}", step, time_ns)
        if command.gripper is not None:
            self._file.write(f"/{GRIPPER_COMMAND}", to_cdr(Float64MultiArray(data=[float(command.gripper)])), time_ns)
        if command.target is not None:
            self._file.write(f"/{TARGET}", to_cdr(pose_message(command.target, frame_id, command.stamp_ns)), time_ns)

    def close(self) -> None:
        self._file.close()

    def abort(self) -> None:
        """Ends without an index."""
        self._file.abort()
